"""95 % intervals of a share of right answers, and of the difference between two models'."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

# Two-sided 95 % of the normal distribution.
_Z = 1.96
_DRAWS, _AT_ONCE = 4000, 100


def wilson(right: int, questions: int) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927), for answers that do not depend on one another."""
    n, p = questions, right / questions
    center = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # Rounding may leave the ends a hair outside.
    return max(center - half, 0.0), min(center + half, 1.0)


def clustered(
    values: np.ndarray, clusters: Sequence[Hashable], *, seed: int = 0
) -> tuple[float, float]:
    """The interval of a mean whose values come in clusters, such as questions about an image.

    The percentile bootstrap over whole clusters (Davison and Hinkley 1997, section 3.8). Given the
    differences of two models' values it is the paired bootstrap. The same seed gives the same ends.

    Args:
        values: [questions].
        clusters: of each value.
        seed: of the draws.
    """
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    rng, size = np.random.default_rng(seed), len(numbers)
    means: list[float] = []
    while len(means) < _DRAWS:
        drawn = rng.multinomial(size, np.full(size, 1 / size), size=_AT_ONCE)
        means += (drawn @ sums / (drawn @ counts)).tolist()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
