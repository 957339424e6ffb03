"""What systems share that drop tokens of images between the decoder's layers."""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.models.cache import Split
from stf_jax.models.layers import Init
from stf_jax.models.llama import Llama
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.pruning import PrunedLlama, Schedule
from stf_jax.systems.base import System


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningSystem(System):
    """LLaVA-1.5 up to the language model, which drops tokens of images as it goes.

    What is dropped depends on the question, so two questions about an image share nothing but the
    pixels. In a chat the question that the cache was made with has decided; later ones see what it
    has left. A chat that begins its cache anew, with another image or when it has outgrown its
    room, lets its newest question decide.

    FLOPs of a prompt leave out the few rows of attention that score tokens.
    """

    # The language model, which knows what scores.
    llama: ClassVar[type[PrunedLlama]] = PrunedLlama

    def stages(self, vision: VisionConfig) -> Schedule:
        """(layer, tokens of an image from this layer on), layers ascending."""
        raise NotImplementedError

    def schedule_of(self, vision: VisionConfig) -> Schedule:
        """The stages that drop anything."""
        schedule, left = [], self.tokens(vision)
        for layer, count in self.stages(vision):
            if count < left:
                schedule.append((layer, count))
                left = count
        return tuple(schedule)

    def check_stages(self, vision: VisionConfig, text: TextConfig) -> None:
        """Refuses a schedule that no model can follow.

        Raises:
            ValueError: layers that are not there, or counts that grow.
        """
        layers = [layer for layer, _ in self.stages(vision)]
        counts = [count for _, count in self.stages(vision)]
        if sorted(set(layers)) != layers:
            raise ValueError(f"{self.title} drops at layers {layers}; give each once, ascending")
        if any(not 1 <= layer < text.layers for layer in layers):
            raise ValueError(
                f"{self.title} drops at layers {layers}; this language model can at 1 to "
                f"{text.layers - 1}"
            )
        bounds = [self.tokens(vision), *counts, 0]
        if sorted(bounds, reverse=True) != bounds:
            raise ValueError(
                f"{self.title} keeps {counts} of an image's {bounds[0]} tokens; give 0 to "
                f"{bounds[0]}, none above the one before: what is dropped does not come back"
            )

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """One hidden state, and a schedule for this language model."""
        super().check(vision, text)
        self.check_stages(vision, text)

    def decoder(
        self, vision: VisionConfig, text: TextConfig, *, init: Init, lora: LoRAConfig | None
    ) -> Llama:
        """The language model in stages."""
        schedule, tokens = self.schedule_of(vision), self.tokens(vision)
        return self.llama(text, tokens=tokens, schedule=schedule, init=init, lora=lora)

    def split(self, ids: Int[np.ndarray, "T"]) -> Split:
        """All of a prompt with images decides what stays; its last position is computed twice."""
        if IMAGE_TOKEN_ID not in ids:
            return super().split(ids)
        return Split(prefilled=len(ids), start=len(ids) - 1)

    def held(self, ids: Int[np.ndarray, "T"], vision: VisionConfig) -> tuple[int, ...]:
        """Each stage without what was dropped before it."""
        tokens = self.tokens(vision)
        images = int((ids == IMAGE_TOKEN_ID).sum()) // tokens
        return self._lengths(vision, length=len(ids), images=images)

    @property
    def compacts(self) -> bool:
        """Later stages hold fewer positions."""
        return True

    def layer_lengths(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> tuple[int, ...]:
        """What is alive in each layer."""
        starts = [layer for layer, _ in self.schedule_of(vision)]
        lengths = self._lengths(vision, length=length, images=images)
        return tuple(
            lengths[sum(start <= layer for start in starts)] for layer in range(text.layers)
        )

    def training_flops(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> float:
        """Scores by queries of all positions, since any may score; they have no gradient."""
        del images
        heads, kv_heads = text.heads * text.head_dim, text.kv_heads * text.head_dim
        scores = 2.0 * length * (text.width * (heads + kv_heads) + length * heads)
        return len(self.schedule_of(vision)) * scores

    def _lengths(self, vision: VisionConfig, *, length: int, images: int) -> tuple[int, ...]:
        """Positions of each stage."""
        tokens = self.tokens(vision)
        counts = [tokens, *(count for _, count in self.schedule_of(vision))]
        return tuple(length - images * (tokens - count) for count in counts)
