"""What a model is: frozen dataclasses for the vision tower, the fusion and the language model.

Architecture only, nothing about files, devices or training; the published sizes are factories.
`stf_jax.hf_config` translates the parts from and to the `config.json` of `transformers`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import jsonargparse

Activation = Literal["quick_gelu", "gelu"]
Reduction = Literal["identity", "average", "stf"]

# The hidden states of the tower that LLaVA-STF mixes, in the order of concatenation.
STF_TAPS = (23, 21, 18, 15, 12, 9, 6, 3)

# The factories of `LlavaConfig`, for configs that name one.
ARCHITECTURES = (
    "llava_stf_7b", "llava_stf_13b", "llava_1_5_7b", "llava_1_5_13b",
    "llava_average_7b", "llava_average_13b", "tiny",
)  # fmt: skip


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{type(config).__name__}.{name} is {value}; it must be at least 1")


def _above_zero(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        # Written so that NaN is refused.
        if not 0 < value < math.inf:
            raise ValueError(f"{type(config).__name__}.{name} is {value}; it must be above 0")


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
        _positive(self, "image_size", "patch_size", "width", "mlp_width", "layers", "heads")
        _above_zero(self, "norm_eps")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining."""

    kind: Literal["linear", "llama3"]
    factor: float
    # The rest is read for "llama3" only.
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        _above_zero(self, "factor", "low_frequency_factor", "high_frequency_factor")
        _positive(self, "original_positions")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"RopeScaling.high_frequency_factor {self.high_frequency_factor} must be above "
                f"low_frequency_factor {self.low_frequency_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A LLaMA decoder. Defaults: Vicuna-7B-v1.5."""

    vocab_size: int = 32000
    # Rows beyond the vocabulary that make it divide by a mesh; they are never predicted.
    vocab_padding: int = 0
    width: int = 4096
    mlp_width: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 4096
    tie_embeddings: bool = False
    bos_id: int = 1
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int = 0

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "width", "mlp_width", "layers", "heads", "kv_heads")
        _positive(self, "head_dim", "max_positions")
        _above_zero(self, "norm_eps", "rope_theta")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and columns of the head."""
        return self.vocab_size + self.vocab_padding

    @classmethod
    def vicuna_7b(cls) -> Self:
        """lmsys/vicuna-7b-v1.5."""
        return cls()

    @classmethod
    def vicuna_13b(cls) -> Self:
        """lmsys/vicuna-13b-v1.5."""
        return cls(width=5120, mlp_width=13824, layers=40, heads=40, kv_heads=40)

    @classmethod
    def tiny(cls) -> Self:
        """Two layers with grouped key-value heads: for tests and first steps."""
        return cls(
            vocab_size=600, width=64, mlp_width=112, layers=2, heads=8, kv_heads=4, head_dim=8
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MBTFConfig:
    """Multi-Block Token Fusion: the width between its linear layers, and the last activation."""

    mlp_width: int = 4096
    # The paper's figure ends in an activation; the released code and weights have none.
    last_activation: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """What happens between the tower and the language model. Defaults: LLaVA-STF-7B."""

    # Indices into the tower's hidden states: 0 is the embedding, k the output of layer k.
    taps: tuple[int, ...] = STF_TAPS
    mbtf: MBTFConfig | None = MBTFConfig()
    reduction: Reduction = "stf"
    # Side of the square window of patches that becomes one token; 1 for "identity".
    window: int = 2
    # Width between the two linear layers of the projector.
    projector_width: int = 16384

    def __post_init__(self) -> None:
        _positive(self, "window", "projector_width")
        if not self.taps or min(self.taps) < 0 or max(self.taps) == 0:
            raise ValueError(
                f"taps {self.taps} must be one or more hidden states, from 0 on, not all 0"
            )
        if len(self.taps) > 1 and self.mbtf is None:
            raise ValueError(f"{len(self.taps)} taps need mbtf to mix them; without it, give one")
        if self.reduction == "identity" and self.window != 1:
            raise ValueError(
                f"reduction 'identity' keeps every token, so window must be 1, not {self.window}"
            )

    @classmethod
    def stf(
        cls, *, vision_width: int = 1024, taps: tuple[int, ...] = STF_TAPS, window: int = 2
    ) -> Self:
        """LLaVA-STF: MBTF, then windows, with the released widths of 4 and 16 tower widths."""
        return cls(
            taps=taps,
            mbtf=MBTFConfig(mlp_width=4 * vision_width),
            reduction="stf",
            window=window,
            projector_width=16 * vision_width,
        )

    @classmethod
    def llava(cls, *, text_width: int, tap: int = 23) -> Self:
        """LLaVA-1.5: one tap, every token."""
        return cls(
            taps=(tap,), mbtf=None, reduction="identity", window=1, projector_width=text_width
        )

    @classmethod
    def average(cls, *, text_width: int, tap: int = 23, window: int = 2) -> Self:
        """The paper's AvgPool arm: LLaVA-1.5 over the mean of each window."""
        return cls(
            taps=(tap,), mbtf=None, reduction="average", window=window, projector_width=text_width
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """A whole vision-language model. Defaults: LLaVA-STF-7B."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    fusion: FusionConfig = FusionConfig()

    def __post_init__(self) -> None:
        last, layers = max(self.fusion.taps), self.vision.layers
        if last > layers:
            raise ValueError(f"tap {last} lies beyond the tower's {layers} layers")
        grid, window = self.vision.grid, self.fusion.window
        if grid % window:
            raise ValueError(f"window {window} does not divide the tower's {grid}x{grid} grid")

    @classmethod
    def llava_stf_7b(cls) -> Self:
        """The published LLaVA-STF-7B: 144 tokens an image."""
        return cls()

    @classmethod
    def llava_stf_13b(cls) -> Self:
        """LLaVA-STF over Vicuna-13B-v1.5."""
        return cls(text=TextConfig.vicuna_13b())

    @classmethod
    def llava_1_5_7b(cls) -> Self:
        """liuhaotian/llava-v1.5-7b: 576 tokens an image."""
        return cls(fusion=FusionConfig.llava(text_width=4096))

    @classmethod
    def llava_1_5_13b(cls) -> Self:
        """liuhaotian/llava-v1.5-13b: 576 tokens an image."""
        return cls(text=TextConfig.vicuna_13b(), fusion=FusionConfig.llava(text_width=5120))

    @classmethod
    def llava_average_7b(cls) -> Self:
        """The paper's AvgPool arm over Vicuna-7B-v1.5: 144 tokens an image."""
        return cls(fusion=FusionConfig.average(text_width=4096))

    @classmethod
    def llava_average_13b(cls) -> Self:
        """The paper's AvgPool arm over Vicuna-13B-v1.5: 144 tokens an image."""
        return cls(text=TextConfig.vicuna_13b(), fusion=FusionConfig.average(text_width=5120))

    @classmethod
    def tiny(cls) -> Self:
        """LLaVA-STF small enough for a test: 4 tokens an image."""
        vision = VisionConfig.tiny()
        fusion = FusionConfig.stf(vision_width=vision.width, taps=(3, 1))
        return cls(vision=vision, text=TextConfig.tiny(), fusion=fusion)

    @classmethod
    def named(cls, name: str) -> Self:
        """The factory of that name.

        Raises:
            ValueError: there is none; lists them.
        """
        if name not in ARCHITECTURES:
            raise ValueError(f"architecture {name!r} is not one of {', '.join(ARCHITECTURES)}")
        config: Self = getattr(cls, name)()
        return config

    @property
    def tokens_per_image(self) -> int:
        """K, the tokens that the language model sees for one image."""
        return (self.vision.grid // self.fusion.window) ** 2

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: an unknown or mistyped key, or a value that does not fit.
        """
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "model")
        try:
            parsed = parser.parse_object({"model": dict(tree)})
            config: Self = parser.instantiate(parsed)["model"]
        except (jsonargparse.ArgumentError, TypeError) as error:
            raise ValueError(f"not a model config: {error}") from error
        return config

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, ready for JSON or YAML."""
        return dataclasses.asdict(self)
