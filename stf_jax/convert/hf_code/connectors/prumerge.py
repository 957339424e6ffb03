"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388), with a fixed share of the patches.

What the class token looks at in the tower's last block is kept; each kept token takes up the
patches whose keys are most like its own; one more token sums up what was dropped.
"""

import math

import torch
from torch.nn import functional

from .base_compact_llava import Connector, Features


class CompactConnector(Connector):
    """Select, merge, project.

    `top` patches are kept for their scores, and those at `places` too (PruMerge+). Each takes up
    `neighbors`. `order` is by "score", with the places behind, or "raster".
    """

    reads_class = True

    def reduce(self, features: Features) -> torch.Tensor:
        """[B, P, C] -> [B, K + 1, C]; in float32 until the end."""
        (patches,) = features.taps
        x, query, keys = (a.float() for a in (patches, features.query, features.keys))
        # One head of the whole width. The class token's attention to itself is left out.
        scores = (keys @ query[..., None]).squeeze(-1) / math.sqrt(query.shape[-1])
        scores = scores.softmax(dim=-1)[:, 1:]
        merged = merge(x, keys[:, 1:], scores, self.select(scores), self.compact["neighbors"])
        return merged.to(patches.dtype)

    def select(self, scores: torch.Tensor) -> torch.Tensor:
        """The kept patches by number, in the order of the tokens: [B, P] -> [B, K].

        One that is kept for its score and for its place stands there twice.
        """
        index = highest(scores, self.compact["top"])
        places = torch.tensor(self.compact["places"], dtype=index.dtype, device=index.device)
        index = torch.cat([index, places.expand(len(index), -1)], dim=1)
        return index if self.compact["order"] == "score" else index.sort(dim=1).values


def highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the highest values of the last axis are, the first of equal ones first."""
    return values.argsort(dim=-1, descending=True, stable=True)[..., :count]


def merge(
    x: torch.Tensor, keys: torch.Tensor, scores: torch.Tensor, index: torch.Tensor, neighbors: int
) -> torch.Tensor:
    """Kept tokens with their neighbors, and the sum of the dropped: [B, K + 1, C].

    Args:
        x: features of the patches, [B, P, C].
        keys: by whose cosine patches are alike, [B, P, C].
        scores: the weight of a patch that is merged, [B, P].
        index: the kept patches, [B, K].
        neighbors: taken up by each.
    """
    batch, count, _ = x.shape
    rows = index.shape[1]

    def take(array: torch.Tensor) -> torch.Tensor:
        return array.gather(1, index[..., None].expand(-1, -1, array.shape[-1]))

    # As released: where a patch is kept twice, the lowest patch that nobody kept is forgotten.
    times = torch.zeros_like(scores).scatter_add_(1, index, torch.ones_like(index, dtype=x.dtype))
    twice = (times - 1).clamp(min=0).sum(dim=1, keepdim=True)
    other = times == 0
    dropped = other & (other.cumsum(dim=1) > twice)

    weighted = scores[..., None] * x
    tokens = take(x)
    if neighbors:
        # A patch that is kept twice is a neighbor of itself, so the kept ones are candidates by
        # row, and the dropped ones by patch.
        units = functional.normalize(keys, dim=-1)
        likeness = take(units) @ torch.cat([take(units), units], dim=1).transpose(1, 2)
        itself = torch.eye(rows, rows + count, dtype=torch.bool, device=x.device)
        selected = torch.ones(batch, rows, dtype=torch.bool, device=x.device)
        candidate = torch.cat([selected, dropped], dim=1)[:, None] & ~itself
        nearest = highest(likeness.masked_fill(~candidate, -math.inf), neighbors)
        taken = torch.zeros_like(likeness).scatter(-1, nearest, 1.0) * candidate
        tokens = tokens + taken @ torch.cat([take(weighted), weighted], dim=1)
    rest = dropped.to(x.dtype)[:, None] @ weighted
    return torch.cat([tokens, rest], dim=1)
