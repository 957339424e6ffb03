"""What a vision tower is: sizes only, nothing about files, devices or training."""

import dataclasses
from typing import Literal, Self

from stf_jax.config.checks import check_above_zero, check_positive
from stf_jax.config.text import MOST_LAYERS

Activation = Literal["quick_gelu", "gelu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A CLIP vision transformer. Defaults: CLIP ViT-L/14 at 336 px."""

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    mlp_width: int = 4096
    layers: int = 24
    heads: int = 16
    norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"

    def __post_init__(self) -> None:
        check_positive(self, "patch_size", "width", "mlp_width", "heads")
        check_positive(self, "image_size", most=2**14)
        check_positive(self, "layers", most=MOST_LAYERS)
        check_above_zero(self, "norm_eps")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"vision width {self.width} does not divide by {self.heads} heads")

    @classmethod
    def clip_l_336(cls) -> Self:
        """openai/clip-vit-large-patch14-336."""
        return cls()

    @classmethod
    def clip_l_224(cls) -> Self:
        """openai/clip-vit-large-patch14."""
        return cls(image_size=224)

    @classmethod
    def tiny(cls) -> Self:
        """16 patches, 4 layers: for tests and first steps."""
        return cls(image_size=56, width=32, mlp_width=64, layers=4, heads=4)

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """P, the patches of one image, without the class token."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads
