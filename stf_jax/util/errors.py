"""Errors that a user can fix; each message is one line that names the fix."""

import contextlib
import os
import re
from collections.abc import Iterator

from etils import epath


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the fix."""


class DeviceMemoryError(ValueError):
    """A device has too little memory; the cause is XLA's own error, with all its lines."""


@contextlib.contextmanager
def explain_memory(message: str) -> Iterator[None]:
    """Within it, XLA's error for want of memory becomes one line that begins with `message`.

    Raises:
        DeviceMemoryError: instead of JAX's error.
    """
    try:
        yield
    except RuntimeError as error:  # JAX's is one; `stf-jax --help` need not import it
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DeviceMemoryError(f"{message} ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The first line of a library's error; never empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def missing(path: epath.PathLike) -> CheckpointError:
    """The error for a path that leads nowhere, and may be meant as a name on the Hub."""
    name = os.fspath(path)
    message = f"{name} does not exist"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not epath.Path(name).parent.exists():
        message += f"; nothing is downloaded, fetch it first: hf download {name} --local-dir DIR"
    return CheckpointError(message)
