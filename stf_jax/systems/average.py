"""Average pooling (arXiv 2506.07138, table 3, "AvgPool 25 %"): the baseline with as few tokens."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.weights import LINEAR, Transform
from stf_jax.systems.base import Variant
from stf_jax.systems.shapes import Shapes, matrix
from stf_jax.systems.stf import STF, MBTFConfig, mixer_fields, spatial_token_fusion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Average(STF):
    """LLaVA-1.5 over the mean of each window of patches: STF's windows, without their detail.

    Attributes:
        mbtf: None, as published; blocks can be mixed before the mean.
        window: side of the square of patches that becomes one token.
    """

    taps: tuple[int, ...] = (23,)
    mbtf: MBTFConfig | None = None
    projector_width: int = 4096

    name: ClassVar[str] = "average"
    title: ClassVar[str] = "AvgPool"
    family: ClassVar[str] = "llava_average"
    published: ClassVar = {
        "vqav2": 77.0,
        "gqa": 62.1,
        "vizwiz": 44.0,
        "scienceqa": 69.8,
        "textvqa": 55.5,
        "pope": 86.3,
        "mmbench": 65.0,
        "mmbench-cn": 57.9,
    }

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """LLaVA-1.5's projector."""
        return {}

    @classmethod
    def variants(cls, *, vision: VisionConfig, text: TextConfig) -> Mapping[str, Variant]:
        """One."""
        return {cls.name: Variant(title=cls.title, system=cls.for_model(vision=vision, text=text))}

    def token_width(self, vision: VisionConfig) -> int:
        """That of a patch."""
        return vision.width

    def fuse(
        self, features: Float[Array, "B P C"], *, out: PartitionSpec | None = None
    ) -> Float[Array, "B K C"]:
        """The mean of each window, in raster order."""
        return average_pooling(features, window=self.window, out=out)

    @property
    def first_weight(self) -> Transform:
        """The projector takes the channels of a patch."""
        return LINEAR

    @classmethod
    def recognizes(cls, shapes: Shapes, vision: VisionConfig) -> bool:
        """The weights are LLaVA-1.5's."""
        return False

    @classmethod
    def fields_of(
        cls,
        shapes: Shapes,
        vision: VisionConfig,
        *,
        selected: Callable[[], int],
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The weights do not tell the window: config.json does, or it is the published one."""
        rows, _ = matrix(shapes, "mm_projector.0.weight")
        fields = {"projector_width": rows, **mixer_fields(shapes)}
        return fields if "taps" in given else {**fields, "taps": [selected()]}


def average_pooling(
    features: Float[Array, "B P C"], *, window: int, out: PartitionSpec | None = None
) -> Float[Array, "B K C"]:
    """The mean over each window of patches, raster order in and out."""
    with jax.named_scope("average_pooling"):
        fused = spatial_token_fusion(features, window=window, out=out)
        batch, tokens, _ = fused.shape
        cut = (batch, tokens, window * window, features.shape[-1])
        return jax.lax.reshape(fused, cut, out_sharding=out).mean(axis=2)
