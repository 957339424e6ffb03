"""4-bit integers on disk: two a byte, neighbors along the last axis, the first in the low half.

It is how a CPU holds them, too. What is stored as uint8 is such a pair: no parameter is uint8.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, UInt

INT4 = np.dtype(jnp.int4)
# Of the pairs.
PACKED = np.dtype(np.uint8)


def pack(integers: Int[np.ndarray, "... F"]) -> UInt[np.ndarray, "... _"]:
    """int4 values as bytes, half as many along the last axis, which is even."""
    nibbles = integers.view(np.uint8) & 15
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: UInt[np.ndarray, "... _"]) -> Int[np.ndarray, "... F"]:
    """The inverse of `pack`, in host memory, a byte a value."""
    signed = packed.view(np.int8)
    integers = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    integers[..., ::2] = (signed << 4) >> 4
    integers[..., 1::2] = signed >> 4
    return integers.astype(INT4)


def unpack_on_device(packed: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The same on devices, each its own part; as `like` says."""
    # Of one device there is nothing to say. On a mesh it names that, which may not be entered.
    sharding = like.sharding if isinstance(like.sharding, NamedSharding) else None

    def run(packed: Array) -> Array:
        pairs = jax.lax.bitcast_convert_type(packed, jnp.int4)
        return jax.lax.reshape(pairs, like.shape, out_sharding=sharding)

    return jax.jit(run)(packed)


def describe_unpacked(stored: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the parameter that is stored so."""
    if stored.dtype != PACKED:
        return stored
    return jax.ShapeDtypeStruct((*stored.shape[:-1], 2 * stored.shape[-1]), INT4)


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the bytes that hold int4 values of this shape."""
    return (*shape[:-1], shape[-1] // 2)
