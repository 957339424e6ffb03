"""What systems share that route tokens around layers of the decoder."""

import re
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.models.routing import Depths
from stf_jax.systems.base import System
from stf_jax.systems.shapes import Shapes


class RoutedSystem(System):
    """LLaVA-1.5 whose language model has routed layers: what these hold and cost."""

    # The name of a layer's router in PyTorch, with {} for the layer.
    router: ClassVar[str]

    @property
    def depths(self) -> Depths:
        """Which layers choose, and how many tokens go through each."""
        raise NotImplementedError

    def held(self, ids: Int[np.ndarray, "T"], vision: VisionConfig) -> tuple[int, ...]:
        """All in dense layers, all text and the chosen vision tokens in the others."""
        each = self.tokens(vision)
        images = int((ids == IMAGE_TOKEN_ID).sum()) // each
        return self.depths.held(len(ids), images=images, tokens_per_image=each)

    @property
    def compacts(self) -> bool:
        """Routed layers hold less."""
        return True

    def layer_lengths(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> tuple[int, ...]:
        """All in dense layers, all text and the chosen vision tokens in the others."""
        each = self.tokens(vision)
        return self.depths.lengths(text.layers, length=length, images=images, tokens_per_image=each)

    def decoder_flops(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> float:
        """The scores."""
        del length
        return 2.0 * len(self.depths.layers) * images * self.tokens(vision) * text.width

    @classmethod
    def recognizes(cls, shapes: Shapes, vision: VisionConfig) -> bool:
        """It has routers."""
        del vision
        return bool(cls.routed_layers(shapes))

    @classmethod
    def routed_layers(cls, shapes: Shapes) -> list[int]:
        """The layers that have a router in a checkpoint, ascending."""
        name = re.compile(re.escape(f"{cls.router}.weight").replace(r"\{\}", r"(\d+)"))
        return sorted(int(match[1]) for match in map(name.fullmatch, shapes) if match)
