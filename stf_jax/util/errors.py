"""Errors that a user can mend; each message is one line that names the fix."""

import os
import re

from etils import epath


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the fix."""


def missing(path: epath.PathLike) -> CheckpointError:
    """The error for a path that leads nowhere, and may be meant as a name on the Hub."""
    name = os.fspath(path)
    message = f"{name} does not exist"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not epath.Path(name).parent.exists():
        message += f"; nothing is downloaded, fetch it first: hf download {name} --local-dir DIR"
    return CheckpointError(message)


def first_line(error: BaseException) -> str:
    """What an error says, without what a library adds in further lines; never empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
