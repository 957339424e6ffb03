"""Files: written whole or not at all, read with errors that name the file."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from stf_jax.util.disk import explain_full_disk
from stf_jax.util.errors import CheckpointError

_FIX = "fix it or fetch it again"

# Bytes. No config or index has more; parsed, JSON takes some ten times its size.
_MOST_JSON = 2**26
MOST_TEXT = 2**29

_LONGEST_NAME = 300  # characters

# JSON can name half a surrogate pair, such as \ud800 alone, which no UTF-8 can hold.
_HALF = re.compile(r"[\ud800-\udfff]")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def check_file(path: epath.PathLike, *, most: int | None = None) -> None:
    """Refuses a pipe or a device, which may have no end, and a file of more than `most` bytes.

    What is not there passes, and what is on gs://.

    Raises:
        ValueError: it is one, in a few words.
    """
    if "://" in os.fspath(path):
        return
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError("a pipe or a device where a file is expected")
    if most is not None and found.st_size > most:
        raise ValueError(f"{found.st_size:,} bytes, where {most:,} are expected at most")


def check_files(
    folder: epath.PathLike, *, error: type[ValueError] = ValueError, fix: str = _FIX
) -> None:
    """Refuses a local folder with a pipe, a device, or a link that leads nowhere, at any depth.

    Libraries in C++ would wait for them without end. What describes arrays (`_METADATA`, `.zarray`,
    `manifest.ocdbt`, JSON) has the size of JSON.

    Raises:
        ValueError: or `error`, with one line that names it.
    """
    if "://" in os.fspath(folder):
        return
    for path in Path(folder).rglob("*"):
        described = path.name.startswith(("_", ".")) or path.suffix in (".json", ".ocdbt")
        with explain_file(path, error, fix):
            check_file(path, most=_MOST_JSON if described else None)
            # Files may come and go meanwhile.
            if path.is_symlink():
                path.stat()


def read_bytes(path: epath.PathLike, *, most: int | None = None) -> bytes:
    """All of a file.

    Args:
        path: local or on gs://.
        most: bytes that it may have; None for any number.

    Raises:
        OSError: it cannot be read.
        ValueError: a pipe, a device, or more than `most` bytes; in a few words.
    """
    path = epath.Path(path)
    check_file(path, most=most)
    return path.read_bytes()


def read_text(
    path: epath.PathLike,
    *,
    error: type[ValueError] = ValueError,
    fix: str = _FIX,
    most: int = MOST_TEXT,
) -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Args:
        path: local or on gs://.
        error: what is raised, with one line that names the file.
        fix: ends that line.
        most: bytes that the file may have.

    Raises:
        ValueError: or `error`, if the file cannot be read or is not UTF-8.
    """
    with explain_file(path, error, fix):
        return decode_text(read_bytes(path, most=most))


def read_json(
    path: epath.PathLike,
    kind: type = dict,
    *,
    error: type[ValueError] = ValueError,
    fix: str = _FIX,
    most: int = _MOST_JSON,
) -> Any:
    """The content of a JSON file, a `kind` (dict or list) of at most `most` bytes.

    Raises:
        ValueError: or `error`, as `read_text`; also for no JSON, JSON of another kind, and text
            that is no valid unicode.
    """
    with explain_file(path, error, fix):
        return decode_json(read_bytes(path, most=most), kind)


def read_jsonl(
    path: epath.PathLike, *, error: type[ValueError] = ValueError, fix: str = _FIX
) -> dict[int, Any]:
    """The content of each line of a file, by its number from 1; empty lines are left out.

    Raises:
        ValueError: or `error`, as `read_json`.
    """
    lines: dict[int, Any] = {}
    with explain_file(path, error, fix):
        text = decode_text(read_bytes(path, most=MOST_TEXT))
        # Not splitlines(), which would also cut at the odd line separators inside a string.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    lines[number] = parse_json(line)
                except ValueError as cause:
                    raise ValueError(f"line {number} is {cause}") from cause
        _check_unicode(text, {f"line {number}": line for number, line in lines.items()})
    return lines


def decode_text(data: bytes) -> str:
    """The text of UTF-8, without its byte order mark.

    Raises:
        ValueError: what is wrong with it, in a few words.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error


def decode_json(data: bytes, kind: type = dict) -> Any:
    """The content of a JSON file from its bytes, as `read_json`.

    Raises:
        ValueError: what is wrong with them, in a few words.
    """
    text = decode_text(data)
    content = parse_json(text)
    if not isinstance(content, kind):
        raise ValueError(f"holds a {type(content).__name__} where a {kind.__name__} is expected")
    _check_unicode(text, {"": content})
    return content


def parse_json(text: str) -> Any:
    """The content of JSON text.

    Raises:
        ValueError: what is wrong with it, in a few words.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error


