"""The key-value cache of the decoder: preallocated, written in place, slot p for position p."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stf_jax.models.attention import platform

# How keys and values are kept; None is the dtype that they are computed in.
CacheDType = Literal["bfloat16", "int8"]

# The least rows that a TPU gives to its matrix unit. Fewer go through the vector unit, which by the
# compiler's estimate takes three times as long; so a query is taken eight times (docs/tpu.md).
_MATRIX_ROWS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantised:
    """Vectors as int8, each with its own scale: value = integer * scale."""

    integers: Int[Array, "B K S D"]
    scales: Float[Array, "B K S 1"]


Stored: TypeAlias = Array | Quantised


def _store(x: Float[Array, "B T K D"], dtype: CacheDType | None) -> Stored:
    x = x.swapaxes(1, 2)
    if dtype != "int8":
        return x if dtype is None else x.astype(dtype)
    wide = x.astype(jnp.float32)
    scales = jnp.abs(wide).max(axis=-1, keepdims=True) / 127
    # A vector of zeros has scale 0.
    integers = jnp.round(wide / jnp.where(scales == 0, 1, scales)).astype(jnp.int8)
    return Quantised(integers=integers, scales=scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (already rotated) and values of S slots for each row, one array a layer.

    The token at position p of a row lies in slot p, and attention looks at no slot beyond a query's
    position: what padding left in later slots is overwritten before anything sees it. Layers are
    separate arrays, since a slice of a stacked one would be copied at every step; and heads come
    before slots, since attention multiplies by each head's [S, D], which must lie in one piece.
    """

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    dtype: CacheDType | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        keys: Sequence[Float[Array, "B T K D"]],
        values: Sequence[Float[Array, "B T K D"]],
        *,
        dtype: CacheDType | None,
    ) -> "KVCache":
        """A cache of T slots that hold these, layer by layer."""
        return cls(
            keys=tuple(_store(key, dtype) for key in keys),
            values=tuple(_store(value, dtype) for value in values),
            dtype=dtype,
        )

    @property
    def slots(self) -> int:
        """S, how many positions there is room for."""
        return int(jax.tree.leaves(self.keys[0])[0].shape[2])

    def write(
        self,
        layer: int,
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K D"],
        *,
        positions: Int[Array, "B T"],
    ) -> "KVCache":
        """With one layer's keys and values at these positions; those beyond S are dropped."""
        # An index for each head: to write several at once, a TPU would copy the cache to [B S K D].
        at = positions[:, None] + jnp.zeros_like(key[..., 0].swapaxes(1, 2), jnp.int32)

        def put(stored: Array, new: Array) -> Array:
            head = jax.vmap(lambda one, at, new: one.at[at].set(new, mode="drop"))
            return jax.vmap(head)(stored, at, new)

        keys, values = list(self.keys), list(self.values)
        keys[layer] = jax.tree.map(put, keys[layer], _store(key, self.dtype))
        values[layer] = jax.tree.map(put, values[layer], _store(value, self.dtype))
        return dataclasses.replace(self, keys=tuple(keys), values=tuple(values))

    def pad_to(self, slots: int) -> "KVCache":
        """With room for `slots` positions, S or more."""
        room = ((0, 0), (0, 0), (0, slots - self.slots), (0, 0))
        widened: KVCache = jax.tree.map(lambda one: jnp.pad(one, room), self)
        return widened

    def rows(self, which: Int[Array, "R"], *, spec: PartitionSpec | None) -> "KVCache":
        """These rows, a row as often as it is named."""
        taken: KVCache = jax.tree.map(
            lambda one: one.at[which].get(mode="clip", out_sharding=spec), self
        )
        return taken

    def insert(
        self, at: Int[Array, "R"], rows: "KVCache", *, spec: PartitionSpec | None
    ) -> "KVCache":
        """With `rows` where the rows `at` begin; rows beyond B are dropped.

        `rows` may have fewer slots: what stood in the later ones is left there.
        """
        replaced: KVCache = jax.tree.map(
            lambda one, new: one.at[at, :, : rows.slots].set(new, mode="drop", out_sharding=spec),
            self,
            rows,
        )
        return replaced


def cache_attention(
    query: Float[Array, "B T N D"],
    key: Stored,
    value: Stored,
    *,
    positions: Int[Array, "B T"],
) -> Float[Array, "B T N D"]:
    """softmax(q k^T / sqrt(D)) v against one layer; a query sees up to its own position.

    With few queries a row this waits for memory: keys and values are read as they lie, and scales
    go to the scores and the weights, which are fewer.
    """
    with jax.named_scope("attention"):
        rows, length, heads, dim = query.shape
        keys, key_scales = _split_scales(key, query.dtype)
        # A weight times a scale may be too small for float16.
        small = isinstance(value, Quantised) and query.dtype == jnp.float16
        values, value_scales = _split_scales(value, jnp.bfloat16 if small else query.dtype)
        kv_heads, slots = keys.shape[1:3]
        group = heads // kv_heads
        grouped = query.reshape(rows, length, kv_heads, group, dim)
        if platform() == "tpu":
            copies = math.ceil(_MATRIX_ROWS / (length * group))
            grouped = jnp.concatenate([grouped] * copies, axis=3)
        scores = jnp.einsum("btkgd,bksd->bktgs", grouped, keys, preferred_element_type=jnp.float32)
        seen = (jnp.arange(slots) <= positions[:, :, None])[:, None, :, None]
        scores = jnp.where(seen, scores * (key_scales / math.sqrt(dim)), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1) * value_scales
        found = jnp.einsum("bktgs,bksd->btkgd", weights.astype(values.dtype), values)
        return found[:, :, :, :group].reshape(query.shape).astype(query.dtype)


def _split_scales(
    stored: Stored, dtype: DTypeLike
) -> tuple[Float[Array, "B K S D"], Float[Array, "B K 1 1 S"] | float]:
    """Vectors, and what each is to be multiplied by."""
    if isinstance(stored, Quantised):
        scales = stored.scales[..., 0]
        return stored.integers.astype(dtype), scales[:, :, None, None]
    return stored.astype(dtype), 1.0
