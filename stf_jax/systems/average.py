"""Average pooling (paper, table 3, "AvgPool 25 %"): the baseline with the same token count."""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from stf_jax.systems.stf import spatial_token_fusion


def average_pooling(
    features: Float[Array, "B P C"], *, window: int, out: PartitionSpec | None = None
) -> Float[Array, "B K C"]:
    """The mean over each window of patches, raster order in and out."""
    with jax.named_scope("average_pooling"):
        windows = spatial_token_fusion(features, window=window, out=out)
        batch, tokens, _ = windows.shape
        cut = (batch, tokens, window * window, features.shape[-1])
        return jax.lax.reshape(windows, cut, out_sharding=out).mean(axis=2)
