"""The tokens that may be drawn are those of `transformers`' logits warpers."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stf_jax.infer.sampling import likely

torch = pytest.importorskip("torch")
# It imports PyTorch.
logits_process = pytest.importorskip("transformers.generation.logits_process")
pytestmark = pytest.mark.torch

VOCABULARY = 300


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(
    temperature=st.floats(0.1, 3.0),
    top_k=st.one_of(st.just(0), st.integers(1, 2 * VOCABULARY)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_kept_tokens(
    temperature: float, top_k: int, top_p: float, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (4, VOCABULARY)).astype(np.float32)
    expected = logits_process.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    # As `generate` does, which leaves out what changes nothing.
    if top_k:
        expected = logits_process.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = logits_process.TopPLogitsWarper(top_p)(None, expected)
    actual = likely(
        jnp.asarray(logits) / jnp.float32(temperature),
        top_k=jnp.full(len(logits), top_k, jnp.int32),
        top_p=jnp.full(len(logits), top_p, jnp.float32),
    )
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected.numpy()))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
