"""How much arithmetic a model does: matmuls and attention, counted by hand, two FLOPs a product.

Attention counts every pair of positions, masked or not, as is usual for model FLOPs (PaLM,
arXiv 2204.02311, appendix B); what `remat` computes again is not counted.
"""

import dataclasses
from typing import Literal

from stf_jax.systems.base import LlavaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """By part of the model; fusion includes the projector, text the head."""

    vision: float
    fusion: float
    text: float

    @property
    def total(self) -> float:
        """Of the whole model."""
        return self.vision + self.fusion + self.text


def forward(config: LlavaConfig, *, rows: int, length: int, images: int) -> Flops:
    """Of one forward pass over `rows` rows of `length` positions with `images` images each."""
    weights, attention = _text(config, length)
    return Flops(
        vision=rows * images * _vision(config),
        fusion=rows * images * _fusion(config),
        text=rows * (weights + attention),
    )


def training(
    config: LlavaConfig,
    *,
    stage: Literal["pretrain", "finetune", "lora"],
    rows: int,
    length: int,
    images: int,
) -> Flops:
    """Of one training step; adapters, which are small, are not counted.

    A backward pass takes as many FLOPs for the gradient of its inputs, and as many again for that
    of its weights where they are trained. The tower has none.
    """
    weights, attention = _text(config, length)
    passes = 3 if stage == "finetune" else 2
    return Flops(
        vision=rows * images * _vision(config),
        fusion=rows * images * _fusion(config) * 3,
        text=rows * (weights * passes + attention * 3),
    )


def _vision(config: LlavaConfig) -> float:
    """Of one image, up to the last tap."""
    vision, layers = config.vision, max(config.fusion.taps)
    width, tokens = vision.width, vision.patches + 1
    layer = 2 * tokens * (4 * width**2 + 2 * width * vision.mlp_width) + 4 * tokens**2 * width
    return 2 * vision.patches * 3 * vision.patch_size**2 * width + layers * layer


def _fusion(config: LlavaConfig) -> float:
    """Of one image."""
    fusion, width = config.fusion, config.vision.width
    mixed = 0
    if fusion.mbtf is not None:
        mixed = config.vision.patches * fusion.mbtf.mlp_width * width * (len(fusion.taps) + 1)
    fused = width * (fusion.window**2 if fusion.reduction == "stf" else 1)
    projected = config.tokens_per_image * fusion.projector_width * (fused + config.text.width)
    return 2 * (mixed + projected)


def _text(config: LlavaConfig, length: int) -> tuple[float, float]:
    """Of one row: products with weights, and attention."""
    text = config.text
    heads, kv_heads = text.heads * text.head_dim, text.kv_heads * text.head_dim
    layer = text.width * (2 * heads + 2 * kv_heads + 3 * text.mlp_width)
    weights = 2 * length * (text.layers * layer + text.width * text.padded_vocab_size)
    return weights, 4 * length**2 * heads * text.layers
