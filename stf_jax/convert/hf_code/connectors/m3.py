"""M3 (arXiv 2405.17430): the mean of projected tokens over square windows."""

import math

import torch

from .base_compact_llava import Connector, Features, windows


class CompactConnector(Connector):
    """The projector, then the mean; `tokens` in the config may be any square grid that divides."""

    def forward(self, features: Features, question: torch.Tensor | None = None) -> torch.Tensor:
        """[B, P, C] -> [B, K, H], in raster order."""
        projected = super().forward(features)
        side = math.isqrt(projected.shape[1] // self.compact["tokens"])
        return windows(projected, side).mean(-1)
