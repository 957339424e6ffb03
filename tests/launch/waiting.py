"""Waiting for what another process does."""

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    """Returns when it holds; fails if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()
