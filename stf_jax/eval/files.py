"""Official files, checked: one clear line for what is missing or of another kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stf_jax.util import files
from stf_jax.util.files import name_some

_KINDS = {str: "text", list: "list", int: "whole number"}


def read_jsonl(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """One object a line, each with `fields`; empty lines are skipped.

    Raises:
      ValueError: unreadable, empty, a line that is no JSON object, or one without a field or with
        text that is no valid unicode.
    """
    lines = files.read_jsonl(path)
    if not lines:
        raise ValueError(f"{path}: empty; fetch it again")
    check_fields(path, [(f"line {number}", line) for number, line in lines.items()], fields)
    return list(lines.values())


def check_fields(path: Path, entries: Sequence[tuple[str, Any]], fields: Sequence[str]) -> None:
    """Raises ValueError naming the entries (place, content) that lack one of `fields`."""
    problems = []
    for place, entry in entries:
        if not isinstance(entry, dict):
            problems.append(f"{place} is no object")
        elif missing := [field for field in fields if field not in entry]:
            problems.append(f"{place} has no {', '.join(missing)}")
    if problems:
        raise ValueError(f"{path}: {name_some(problems)}; check that it is the official file")


def check_kinds(path: Path, entries: Sequence[tuple[str, Any]], kinds: Mapping[str, type]) -> None:
    """Raises ValueError naming the entries (place, content) with a field that is no such kind."""
    problems = [
        f"the {field} of {place} is no {_KINDS[kind]}"
        for place, entry in entries
        for field, kind in kinds.items()
        # A bool is an int, and never meant to be.
        if type(entry[field]) is not kind
    ]
    if problems:
        raise ValueError(f"{path}: {name_some(problems)}; check that it is the official file")


def check_there(paths: Mapping[str, Path], *, option: str | None) -> None:
    """Raises ValueError with a line for each path (by role) that is not there."""
    missing = [
        f"{path}: no such file or folder; fetch it"
        + (f", or give its place with {option} {role}=PATH" if option else "")
        for role, path in paths.items()
        if not path.exists()
    ]
    if missing:
        raise ValueError("\n".join(missing))
