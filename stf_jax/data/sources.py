"""Training files as a list of raw examples.

A file is a JSON list, JSON lines, JSON objects one after the other, or one object that holds the
list, and may be packed by gzip.
"""

import dataclasses
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stf_jax.data.forms import TURN_KEYS
from stf_jax.util.files import check_file, decode_text, explain_file, parse_json, read_bytes

# Longer ids are cut: they only name an example.
_ID_LENGTH = 100
# Text shrinks to a tenth or so; what shrinks to less was made to fill the memory.
_GZIP_RATIO, _GZIP_LEAST = 200, 2**26
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawExample:
    """One entry of a file, not looked into yet.

    Attributes:
      id: the entry's own, made unique over all files ("33471", "33471#2"), or else its place.
      where: file and place in it, for messages.
      content: what JSON made of it.
      unreadable: why there is no content, for a line that is no JSON.
      note: of a file's first entry, how the file was read, where it is no list.
    """

    id: str
    where: str
    content: Any = None
    unreadable: str | None = None
    note: str | None = None


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
    text = _read_text(path).strip()
    if not text:
        return
    if not text.startswith(("[", "{")):
        raise ValueError(f"{path}: neither a JSON list nor JSON lines; convert it to one of them")
    # A line of JSON ends with a newline; str.splitlines would also cut at U+2028, which a text has.
    # Several values that are no lines are laid out over lines.
    if text.startswith("{") and "\n" in text and _is_object(text[: text.index("\n")]):
        yield from _from_lines(text, path)
        return
    try:
        values = list(_decode_values(text))
    except (ValueError, RecursionError) as error:
        # Of lines, the first may be the one that is broken.
        if text.startswith("{") and any(map(_is_object, text.split("\n", 3)[1:3])):
            yield from _from_lines(text, path)
            return
        raise ValueError(f"{path}: not valid JSON ({error}); fetch it again") from error
    note = None
    if len(values) == 1:
        values, note = _find_list(values[0], path)
    for number, entry in enumerate(values, start=1):
        where = f"{path.name} entry {number}"
        yield RawExample(id=_id(entry, where), where=where, content=entry, note=note)
        note = None


def _from_lines(text: str, path: Path) -> Iterator[RawExample]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        content, fault = _parse(line)
        if fault is None:
            yield RawExample(id=_id(content, where), where=where, content=content)
        else:
            yield RawExample(id=where, where=where, unreadable=fault)


def _is_object(line: str) -> bool:
    return isinstance(_parse(line)[0], dict)


def check_text(path: Path) -> None:
    """Looks at the beginning of a file: what is no text at all may be of any size.

    Raises:
      OSError: it cannot be read.
      ValueError: a pipe, a device, or zero bytes; in a few words.
    """
    check_file(path)
    with path.open("rb") as file:
        begins = file.read(4096)
    if b"\0" in begins and not begins.startswith((_GZIP, _PARQUET)):
        raise ValueError("not UTF-8 (zero bytes)")


def _read_text(path: Path) -> str:
    try:
        with explain_file(path, fix="check the path"):
            check_text(path)
            data = read_bytes(path)
        if data.startswith(_GZIP):
            data = _unpack(data, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: a damaged gzip file ({error}); fetch it again") from error
    if data.startswith(_PARQUET):
        raise ValueError(
            f"{path}: Parquet is not read; make JSON lines of it: pip install pandas pyarrow, then "
            f"pandas.read_parquet({path.name!r}).to_json('train.jsonl', orient='records', "
            "lines=True), with images written to files"
        )
    try:
        return decode_text(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; convert it") from error


def _unpack(data: bytes, path: Path) -> bytes:
    most = max(_GZIP_RATIO * len(data), _GZIP_LEAST)
    with gzip.open(io.BytesIO(data)) as file:
        unpacked = file.read(most + 1)
    if len(unpacked) > most:
        raise ValueError(
            f"{path}: unpacks to more than {_GZIP_RATIO} times its size, which no text does; fetch "
            "it again"
        )
    return unpacked


def _decode_values(text: str) -> Iterator[Any]:
    """The JSON values of a text, one after the other, however they are laid out."""
    decoder = json.JSONDecoder()
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        value, place = decoder.raw_decode(text, place)
        yield value


def _find_list(value: Any, path: Path) -> tuple[list[Any], str | None]:
    """The examples in a file's one value, and what to note where that is no list.

    It may be one example, or an object that holds the list.
    """
    if isinstance(value, list):
        return value, None
    if any(key in value for key in TURN_KEYS):
        return [value], f"{path} is one example, not a list of them"
    lists = {
        key: entries
        for key, entries in value.items()
        if isinstance(entries, list)
        and entries
        and all(isinstance(entry, dict) for entry in entries)
    }
    if len(lists) != 1:
        what = f"lists under {', '.join(map(repr, lists))}" if lists else "none is in it"
        raise ValueError(
            f"{path}: one JSON object where a list of examples, or one example a line, is expected "
            f"({what}); write the list alone"
        )
    ((key, entries),) = lists.items()
    return entries, f"{path} is one object; the list under {key!r} was read"


def _parse(line: str) -> tuple[Any, str | None]:
    """What JSON makes of a line, and why it makes nothing."""
    try:
        return parse_json(line), None
    except ValueError as error:
        return None, str(error)


def _id(entry: Any, where: str) -> str:
    name = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(name, str | int) or name == "":
        return where
    # Half a surrogate could be neither printed nor stored.
    return str(name)[:_ID_LENGTH].encode(errors="replace").decode()
