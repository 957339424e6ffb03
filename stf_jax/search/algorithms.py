"""G-Search and P-Sigmoid over any measure of a schedule's quality (arXiv 2412.00556).

What the paper's abstract says is that the search goes from shallow to deep layers for the least
number of tokens, and that the sigmoid's parameters are found under a budget. How a number is
accepted, the grids, and a grid in place of Bayesian optimization are our own.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import numpy as np

from stf_jax.systems.gsearch import WHOLE, sigmoid_counts, sigmoid_rates, solve_midpoint

# Tokens of an image in each layer.
Counts: TypeAlias = tuple[int, ...]
Criterion: TypeAlias = Literal["agree", "ce", "lambda"]

# 2**(p/4) and quarters of a layer, to fit; 2**(p/2), to search.
_FIT_SLOPES = [2.0 ** (power / 4) for power in range(-16, 17)]
SLOPES = tuple(2.0 ** (power / 2) for power in range(-6, 7))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """How a model with a schedule does on calibration prompts, beside itself with all tokens.

    Attributes:
        agreement: share of the prompts after which both choose the same token.
        cross_entropy: in nats, of the token that it chooses with all tokens; the mean.
    """

    agreement: float
    cross_entropy: float


Evaluate: TypeAlias = Callable[[Counts], Quality]
# (done, of how many)
Progress: TypeAlias = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One schedule that the greedy search tried: `count` tokens from `layer` on."""

    layer: int
    count: int
    quality: Quality


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Which numbers of tokens the greedy search accepts.

    Attributes:
        criterion: `agree`: every prompt's next token is the same; `ce`: the cross entropy exceeds
            that of all tokens by no more than `tolerance`, as a share of it; `lambda`: no
            threshold, the number with the largest -cross entropy + weight * (1 - share kept).
        step: numbers are multiples of it, and all tokens.
        tolerance: of `ce`.
        weight: of `lambda`, in nats.
    """

    criterion: Criterion = "ce"
    step: int = 32
    tolerance: float = 0.02
    weight: float = 0.15

    def __post_init__(self) -> None:
        if self.criterion not in get_args(Criterion):
            raise ValueError(
                f"criterion is {self.criterion!r}; choose {', '.join(get_args(Criterion))}"
            )
        if self.step < 1:
            raise ValueError(f"step is {self.step}; give 1 or more tokens")
        if not self.tolerance >= 0 or not self.weight >= 0:
            raise ValueError(
                f"tolerance is {self.tolerance} and weight {self.weight}; neither may be below 0"
            )

    def accepts(self, quality: Quality, dense: Quality) -> bool:
        """Whether a number will do, beside all tokens."""
        if self.criterion == "agree":
            return quality.agreement == 1
        return quality.cross_entropy <= dense.cross_entropy * (1 + self.tolerance)


def search_greedily(
    evaluate: Evaluate, *, tokens: int, layers: int, rule: Rule, progress: Progress
) -> tuple[Counts, list[Trial]]:
    """From shallow to deep: the least number that each layer can do with, and all trials.

    A number is tried for its layer and all behind it. The first that is accepted stays.
    """
    candidates = sorted({*range(0, tokens, rule.step), tokens})
    dense = evaluate((tokens,) * layers)
    counts, trials = [tokens] * layers, []
    for layer in range(WHOLE, layers):
        best: tuple[float, int] | None = None
        for count in candidates:
            if count > counts[layer - 1]:
                break
            quality = evaluate((*counts[:layer], *[count] * (layers - layer)))
            trials.append(Trial(layer=layer, count=count, quality=quality))
            if rule.criterion != "lambda":
                if rule.accepts(quality, dense):
                    best = 0.0, count
                    break
                continue
            value = -quality.cross_entropy + rule.weight * (1 - count / tokens)
            if best is None or value > best[0]:
                best = value, count
        if best is not None:
            counts[layer:] = [best[1]] * (layers - layer)
        progress(layer - WHOLE + 1, layers - WHOLE)
    return tuple(counts), trials


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """A sigmoid of the layer: its slope, its midpoint in layers."""

    slope: float
    midpoint: float


def fit_sigmoid(counts: Counts) -> tuple[Sigmoid, float]:
    """The sigmoid of a grid that is nearest to a schedule, and the sum of squared errors.

    The first layers, which keep all tokens, do not count.
    """
    layers, shares = len(counts), np.array(counts) / counts[0]

    def error(sigmoid: Sigmoid) -> float:
        rates = sigmoid_rates(sigmoid.slope, sigmoid.midpoint, layers=layers)
        return float(((rates - shares)[WHOLE:] ** 2).sum())

    grid = itertools.product(_FIT_SLOPES, np.arange(4 * layers + 1) / 4)
    sigmoids = [Sigmoid(slope=slope, midpoint=float(midpoint)) for slope, midpoint in grid]
    errors = [error(sigmoid) for sigmoid in sigmoids]
    best = int(np.argmin(errors))
    return sigmoids[best], errors[best]


def search_sigmoids(
    evaluate: Evaluate, *, tokens: int, layers: int, budget: float, progress: Progress
) -> tuple[Counts, Sigmoid]:
    """The schedule with the least cross entropy among sigmoids whose mean share is a budget.

    Raises:
        ValueError: a budget that the first layers alone exceed, or above 1.
    """
    found: tuple[float, Counts, Sigmoid] | None = None
    for number, slope in enumerate(SLOPES, start=1):
        sigmoid = Sigmoid(slope=slope, midpoint=solve_midpoint(slope, budget, layers=layers))
        counts = sigmoid_counts(slope, sigmoid.midpoint, tokens=tokens, layers=layers)
        cross_entropy = evaluate(counts).cross_entropy
        if found is None or cross_entropy < found[0]:
            found = cross_entropy, counts, sigmoid
        progress(number, len(SLOPES))
    assert found is not None
    return found[1], found[2]
