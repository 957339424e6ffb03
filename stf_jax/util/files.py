"""Files: written whole or not at all, read with errors that name the file."""

import contextlib
import os
import secrets
from collections.abc import Iterator

from etils import epath

from stf_jax.util.errors import CheckpointError


@contextlib.contextmanager
def new_directory(path: epath.PathLike) -> Iterator[epath.Path]:
    """A directory to fill, which takes the name `path` on success and vanishes on failure.

    Raises:
        CheckpointError: `path` exists, or cannot be made.
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
        yield unfinished
        unfinished.rename(final)
    except BaseException:
        if unfinished.exists():
            unfinished.rmtree()
        raise


def list_some(lines: list[str], *, most: int = 100) -> str:
    """The lines of an error, indented; beyond `most`, how many more there are."""
    shown = [f"  {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"  ... and {len(lines) - most} more")
    return "\n".join(shown)


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, as Orbax wants it; a URL is that already."""
    path = epath.Path(path)
    return path if "://" in os.fspath(path) else path.absolute()


def file_size(path: epath.Path) -> int:
    """Bytes of a file."""
    # epath's own `stat` looks up the owner's name, which fails for a user id that has none.
    local = "://" not in os.fspath(path)
    return os.path.getsize(path) if local else path.stat().length
