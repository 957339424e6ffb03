"""Arrays of a checkpoint: named by path, read as they are stored, checked, cast and placed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from stf_jax.store.checksum import checksums
from stf_jax.store.packing import INT4, PACKED, pack, packed_shape, unpack, unpack_on_device
from stf_jax.store.quiet import quiet_failures
from stf_jax.util.errors import CheckpointError

Tree = Mapping[str, Any]

# Of arrays that are read, checked and cast together, or written together.
CONCURRENT_BYTES = 512 * 2**20


def load_some(path: epath.Path, wanted: Tree) -> dict[str, Any]:
    """The leaves of an Orbax checkpoint that are wanted, in the form of `wanted`."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context, quiet_failures():
        loaded: dict[str, Any] = ocp.load(path, wanted)
    return loaded


def load_and_check(
    load: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    wanted: Mapping[str, Any],
    *,
    stored: Mapping[str, Any],
    recorded: Mapping[str, int],
    damaged: Callable[[str], CheckpointError],
) -> dict[str, Any]:
    """Reads arrays as they are stored, holds each against its checksum, and then casts it.

    Some are read at a time, so that little is held in both dtypes.

    Args:
        load: reads the arrays that are wanted, by path.
        wanted: by path, what each is to be like: `host_like`, or a shape with a sharding.
        stored: shape and dtype of each on disk; int4 lies there as `stf_jax.store.packing` says.
        recorded: the checksums; what has none is taken as it is.
        damaged: makes the error of the reason.

    Raises:
        CheckpointError: the first array that is not what was written.
    """
    loaded: dict[str, Any] = {}
    for names in batches(wanted, stored):
        some = dict(load({name: _on_disk(wanted[name], stored[name].dtype) for name in names}))
        sums = checksums({name: some[name] for name in names if name in recorded})
        if changed := [name for name, number in sums.items() if number != recorded[name]]:
            raise damaged(f"{changed[0]} is not what was written")
        for name in names:
            array = some.pop(name)
            if stored[name].dtype == INT4:
                array = _unpack(array, wanted[name])
            loaded[name] = _cast(array, wanted[name])
    return loaded


def to_disk(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An array as it is stored."""
    return pack(array) if array.dtype == INT4 else array


def _unpack(array: Any, like: Any) -> Any:
    return unpack(array) if isinstance(like, np.ndarray) else unpack_on_device(array, like)


def _cast(array: Any, like: Any) -> Any:
    if array.dtype == like.dtype:
        return array
    array = array.astype(like.dtype)
    # The same place, said as it was asked for.
    return array if isinstance(like, np.ndarray) else jax.device_put(array, like.sharding)


def batches(wanted: Iterable[str], stored: Mapping[str, Any]) -> Iterator[list[str]]:
    """The names in order, so many at a time that their arrays stay below a size."""
    names: list[str] = []
    held = 0
    for name in wanted:
        size = math.prod(stored[name].shape) * stored[name].dtype.itemsize
        if names and held + size > CONCURRENT_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


def _on_disk(like: Any, dtype: Any) -> Any:
    """As `like`, in the shape and dtype in which it is stored."""
    shape, dtype = (packed_shape(like.shape), PACKED) if dtype == INT4 else (like.shape, dtype)
    if isinstance(like, np.ndarray):
        return host_like(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=like.sharding)


def host_like(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """What asks `load` for an array in host memory; takes no memory itself."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def place(array: np.ndarray[Any, Any], like: Any) -> Any:
    """Casts a host array and puts it where `like` says; each device gets its own part only."""
    array = array.astype(like.dtype, copy=False)
    if isinstance(like, np.ndarray):
        return array
    if like.sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, like.sharding, lambda part: array[part])


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dictionaries -> {"a/b/c": leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{rest}": leaf for rest, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} -> nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
