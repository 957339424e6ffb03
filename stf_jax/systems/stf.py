"""LLaVA-STF: "Learning Compact Vision Tokens for Efficient Large Multimodal Models".

arXiv 2506.07138. Two changes to LLaVA-1.5, in this order (paper, figure 2):

1. Multi-Block Token Fusion (section 3.3): every patch's features at M blocks of the tower are
   concatenated and mixed by two linear layers, so that fine detail of early blocks survives the
   loss of tokens that follows.
2. Spatial Token Fusion (section 3.2): the grid of patches is cut into windows, and the features of
   a window lie side by side in the channels of one token. Nothing is averaged away: the projector
   learns what to keep. With the published 2x2 windows, 576 tokens of 1024 channels are 144 tokens
   of 4096.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from stf_jax.config.checks import check_positive
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.connector import Connector, VisionFeatures
from stf_jax.models.layers import MLP, Init, gelu
from stf_jax.models.weights import Entry, Transform, mlp_entries, windows
from stf_jax.systems.base import System, Variant
from stf_jax.systems.shapes import Shapes, matrix

# The hidden states that LLaVA-STF mixes, in the order of concatenation.
STF_TAPS = (23, 21, 18, 15, 12, 9, 6, 3)

_MIXER = "mm_projector_crosslayer."


@dataclasses.dataclass(frozen=True, kw_only=True)
class MBTFConfig:
    """Multi-Block Token Fusion: the width between its linear layers, and the last activation."""

    mlp_width: int = 4096
    # The paper's figure ends in an activation; the released code and weights have none.
    last_activation: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "mlp_width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class STF(System):
    """Blocks are fused first, then space. Defaults: LLaVA-STF-7B.

    Attributes:
        mbtf: None reads one tap and mixes nothing.
        window: side of the square of patches that becomes one token.
    """

    taps: tuple[int, ...] = STF_TAPS
    mbtf: MBTFConfig | None = MBTFConfig()
    window: int = 2
    projector_width: int = 16384

    name: ClassVar[str] = "stf"
    title: ClassVar[str] = "LLaVA-STF"
    family: ClassVar[str] = "llava_stf"
    published: ClassVar = {
        "vqav2": 78.1,
        "gqa": 61.9,
        "vizwiz": 51.1,
        "scienceqa": 70.5,
        "textvqa": 57.4,
        "pope": 86.0,
        "mme": 1482.8,
        "mmbench": 66.2,
        "mmbench-cn": 58.9,
    }
    prefixes: ClassVar = {"mm_projector.": "llava", _MIXER: "llava-stf"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "window")
        if len(self.taps) > 1 and self.mbtf is None:
            raise ValueError(f"{len(self.taps)} taps need mbtf to mix them; without it, give one")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The released proportions: 4 and 16 tower widths, the last block but one and every third.

        A tower of 24 layers gets `STF_TAPS`.
        """
        last = vision.layers - 1
        return {
            "taps": (last, *reversed(range(3, last, 3))),
            "mbtf": MBTFConfig(mlp_width=4 * vision.width),
            "projector_width": 16 * vision.width,
        }

    @classmethod
    def variants(cls, *, vision: VisionConfig, text: TextConfig) -> Mapping[str, Variant]:
        """The paper's ablation: STF alone, and both."""
        both = cls.for_model(vision=vision, text=text)
        alone = dataclasses.replace(both, taps=both.taps[:1], mbtf=None)
        return {
            "stf": Variant(title="STF", system=alone),
            "stf_mbtf": Variant(title="STF + MBTF", system=both),
        }

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """The window divides the grid."""
        check_window(self.window, vision)

    def tokens(self, vision: VisionConfig) -> int:
        """One a window."""
        return (vision.grid // self.window) ** 2

    def token_width(self, vision: VisionConfig) -> int:
        """The patches of a window, side by side."""
        return vision.width * self.window**2

    def connector(self, vision: VisionConfig, text: TextConfig, *, init: Init) -> "STFConnector":
        """MBTF, STF, projector."""
        return STFConnector(self, vision, text, init=init)

    def flops(self, vision: VisionConfig, text: TextConfig) -> float:
        """MBTF runs over every patch, the projector over every window."""
        mixed = 0
        if self.mbtf is not None:
            mixed = vision.patches * self.mbtf.mlp_width * vision.width * (len(self.taps) + 1)
        return 2.0 * mixed + super().flops(vision, text)

    def tensor_sizes(self) -> dict[str, int]:
        """The widths inside the two MLPs."""
        mixer = {} if self.mbtf is None else {"mbtf.mlp_width": self.mbtf.mlp_width}
        return {**super().tensor_sizes(), **mixer}

    def fuse(
        self, features: Float[Array, "B P C"], *, out: PartitionSpec | None = None
    ) -> Float[Array, "B K _"]:
        """One token a window, in raster order."""
        return spatial_token_fusion(features, window=self.window, out=out)

    @property
    def first_weight(self) -> Transform:
        """The released projector takes a window channel by channel; here patch by patch."""
        return windows(self.window)

    def weights(self, vision: VisionConfig, text: TextConfig) -> tuple[Entry, ...]:
        """The mixer, where there is one, and the projector."""
        projector = self.projector_weights(vision, text, first=self.first_weight)
        if self.mbtf is None:
            return projector
        mixer = mlp_entries(
            "connector/mbtf",
            _MIXER,
            inputs=len(self.taps) * vision.width,
            hidden=self.mbtf.mlp_width,
            outputs=vision.width,
        )
        return (*mixer, *projector)

    @classmethod
    def recognizes(cls, shapes: Shapes, vision: VisionConfig) -> bool:
        """There is a mixer, or the projector takes more channels than a patch has."""
        if f"{_MIXER}0.weight" in shapes:
            return True
        name = "mm_projector.0.weight"
        return name in shapes and matrix(shapes, name)[1] != vision.width

    @classmethod
    def fields_of(
        cls,
        shapes: Shapes,
        vision: VisionConfig,
        *,
        selected: Callable[[], int],
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Window and widths follow from the weights; the taps from their number."""
        name = f"{_MIXER}0.weight"
        channels = matrix(shapes, name)[1] if name in shapes else vision.width
        if channels % vision.width:
            raise ValueError(
                f"{name} takes {channels} channels, no multiple of the tower's width "
                f"{vision.width}; is this the right vision tower?"
            )
        rows, columns = matrix(shapes, "mm_projector.0.weight")
        area = columns / vision.width
        window = math.isqrt(int(area))
        if window**2 != area or window == 0:
            raise ValueError(
                f"the projector takes {columns} channels, which is no square window of tokens of "
                f"the tower's width {vision.width}; is this the right vision tower?"
            )
        fields = {"window": window, "projector_width": rows, **mixer_fields(shapes)}
        if "taps" in given:
            return fields
        taps = _published_taps(channels // vision.width, selected)
        return {"taps": list(taps), **fields}

    def hf_code(self, vision: VisionConfig) -> dict[str, Any]:
        """Windows with all of their channels."""
        del vision
        mixer = None if self.mbtf is None else dataclasses.asdict(self.mbtf)
        return {"kind": self.name, "window": self.window, "mbtf": mixer}

    @property
    def layout(self) -> str:
        """With a mixer it is LLaVA-STF's own, without it LLaVA-1.5's."""
        return "llava" if self.mbtf is None else "llava-stf"


def mixer_fields(shapes: Shapes) -> dict[str, Any]:
    """The field `mbtf`, as the weights tell it."""
    name = f"{_MIXER}0.weight"
    return {"mbtf": {"mlp_width": matrix(shapes, name)[0]} if name in shapes else None}


def _published_taps(count: int, selected: Callable[[], int]) -> tuple[int, ...]:
    """The taps of a mixer of so many hidden states, where config.json does not name them."""
    if count == 1:
        return (selected(),)
    # The released taps, and those of the unpublished 13B run.
    known = {8: STF_TAPS, 4: (23, 18, 12, 6)}
    if count not in known:
        raise ValueError(
            f"{_MIXER}0.weight mixes {count} hidden states of the tower, and nothing says which; "
            'add "mm_system": {"taps": [...]} to config.json, in order of concatenation'
        )
    return known[count]


class STFConnector(Connector):
    """MBTF, then STF, then the projector."""

    def __init__(self, system: STF, vision: VisionConfig, text: TextConfig, *, init: Init):
        self.system = system
        self.mbtf = system.mbtf and MBTF(
            system.mbtf, blocks=len(system.taps), vision_width=vision.width, init=init
        )
        super().__init__(**system.widths(vision, text), init=init)

    def reduce(self, features: VisionFeatures) -> Float[Array, "B K _"]:
        """M taps -> K tokens an image, in raster order."""
        mixed = self.mbtf.mix(features.taps) if self.mbtf else features.taps[0]
        return self.system.fuse(mixed, out=self.rules.tokens)


class MBTF(MLP):
    """Concatenate on channels, Linear, GELU, Linear: M x [B, P, C] -> [B, P, C]."""

    def __init__(self, config: MBTFConfig, *, blocks: int, vision_width: int, init: Init):
        super().__init__(blocks * vision_width, config.mlp_width, vision_width, init=init)
        self.last_activation = config.last_activation

    def mix(self, taps: tuple[Float[Array, "B P C"], ...]) -> Float[Array, "B P C"]:
        """`taps` in the order of the config."""
        with jax.named_scope("mbtf"):
            mixed = self(jnp.concatenate(taps, axis=-1), activation=gelu)
            return gelu(mixed) if self.last_activation else mixed


def spatial_token_fusion(
    features: Float[Array, "B P C"], *, window: int, out: PartitionSpec | None = None
) -> Float[Array, "B K _"]:
    """Raster order in, raster order out; channels of a token are (row, column, channel).

    The published weights number them (channel, row, column); `STF.weights` permutes the projector.

        patches of a 4x4 grid     window 2: token 0 is [f0, f1, f4, f5], token 1 [f2, f3, f6, f7],
         0  1 |  2  3             token 2 [f8, f9, f12, f13], token 3 [f10, f11, f14, f15]
         4  5 |  6  7
        ------+------
         8  9 | 10 11
        12 13 | 14 15
    """
    with jax.named_scope("stf"):
        batch, patches, channels = features.shape
        side = math.isqrt(patches) // window
        cut = (batch, side, window, side, window, channels)
        grouped = jax.lax.reshape(features, cut, out_sharding=out).swapaxes(2, 3)
        fused = (batch, side * side, window * window * channels)
        return jax.lax.reshape(grouped, fused, out_sharding=out)


def check_window(window: int, vision: VisionConfig) -> None:
    """Refuses a window that does not divide the tower's grid.

    Raises:
        ValueError: it does not.
    """
    grid = vision.grid
    if grid % window:
        fits = [str(side) for side in range(1, grid + 1) if grid % side == 0]
        raise ValueError(
            f"window {window} does not divide the tower's {grid}x{grid} grid; windows that do: "
            + ", ".join(fits)
        )
