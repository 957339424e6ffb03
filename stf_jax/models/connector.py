"""What lies between the vision tower and the language model: what it takes, and what it gives."""

import dataclasses
from typing import Protocol

import jax
from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.layers import MLP, Init, gelu


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionFeatures:
    """What the tower found in each image.

    Attributes:
        taps: M hidden states, in the order of the system's taps; no class token, raster order.
    """

    taps: tuple[Float[Array, "B P C"], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """K tokens an image, in the width of the language model."""

    values: Float[Array, "B K H"]


class Connector(nnx.Module):
    """Fewer tokens, then LLaVA-1.5's projector: Linear, GELU, Linear.

    LLaVA-1.5 (arXiv 2310.03744) keeps every token of its one tap; a system that makes fewer writes
    `reduce`.

    Args:
        inputs: channels of a token before the projector.
        width: between the two linear layers.
        outputs: H, the width of the language model.
        init: of the weights.
    """

    def __init__(self, *, inputs: int, width: int, outputs: int, init: Init):
        self.rules = init.rules
        self.projector = MLP(inputs, width, outputs, init=init)

    def __call__(self, features: VisionFeatures) -> Tokens:
        """Tokens of each image, in raster order."""
        reduced = self.reduce(features)
        with jax.named_scope("projector"):
            return Tokens(values=self.projector(reduced, activation=gelu))

    def reduce(self, features: VisionFeatures) -> Float[Array, "B K _"]:
        """Every patch of the one tap."""
        (tap,) = features.taps
        return tap


class ConnectedSystem(Protocol):
    """What the networks ask of a system; `stf_jax.systems.base.System` is one."""

    @property
    def taps(self) -> tuple[int, ...]:
        """The hidden states of the tower that are read."""

    def connector(self, vision: VisionConfig, text: TextConfig, *, init: Init) -> Connector:
        """The module between the tower and the language model."""

    def flops(self, vision: VisionConfig, text: TextConfig) -> float:
        """Arithmetic of the connector for one image."""


class Architecture(Protocol):
    """The sizes of a whole model; `stf_jax.systems.base.LlavaConfig` is one."""

    @property
    def vision(self) -> VisionConfig:
        """The tower."""

    @property
    def text(self) -> TextConfig:
        """The language model."""

    @property
    def system(self) -> ConnectedSystem:
        """What makes an image's tokens."""

    @property
    def image_size(self) -> int:
        """The side in pixels at which the tower sees an image."""

    @property
    def tokens_per_image(self) -> int:
        """K, the tokens of an image that the language model sees."""
