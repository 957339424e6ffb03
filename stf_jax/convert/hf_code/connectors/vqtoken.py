"""VQToken (arXiv 2503.16980) over images: an image passes through whole, or is a clip of one frame.

Projected patches of a clip are clustered. The language model sees the codebook, or what VQ-Attn
makes of it and of the clusters' numbers; a learned row ends the image. Clips of several frames are
not computed here.
"""

import torch
from torch import nn
from torch.nn import functional

from .base_compact_llava import Connector, Features
from .configuration_compact_llava import CompactLlavaConfig

# Clustering stops when the centroids move by less, all of them together.
_TOLERANCE = 1e-4


class CompactConnector(Connector):
    """The projector over every patch, then the codebook.

    `images` is "whole" or "clip", `output` is "attention" or "codebook". Clusters begin with the
    patches at `seeds`, one for each, and take `steps` at most.
    """

    def __init__(self, config: CompactLlavaConfig):
        super().__init__(config)
        width, compact = config.text_config.hidden_size, self.compact
        self.image_newline = nn.Parameter(torch.empty(width))
        self.cross_attention = VQAttention(
            compact["patches"], width, inner=compact["attention_width"], heads=compact["heads"]
        )

    def forward(self, features: Features, question: torch.Tensor | None = None) -> torch.Tensor:
        """[B, P, C] -> [B, K, H]; the last row is learned."""
        tokens = super().forward(features)
        if self.compact["images"] == "clip":
            tokens = self.quantize(tokens)
        return torch.cat([tokens, self.image_newline.expand(len(tokens), 1, -1)], dim=1)

    def quantize(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, P, H] -> [B, K, H]."""
        units = functional.normalize(tokens.float(), dim=-1)
        count = len(self.compact["seeds"])
        start = units[:, self.compact["seeds"]]
        labels = find_clusters(units.detach(), start.detach(), self.compact["steps"])
        codebook = average_clusters(units, labels, count)[0].to(tokens.dtype)
        if self.compact["output"] == "codebook":
            return codebook
        return self.cross_attention(labels.to(tokens.dtype), codebook)


def find_clusters(units: torch.Tensor, centroids: torch.Tensor, steps: int) -> torch.Tensor:
    """K-means by cosine over [B, P, H] from [B, K, H]: the cluster of each patch, [B, P].

    A step that moves the centroids of an image by less than the tolerance is its last one.
    """
    count = centroids.shape[1]
    labels = torch.zeros(units.shape[:2], dtype=torch.long, device=units.device)
    stopped = torch.zeros(len(units), dtype=torch.bool, device=units.device)
    for _ in range(steps):
        cosine = units @ functional.normalize(centroids, dim=-1).transpose(1, 2)
        labels = torch.where(stopped[:, None], labels, (1 - cosine).argmin(dim=-1))
        means, sizes = average_clusters(units, labels, count)
        # An empty cluster keeps its centroid.
        moved = torch.where(sizes[..., None] > 0, means, centroids)
        stopped |= (moved - centroids).square().sum(dim=(1, 2)).sqrt() < _TOLERANCE
        if stopped.all():
            break
        centroids = torch.where(stopped[:, None, None], centroids, moved)
    return labels


def average_clusters(
    units: torch.Tensor, labels: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of each cluster [B, K, H], zero where it is empty, and how many it has [B, K]."""
    members = functional.one_hot(labels, count).to(units.dtype)
    sizes = members.sum(dim=1)
    return members.transpose(1, 2) @ units / sizes.clamp(min=1)[..., None], sizes


class VQAttention(nn.Module):
    """Rows of the index map look at the codebook: one post-norm decoder layer."""

    def __init__(self, patches: int, width: int, *, inner: int, heads: int):
        super().__init__()
        self.to_q_proj = nn.Linear(patches, width)
        layer = nn.TransformerDecoderLayer(width, heads, inner, dropout=0.0, batch_first=True)
        self.transformer_decoder = nn.TransformerDecoder(layer, num_layers=1)

    def forward(self, labels: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        """[B, P], [B, K, H] -> [B, K, H]: the one row of an image, as often as there are codes."""
        row = self.to_q_proj(labels)[:, None]
        return self.transformer_decoder(row.expand(-1, codebook.shape[1], -1), codebook)
