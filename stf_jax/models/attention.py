"""Attention over heads, masked by a rule rather than by an array that the caller builds.

Splash on a TPU, cuDNN on a GPU for 16-bit numbers, XLA elsewhere.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from stf_jax.parallel.splash import splash_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """A query sees the keys of its own segment; with `causal`, only those at or before its index.

    Segment 0 is padding: it is never seen.
    """

    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    causal: bool

    def array(self) -> Bool[Array, "B 1 T S"]:
        """The rule as an array, True where a query sees a key."""
        query, key = self.query_segments[:, :, None], self.key_segments[:, None, :]
        seen = (query == key) & (key != 0)
        if self.causal:
            index = jnp.arange(query.shape[1])[:, None] >= jnp.arange(key.shape[2])[None, :]
            seen &= index
        return seen[:, None]


def attention(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    *,
    mask: Mask | None = None,
) -> Float[Array, "B T N D"]:
    """softmax(q k^T / sqrt(D)) v, with the softmax in float32; N is a multiple of K.

    A query that sees no key (padding) gets a finite value that means nothing.
    """
    with jax.named_scope("attention"):
        place = platform()
        if place == "tpu":
            return _per_device(query, key, value, mask)
        cudnn = place in ("cuda", "gpu") and query.dtype in (jnp.bfloat16, jnp.float16)
        seen = mask.array() if mask else None
        query, key, value = (checkpoint_name(array, "attention") for array in (query, key, value))
        found = jax.nn.dot_product_attention(
            query, key, value, mask=seen, implementation="cudnn" if cudnn else None
        )
        return checkpoint_name(found, "attention")


def platform() -> str:
    """Where the program will run, which need not be where it is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def _per_device(query: Array, key: Array, value: Array, mask: Mask | None) -> Array:
    """Splash, on each device's rows and heads: the compiler cannot split a kernel."""
    segments = () if mask is None else (mask.query_segments, mask.key_segments)
    kernel = partial(splash_attention, causal=mask is not None and mask.causal)
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(query, key, value, *segments)
    specs = tuple(jax.typeof(array).sharding.spec for array in (query, key, value, *segments))
    sharded = jax.shard_map(kernel, in_specs=specs, out_specs=specs[0], check_vma=False)
    return sharded(query, key, value, *segments)
