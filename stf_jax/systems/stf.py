"""Spatial Token Fusion (paper, section 3.2): each window of neighbouring patches is one token.

The grid of patches is cut into non-overlapping windows, and the features of a window lie side by
side in the channels of its token. Nothing is averaged away: the projector learns what to keep.
With the published 2x2 windows, 576 tokens of 1024 channels are 144 tokens of 4096.
"""

import math

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float


def spatial_token_fusion(
    features: Float[Array, "B P C"], *, window: int, out: PartitionSpec | None = None
) -> Float[Array, "B K window*window*C"]:
    """Raster order in, raster order out; channels of a token are (row, column, channel).

    The published weights number them (channel, row, column); `convert/` permutes the projector.

        patches of a 4x4 grid     window 2: token 0 is [f0, f1, f4, f5], token 1 [f2, f3, f6, f7],
         0  1 |  2  3             token 2 [f8, f9, f12, f13], token 3 [f10, f11, f14, f15]
         4  5 |  6  7
        ------+------
         8  9 | 10 11
        12 13 | 14 15
    """
    with jax.named_scope("stf"):
        batch, patches, channels = features.shape
        side = math.isqrt(patches) // window
        cut = (batch, side, window, side, window, channels)
        windows = jax.lax.reshape(features, cut, out_sharding=out).swapaxes(2, 3)
        fused = (batch, side * side, window * window * channels)
        return jax.lax.reshape(windows, fused, out_sharding=out)
