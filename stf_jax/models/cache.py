"""The key-value cache of the decoder: preallocated, written in place, slots that carry marks."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

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
class SlotGroup:
    """What the slots of some layers hold, which may be less than was computed.

    A token's slot is its place in the row less what these layers dropped of the row. Slots count
    from 0 in every row, and the S of groups differ.

    Attributes:
        marks: of the slots; an empty one has segment 0, so nothing sees it.
        dropped: positions of each row that these layers do not hold; all lie before what comes.
        renumbered: whether rotary positions do not count what was dropped.
    """

    marks: Marks
    dropped: Int[Array, "B"]
    renumbered: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def whole(cls, marks: Marks, *, renumbered: bool = False) -> "SlotGroup":
        """Of layers that hold everything so far."""
        none = jnp.zeros_like(marks.segment[:, 0])
        return cls(marks=marks, dropped=none, renumbered=renumbered)

    @property
    def slots(self) -> int:
        """S."""
        return int(self.marks.segment.shape[1])

    def place(self, slots: Int[Array, "B T"], marks: Marks) -> tuple[Int[Array, "B T"], Marks]:
        """The slots of new tokens in these layers, and their marks.

        Args:
            slots: their places in the row.
            marks: of the tokens, as if nothing had been dropped.
        """
        dropped = self.dropped[:, None]
        if self.renumbered:
            marks = dataclasses.replace(marks, position=marks.position - dropped)
        return slots - dropped, marks

    def put(self, slots: Int[Array, "B T"], marks: Marks) -> "SlotGroup":
        """With the marks of new tokens at what `place` gave; those beyond S are dropped.

        What stood in these slots is hidden from now on.
        """

        def put(old: Array, new: Array) -> Array:
            return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(old, slots, new)

        return dataclasses.replace(self, marks=jax.tree.map(put, self.marks, marks))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (already rotated) and values of S slots for each row, one array a layer.

    Layers that hold the same positions share the marks of their slots; where no layer drops any,
    there is one group. Layers are separate arrays, since a slice of a stacked one would be copied
    at every step; and heads come before slots, since attention multiplies by each head's [S, D],
    which must lie in one piece.

    Attributes:
        keys: of each layer.
        values: of each layer.
        groups: of layers; the first holds the last position of every row, wherever it ends.
        layer_groups: the group of each layer.
        dtype: of keys and values.
    """

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    groups: tuple[SlotGroup, ...]
    layer_groups: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: CacheDType | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        keys: Sequence[Float[Array, "B _ G D"]],
        values: Sequence[Float[Array, "B _ G D"]],
        groups: Marks | Sequence[SlotGroup],
        *,
        layer_groups: Sequence[int] | None = None,
        dtype: CacheDType | None,
    ) -> "KVCache":
        """A cache whose slots hold these, layer by layer.

        Args:
            keys: of each layer.
            values: of each layer.
            groups: of layers; or the marks of all, where no layer drops anything.
            layer_groups: the group of each layer, by default the first.
            dtype: of keys and values.
        """
        return cls(
            keys=tuple(_store(key, dtype) for key in keys),
            values=tuple(_store(value, dtype) for value in values),
            groups=(SlotGroup.whole(groups),) if isinstance(groups, Marks) else tuple(groups),
            layer_groups=(0,) * len(keys) if layer_groups is None else tuple(layer_groups),
            dtype=dtype,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """S, how many positions each group of layers has room for."""
        return tuple(group.slots for group in self.groups)

    def next_position(self, start: Int[Array, "B"]) -> Int[Array, "B"]:
        """The position after the last one that stands before `start` in the row; 0 after none."""
        group = self.groups[0]
        before = jnp.arange(group.slots) < (start - group.dropped)[:, None]
        held = before & (group.marks.segment > 0)
        return jnp.where(held, group.marks.position + 1, 0).max(axis=1)

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

    def grow(self, by: int) -> "KVCache":
        """With room for so many more slots in every layer; they are empty."""
        return self.resize([size + by for size in self.sizes])

    def resize(self, sizes: Sequence[int]) -> "KVCache":
        """With room for so many slots in each group's layers.

        New ones are empty; those that are cut off have to be.
        """

        def fit(array: Array, size: int) -> Array:
            axis = 1 if array.ndim == 2 else 2
            array = jax.lax.slice_in_dim(array, 0, min(size, array.shape[axis]), axis=axis)
            room = [(0, 0)] * array.ndim
            room[axis] = (0, size - array.shape[axis])
            return jnp.pad(array, room)

        def layers(stored: tuple[Stored, ...]) -> tuple[Stored, ...]:
            wanted = [sizes[group] for group in self.layer_groups]
            return tuple(
                jax.tree.map(partial(fit, size=size), layer)
                for layer, size in zip(stored, wanted, strict=True)
            )

        groups = (
            dataclasses.replace(group, marks=jax.tree.map(partial(fit, size=size), group.marks))
            for group, size in zip(self.groups, sizes, strict=True)
        )
        return dataclasses.replace(
            self, keys=layers(self.keys), values=layers(self.values), groups=tuple(groups)
        )

    def rows(
        self, which: Int[Array, "R"], *, spec: PartitionSpec | None, marks: PartitionSpec | None
    ) -> "KVCache":
        """These rows, a row as often as it is named.

        Args:
            which: rows.
            spec: the partition spec of keys and values.
            marks: that of what is known of their slots.
        """
        taken: KVCache = jax.tree.map(
            lambda array: array.at[which].get(
                mode="clip", out_sharding=marks if array.ndim < 3 else spec
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

        `rows` may have fewer slots: the later ones are empty then. What stood there is hidden, and
        has to be finite, since zero times what is not is no zero; see `clear`.
        """

        def put(old: Array, new: Array) -> Array:
            if old.ndim < 3:
                if old.ndim == 2:
                    # Whole rows, so that nothing sees what stood in the later slots.
                    new = jnp.pad(new, ((0, 0), (0, old.shape[1] - new.shape[1])))
                return old.at[at].set(new, mode="drop", out_sharding=marks)
            return old.at[at, :, : new.shape[2]].set(new, mode="drop", out_sharding=spec)

        inserted: KVCache = jax.tree.map(put, self, rows)
        return inserted

    def clear(self, which: Bool[Array, "B"]) -> "KVCache":
        """With nothing but zeros in these rows."""

        def zero(array: Array) -> Array:
            rows = which.reshape(-1, *[1] * (array.ndim - 1))
            return jnp.where(rows, jnp.zeros((), array.dtype), array)

        cleared: KVCache = jax.tree.map(zero, self)
        return cleared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """How a prompt comes into the cache.

    Attributes:
        prefilled: positions that are computed at once; equal ones of several prompts only once.
        start: where the rest begins, which is computed against that cache: `prefilled`, or one less
            where the last position too decides what the cache holds.
    """

    prefilled: int
    start: int


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
