"""The key-value cache of the decoder: preallocated, written in place, equal slots for every row."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (already rotated) and values of S slots for each row.

    Rows of different length share slot numbers: a prompt shorter than its neighbours leaves slots
    of segment 0, which attention never sees, and every row's next token goes to slot `length`.
    """

    key: Float[Array, "L B S K D"]
    value: Float[Array, "L B S K D"]
    segments: Int[Array, "B S"]
    length: Int[Array, ""]

    @classmethod
    def from_prefill(
        cls,
        key: Float[Array, "L B T K D"],
        value: Float[Array, "L B T K D"],
        segments: Int[Array, "B T"],
        *,
        slots: int,
    ) -> "KVCache":
        """The cache after a prompt of T positions, with room for `slots` - T more."""
        prompt = segments.shape[1]
        room = ((0, 0), (0, 0), (0, slots - prompt), (0, 0), (0, 0))
        return cls(
            key=jnp.pad(key, room),
            value=jnp.pad(value, room),
            segments=jnp.pad(segments, ((0, 0), (0, slots - prompt))),
            length=jnp.int32(prompt),
        )

    def opened(self, segments: Int[Array, "B 1"]) -> "KVCache":
        """Makes the next slot visible; its keys and values are written layer by layer."""
        marked = jax.lax.dynamic_update_slice(self.segments, segments, (0, self.length))
        return dataclasses.replace(self, segments=marked, length=self.length + 1)

    def written(
        self, layer: Int[Array, ""], key: Float[Array, "B 1 K D"], value: Float[Array, "B 1 K D"]
    ) -> "KVCache":
        """Puts one layer's key and value into the slot that `opened` made visible."""
        at = (layer, 0, self.length - 1, 0, 0)
        return dataclasses.replace(
            self,
            key=jax.lax.dynamic_update_slice(self.key, key[None], at),
            value=jax.lax.dynamic_update_slice(self.value, value[None], at),
        )
