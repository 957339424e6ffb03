"""LLaVA-STF (arXiv 2506.07138) and its baseline AvgPool: windows of patches become tokens."""

import torch
from torch import nn

from .base_compact_llava import Connector, Features, windows
from .configuration_compact_llava import CompactLlavaConfig


class CompactConnector(Connector):
    """Blocks are mixed, where there are several; then each window is one token.

    stf: a token has all channels of its window, so that the projector learns what to keep.
    average: it has the mean.
    """

    def __init__(self, config: CompactLlavaConfig):
        super().__init__(config)
        mixer = self.compact["mbtf"]
        if mixer is None:
            return
        width = config.vision_config.hidden_size
        layers = [
            nn.Linear(len(self.compact["taps"]) * width, mixer["mlp_width"]),
            nn.GELU(),
            nn.Linear(mixer["mlp_width"], width),
        ]
        if mixer["last_activation"]:
            layers.append(nn.GELU())
        self.mm_projector_crosslayer = nn.Sequential(*layers)

    def reduce(self, features: Features) -> torch.Tensor:
        """M x [B, P, C] -> [B, K, C or C * window * window], in raster order."""
        mixed = features.taps[0]
        if self.compact["mbtf"] is not None:
            mixed = self.mm_projector_crosslayer(torch.cat(features.taps, dim=-1))
        cut = windows(mixed, self.compact["window"])
        # The projector counts the channels of a window as (channel, row, column).
        return cut.mean(-1) if self.compact["kind"] == "average" else cut.flatten(2)
