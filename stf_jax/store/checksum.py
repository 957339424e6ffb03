"""A checksum of an array's values, which does not depend on where the array lies.

Each value's bits are mixed with the value's place in the array, and the results are added modulo
2^32. A sum can be taken in any order, so that devices, hosts and chunks each add up their own part
and the number is the same: on one device, on any mesh, and in host memory. Another value in one
place always changes it; several do, but for one case in 2^32.

What storage offers was not enough. OCDBT protects its own index, not the arrays; Orbax has no
setting for Zarr's crc32c codec; and neither sees a byte that is damaged in memory on its way.
"""

import concurrent.futures
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

# MurmurHash3's and the golden ratio: odd, so that multiplying by them loses nothing.
_PLACE = 0x9E3779B1
_FIRST, _SECOND = 0x85EBCA6B, 0xC2B2AE35
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}

# Values that numpy mixes at a time; they and what is made of them stay in a core's cache.
_CHUNK = 1 << 16
# What is smaller is fetched and added up here, sooner than a program for it is compiled.
_SMALL_BYTES = 1 << 20
# In a context mesh every argument has to lie on all of its devices.
NO_MESH = Mesh(np.empty((), object), ())
_THREADS = max(1, min(8, os.cpu_count() or 1))


def has_checksum(dtype: Any) -> bool:
    """Whether arrays of a dtype have one; what JAX would narrow, float64 for one, has not."""
    return np.dtype(dtype).itemsize in _WORDS


def name_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any tree by their path, "optimizer/1/0/mu/head", in the paths' order.

    A tree of dataclasses and tuples has the names of the dictionaries and lists that Orbax makes
    of it.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return dict(sorted(named.items()))


def checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """The checksum of each array of numpy or JAX; on several hosts, all of them call this.

    Each device adds up its own parts, of copies one. The hosts exchange nothing but sums.
    """
    # Devices begin before the host waits for anything.
    begun = {name: _begin(array) for name, array in arrays.items() if _stays(array)}
    sums_by_name = {
        name: sum(map(int, begun[name])) % 2**32 if name in begun else checksum(np.asarray(array))
        for name, array in arrays.items()
    }
    spread = [name for name in begun if not arrays[name].is_fully_addressable]
    if spread:
        parts = np.array([sums_by_name[name] for name in spread], np.uint32)
        with jax.set_mesh(NO_MESH):
            sums = multihost_utils.process_allgather(parts).astype(np.uint64).sum(axis=0)
        sums_by_name |= {name: int(total) % 2**32 for name, total in zip(spread, sums, strict=True)}
    return sums_by_name


def _begin(array: jax.Array) -> list[jax.Array]:
    """Has the devices of this host add up their parts of an array."""
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    steps = np.array([stride * _PLACE % 2**32 for stride in strides], np.uint32)
    # Each part is on one device, and no other takes part in the work on it.
    with jax.set_mesh(NO_MESH):
        return [
            _on_device(
                shard.data, steps, np.array([part.start or 0 for part in shard.index], np.uint32)
            )
            for shard in array.addressable_shards
            if shard.replica_id == 0
        ]


def checksum(array: np.ndarray[Any, Any]) -> int:
    """The checksum of an array in host memory; takes a few hundred KB beside it."""
    flat = np.ascontiguousarray(array).reshape(-1)
    words = flat.view(_WORDS[flat.dtype.itemsize])
    if len(words) <= _CHUNK:
        return _add_up(words, 0)
    # A part for each thread; numpy lets go of the interpreter while it computes.
    part = -(-len(words) // _THREADS)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(
            lambda start: _add_up(words[start : start + part], start), range(0, len(words), part)
        )
        return sum(parts) % 2**32


def _add_up(words: np.ndarray[Any, Any], place: int) -> int:
    """The sum over words that follow each other, the first of them at `place`."""
    places = np.arange(_CHUNK, dtype=np.uint32) * np.uint32(_PLACE)
    mixed, shifted = np.empty((2, _CHUNK), np.uint32)
    total = 0
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK]
        some, more = mixed[: len(chunk)], shifted[: len(chunk)]
        offset = np.uint32((place + start) * _PLACE % 2**32)
        np.add(places[: len(chunk)], offset, out=some)
        np.bitwise_xor(some, chunk, out=some)
        if chunk.dtype.itemsize == 4:
            # A sign's bit alone would change few others.
            np.right_shift(chunk, 16, out=more)
            np.bitwise_xor(some, more, out=some)
        np.multiply(some, np.uint32(_FIRST), out=some)
        np.right_shift(some, 15, out=more)
        np.bitwise_xor(some, more, out=some)
        np.multiply(some, np.uint32(_SECOND), out=some)
        total += int(some.sum(dtype=np.uint32))
    return total % 2**32


def _stays(array: Any) -> bool:
    """Whether an array is added up where it lies, rather than in host memory."""
    if not isinstance(array, jax.Array):
        return False
    if not array.is_fully_addressable:
        return True
    return array.nbytes > _SMALL_BYTES and next(iter(array.devices())).platform != "cpu"


@jax.jit
def _on_device(part: jax.Array, steps: jax.Array, starts: jax.Array) -> jax.Array:
    """The sum over a part of an array, by the device that holds it.

    Args:
        part: its values.
        steps: uint32 [axes]: from one value to the next along each axis of the whole array.
        starts: uint32 [axes]: where in the whole array the part begins.
    """
    bits = part.astype(jnp.uint8) if part.dtype == bool else part
    words = jax.lax.bitcast_convert_type(bits, _WORDS[bits.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place + (index + starts[axis]) * steps[axis]
    mixed = (words ^ (words >> 16) ^ place) * jnp.uint32(_FIRST)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(_SECOND)
    return jnp.sum(mixed, dtype=jnp.uint32)
