"""Long work on the command line: a bar on a terminal's stderr, nothing in a pipe."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def byte_progress(title: str, *, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` bytes are done; yields what takes the number of further ones."""
    with _bar(title, DownloadColumn()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


@contextlib.contextmanager
def count_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how many examples are done; yields f(done, of how many)."""
    with _bar(title, MofNCompleteColumn()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM unwinds like Ctrl-C: workers end, and nothing is left to clean up."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bar(title: str, done: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), done, TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _exit(number: int, frame: FrameType | None) -> None:
    # As a shell tells of a signal.
    sys.exit(128 + number)
