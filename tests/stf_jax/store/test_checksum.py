"""A checksum is one number for an array, wherever it lies, and another one for any other array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stf_jax.parallel.sharding import make_mesh
from stf_jax.store import checksum as module
from stf_jax.store.checksum import checksum, checksums, name_leaves


def on_devices(array: jax.Array) -> int:
    """As where arrays are not fetched first."""
    return sum(map(int, module._begin(array))) % 2**32


DTYPES = (np.float32, jnp.bfloat16, np.float16, np.int8, np.int32, np.uint32, bool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_in_host_memory_and_on_any_mesh(dtype: np.dtype) -> None:
    array = (np.random.default_rng(0).standard_normal((8, 16, 640)) * 100).astype(dtype)
    expected = checksum(array)
    assert on_devices(jnp.asarray(array)) == expected
    mesh = make_mesh(fsdp=2, tensor=4)
    with jax.set_mesh(mesh):
        for spec in (
            PartitionSpec("fsdp", None, "tensor"),
            PartitionSpec(None, "fsdp"),
            PartitionSpec(None, None, ("fsdp", "tensor")),
        ):
            placed = jax.device_put(array, NamedSharding(mesh, spec))
            assert on_devices(placed) == expected
            assert checksums({"placed": placed}) == {"placed": expected}


@pytest.mark.parametrize("size", [0, 1, 5, 1 << 16, (1 << 16) + 1, 300_001])
def test_the_same_in_any_number_of_chunks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(size).standard_normal(size, np.float32)
    expected = on_devices(jnp.asarray(array))
    for threads, chunk in ((1, 1 << 16), (3, 1 << 16), (2, 1000)):
        monkeypatch.setattr(module, "_THREADS", threads)
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert checksum(array) == expected


@pytest.mark.parametrize("dtype", [np.uint32, np.uint16])
def test_another_for_every_flipped_bit_and_every_two_of_them(dtype: type) -> None:
    words = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, 6).astype(dtype)
    expected = checksum(words)
    bits = 8 * words.dtype.itemsize
    flips = [(place, dtype(1 << bit)) for place in range(6) for bit in range(bits)]
    for number, (place, bit) in enumerate(flips):
        once = words.copy()
        once[place] ^= bit
        assert checksum(once) != expected
        for other, another in flips[number + 1 :]:
            twice = once.copy()
            twice[other] ^= another
            assert checksum(twice) != expected


def test_another_when_values_change_places() -> None:
    array = np.arange(4096, dtype=np.float32)
    assert len({checksum(np.roll(array, shift)) for shift in range(64)}) == 64


def test_leaves_have_the_names_that_storage_gives_them() -> None:
    tree = {"b": (1, {"x": 2, "c/d": 3}), "a": [4]}
    assert name_leaves(tree) == {"a/0": 4, "b/0": 1, "b/1/c/d": 3, "b/1/x": 2}
