"""The TPU's kernel, interpreted in Python, and attention to a cache, beside XLA's attention."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from stf_jax.models import attention as module
from stf_jax.models.attention import attention
from stf_jax.models.marks import Marks
from stf_jax.parallel.sharding import make_mesh
from stf_jax.parallel.splash import splash_attention

# T, N, K, D, causal: whole blocks, padded ones, grouped heads, several blocks, the tower's shape.
CASES = {
    "one block": (128, 2, 2, 128, True),
    "grouped, padded": (200, 4, 2, 128, True),
    "several blocks": (640, 2, 1, 128, True),
    "tower": (145, 2, 2, 64, False),
}


def arrays(case: tuple[int, int, int, int, bool], rows: int = 2) -> tuple[jax.Array, ...]:
    length, heads, kv_heads, dim, _ = case
    rng = np.random.default_rng(0)
    query, key, value, seed = (
        jnp.asarray(rng.standard_normal((rows, length, n, dim)), jnp.float32)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    # Three segments, then padding, at other places in each row.
    cuts = np.sort(rng.integers(1, length, (rows, 3)), axis=1)
    segments = 1 + (np.arange(length) >= cuts[:, :2, None]).sum(1)
    segments = jnp.asarray(np.where(np.arange(length) < cuts[:, 2:], segments, 0), jnp.int32)
    return query, key, value, segments, seed


def same_segment(query: Marks, key: Marks) -> jax.Array:
    return (query.segment == key.segment) & (key.segment != 0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_is_attention(case: tuple[int, int, int, int, bool]) -> None:
    """Values and gradients at every position that means something."""
    query, key, value, segments, seed = arrays(case)
    causal, real = case[-1], (segments > 0)[..., None, None]
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    marks = Marks.text(index, segments)
    rule = module.causal if causal else same_segment

    def kernel(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return splash_attention(
            query, key, value, segments, segments, causal=causal, interpret=True
        )

    def xla(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention(query, key, value, marks=marks, rule=rule)

    def with_gradient(function: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
        seen, back = jax.vjp(lambda *given: jnp.where(real, function(*given), 0), query, key, value)
        return seen, *back(seed)

    actual, wanted = jax.jit(with_gradient, static_argnums=0)(kernel), with_gradient(xla)
    for array, expected in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(
            array, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max())
        )


@pytest.mark.parametrize("masked", [True, False])
def test_split_over_a_mesh(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    """Each device takes its rows and heads; on a TPU this is what `attention` does."""
    case = (130, 4, 2, 64, masked)
    query, key, value, segments, _ = arrays(case, rows=4)
    marks = Marks.text(jnp.broadcast_to(jnp.arange(130), segments.shape), segments)
    wanted = attention(query, key, value, marks=marks if masked else None)
    monkeypatch.setattr(module, "platform", lambda: "tpu")
    interpreted = lambda *given, **options: splash_attention(*given, **options, interpret=True)  # noqa: E731
    monkeypatch.setattr(module, "splash_attention", interpreted)
    rows, heads = PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp"), None, "tensor")
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        query, key, value = (jax.device_put(array, heads) for array in (query, key, value))
        marks = jax.device_put(marks, rows)
        actual = jax.jit(lambda *given: attention(*given, marks=marks if masked else None))(
            query, key, value
        )
        assert jax.typeof(actual).sharding.spec[:3] == (("data", "fsdp"), None, "tensor")
    real = np.asarray(segments > 0)[..., None, None] if masked else True
    np.testing.assert_allclose(np.where(real, actual, 0), np.where(real, wanted, 0), atol=1e-5)


def test_keys_may_be_other_positions_than_queries() -> None:
    """Some of the queries against all keys are those rows of the whole."""
    query, key, value, segments, _ = arrays(CASES["grouped, padded"])
    index = jnp.broadcast_to(jnp.arange(query.shape[1], dtype=jnp.int32), segments.shape)
    marks, chosen = Marks.text(index, segments), jnp.broadcast_to(index[0, 3::7], (2, 29))
    whole = attention(query, key, value, marks=marks, rule=same_segment)
    part = attention(
        query[:, 3::7], key, value, marks=marks.take(chosen), key_marks=marks, rule=same_segment
    )
    real = np.asarray(segments[:, 3::7]) > 0
    np.testing.assert_allclose(part[real], whole[:, 3::7][real], rtol=0, atol=1e-6)
