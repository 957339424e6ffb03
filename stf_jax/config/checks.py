"""Refusals that every config shares."""

import math
from typing import Any


def check_positive(config: Any, *names: str, most: int = 2**31 - 1) -> None:
    """Refuses a field below 1 or above `most`, which no model or machine has."""
    for name in names:
        value = getattr(config, name)
        if not 1 <= value <= most:
            bound = "at least 1" if value < 1 else f"at most {most}"
            raise ValueError(f"{type(config).__name__}.{name} is {value}; it must be {bound}")


def check_above_zero(config: Any, *names: str) -> None:
    """Refuses a field that is not a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        # Written so that NaN is refused.
        if not 0 < value < math.inf:
            raise ValueError(f"{type(config).__name__}.{name} is {value}; it must be above 0")
