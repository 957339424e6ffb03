"""A full disk as one line that names the path, whichever library found it."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORDS = tuple(os.strerror(number).lower() for number in _NUMBERS)


class FullDiskError(OSError):
    """There is no room for a file; the message names the path and the fix."""


def is_full(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that there is no room.

    Libraries in C++ have their own classes, and keep the system's words.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, OSError) and link.errno in _NUMBERS:
            return True
        if any(word in str(link).lower() for word in _WORDS):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False


def full_disk_error(path: epath.PathLike) -> FullDiskError:
    """The error for a path below which there is no room."""
    return FullDiskError(
        f"{os.fspath(path)} cannot be written: there is no room{_say_free(path)}; make room, or "
        "choose another place"
    )


@contextlib.contextmanager
def explain_full_disk(path: epath.PathLike) -> Iterator[None]:
    """Within it, an error for want of room below `path` becomes one line.

    Raises:
        FullDiskError: instead.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise full_disk_error(path) from error


def free_bytes(path: epath.PathLike) -> int | None:
    """What is free below a path, which need not be there yet; None where nobody can tell."""
    if "://" in os.fspath(path):
        return None
    folder = Path(path).absolute()
    try:
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _say_free(path: epath.PathLike) -> str:
    free = free_bytes(path)
    return "" if free is None else f" ({free / 1e9:.2f} GB are free)"
