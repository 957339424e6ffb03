"""What a search has measured, line by line: after a kill it continues from there."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

from stf_jax.search.algorithms import Counts, Quality
from stf_jax.util.files import explain_file, read_jsonl

_FIX = "give another --out, or delete it"


class Journal:
    """Qualities by schedule; each is measured once.

    The first line says for which model and prompts.

    Args:
        path: of the file, which a kill may have cut in its last line.
        fingerprint: of the model, its dtype and the prompts.
        measure: gives the quality of a schedule.

    Raises:
        ValueError: the file is another search's.
    """

    def __init__(self, path: Path, *, fingerprint: str, measure: Callable[[Counts], Quality]):
        self._measure, self._known = measure, dict[Counts, Quality]()
        #: Schedules that this call has measured.
        self.measured = 0
        with explain_file(path, fix=_FIX):
            if path.exists():
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
                self._read(path, fingerprint)
            self._file: IO[str] = path.open("a", encoding="utf-8")
        if not path.stat().st_size:
            self._write({"fingerprint": fingerprint})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __call__(self, counts: Counts) -> Quality:
        """Measured, or as it was measured before."""
        if counts not in self._known:
            quality = self._known[counts] = self._measure(counts)
            self._write({"counts": counts, **dataclasses.asdict(quality)})
            self.measured += 1
        return self._known[counts]

    def _read(self, path: Path, fingerprint: str) -> None:
        lines = list(read_jsonl(path, fix=_FIX).values())
        if lines and lines[0] != {"fingerprint": fingerprint}:
            raise ValueError(
                f"{path} is of another model, another dtype or other calibration prompts; {_FIX}"
            )
        try:
            for line in lines[1:]:
                counts = tuple(map(int, line["counts"]))
                self._known[counts] = Quality(
                    agreement=float(line["agreement"]), cross_entropy=float(line["cross_entropy"])
                )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no journal of a search; {_FIX}") from error

    def _write(self, line: dict[str, object]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
