"""How much arithmetic a model does: matmuls and attention, counted by hand, two FLOPs a product.

Attention counts every pair of positions, masked or not, as is usual for model FLOPs (PaLM,
arXiv 2204.02311, appendix B); what `remat` computes again is not counted.
"""

import dataclasses
from typing import Literal

from stf_jax.config.text import TextConfig
from stf_jax.models.connector import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """By part of the model; the connector includes the projector, the text the head."""

    vision: float
    connector: float
    text: float

    @property
    def total(self) -> float:
        """Of the whole model."""
        return self.vision + self.connector + self.text


def forward(config: Architecture, *, rows: int, length: int, images: int) -> Flops:
    """Of one forward pass over `rows` rows of `length` positions with `images` images each.

    The head is counted at every position of a row, whatever the layers drop.
    """
    vision, text = config.vision, config.text
    lengths = config.system.layer_lengths(vision, text, length=length, images=images)
    weights, attention = _text(config, length, lengths)
    attention += config.system.decoder_flops(vision, text, length=length, images=images)
    return Flops(
        vision=rows * images * _vision(config),
        connector=rows * images * _connector(config),
        text=rows * (weights + attention + images * _question(config)),
    )


def training(
    config: Architecture,
    *,
    stage: Literal["pretrain", "finetune", "lora"],
    rows: int,
    length: int,
    images: int,
    tower: bool = True,
) -> Flops:
    """Of one training step; adapters, which are small, are not counted.

    A backward pass takes as many FLOPs for the gradient of its inputs, and as many again for that
    of its weights where they are trained. The tower has none but for extra tokens. A system that
    trains several budgets runs the language model once for each, over rows of the same length. What
    layers drop is hidden in training, and counted. Without `tower`, features are read from disk.
    """
    vision, text = config.vision, config.text
    weights, attention = _text(config, length)
    added = config.system.training_flops(vision, text, length=length, images=images)
    passes = 3 if stage == "finetune" else 2
    views = len(config.system.training_budgets(vision))
    return Flops(
        vision=rows * images * (_vision(config) + _extra(config)) * tower,
        connector=rows * images * _connector(config) * 3,
        text=rows
        * (views * (weights * passes + attention * 3 + added) + images * _question(config)),
    )


def _vision(config: Architecture) -> float:
    """Of one image, up to the last tap."""
    vision, layers = config.vision, max(config.system.taps)
    width, patches = vision.width, (config.image_size // vision.patch_size) ** 2
    tokens = patches + 1
    layer = 2 * tokens * (4 * width**2 + 2 * width * vision.mlp_width) + 4 * tokens**2 * width
    next_layer = 2 * (tokens + 1) * width**2 if config.system.captures else 0
    image = 2 * patches * 3 * vision.patch_size**2 * width + layers * layer + next_layer
    return image + _extra(config)


def _extra(config: Architecture) -> float:
    """Of an image's extra tokens in the tower, which see the image and each other."""
    vision, count = config.vision, config.system.extra_count
    seen = (config.image_size // vision.patch_size) ** 2 + 1 + count
    weights = 2 * count * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width)
    return max(config.system.taps) * (weights + 4 * count * seen * vision.width)


def _connector(config: Architecture) -> float:
    """Of one image."""
    return config.system.flops(config.vision, config.text)


def _question(config: Architecture) -> float:
    """Of reading what one image is asked, without a head; nothing is learnt by it."""
    length, text = config.question_length, config.text
    weights, attention = _text(config, length)
    return weights - 2 * length * text.width * text.padded_vocab_size + attention


def decoder_layer(text: TextConfig, length: int) -> tuple[float, float]:
    """Of one layer over one row: products with weights, and attention."""
    heads, kv_heads = text.heads * text.head_dim, text.kv_heads * text.head_dim
    weights = 2 * length * text.width * (2 * heads + 2 * kv_heads + 3 * text.mlp_width)
    return weights, 4 * length**2 * heads


def _text(
    config: Architecture, length: int, lengths: tuple[int, ...] | None = None
) -> tuple[float, float]:
    """Of one row: products with weights, and attention; `lengths` are those of the layers."""
    text = config.text
    lengths = (length,) * text.layers if lengths is None else lengths
    layers, attention = zip(*(decoder_layer(text, each) for each in lengths), strict=True)
    head = 2 * length * text.width * text.padded_vocab_size
    return sum(layers) + head, sum(attention)
