"""The cache holds what is written where it is written, as exactly as its dtype can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.models.cache import CacheDType, KVCache


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("dtype", "error"), [(None, 0), ("bfloat16", 2**-8), ("int8", 1 / 253)])
def test_written_row_by_row(dtype: CacheDType | None, error: float) -> None:
    """Each row at its own positions; what lies beyond the last slot is dropped."""
    first, second = random(2, 4, 3, 8), random(2, 3, 3, 8, seed=1)
    cache = KVCache.of([first], [2 * first], dtype=dtype).widened(6)
    positions = jnp.array([[1, 2, 3], [4, 5, 6]])
    cache = cache.written(0, second, 2 * second, positions=positions)
    expected = np.zeros((2, 6, 3, 8), np.float32)
    expected[:, :4] = first
    expected[0, 1:4], expected[1, 4:6] = second[0], second[1, :2]
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    keys, values = (one.swapaxes(1, 2) for one in cache.read(0, jnp.float32))
    assert (np.abs(keys - expected) <= error * largest).all()
    assert (np.abs(values - 2 * expected) <= 2 * error * largest).all()


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_rows_move(dtype: CacheDType | None) -> None:
    arrays = (random(4, 5, 3, 8, seed=seed) for seed in (0, 1))
    old, new = (KVCache.of([one], [one], dtype=dtype) for one in arrays)
    moved = old.replaced(jnp.array([2, 4, 0]), new.rows(jnp.array([1, 3, 3]), spec=None), spec=None)
    rows = np.asarray(moved.read(0, jnp.float32)[0])
    was, now = (np.asarray(one.read(0, jnp.float32)[0]) for one in (old, new))
    np.testing.assert_array_equal(rows, np.stack([now[3], was[1], now[1], was[3]]))


def test_fewer_slots_leave_the_later_ones() -> None:
    old, new = random(2, 5, 3, 8), random(1, 3, 3, 8, seed=1)
    long, short = (KVCache.of([one], [one], dtype=None) for one in (old, new))
    rows = long.replaced(jnp.array([1]), short, spec=None).read(0, jnp.float32)[0].swapaxes(1, 2)
    np.testing.assert_array_equal(rows, old.at[1, :3].set(new[0]))


def test_zeros_stay_zeros() -> None:
    cache = KVCache.of([jnp.zeros((1, 2, 1, 4))], [jnp.zeros((1, 2, 1, 4))], dtype="int8")
    assert not np.asarray(cache.read(0, jnp.float32)).any()
