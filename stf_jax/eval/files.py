"""Official files read with one clear line for what is wrong, and results written whole or not."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_NAMED = 5
_BLOCK = 1 << 20
_KINDS = {str: "text", list: "list", int: "whole number"}
# JSON can name half a surrogate pair, such as \ud800 alone, which no UTF-8 can hold.
_HALF = re.compile(r"[\ud800-\udfff]")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; ValueError in one line if there is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}); fetch it again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def read_json(path: Path, kind: type) -> Any:
    """What a JSON file holds, which must be a `kind` (dict or list).

    Raises:
      ValueError: unreadable, no JSON, of another kind, or with text that is no valid unicode.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, kind):
        raise ValueError(
            f"{path}: holds a {type(content).__name__} where a {kind.__name__} is expected; "
            "check that it is the official file"
        )
    _check_unicode(path, _halves(content))
    return content


def read_jsonl(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """One object a line, each with `fields`; empty lines are skipped.

    Raises:
      ValueError: unreadable, empty, a line that is no JSON object, or one without a field or with
        text that is no valid unicode.
    """
    entries: list[tuple[str, Any]] = []
    # Not splitlines(), which would also cut at the odd line separators inside a string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entries.append((f"line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: line {number} is not valid JSON ({error.msg}); mend it or fetch the file "
                "again"
            ) from error
    if not entries:
        raise ValueError(f"{path}: empty; fetch it again")
    check_fields(path, entries, fields)
    _check_unicode(path, (half for place, entry in entries for half in _halves(entry, place)))
    return [entry for _, entry in entries]


def _halves(content: Any, *place: str) -> Iterator[str]:
    """Where in what JSON holds there is half a surrogate pair."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _halves(name, *place, "a name")
            yield from _halves(value, *place, name)
    elif isinstance(content, list):
        for number, value in enumerate(content, start=1):
            yield from _halves(value, *place, f"entry {number}")
    elif isinstance(content, str) and _HALF.search(content):
        yield ", ".join(place)


def _check_unicode(path: Path, halves: Iterable[str]) -> None:
    if found := list(halves):
        raise ValueError(
            f"{path}: half a surrogate pair, which is no valid unicode, stands in "
            f"{name_some(found)}; mend it or fetch the file again"
        )


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


def name_some(names: Sequence[str], *, limit: int = _NAMED) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def check_there(paths: Mapping[str, Path], *, option: str) -> None:
    """Raises ValueError with a line for each path (by role) that is not there."""
    missing = [
        f"{path}: no such file or folder; fetch it, or give its place with {option} {role}=PATH"
        for role, path in paths.items()
        if not path.exists()
    ]
    if missing:
        raise ValueError("\n".join(missing))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a file beside `path` and renames it, so that no half file is ever there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    write(unfinished)
    os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as the reference's scripts do, whole or not at all."""
    write_text(path, json.dumps(content))


def sha256(path: Path) -> str:
    """Of a file; or of a folder's JSON and text files with their names, pictures left out."""
    if not path.is_dir():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()
    files = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".txt"))
    listing = "".join(f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()
