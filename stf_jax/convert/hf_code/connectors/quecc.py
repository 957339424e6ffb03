"""QueCC (arXiv 2411.03312): the question decides what an image's few tokens say.

One query of each window of patches, made with the question, attends to the patches of its window.
"""

import math

import torch
from torch import nn

from .base_compact_llava import Connector, Features, windows
from .configuration_compact_llava import CompactLlavaConfig


class CompactConnector(Connector):
    """The compressor is module 0 of what LLaVA calls its projector."""

    reads_question = True

    def __init__(self, config: CompactLlavaConfig):
        super().__init__(config)
        self.mm_projector.insert(0, Compressor(config))

    def forward(self, features: Features, question: torch.Tensor | None = None) -> torch.Tensor:
        """M x [B, P, C] and [B, H] -> [B, K, H], in raster order."""
        return self.mm_projector[1:](self.mm_projector[0](features.taps, question))


class Compressor(nn.Module):
    """Queries are of the last tap, keys and values of all taps side by side."""

    def __init__(self, config: CompactLlavaConfig):
        super().__init__()
        width, compact = config.vision_config.hidden_size, config.compact
        self.side = compact["stride"]
        self.text_projection = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, width), nn.LayerNorm(width, eps=1e-6)
        )
        self.q_proj = normed_mlp(width, width)
        self.k_proj, self.v_proj = (
            normed_mlp(len(compact["taps"]) * width, width) for _ in range(2)
        )
        self.q_downsample = nn.Conv2d(width, width, self.side, self.side, groups=width)
        self.clip_attn = nn.MultiheadAttention(width, compact["heads"], batch_first=True)

    def forward(self, taps: list[torch.Tensor], question: torch.Tensor) -> torch.Tensor:
        """[B, P, C] each, and [B, H] -> [B, K, C]; no residual and no norm follow."""
        blocks = torch.cat(taps, dim=-1)
        queries = self.q_proj(taps[-1] + self.text_projection(question)[:, None])
        batch, count, width = queries.shape
        grid = math.isqrt(count)
        image = queries.transpose(1, 2).reshape(batch, width, grid, grid)
        query = self.q_downsample(image).flatten(2).transpose(1, 2)  # [B, K, C]
        # Every window is a row of its own: one query, side * side keys.
        key, value = (
            windows(part(blocks), self.side).transpose(2, 3).flatten(0, 1)
            for part in (self.k_proj, self.v_proj)
        )
        attended, _ = self.clip_attn(query.reshape(-1, 1, width), key, value, need_weights=False)
        return attended.reshape(query.shape)


def normed_mlp(inputs: int, width: int) -> nn.Sequential:
    """Linear, GELU, Linear, then LayerNorm."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.LayerNorm(width, eps=1e-6),
    )
