"""What the tower gives of an image, and what every connector has."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from .configuration_compact_llava import CompactLlavaConfig


@dataclass
class Features:
    """What the tower finds in B images of P patches.

    Attributes:
        taps: M hidden states [B, P, C], in the order of the config; patches in raster order.
        query: of the class token in the layer after the last tap, [B, C]; None where nobody asks.
        keys: of the class token and the patches in that layer, [B, 1 + P, C], not split into heads.
        extra: the last hidden state of the extra tokens, [B, E, C]; None where there are none.
    """

    taps: list[torch.Tensor]
    query: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    extra: torch.Tensor | None = None


class Connector(nn.Module):
    """Hidden states of the tower to tokens of the language model: LLaVA-1.5's projector.

    Each system writes what it changes, as `CompactConnector` in a file of its own.

    Attributes:
        reads_class: whether it asks the tower for `query` and `keys`.
        reads_question: whether it asks the language model what it makes of the question.
    """

    reads_class = False
    reads_question = False

    def __init__(self, config: CompactLlavaConfig):
        super().__init__()
        self.compact = compact = config.compact
        self.mm_projector = nn.Sequential(
            nn.Linear(compact["projector_inputs"], compact["projector_width"]),
            nn.GELU(),
            nn.Linear(compact["projector_width"], config.text_config.hidden_size),
        )

    def extra_tokens(self) -> torch.Tensor | None:
        """What goes through the tower behind the patches: [E, C]."""
        return None

    def reduce(self, features: Features) -> torch.Tensor:
        """Fewer tokens, in front of the projector: [B, K, ...]. Here every patch of the one tap."""
        (patches,) = features.taps
        return patches

    def forward(self, features: Features, question: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens of each image: [B, K, H]. `question` [B, H] is what the image is asked."""
        return self.mm_projector(self.reduce(features))


def read_tower(
    tower: nn.Module,
    pixel_values: torch.Tensor,
    taps: list[int],
    *,
    interpolate: bool = False,
    extra: torch.Tensor | None = None,
    reads_class: bool = False,
) -> Features:
    """CLIP up to the last tap; nothing behind it is computed.

    Args:
        tower: transformers' CLIPVisionModel.
        pixel_values: [B, 3, height, width].
        taps: hidden states that are read; 0 is the embedding, k the output of layer k.
        interpolate: positions of a smaller image are interpolated from the trained ones.
        extra: tokens [E, C] without positions. They see everything, and only they see themselves;
            this mask needs attention by "sdpa" or "eager".
        reads_class: whether the layer after the last tap tells how the class token attends.
    """
    last = max(taps)
    x = tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate)
    end, mask = x.shape[1], None
    if extra is not None:
        x = torch.cat([x, extra.to(x.dtype).expand(len(x), -1, -1)], dim=1)
        mask = x.new_zeros(1, 1, x.shape[1], x.shape[1])
        mask[..., :end, end:] = torch.finfo(x.dtype).min
    x = tower.pre_layrnorm(x)
    states = [x]
    for layer in tower.encoder.layers[:last]:
        x = layer(x, mask)
        states.append(x)
    features = Features(taps=[states[tap][:, 1:end] for tap in taps])
    if extra is not None:
        features.extra = x[:, end:]
    if reads_class:
        layer = tower.encoder.layers[last]
        normal = layer.layer_norm1(x[:, :end])
        features.query = layer.self_attn.q_proj(normal[:, 0])
        features.keys = layer.self_attn.k_proj(normal)
    return features


def windows(patches: torch.Tensor, side: int) -> torch.Tensor:
    """Patches in raster order as windows of side x side: [B, P, C] -> [B, K, C, side * side]."""
    batch, count, channels = patches.shape
    grid = math.isqrt(count)
    image = patches.transpose(1, 2).reshape(batch, channels, grid, grid)
    cut = functional.unfold(image, kernel_size=side, stride=side)
    return cut.transpose(1, 2).reshape(batch, -1, channels, side * side)
