"""VisToG (arXiv 2411.17773): learned tokens go through the tower, and patches join them.

The grouping is GroupViT's (arXiv 2202.11094, section 3.2): its assignment alone, or its block.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from .base_compact_llava import Connector, Features
from .configuration_compact_llava import CompactLlavaConfig


class CompactConnector(Connector):
    """The semantic tokens, the grouping, the projector."""

    def __init__(self, config: CompactLlavaConfig):
        super().__init__(config)
        vision, compact = config.vision_config, self.compact
        make = GroupingBlock if compact["grouping"] == "full" else Grouping
        self.mm_grouping = make(
            compact["semantic_tokens"],
            vision.hidden_size,
            heads=vision.num_attention_heads,
            epsilon=compact["assign_eps"],
        )

    def extra_tokens(self) -> torch.Tensor:
        """The semantic tokens, as they enter the tower: [K, C]."""
        return self.mm_grouping.semantic_tokens

    def reduce(self, features: Features) -> torch.Tensor:
        """One token a group, in the order of the semantic tokens: [B, K, C]."""
        (patches,) = features.taps
        return self.mm_grouping(features.extra, patches)


class Assign(nn.Module):
    """Each patch goes to one group, which gathers the mean of its patches."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.q_proj, self.k_proj, self.v_proj, self.proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, groups: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """[B, K, C], [B, P, C] -> [B, K, C]."""
        query, key = self.q_proj(groups).float(), self.k_proj(patches).float()
        scores = query @ key.transpose(1, 2) / math.sqrt(groups.shape[-1])
        # The first of equal groups, as argmax takes it.
        belongs = functional.one_hot(scores.argmax(dim=1), scores.shape[1]).transpose(1, 2).float()
        mean = belongs / (belongs.sum(dim=2, keepdim=True) + self.epsilon)
        value = self.v_proj(patches)
        return self.proj(mean.to(value.dtype) @ value)


class Grouping(nn.Module):
    """The assignment alone, added to the tokens."""

    def __init__(self, count: int, width: int, *, heads: int, epsilon: float):
        super().__init__()
        self.semantic_tokens = nn.Parameter(torch.empty(count, width))
        self.assign = Assign(width, epsilon)

    def forward(self, groups: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """[B, K, C], [B, P, C] -> [B, K, C]."""
        return groups + self.assign(groups, patches)


class GroupingBlock(Grouping):
    """Groups mix among themselves and look at the patches; then the assignment, and an MLP."""

    def __init__(self, count: int, width: int, *, heads: int, epsilon: float):
        super().__init__(count, width, heads=heads, epsilon=epsilon)
        self.norm_tokens, self.norm_post_tokens, self.norm_x, self.norm_new_x = (
            nn.LayerNorm(width) for _ in range(4)
        )
        self.mlp_inter = PlainMLP(count, width // 2)
        self.pre_assign_attn = CrossBlock(width, heads)
        self.mlp_channels = PlainMLP(width, 4 * width)

    def forward(self, groups: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """[B, K, C], [B, P, C] -> [B, K, C]."""
        groups, patches = self.norm_tokens(groups), self.norm_x(patches)
        mixed = self.mlp_inter(groups.transpose(1, 2)).transpose(1, 2)
        groups = self.pre_assign_attn(self.norm_post_tokens(mixed), patches)
        groups = super().forward(groups, patches)
        return groups + self.mlp_channels(self.norm_new_x(groups))


class CrossBlock(nn.Module):
    """Groups attend to patches, then an MLP and a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = CrossAttention(width, heads)
        self.norm2, self.norm_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = PlainMLP(width, 2 * width)

    def forward(self, groups: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """[B, K, C], [B, P, C] -> [B, K, C]."""
        groups = groups + self.attn(groups, patches)
        groups = groups + self.mlp(self.norm2(groups))
        return self.norm_post(groups)


class CrossAttention(nn.Module):
    """Each group gathers from all patches, in several heads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, groups: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """[B, K, C], [B, P, C] -> [B, K, C]."""

        def split(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = (
            split(x) for x in (self.q_proj(groups), self.k_proj(patches), self.v_proj(patches))
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    """Linear, GELU, Linear over the last axis."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As wide as what came in."""
        return self.fc2(functional.gelu(self.fc1(x)))
