"""VideoLLM-MoD: mixture of depths over vision tokens (arXiv 2408.16730).

Every other layer lets through the best of an image's tokens only; all text goes
through every layer. There is no released code. From descriptions of the paper: a linear score for
each layer, a share of 0.2 of each frame, interleaved layers. Our own choice, since its equation
could not be read:

- the score is x . w on the layer's input, without bias, in float32;
- k = max(1, floor(0.2 K)) of an image's K tokens go through layers 1, 3, 5, ... (from 0), ties to
  the lower index, at their own positions;
- what goes through becomes x + score (layer(x) - x); what skips stays x. So an image whose scores
  are near 0 passes unchanged, as at the start of training;
- weights start as those of a linear layer.

The paper's frames have 10 tokens of another tower; here an image or a frame has LLaVA-1.5's.
`stream_loss_weight` is that of VideoLLM-online's loss (arXiv 2406.11816): what a vision token
predicts counts so much.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.layers import Init
from stf_jax.models.llama import DecoderLayer
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.marks import IMAGE, Marks
from stf_jax.models.routing import Depths, RoutedLlama, Routing, router_entries
from stf_jax.models.weights import Entry
from stf_jax.systems.routed import RoutedSystem
from stf_jax.systems.shapes import Shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLLMMoD(RoutedSystem):
    """Defaults: over LLaVA-1.5-7B.

    Attributes:
        layers: that are routed, ascending, from 0.
        ratio: of an image's tokens that go through such a layer; at least one does.
        stream_loss_weight: by which the loss counts what a vision token predicts.
    """

    layers: tuple[int, ...] = tuple(range(1, 32, 2))
    ratio: float = 0.2
    stream_loss_weight: float = 1.0

    name: ClassVar[str] = "videollm_mod"
    title: ClassVar[str] = "VideoLLM-MoD"
    family: ClassVar[str] = "llava_videollm_mod"
    router: ClassVar[str] = "model.layers.{}.router"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; give more than 0, at most 1")
        if not 0 <= self.stream_loss_weight < math.inf:
            raise ValueError(
                f"stream_loss_weight is {self.stream_loss_weight}; give 0 or more, and finite"
            )
        if not self.layers or list(self.layers) != sorted({*self.layers}) or self.layers[0] < 0:
            raise ValueError(f"layers {self.layers} must be one or more numbers from 0, ascending")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """Every odd layer."""
        return {"layers": tuple(range(1, text.layers, 2))}

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """The language model has these layers."""
        super().check(vision, text)
        if self.layers[-1] >= text.layers:
            raise ValueError(
                f"layer {self.layers[-1]} cannot be routed: the language model has {text.layers} "
                f"layers; give layers up to {text.layers - 1}"
            )

    @property
    def depths(self) -> Depths:
        """One ratio for all of them."""
        return Depths(
            ratios=tuple((layer, self.ratio) for layer in self.layers), keep=_keep, per_image=True
        )

    def decoder(
        self, vision: VisionConfig, text: TextConfig, *, init: Init, lora: LoRAConfig | None
    ) -> "MoDLlama":
        """LLaMA with routed layers."""
        return MoDLlama(self, self.tokens(vision), text, init=init, lora=lora)

    def decoder_weights(self, vision: VisionConfig, text: TextConfig) -> tuple[Entry, ...]:
        """A router for each of the layers; there are no published names."""
        del vision
        return router_entries(self.router, text, self.layers)

    @classmethod
    def own_fields(cls, shapes: Shapes) -> dict[str, Any]:
        """The routers tell which layers are routed."""
        layers = cls.routed_layers(shapes)
        return {"layers": layers} if layers else {}


def _keep(tokens: Int[np.ndarray, "N"], ratio: float) -> Int[np.ndarray, "N"]:
    """At least one; a product that is a whole number but for rounding is that number."""
    return np.maximum(np.floor(ratio * tokens + 1e-6).astype(int), 1)


class MoDLlama(RoutedLlama):
    """What goes through changes by its score times what the layer would change."""

    def __init__(
        self,
        system: VideoLLMMoD,
        tokens_per_image: int,
        text: TextConfig,
        *,
        init: Init,
        lora: LoRAConfig | None,
    ):
        super().__init__(
            text,
            system.depths,
            tokens_per_image=tokens_per_image,
            bias=False,
            zeros=False,
            init=init,
            lora=lora,
        )
        self.stream_loss_weight = system.stream_loss_weight

    def weigh(self, logits: Float[Array, "B T"]) -> Float[Array, "B T"]:
        """The score as it is."""
        return logits

    def passed(
        self,
        layer: DecoderLayer,
        x: Float[Array, "B T H"],
        attended: Float[Array, "B T N D"],
        routing: Routing,
    ) -> Float[Array, "B T H"]:
        """X + score (layer(x) - x); of text, layer(x)."""
        whole = layer.finish(x, attended)
        return jnp.where(routing.vision, x + routing.weight * (whole - x), whole)

    def skipped(self, x: Float[Array, "B T H"], routing: Routing) -> Float[Array, "B T H"]:
        """Unchanged."""
        del routing
        return x

    def loss_weights(self, marks: Marks) -> Float[Array, "B T"] | None:
        """What a vision token predicts is whether to stay silent."""
        if self.stream_loss_weight == 1:
            return None
        return jnp.where(marks.kind == IMAGE, jnp.float32(self.stream_loss_weight), 1.0)
