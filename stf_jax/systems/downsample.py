"""A control: a smaller image, so that the tower itself sees fewer patches.

The tower's positions are interpolated to the smaller grid (`stf_jax.models.clip`). It is the
cheapest way to fewer tokens: the tower's arithmetic falls, too.
"""

import dataclasses
from typing import Any, ClassVar

from stf_jax.config.checks import check_positive
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.systems.base import System


@dataclasses.dataclass(frozen=True, kw_only=True)
class Downsample(System):
    """LLaVA-1.5 over an image of another size.

    Attributes:
        side: of the image in pixels, a multiple of the tower's patch size.
    """

    side: int = 168

    name: ClassVar[str] = "downsample"
    title: ClassVar[str] = "smaller image"
    family: ClassVar[str] = "llava_downsample"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "side")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """Half the side, rounded down to whole patches: a quarter of the tokens."""
        side = max(vision.grid // 2, 1) * vision.patch_size
        return {"side": side}

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """The side is a whole number of patches, no more than the tower was trained with."""
        super().check(vision, text)
        patch, most = vision.patch_size, vision.image_size
        if self.side % patch or self.side > most:
            raise ValueError(
                f"side is {self.side}; this tower can see {patch} to {most} pixels in steps of "
                f"{patch}: n times {patch} gives n * n tokens"
            )

    def image_size(self, vision: VisionConfig) -> int:
        """The smaller side."""
        return self.side

    def hf_code(self, vision: VisionConfig) -> dict[str, Any]:
        """Every patch of the smaller image."""
        del vision
        return {"kind": self.name}
