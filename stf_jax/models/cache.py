"""The key-value cache of the decoder: preallocated, written in place, slots that carry marks."""

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
from stf_jax.models.marks import Marks, Rule, causal, visible

# How keys and values are kept; None is the dtype that they are computed in.
CacheDType = Literal["bfloat16", "int8"]

# The score of a slot that is not seen.
_HIDDEN = -1e30

# The least rows that a TPU gives to its matrix unit. Fewer go through the vector unit, which by the
# compiler's estimate takes three times as long; so a query is taken eight times (docs/tpu.md).
_MATRIX_ROWS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """Vectors as int8, each with its own scale: value = integer * scale."""

    integers: Int[Array, "B G S D"]
    scales: Float[Array, "B G S 1"]


Stored: TypeAlias = Array | Quantized


def _store(x: Float[Array, "B T G D"], dtype: CacheDType | None) -> Stored:
    x = x.swapaxes(1, 2)
    if dtype != "int8":
        return x if dtype is None else x.astype(dtype)
    wide = x.astype(jnp.float32)
    scales = jnp.abs(wide).max(axis=-1, keepdims=True) / 127
    # A vector of zeros has scale 0.
    integers = jnp.round(wide / jnp.where(scales == 0, 1, scales)).astype(jnp.int8)
    return Quantized(integers=integers, scales=scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (already rotated) and values of S slots for each row, one array a layer.

    A slot is seen as its marks say; an empty one has segment 0, so nothing sees it. Layers are
    separate arrays, since a slice of a stacked one would be copied at every step; and heads come
    before slots, since attention multiplies by each head's [S, D], which must lie in one piece.
    """

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    marks: Marks
    dtype: CacheDType | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        keys: Sequence[Float[Array, "B T G D"]],
        values: Sequence[Float[Array, "B T G D"]],
        marks: Marks,
        *,
        dtype: CacheDType | None,
    ) -> "KVCache":
        """A cache of T slots that hold these, layer by layer."""
        return cls(
            marks=marks,
            keys=tuple(_store(key, dtype) for key in keys),
            values=tuple(_store(value, dtype) for value in values),
            dtype=dtype,
        )

    @property
    def slots(self) -> int:
        """S, how many positions there is room for."""
        return int(jax.tree.leaves(self.keys[0])[0].shape[2])

    def next_position(self, start: Int[Array, "B"]) -> Int[Array, "B"]:
        """The position after the last one that the slots before `start` hold; 0 after none."""
        held = (jnp.arange(self.slots) < start[:, None]) & (self.marks.segment > 0)
        return jnp.where(held, self.marks.position + 1, 0).max(axis=1)

    def mark(self, slots: Int[Array, "B T"], marks: Marks) -> "KVCache":
        """With the marks of new tokens at these slots; those beyond S are dropped.

        What stood in these slots is hidden from now on: `write` follows in every layer.
        """

        def put(old: Array, new: Array) -> Array:
            return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(old, slots, new)

        return dataclasses.replace(self, marks=jax.tree.map(put, self.marks, marks))

    def write(
        self,
        layer: int,
        key: Float[Array, "B T G D"],
        value: Float[Array, "B T G D"],
        *,
        slots: Int[Array, "B T"],
    ) -> "KVCache":
        """With one layer's keys and values at these slots; those beyond S are dropped."""
        # An index for each head: to write several at once, a TPU would copy the cache to [B S K D].
        at = slots[:, None] + jnp.zeros_like(key[..., 0].swapaxes(1, 2), jnp.int32)

        def put(stored: Array, new: Array) -> Array:
            head = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))
            return jax.vmap(head)(stored, at, new)

        keys, values = list(self.keys), list(self.values)
        keys[layer] = jax.tree.map(put, keys[layer], _store(key, self.dtype))
        values[layer] = jax.tree.map(put, values[layer], _store(value, self.dtype))
        return dataclasses.replace(self, keys=tuple(keys), values=tuple(values))

    def pad_to(self, slots: int) -> "KVCache":
        """With room for `slots` slots, S or more; the new ones are empty."""

        def pad(array: Array) -> Array:
            axis = _slot_axis(array)
            room = [(0, 0)] * array.ndim
            room[axis] = (0, slots - array.shape[axis])
            return jnp.pad(array, room)

        padded: KVCache = jax.tree.map(pad, self)
        return padded

    def rows(
        self, which: Int[Array, "R"], *, spec: PartitionSpec | None, marks: PartitionSpec | None
    ) -> "KVCache":
        """These rows, a row as often as it is named.

        Args:
            which: rows.
            spec: the partition spec of keys and values.
            marks: that of their marks.
        """
        taken: KVCache = jax.tree.map(
            lambda array: array.at[which].get(
                mode="clip", out_sharding=marks if array.ndim == 2 else spec
            ),
            self,
        )
        return taken

    def insert(
        self,
        at: Int[Array, "R"],
        rows: "KVCache",
        *,
        spec: PartitionSpec | None,
        marks: PartitionSpec | None,
    ) -> "KVCache":
        """With `rows` where the rows `at` begin; rows beyond B are dropped.

        `rows` may have fewer slots: the later ones are empty then.
        """

        def put(old: Array, new: Array) -> Array:
            if old.ndim == 2:
                # Whole rows, so that nothing sees what stood in the later slots.
                new = jnp.pad(new, ((0, 0), (0, old.shape[1] - new.shape[1])))
                return old.at[at].set(new, mode="drop", out_sharding=marks)
            return old.at[at, :, : rows.slots].set(new, mode="drop", out_sharding=spec)

        inserted: KVCache = jax.tree.map(put, self, rows)
        return inserted


