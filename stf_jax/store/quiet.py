"""Keeps Orbax silent about what it gives up when one of its reads or writes fails.

It raises the failure, which becomes one line of ours. But it also closes its event loop under the
others, and each of these prints a traceback: from a thread of tensorstore, when its coroutine is
collected, or through asyncio's log, some of them up to the end of the process.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

# In what asyncio says of a read or write of theirs.
_NAMES = ("orbax", "tensorstore", "ocdbt", "zarr")


@contextlib.contextmanager
def quiet_failures() -> Iterator[None]:
    """Within it Orbax logs nothing; from then on, what it gives up prints nothing."""
    logging.getLogger("asyncio").addFilter(_is_news)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)
    with quiet("absl", logging.CRITICAL):
        yield


@contextlib.contextmanager
def quiet(logger: str, least: int) -> Iterator[None]:
    """Within it, a logger says nothing below a level."""
    before = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(least)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(before)


class _Hook:
    """For `sys.unraisablehook`: passes on all but the reads and writes that Orbax has given up."""

    def __init__(self, before: Any):
        self._before = before

    def __call__(self, raised: Any) -> None:
        code = getattr(raised.object, "cr_code", None)
        of_orbax = code is not None and "orbax" in code.co_filename
        if not of_orbax and str(raised.exc_value) != "Event loop is closed":
            self._before(raised)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether asyncio's log is about anything else."""
    message = record.getMessage().lower()
    return not any(name in message for name in _NAMES)
