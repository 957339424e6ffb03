"""Damage to files: bytes, lines, JSON values, and what is no file at all."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEEP = "[" * 10_000 + "]" * 10_000
# In place of any JSON value; a text is put in as it stands.
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 10**9, 10**30, -(10**30), 1e308, 0.5, float("nan"), float("inf"), "",
    "a", "\0", "../..", "/dev/zero", "é停🙂", "\ud800", "x" * 100_000, [], [[]], ["a"], [None] * 3,
    {}, {"a": {}}, {"": None}, [[0] * 100] * 100,
)  # fmt: skip


def damage(files: list[Path], rng: random.Random) -> str:
    """Damages one of the files, rarely two; says how."""
    count = 1 + (rng.random() < 0.1)
    return "; ".join(_damage_one(file, rng) for file in rng.sample(files, min(count, len(files))))


def _damage_one(file: Path, rng: random.Random) -> str:
    ways: list[Callable[[Path, random.Random], str]] = [_bytes, _bytes, _replace_file]
    if file.suffix == ".json":
        ways += [_json] * 6
    if file.suffix in (".jsonl", ".txt", ".tsv", ".yaml"):
        ways += [_lines] * 4
    return f"{file.name}: {rng.choice(ways)(file, rng)}"


def write(file: Path, data: bytes) -> None:
    """Writes a new file of that name: the old one may be a link that others share."""
    file.unlink()
    file.write_bytes(data)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, doubled, zeroed, or others altogether."""
    place = rng.randrange(len(data) + 1)
    length = rng.choice((1, 4, 64, 1024))
    match rng.randrange(7):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + rng.randbytes(length) + data[place:]
        case 2:
            return data[:place] + data[place + length :]
        case 3:
            return data[:place] + bytes(length) + data[place + length :]
        case 4:
            return data[:place] + data[max(place - length, 0) :]
        case 5:
            return rng.choice(
                (b"", b"\n", b"{", b"null", b"[]", b"\xef\xbb\xbf", rng.randbytes(50))
            )
        case _:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 8))):
                if changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return bytes(changed)


def _bytes(file: Path, rng: random.Random) -> str:
    write(file, change_bytes(file.read_bytes(), rng))
    return "other bytes"


def _replace_file(file: Path, rng: random.Random) -> str:
    file.unlink()
    match rng.randrange(6):
        case 0:
            return "gone"
        case 1:
            file.mkdir()
            return "a directory"
        case 2:
            os.mkfifo(file)
            return "a pipe"
        case 3:
            file.symlink_to("/dev/zero")
            return "an endless device"
        case 4:
            file.symlink_to(file.name)
            return "a link to itself"
        case _:
            with file.open("wb") as sparse:
                sparse.truncate(2**33)
            return "8 GiB of zeros"


def _json(file: Path, rng: random.Random) -> str:
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return _bytes(file, rng)
    if rng.random() < 0.1:
        text = file.read_text(encoding="utf-8")
        place = text.rfind("}") if rng.random() < 0.5 else 0
        nested = f'{text[:place]}, "deep": {DEEP}}}' if place else DEEP
        write(file, nested.encode())
        return "nested 10,000 deep"
    content, told = change_value(content, rng)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.8)
    write(file, text.encode(errors="surrogatepass"))
    return told


def change_value(content: Any, rng: random.Random) -> tuple[Any, str]:
    """The same JSON with one value, key or entry changed."""
    places = list(_places(content))
    # Of a vocabulary there are thousands, and a few keys of a config beside them.
    places.sort(key=lambda place: place[2])
    depth = rng.choice(sorted({place[2] for place in places}) or [0])
    holders = [place for place in places if place[2] == depth]
    if not holders:
        return rng.choice(VALUES), "another value"
    holder, key, _ = rng.choice(holders)
    match rng.randrange(6):
        case 0:
            del holder[key]
            return content, f"without {key!r}"
        case 1 if isinstance(holder, dict):
            holder[rng.choice((f"{key}x", str(key).upper(), ""))] = holder.pop(key)
            return content, f"{key!r} under another name"
        case 2 if isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), rng.choice((holder[key], None)))
            return content, "an entry more"
        case 3 if isinstance(holder[key], str):
            holder[key] = rng.choice((holder[key] * 2, holder[key][:-1], [holder[key]]))
        case 4 if isinstance(holder[key], int):
            holder[key] = rng.choice((holder[key] + 1, -holder[key], str(holder[key]), 2**40))
        case _:
            holder[key] = rng.choice(VALUES)
    return content, f"{key!r} is {holder[key]!r:.40}"


def _places(content: Any, depth: int = 0) -> Iterator[tuple[Any, Any, int]]:
    if isinstance(content, dict):
        entries: Any = content.items()
    elif isinstance(content, list):
        entries = enumerate(content)
    else:
        return
    for key, value in entries:
        yield content, key, depth
        yield from _places(value, depth + 1)


def _lines(file: Path, rng: random.Random) -> str:
    lines = file.read_bytes().split(b"\n")
    place = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            lines.insert(place, rng.randbytes(20))
        case 1:
            lines.insert(place, lines[place])
        case 2:
            del lines[place]
        case 3:
            lines[place] = lines[place][: len(lines[place]) // 2]
        case 4:
            lines[place] = rng.choice((DEEP.encode(), b"9" * 5000, b"null", b"[1]", b"\t\t", b"{}"))
        case _:
            return _line_value(file, lines, place, rng)
    write(file, b"\n".join(lines))
    return f"line {place + 1}"


def _line_value(file: Path, lines: list[bytes], place: int, rng: random.Random) -> str:
    separator = b": " if file.suffix == ".yaml" else b"\t"
    try:
        content, told = change_value(json.loads(lines[place]), rng)
        lines[place] = json.dumps(content).encode()
    except ValueError:
        head, found, _ = lines[place].partition(separator)
        value = json.dumps(rng.choice(VALUES)).encode()
        lines[place], told = head + found + value, "another value"
    write(file, b"\n".join(lines))
    return f"line {place + 1}: {told}"


def copy(source: Path, target: Path, *, link: bool) -> None:
    """A folder to damage; linked, where nothing but `damage` writes into it."""
    shutil.copytree(source, target, copy_function=os.link if link else shutil.copy2)
