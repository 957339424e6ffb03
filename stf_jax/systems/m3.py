"""M3: "Matryoshka Multimodal Models" (arXiv 2405.17430).

LLaVA-1.5, whose projected tokens are averaged over square windows: one set of weights serves every
budget, and the user chooses at generation. Training takes the mean loss over the scales (paper,
section 3), so coarse tokens are taught with fine ones. It begins with a trained LLaVA-1.5.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.connector import Connector, Tokens
from stf_jax.models.layers import Init
from stf_jax.systems.average import average_pooling
from stf_jax.systems.base import LlamaCppProjector, System

_SCALES_KEY = "matryoshka_vis_token_scale"


@dataclasses.dataclass(frozen=True, kw_only=True)
class M3(System):
    """Every square grid of tokens that divides the tower's. Defaults: LLaVA-1.5-7B-M3.

    Attributes:
        scales: tokens an image of each view that training takes the mean over.
    """

    scales: tuple[int, ...] = (576, 144, 36, 9, 1)

    name: ClassVar[str] = "m3"
    title: ClassVar[str] = "M3"
    family: ClassVar[str] = "llava_m3"
    published_keys: ClassVar = (_SCALES_KEY,)
    # With 144 tokens (paper, table 1).
    published: ClassVar = {"mmbench": 66.4, "gqa": 61.3, "pope": 87.0, "vizwiz": 53.1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales or len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales {self.scales} must be one or more numbers, each once")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """All patches, then sides of a half, a quarter, an eighth and one, where they divide."""
        sides = [vision.grid // part for part in (1, 2, 4, 8) if vision.grid % part == 0]
        scales = tuple(dict.fromkeys(side**2 for side in [*sides, 1]))
        return {"scales": scales}

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """Every scale is a grid of whole windows."""
        super().check(vision, text)
        possible = self.budgets(vision)
        wrong = [scale for scale in self.scales if scale not in possible]
        if wrong:
            raise ValueError(
                f"{wrong[0]} tokens are no grid of whole windows of {vision.grid}x{vision.grid} "
                f"patches; choose among {', '.join(map(str, possible))}"
            )

    def budgets(self, vision: VisionConfig) -> tuple[int, ...]:
        """A square for every divisor of the grid's side."""
        return tuple(side**2 for side in range(vision.grid, 0, -1) if vision.grid % side == 0)

    def training_budgets(self, vision: VisionConfig) -> tuple[int, ...]:
        """The scales."""
        return self.scales

    def connector(self, vision: VisionConfig, text: TextConfig, *, init: Init) -> Connector:
        """LLaVA-1.5's projector, then the mean."""
        return M3Connector(self.scales, **self.widths(vision, text), init=init)

    def hf_code(self, vision: VisionConfig) -> dict[str, Any]:
        """The most tokens; whoever wants fewer changes the number in both configs."""
        return {"kind": self.name, "tokens": self.tokens(vision)}

    def llama_cpp(self, vision: VisionConfig) -> Mapping[int, LlamaCppProjector]:
        """Of MobileVLM's second projector, the mean over 2x2 patches; its grid is 24 x 24."""
        quarter: dict[int, LlamaCppProjector] = {144: "ldpv2"} if vision.grid == 24 else {}
        return {vision.patches: "mlp", **quarter}

    @classmethod
    def read_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any] | None:
        """The scales stand under the key of the released code."""
        scales = hf.get(_SCALES_KEY)
        return None if scales is None else {"scales": scales}

    def hf_keys(self, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The same key."""
        return {_SCALES_KEY: list(self.scales)}


class M3Connector(Connector):
    """Every patch is projected, then windows are averaged: the projector is not linear."""

    def __init__(
        self, scales: tuple[int, ...], *, inputs: int, width: int, outputs: int, init: Init
    ):
        self.scales = scales
        super().__init__(inputs=inputs, width=width, outputs=outputs, init=init)

    def shrink(self, tokens: Tokens, budget: int) -> Tokens:
        """The mean over each window of projected tokens, in raster order."""
        return Tokens(values=pool_to(tokens.values, budget, out=self.rules.tokens))

    def views(self, tokens: Tokens) -> tuple[Tokens, ...]:
        """One a scale, all from one pass of the tower and the projector.

        A view has as many slots as there are patches, of which the last hold its tokens.
        """
        slots = tokens.values.shape[1]

        def view(scale: int) -> Tokens:
            values = self.shrink(tokens, scale).values
            empty = slots - scale
            valid = jnp.broadcast_to(
                jnp.arange(slots) >= empty, (len(values), slots), out_sharding=self.rules.tokens
            )
            return Tokens(values=jnp.pad(values, ((0, 0), (empty, 0), (0, 0))), valid=valid)

        return tuple(tokens if scale == slots else view(scale) for scale in self.scales)


def pool_to(
    tokens: Float[Array, "B P H"], budget: int, *, out: PartitionSpec | None = None
) -> Float[Array, "B K H"]:
    """The mean over each of `budget` square windows of a grid; `budget` of P is what came in."""
    with jax.named_scope("m3"):
        window = math.isqrt(tokens.shape[1]) // math.isqrt(budget)
        return tokens if window == 1 else average_pooling(tokens, window=window, out=out)