@contextlib.contextmanager
def explain_file(
    path: epath.PathLike, error: type[ValueError] = ValueError, fix: str = _FIX
) -> Iterator[None]:
    """Within it, an error about a file becomes one line with its name and the fix."""
    try:
        yield
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror or cause}); {fix}") from cause
    except ValueError as cause:
        # One of this kind says all already.
        if error is not ValueError and isinstance(cause, error):
            raise
        raise error(f"{path}: {cause}; {fix}") from cause


def _check_unicode(text: str, parts: Mapping[str, Any]) -> None:
    """Raises ValueError naming the places in what `text` holds that are no valid unicode."""
    # Only an escape brings half a pair into what was UTF-8, and hardly any text has one.
    if not _ESCAPED_HALF.search(text):
        return
    halves = []
    waiting: list[tuple[tuple[str, ...], Any]] = [
        ((place,), content) for place, content in parts.items()
    ]
    for place, content in waiting:  # It grows meanwhile; a recursion would have an end.
        if isinstance(content, dict):
            for name, value in content.items():
                waiting += [((*place, "a name"), name), ((*place, name), value)]
        elif isinstance(content, list):
            waiting += [((*place, f"entry {n}"), value) for n, value in enumerate(content, start=1)]
        elif isinstance(content, str) and _HALF.search(content):
            halves.append(", ".join(filter(None, place)))
    if halves:
        raise ValueError(
            f"half a surrogate pair, which is no valid unicode, stands in {name_some(halves)}"
        )


@contextlib.contextmanager
def write_whole(path: epath.PathLike) -> Iterator[epath.Path]:
    """A file to fill, beside `path`, which takes that name on success and vanishes on failure."""
    path = epath.Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with write_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: epath.PathLike, content: Any, *, indent: int | None = None) -> None:
    """Writes a JSON file whole: without an indent as `json.dump` does, else for people to read."""
    if indent is None:
        write_text(path, json.dumps(content))
    else:
        write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def sha256(path: epath.PathLike) -> str:
    """SHA-256 of a file; or of a local folder's JSON and text files with their names."""
    path = epath.Path(path)
    with explain_file(path):
        check_file(path)
    if not path.is_dir():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()
    folder = Path(path)
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".txt"))
    listing = "".join(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


@contextlib.contextmanager
def new_directory(path: epath.PathLike) -> Iterator[epath.Path]:
    """A directory to fill, which takes the name `path` on success and vanishes on failure.

    Raises:
        CheckpointError: `path` exists, or cannot be made.
        FullDiskError: there is no room for what is put into it.
    """
    final = absolute(path)
    try:
        # A link that leads nowhere takes the name, too.
        exists = final.exists() or os.path.islink(final)
        unfinished = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
        if not exists:
            unfinished.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{final} cannot be made ({error.strerror or error}); "
            "choose a place where directories can be made"
        ) from error
    if exists:
        raise CheckpointError(f"{final} exists; remove it or choose another name")
    try:
        with explain_full_disk(final):
            yield unfinished
            unfinished.rename(final)
    except BaseException:
        _remove(unfinished)
        raise


def _remove(path: epath.Path) -> None:
    """Removes a directory into which threads of a failed write may still put files."""
    for wait in (0.1, 0.5, 2.0, None):
        try:
            if path.exists():
                path.rmtree()
            return
        except OSError:
            if wait is None:
                raise
            time.sleep(wait)


def list_some(lines: list[str], *, most: int = 100) -> str:
    """The lines of an error, indented; beyond `most`, how many more there are."""
    shown = [f"  {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"  ... and {len(lines) - most} more")
    return "\n".join(shown)


def name_some(names: Sequence[object], *, most: int = 5) -> str:
    """The first names, in one line, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    # A name from a damaged file may be of any length.
    return ", ".join(str(name)[:_LONGEST_NAME] for name in names[:most]) + more


def expand(path: epath.PathLike) -> str:
    """`path` with the home directory in the place of a "~" in front.

    A shell does so, but not in a config, behind "--out=" or in a chat. Every path that a user names
    comes through here; "./~" is a file of that name.
    """
    return os.path.expanduser(os.fspath(path))


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, as Orbax wants it, its "~" expanded; a URL is that already."""
    path = epath.Path(expand(path))
    return path if "://" in os.fspath(path) else path.absolute()


def file_size(path: epath.Path) -> int:
    """Bytes of a file."""
    # epath's own `stat` looks up the owner's name, which fails for a user id that has none.
    local = "://" not in os.fspath(path)
    return os.path.getsize(path) if local else path.stat().length
