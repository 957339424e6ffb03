"""`python -m tests.fuzz.kills`: a run killed a hundred times, and a hundred bytes of it changed.

Half of the kills fall into a save. A run that was killed must end as one that was left alone, to
the bit. One whose files have changed must do so too, or say in one line what was found.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import yaml

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from stf_jax.convert import import_checkpoint
from stf_jax.convert.stored_model import load_processors
from stf_jax.data.builder import build
from tests.corpus import write_corpus
from tests.runs import Server

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
STEPS, EVERY, LEFT = 60, 3, 51


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of one config in a folder, each with its own directory."""

    folder: Path
    server: Server

    @classmethod
    def prepare(cls, folder: Path) -> "Runs":
        """A model, a dataset, and a server."""
        import_checkpoint(REFERENCE / "llava-stf", folder / "model")
        corpus, processors = write_corpus(folder, 48), load_processors(folder / "model")
        build(
            [corpus.json],
            folder / "dataset",
            images=corpus.images,
            tokenizer=processors.tokenizer,
            image_processor=processors.image_processor,
            workers=0,
        )
        return cls(folder, Server(folder / "cache"))

    def start(self, name: str) -> int:
        """Begins or resumes a run; its process."""
        tree = {
            "model": str(self.folder / "model"),
            "out": str(self.folder / name),
            "steps": STEPS,
            "dtype": "float32",
            "remat": "none",
            "mesh": None,
            "data": {
                "datasets": [{"path": str(self.folder / "dataset")}],
                "sequence_length": 384,
                "batch_size": 2,
                "images_per_row": 4,
                "workers": 0,
            },
            "optimizer": {"learning_rate": 1e-3},
            "checkpoint": {"every": EVERY, "keep": 2},
        }
        self.config(name).write_text(yaml.safe_dump(tree), encoding="utf-8")
        return self.server.start(self.config(name))

    def finish(self, name: str) -> int:
        """Begins or resumes a run, and waits for it; its exit status."""
        self.start(name)
        return self.server.answer()

    def config(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    def said(self, name: str) -> list[str]:
        """What a run wrote to stderr, but for what every run writes."""
        text = self.config(name).with_suffix(".yaml.stderr").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if "damaged" in line or "error" in line]
        return lines if "Traceback" not in text else [*lines, "Traceback"]

    def steps(self, name: str) -> int:
        path = self.folder / name / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def is_saving(self, name: str) -> bool:
        folder = self.folder / name / "checkpoints"
        return folder.is_dir() and any("tmp" in child.name for child in folder.iterdir())

    def end(self, name: str) -> dict[str, bytes]:
        """Every array of a run's last checkpoint."""
        tree: Any = ocp.load(self.folder / name / "checkpoints" / str(STEPS))
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}

    def losses(self, name: str) -> list[float]:
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]


def kill(runs: Runs, rng: random.Random, kills: int) -> Counter[str]:
    """Kills runs, half of the times inside a save, and compares what each ends with."""
    counts, number = Counter[str](), 0
    while counts["kills"] < kills:
        name = f"killed-{number}"
        in_save = counts["in a save"] * 2 <= counts["kills"]
        process, before = runs.start(name), runs.steps(name)
        deadline = time.monotonic() + 60
        if in_save:
            later = before + rng.randint(0, 4)
            while runs.steps(name) < later and time.monotonic() < deadline:
                time.sleep(0.002)
            while not runs.is_saving(name) and time.monotonic() < deadline:
                if runs.steps(name) >= STEPS:
                    break
                time.sleep(0.001)
        else:
            time.sleep(rng.uniform(0, 4))
        saving = runs.is_saving(name)
        os.kill(process, signal.SIGKILL)
        if runs.server.answer() == 0 or runs.steps(name) >= STEPS:
            _compare(runs, name, counts)
            number += 1
            continue
        counts["kills"] += 1
        counts["in a save"] += saving
    _compare(runs, f"killed-{number}", counts)
    return counts


def _compare(runs: Runs, name: str, counts: Counter[str]) -> None:
    status = runs.finish(name)
    same = status == 0 and runs.end(name) == runs.end("alone")
    same = same and runs.losses(name) == runs.losses("alone")
    counts["runs"] += 1
    counts["bit-identical end"] += same
    if not same or runs.said(name):
        sys.stderr.write(f"{name}: status {status}; {runs.said(name)}\n")


def flip(runs: Runs, rng: random.Random, flips: int) -> Counter[str]:
    """Changes a byte of what a killed run left, and lets the run continue."""
    process = runs.start("left")
    while runs.steps("left") < LEFT + 1:
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    runs.server.answer()
    counts = Counter[str]()
    files = sorted(path for path in (runs.folder / "left").rglob("*") if path.is_file())
    files = [path for path in files if path.stat().st_size and "tensorboard" not in path.parts]
    expected = runs.end("alone")
    for number in range(flips):
        name = f"flipped-{number}"
        shutil.copytree(runs.folder / "left", runs.folder / name)
        # Half of them anywhere, half in a file that is drawn first: small ones are hit, too.
        sizes = [path.stat().st_size for path in files] if number % 2 else None
        (chosen,) = rng.choices(files, sizes)
        file = runs.folder / name / chosen.relative_to(runs.folder / "left")
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        status = runs.finish(name)
        said = runs.said(name)
        same = status == 0 and runs.end(name) == expected
        if same:
            outcome = "named, set aside, bit-identical end" if said else "bit-identical end"
        elif status == 1 and len(said) == 1 and said[0].startswith("error: "):
            outcome = "refused in one line"
        else:
            outcome = "FAILED"
        counts[outcome] += 1
        if outcome == "FAILED" or len(said) > 1:
            sys.stderr.write(f"{name} ({chosen.name}): status {status}; {said}\n")
        shutil.rmtree(runs.folder / name)
    return counts


def main() -> int:
    """Exit status 1 if a run ended otherwise than it must."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="(100)")
    parser.add_argument("--flips", type=int, default=100, help="(100)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs.prepare(Path(folder))
        try:
            status = runs.finish("alone")
            assert status == 0, runs.said("alone")
            killed = kill(runs, rng, options.kills)
            flipped = flip(runs, rng, options.flips)
        finally:
            runs.server.process.kill()
    for title, counts in (("killed", killed), ("flipped", flipped)):
        for name, count in counts.items():
            sys.stdout.write(f"| {title} | {name} | {count} |\n")
    failed = flipped["FAILED"] or killed["bit-identical end"] < killed["runs"]
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
