"""What a model is: frozen dataclasses for the vision tower, the fusion and the language model.

Architecture only, nothing about files, devices or training; the published sizes are factories.
`stf_jax.convert.hf_config` translates the parts from and to the `config.json` of `transformers`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

import jsonargparse
from jax.sharding import Mesh

from stf_jax.config.checks import check_positive
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig

Reduction = Literal["identity", "average", "stf"]

# The hidden states of the tower that LLaVA-STF mixes, in the order of concatenation.
STF_TAPS = (23, 21, 18, 15, 12, 9, 6, 3)

# The factories of `LlavaConfig`, for configs that name one.
ARCHITECTURES = (
    "llava_stf_7b", "llava_stf_13b", "llava_1_5_7b", "llava_1_5_13b",
    "llava_average_7b", "llava_average_13b", "tiny",
)  # fmt: skip


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
        check_positive(self, "window", "projector_width")
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
    def by_name(cls, name: str) -> Self:
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


def check_divisible(config: LlavaConfig, mesh: Mesh) -> None:
    """Refuses a mesh that does not divide the model.

    Raises:
        ValueError: lists every size that does not divide, and by which axis.
    """
    text, vision, fusion = config.text, config.vision, config.fusion
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    sizes = [
        ("text.width", text.width, "fsdp", fsdp),
        ("vision.width", vision.width, "fsdp", fsdp),
        ("vocabulary (pad it on import)", text.padded_vocab_size, "tensor", tensor),
        ("text.heads", text.heads, "tensor", tensor),
        ("text.kv_heads", text.kv_heads, "tensor", tensor),
        ("text.mlp_width", text.mlp_width, "tensor", tensor),
        ("vision.heads", vision.heads, "tensor", tensor),
        ("vision.mlp_width", vision.mlp_width, "tensor", tensor),
        ("fusion.projector_width", fusion.projector_width, "tensor", tensor),
    ]
    if fusion.mbtf:
        sizes.append(("fusion.mbtf.mlp_width", fusion.mbtf.mlp_width, "tensor", tensor))
    wrong = [f"{name} {size} by {axis} {by}" for name, size, axis, by in sizes if size % by]
    if wrong:
        raise ValueError(f"the mesh does not divide the model: {', '.join(wrong)}")
