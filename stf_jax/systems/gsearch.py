"""G-Search and P-Sigmoid: how many tokens each layer needs (CVPR 2025, arXiv 2412.00556).

Tokens of an image are ranked alike by the attention of all layers but the first, and fewer are
needed the deeper the layer. G-Search goes from shallow to deep and finds the least number that
each layer can do with; P-Sigmoid describes these numbers by a sigmoid of the layer, and finds its
two parameters under a budget. Both search; nothing is trained. `stf-jax search` does, over any
LLaVA-1.5, and this system follows the schedule that it finds.

There is no released code, and the paper's text beyond its abstract was not at hand. That ranks come
from the previous layer is known; our own decisions are: scores are means over heads and over all
positions of text behind the image (answers that are supervised left out, since a prompt has none);
tokens that stay keep their rotary positions; the first two layers keep all tokens, since the first
layer's ranking is not to be trusted; each image is ranked by itself; and the default schedule, a
sigmoid whose mean is half of the tokens.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Array, Bool, Float

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.layers import Init
from stf_jax.models.llama import Llama
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.marks import TEXT, Marks
from stf_jax.models.pruning import PrunedLlama, Schedule
from stf_jax.systems.pruning import PruningSystem

# Layers that keep all tokens.
WHOLE = 2

# The default schedule: how steep it is, and the mean share of tokens over all layers.
_SLOPE, _BUDGET = 0.25, 0.5


class GSearchLlama(PrunedLlama):
    """Every position of text behind an image scores its tokens; those before it do not see them."""

    def scoring(self, marks: Marks) -> Bool[Array, "B T"]:
        """Text that is no answer."""
        return (marks.kind == TEXT) & (marks.segment > 0)

    def most_scoring(self, length: int, image_tokens: int) -> int:
        """All that is no token of an image."""
        return length - image_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSearch(PruningSystem):
    """Defaults: a sigmoid whose mean is half of LLaVA-1.5-7B's tokens.

    Attributes:
        schedule: tokens of an image in each layer; the first keeps all.
        rows: what scores: all positions of text behind the image, or the prompt's last.
    """

    schedule: tuple[int, ...] = ()
    rows: Literal["text", "last"] = "text"

    name: ClassVar[str] = "gsearch"
    title: ClassVar[str] = "G-Search"
    family: ClassVar[str] = "llava_gsearch"

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The default for this number of tokens and layers."""
        return {"schedule": default_schedule(vision.patches, text.layers)}

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """A number for each layer, of which none is above the one before."""
        tokens, layers = self.tokens(vision), text.layers
        if len(self.schedule) != layers or self.schedule[0] != tokens:
            raise ValueError(
                f"schedule {list(self.schedule)} does not fit: give {layers} numbers, one a layer, "
                f"the first {tokens}; 'stf-jax search' finds them"
            )
        super().check(vision, text)

    def stages(self, vision: VisionConfig) -> Schedule:
        """One a layer."""
        return tuple(enumerate(self.schedule))[1:]

    def decoder(
        self, vision: VisionConfig, text: TextConfig, *, init: Init, lora: LoRAConfig | None
    ) -> Llama:
        """The language model in stages, ranked by one row or by many."""
        kind = GSearchLlama if self.rows == "text" else PrunedLlama
        schedule, tokens = self.schedule_of(vision), self.tokens(vision)
        return kind(text, tokens=tokens, schedule=schedule, init=init, lora=lora)


def default_schedule(tokens: int, layers: int) -> tuple[int, ...]:
    """Half of the tokens on average; with few layers, from the second on."""
    if _BUDGET * layers <= WHOLE:
        return (tokens, *(tokens // 2 for _ in range(layers - 1)))
    midpoint = solve_midpoint(_SLOPE, _BUDGET, layers=layers)
    return sigmoid_counts(_SLOPE, midpoint, tokens=tokens, layers=layers)


def sigmoid_rates(slope: float, midpoint: float, *, layers: int) -> Float[np.ndarray, "L"]:
    """The share of tokens that each layer keeps: 1 / (1 + exp(slope (layer - midpoint)))."""
    layer = np.arange(layers)
    # Beyond 700 the exponential is as good as infinite, and has no float64.
    rates = 1 / (1 + np.exp(np.minimum(slope * (layer - midpoint), 700.0)))
    return np.where(layer < WHOLE, 1.0, rates)


def sigmoid_counts(slope: float, midpoint: float, *, tokens: int, layers: int) -> tuple[int, ...]:
    """Tokens of an image in each layer, rounded down, so that a budget is never exceeded."""
    rates = sigmoid_rates(slope, midpoint, layers=layers)
    return tuple(np.floor(tokens * rates + 1e-6).astype(int).tolist())


def solve_midpoint(slope: float, budget: float, *, layers: int) -> float:
    """The midpoint at which the mean share over all layers is the budget; by bisection.

    Raises:
        ValueError: a budget that the first layers alone exceed, or above 1.
    """
    least = WHOLE / layers
    if not least < budget < 1:
        raise ValueError(
            f"budget is {budget}; the first {WHOLE} of {layers} layers keep all tokens, so give "
            f"more than {least:.3f} and less than 1"
        )
    low, high = -20.0 * layers, 21.0 * layers
    for _ in range(100):
        middle = (low + high) / 2
        mean = sigmoid_rates(slope, middle, layers=layers).mean()
        low, high = (middle, high) if mean < budget else (low, middle)
    return (low + high) / 2
