"""Attention over heads, masked by a rule rather than by an array that the caller builds."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """A query sees the keys of its own segment; with `causal`, only those at or before its index.

    Segment 0 is padding, or a cache slot that nothing was written to: it is never seen.
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
        seen = mask.array() if mask else None
        return jax.nn.dot_product_attention(query, key, value, mask=seen)
