"""A control: some of the patches, drawn once; whatever beats it has learned where to look."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from stf_jax.config.checks import check_positive
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.connector import Connector, VisionFeatures
from stf_jax.models.layers import Init
from stf_jax.systems.base import System


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(System):
    """K patches, the same of every image, in raster order.

    Attributes:
        keep: K.
        seed: of the draw. Another seed is another model, since positions are learned.
    """

    keep: int = 144
    seed: int = 0

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "random patches"
    family: ClassVar[str] = "llava_random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "keep")
        if self.seed < 0:
            raise ValueError(f"Random.seed is {self.seed}; give 0 or more")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """A quarter of the patches, as the published systems keep."""
        quarter = max(vision.patches // 4, 1)
        return {"keep": quarter}

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """There are enough patches."""
        super().check(vision, text)
        if self.keep > vision.patches:
            raise ValueError(f"keep is {self.keep}; an image has {vision.patches} patches")

    def tokens(self, vision: VisionConfig) -> int:
        """As many as are kept."""
        return self.keep

    def indices(self, vision: VisionConfig) -> Int[np.ndarray, "K"]:
        """The patches that are kept, ascending."""
        order = np.random.default_rng(self.seed).permutation(vision.patches)
        return np.sort(order[: self.keep]).astype(np.int32)

    def hf_code(self, vision: VisionConfig) -> dict[str, Any]:
        """The patches by their numbers."""
        return {"kind": self.name, "kept": self.indices(vision).tolist()}

    def connector(self, vision: VisionConfig, text: TextConfig, *, init: Init) -> Connector:
        """A static gather, then LLaVA-1.5's projector."""
        kept = tuple(self.indices(vision).tolist())
        return RandomConnector(kept, **self.widths(vision, text), init=init)


class RandomConnector(Connector):
    """Named patches, then the projector."""

    def __init__(self, kept: tuple[int, ...], *, inputs: int, width: int, outputs: int, init: Init):
        self.kept = kept
        super().__init__(inputs=inputs, width=width, outputs=outputs, init=init)

    def reduce(self, features: VisionFeatures) -> Float[Array, "B K C"]:
        """One tap -> the patches that are kept, in raster order."""
        (tap,) = features.taps
        with jax.named_scope("random"):
            return tap[:, np.asarray(self.kept)]
