"""Attention on a TPU: JAX's Pallas kernel "splash", which never writes the scores to memory."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

# A block's sides are multiples of a vector register's lanes; large blocks have fewer seams, small
# ones skip more of a causal mask. The tower's 577 positions are one block; the scores of several
# such blocks fit in a v5e's fast memory.
_LANES, _LARGEST = 128, 640


def splash_attention(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S G D"],
    value: Float[Array, "B S G D"],
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B T N D"]:
    """softmax(q k^T / sqrt(D)) v among positions of the same segment, on one device.

    Lengths are padded to whole blocks, with segment 0. Unlike `causal`, segment 0 sees segment 0,
    which changes no position that means anything.

    Args:
        query: T positions, N heads.
        key: S positions, G heads, of which N is a multiple; as many as queries where `causal`.
        value: as `key`.
        query_segments: from 1; 0 is padding. None is one segment.
        key_segments: from 1; 0 is padding. None is one segment.
        causal: a query sees only the keys at or before its index.
        interpret: in Python, for tests without a TPU.
    """
    length, heads = query.shape[1], query.shape[2]
    if query_segments is None or key_segments is None:
        # The padding below must differ from the rest.
        query_segments, key_segments = (jnp.ones(x.shape[:2], jnp.int32) for x in (query, key))
    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    query, query_segments = _pad(scaled), _pad(query_segments)
    key, value, key_segments = _pad(key), _pad(value), _pad(key_segments)
    shape = (query.shape[1], key.shape[1])
    head_mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([head_mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_blocks(*shape),
        # Its backward pass needs what it took and found, as the kernel lays them out; see `REMAT`.
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

    def row(query: Array, key: Array, value: Array, q: Array, kv: Array) -> Array:
        return kernel(query, key, value, splash.SegmentIds(q=q, kv=kv))

    query, key, value = (
        checkpoint_name(array.swapaxes(1, 2), "attention") for array in (query, key, value)
    )
    seen = jax.vmap(row)(query, key, value, query_segments, key_segments)
    return seen.swapaxes(1, 2)[:, :length]


def visited_share(queries: int, keys: int) -> float:
    """The part of a causal mask's blocks that the kernel visits, of lengths in whole lanes."""
    query, key = _block(queries), _block(keys)
    visited = sum(-(-(start + query) // key) for start in range(0, queries, query))
    return visited / (queries // query * (keys // key))


def _pad(array: Array) -> Array:
    """Positions up to a whole number of lanes, zero."""
    more = -array.shape[1] % _LANES
    return jnp.pad(array, ((0, 0), (0, more), *((0, 0),) * (array.ndim - 2)))


def _block(length: int) -> int:
    return next(size for size in range(_LARGEST, 0, -_LANES) if length % size == 0)


def _blocks(queries: int, keys: int) -> splash.BlockSizes:
    query, key = _block(queries), _block(keys)
    return splash.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=key,
        block_q_dkv=query,
        block_kv_dkv=key,
        block_kv_dkv_compute=key,
        block_q_dq=query,
        block_kv_dq=key,
    )
