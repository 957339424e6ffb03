"""Files: written whole or not at all, read with errors that name the file."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator

from etils import epath

from stf_jax.util.disk import explain_full_disk
from stf_jax.util.errors import CheckpointError


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
        there = final.exists() or os.path.islink(final)
        unfinished = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
        if not there:
            unfinished.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{final} cannot be made ({error.strerror or error}); "
            "choose a place where directories can be made"
        ) from error
    if there:
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
