"""A control: some of the patches, drawn once, the same of every image."""

import torch

from .base_compact_llava import Connector, Features


class CompactConnector(Connector):
    """Patches by their numbers (`kept`), then the projector."""

    def reduce(self, features: Features) -> torch.Tensor:
        """[B, P, C] -> [B, K, C], in raster order."""
        (patches,) = features.taps
        return patches[:, self.compact["kept"]]
