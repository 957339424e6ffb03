"""Refusals that every config shares."""

import math
from typing import Any


def check_positive(config: Any, *names: str) -> None:
    """Refuses a field below 1."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{type(config).__name__}.{name} is {value}; it must be at least 1")


def check_above_zero(config: Any, *names: str) -> None:
    """Refuses a field that is not a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        # Written so that NaN is refused.
        if not 0 < value < math.inf:
            raise ValueError(f"{type(config).__name__}.{name} is {value}; it must be above 0")
