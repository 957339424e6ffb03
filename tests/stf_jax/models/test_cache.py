"""The cache holds what is written where it is written, as exactly as its dtype can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from stf_jax.models import cache as module
from stf_jax.models.attention import attention
from stf_jax.models.cache import CacheDType, KVCache, Quantized, Stored, cache_attention
from stf_jax.models.marks import Marks
from stf_jax.parallel.sharding import make_mesh


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def vectors(stored: Stored) -> np.ndarray:
    """What is stored, [B G S D]."""
    if isinstance(stored, Quantized):
        return np.asarray(stored.integers * stored.scales)
    return np.asarray(stored, np.float32)


def marks_to(rows: int, slots: int) -> Marks:
    """Of rows that are full of text."""
    index = jnp.broadcast_to(jnp.arange(slots), (rows, slots))
    return Marks.text(index, jnp.ones_like(index))


def marks_at(positions: jax.Array) -> Marks:
    return Marks.text(positions, jnp.ones_like(positions))


@pytest.mark.parametrize(("dtype", "error"), [(None, 0), ("bfloat16", 2**-8), ("int8", 1 / 253)])
def test_written_row_by_row(dtype: CacheDType | None, error: float) -> None:
    """Each row at its own positions; what lies beyond the last slot is dropped."""
    first, second = random(2, 4, 3, 8), random(2, 3, 3, 8, seed=1)
    cache = KVCache.of([first], [2 * first], marks_to(2, 4), dtype=dtype).resize([6])
    positions = jnp.array([[1, 2, 3], [4, 5, 6]])
    cache = cache.write(0, second, 2 * second, slots=positions)
    expected = np.zeros((2, 6, 3, 8), np.float32)
    expected[:, :4] = first
    expected[0, 1:4], expected[1, 4:6] = second[0], second[1, :2]
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    keys, values = (vectors(one).swapaxes(1, 2) for one in (cache.keys[0], cache.values[0]))
    assert (np.abs(keys - expected) <= error * largest).all()
    assert (np.abs(values - 2 * expected) <= 2 * error * largest).all()


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_rows_move(dtype: CacheDType | None) -> None:
    arrays = (random(4, 5, 3, 8, seed=seed) for seed in (0, 1))
    old, new = (KVCache.of([one], [one], marks_to(*one.shape[:2]), dtype=dtype) for one in arrays)
    moved = old.insert(
        jnp.array([2, 4, 0]),
        new.rows(jnp.array([1, 3, 3]), spec=None, marks=None),
        spec=None,
        marks=None,
    )
    rows = vectors(moved.keys[0])
    was, now = (vectors(one.keys[0]) for one in (old, new))
    np.testing.assert_array_equal(rows, np.stack([now[3], was[1], now[1], was[3]]))


def test_what_stood_in_later_slots_is_not_seen_and_can_be_cleared() -> None:
    old, new = random(2, 5, 3, 8), random(1, 3, 3, 8, seed=1)
    long, short = (
        KVCache.of([one], [one], marks_to(*one.shape[:2]), dtype=None) for one in (old, new)
    )
    replaced = long.insert(jnp.array([1]), short, spec=None, marks=None)
    rows = vectors(replaced.keys[0]).swapaxes(1, 2)
    np.testing.assert_array_equal(rows, old.at[1, :3].set(new[0]))
    np.testing.assert_array_equal(
        replaced.groups[0].marks.segment, [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    )
    cleared = replaced.clear(jnp.array([False, True]))
    rows = vectors(cleared.keys[0]).swapaxes(1, 2)
    np.testing.assert_array_equal(rows, old.at[1].set(0))


def test_zeros_stay_zeros() -> None:
    zeros = jnp.zeros((1, 2, 1, 4))
    cache = KVCache.of([zeros], [zeros], marks_to(1, 2), dtype="int8")
    assert not vectors(cache.keys[0]).any()
    positions = jnp.zeros((1, 1), jnp.int32)
    marks = marks_at(positions)
    seen = cache_attention(
        random(1, 1, 1, 4), cache.keys[0], cache.values[0], marks=marks, slots=cache.groups[0].marks
    )
    assert not seen.any()


def test_long_contexts_in_float16() -> None:
    """A four-thousandth of the attention times a small scale is below what float16 tells apart."""
    slots = 4096
    key, value = (
        (random(1, slots, 1, 16, seed=seed) * 0.02 + 0.01).astype(jnp.float16) for seed in (1, 2)
    )
    cache = KVCache.of([key], [value], marks_to(1, slots), dtype="int8")
    query, positions = random(1, 1, 1, 16) * 0.1, jnp.full((1, 1), slots - 1)
    held = cache.keys[0], cache.values[0]
    seen = {"marks": marks_at(positions), "slots": cache.groups[0].marks}
    wanted = cache_attention(query, *held, **seen)
    actual = cache_attention(query.astype(jnp.float16), *held, **seen)
    assert actual.dtype == jnp.float16
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=0.01 * float(abs(wanted).max()))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("dtype", "error"), [(None, 1e-6), ("bfloat16", 2e-2), ("int8", 2e-2)])
def test_attention(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    queries: int,
    dtype: CacheDType | None,
    error: float,
) -> None:
    """Queries in the midst of a sequence see what they see with all of it at hand."""
    query, key, value = (
        random(2, 9, 6, 16),
        random(2, 9, 2, 16, seed=1),
        random(2, 9, 2, 16, seed=2),
    )
    # Each row continues from a place of its own, with room behind it that nothing may see.
    positions = jnp.array([[5, 6, 7], [2, 3, 4]])[:, :queries]
    late = jnp.take_along_axis(query, positions[:, :, None, None], axis=1)
    wanted = attention(query, key, value, marks=marks_to(2, 9))
    wanted = jnp.take_along_axis(wanted, positions[:, :, None, None], axis=1)
    room = ((0, 0), (0, 4), (0, 0), (0, 0))
    cache = KVCache.of(
        *([jnp.pad(one, room, constant_values=9)] for one in (key, value)),
        marks_to(2, 13),
        dtype=dtype,
    )
    held = cache.keys[0], cache.values[0]
    monkeypatch.setattr(module, "platform", lambda: platform)
    seen = {"marks": marks_at(positions), "slots": cache.groups[0].marks}
    actual = cache_attention(late, *held, **seen)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=error)
    rows, heads = PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp"), "tensor")
    with jax.set_mesh(make_mesh(data=2, tensor=2, devices=jax.devices()[:4])):
        late = jax.device_put(late, PartitionSpec(("data", "fsdp"), None, "tensor"))
        split = jax.jit(cache_attention)(
            late, *jax.device_put(held, heads), **jax.device_put(seen, rows)
        )
    np.testing.assert_allclose(split, actual, rtol=0, atol=1e-6)