def _slot_axis(array: Array) -> int:
    """Keys and values are [B, G, S, D], marks [B, S]."""
    return 1 if array.ndim == 2 else 2


def cache_attention(
    query: Float[Array, "B T N D"],
    key: Stored,
    value: Stored,
    *,
    marks: Marks,
    slots: Marks,
    rule: Rule = causal,
) -> Float[Array, "B T N D"]:
    """softmax(q k^T / sqrt(D)) v against one layer of a cache.

    With few queries a row this waits for memory: keys and values are read as they lie, and scales
    go to the scores and the weights, which are fewer.

    Args:
        query: T positions, N heads.
        key: of S slots.
        value: of S slots.
        marks: of the queries.
        slots: of the slots.
        rule: which slots a query sees.
    """
    with jax.named_scope("attention"):
        rows, length, heads, dim = query.shape
        keys, key_scales = _split_scales(key, query.dtype)
        # A weight times a scale may be too small for float16.
        small = isinstance(value, Quantized) and query.dtype == jnp.float16
        values, value_scales = _split_scales(value, jnp.bfloat16 if small else query.dtype)
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        grouped = query.reshape(rows, length, kv_heads, group, dim)
        if platform() == "tpu":
            copies = math.ceil(_MATRIX_ROWS / (length * group))
            grouped = jnp.concatenate([grouped] * copies, axis=3)
        scores = jnp.einsum("btkgd,bksd->bktgs", grouped, keys, preferred_element_type=jnp.float32)
        seen = visible(rule, marks, slots)[:, None, :, None]
        # A query of padding sees nothing; a finite score keeps NaN out of its row.
        scores = jnp.where(seen, scores * (key_scales / math.sqrt(dim)), _HIDDEN)
        weights = jax.nn.softmax(scores, axis=-1) * value_scales
        attended = jnp.einsum("bktgs,bksd->btkgd", weights.astype(values.dtype), values)
        return attended[:, :, :, :group].reshape(query.shape).astype(query.dtype)


def _split_scales(
    stored: Stored, dtype: DTypeLike
) -> tuple[Float[Array, "B G S D"], Float[Array, "B G 1 1 S"] | float]:
    """Vectors, and what each is to be multiplied by."""
    if isinstance(stored, Quantized):
        scales = stored.scales[..., 0]
        return stored.integers.astype(dtype), scales[:, :, None, None]
    return stored.astype(dtype), 1.0
