"""Where bfloat16 is rounded: as LLaMA rounds it, and not at all in the logits."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax import nnx

from stf_jax.config.text import TextConfig
from stf_jax.models.layers import Init, RMSNorm
from stf_jax.models.llama import Llama

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

BF16 = ml_dtypes.bfloat16


def test_norm_rounds_before_it_scales() -> None:
    rng, width = np.random.default_rng(0), 512
    x = rng.normal(size=(64, width)).astype(BF16)
    scale = rng.normal(1, 0.3, width).astype(BF16)
    ours = RMSNorm(width, epsilon=1e-5, init=Init(rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    ours.scale[...] = jnp.asarray(scale)
    theirs = transformers.models.llama.modeling_llama.LlamaRMSNorm(width, eps=1e-5).bfloat16()
    theirs.weight.data = torch.tensor(scale.astype(np.float32)).bfloat16()
    with torch.no_grad():
        expected = theirs(torch.tensor(x.astype(np.float32)).bfloat16()).float().numpy()
    actual = ours(jnp.asarray(x))
    assert actual.dtype == jnp.bfloat16
    # The mean may be summed in another order, which moves one in thousands by a rounding.
    assert np.mean(np.asarray(actual, np.float32) == expected) > 0.999


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_not_rounded(tied: bool) -> None:
    config = TextConfig(
        vocab_size=100, width=64, mlp_width=8, layers=1, heads=2, kv_heads=2, head_dim=32,
        tie_embeddings=tied,
    )  # fmt: skip
    model = Llama(config, init=Init(rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    x = np.random.default_rng(0).normal(size=(2, 3, 64)).astype(BF16)
    actual = model.logits(jnp.asarray(x))
    kernel = model.embedding[...].T if model.head is None else model.head.kernel[...]
    exact = x.astype(np.float64) @ np.asarray(kernel).astype(np.float64)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(actual), exact, rtol=0, atol=1e-5)
