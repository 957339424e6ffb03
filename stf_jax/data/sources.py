"""LLaVA's training files as a list of raw examples: a JSON list, or JSON lines."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stf_jax.util.files import parse_json, read_text

# Longer ids are cut: they only name an example.
_ID_LENGTH = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawExample:
    """One entry of a file, not looked into yet.

    Attributes:
      id: the entry's own, made unique over all files ("33471", "33471#2"), or else its place.
      where: file and place in it, for messages.
      content: what JSON made of it.
      unreadable: why there is no content, for a line that is no JSON.
    """

    id: str
    where: str
    content: Any = None
    unreadable: str | None = None


def read_examples(files: Sequence[str | os.PathLike[str]]) -> list[RawExample]:
    """All entries of `files` in order.

    Raises:
      ValueError: a line for each file that is missing, no JSON, no list, or empty.
    """
    examples: list[RawExample] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    if not files:
        raise ValueError("no training file is given; name at least one JSON or jsonl")
    for path in map(Path, files):
        try:
            entries = list(_entries(path))
        except ValueError as error:
            problems.append(str(error))
            continue
        if not entries:
            problems.append(f"{path}: holds no examples")
        for entry in entries:
            number = seen[entry.id] = seen.get(entry.id, 0) + 1
            name = entry.id if number == 1 else f"{entry.id}#{number}"
            examples.append(dataclasses.replace(entry, id=name))
    if problems:
        raise ValueError("\n".join(problems))
    return examples


def _entries(path: Path) -> Iterator[RawExample]:
    text = read_text(path)
    if not text.lstrip().startswith("["):
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield _from_line(line, f"{path.name} line {number}")
        return
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; fetch it again") from error
    for number, entry in enumerate(content, start=1):
        where = f"{path.name} entry {number}"
        yield RawExample(id=_id(entry, where), where=where, content=entry)


def _from_line(line: str, where: str) -> RawExample:
    try:
        content = parse_json(line)
    except ValueError as error:
        return RawExample(id=where, where=where, unreadable=str(error))
    return RawExample(id=_id(content, where), where=where, content=content)


def _id(entry: Any, where: str) -> str:
    name = entry.get("id") if isinstance(entry, dict) else None
    return where if name is None or name == "" else str(name)[:_ID_LENGTH]
