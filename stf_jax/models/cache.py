"""The key-value cache of the decoder: preallocated, written in place, equal slots for every row."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (already rotated) and values of S slots for each row, one array a layer.

    Rows of different length share slot numbers: a prompt shorter than its neighbours leaves slots
    of segment 0, which attention never sees, and every row's next token goes to slot `length`.
    Layers are separate arrays, since a slice of a stacked one would be copied at every step.
    """

    keys: tuple[Float[Array, "B S K D"], ...]
    values: tuple[Float[Array, "B S K D"], ...]
    segments: Int[Array, "B S"]
    length: Int[Array, ""]

    @classmethod
    def from_prefill(
        cls,
        keys: tuple[Float[Array, "B T K D"], ...],
        values: tuple[Float[Array, "B T K D"], ...],
        segments: Int[Array, "B T"],
        *,
        slots: int,
    ) -> "KVCache":
        """The cache after a prompt of T positions, with room for `slots` - T more."""
        prompt = segments.shape[1]
        room = ((0, 0), (0, slots - prompt), (0, 0), (0, 0))
        return cls(
            keys=tuple(jnp.pad(key, room) for key in keys),
            values=tuple(jnp.pad(value, room) for value in values),
            segments=jnp.pad(segments, room[:2]),
            length=jnp.int32(prompt),
        )

    def opened(self, segments: Int[Array, "B 1"]) -> "KVCache":
        """Makes the next slot visible; its keys and values are written layer by layer."""
        marked = jax.lax.dynamic_update_slice(self.segments, segments, (0, self.length))
        return dataclasses.replace(self, segments=marked, length=self.length + 1)

    def written(
        self, layer: int, key: Float[Array, "B 1 K D"], value: Float[Array, "B 1 K D"]
    ) -> "KVCache":
        """Puts one layer's key and value into the slot that `opened` made visible."""
        slot = (0, self.length - 1, 0, 0)
        keys, values = list(self.keys), list(self.values)
        keys[layer] = jax.lax.dynamic_update_slice(keys[layer], key, slot)
        values[layer] = jax.lax.dynamic_update_slice(values[layer], value, slot)
        return dataclasses.replace(self, keys=tuple(keys), values=tuple(values))
