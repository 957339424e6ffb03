"""Adapters: the paper's formula, dropout in training, and merging."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config.text import TextConfig
from stf_jax.models.keys import StepKey
from stf_jax.models.layers import Init, Linear
from stf_jax.models.llama import Llama
from stf_jax.models.lora import LoRAConfig, is_adapter, merge
from stf_jax.models.marks import Marks
from stf_jax.store.arrays import flatten, unflatten

CONFIG = LoRAConfig(rank=3, alpha=5.0, dropout=0.0)


def linear(inputs: tuple[int, ...], outputs: tuple[int, ...], config: LoRAConfig) -> Linear:
    init = Init(rngs=nnx.Rngs(0))
    layer = Linear(inputs, outputs, init=init, kernel=None, use_bias=False, lora=config)
    layer.lora.b[...] = jax.random.normal(jax.random.key(1), layer.lora.b.shape)
    return layer


@pytest.mark.parametrize(("inputs", "outputs"), [((6,), (8,)), ((6,), (2, 4)), ((2, 3), (8,))])
def test_the_papers_formula(inputs, outputs):
    layer = linear(inputs, outputs, CONFIG)
    x = jax.random.normal(jax.random.key(2), (2, 7, *inputs))
    flat = np.asarray(x, np.float64).reshape(14, 6)
    w, a, b = (
        np.asarray(leaf[...], np.float64) for leaf in (layer.kernel, layer.lora.a, layer.lora.b)
    )
    w, a, b = w.reshape(6, 8), a.reshape(6, 3), b.reshape(3, 8)
    expected = flat @ w + 5 / 3 * (flat @ a) @ b
    np.testing.assert_allclose(layer(x, out=None).reshape(14, 8), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [((6,), (2, 4)), ((2, 3), (8,))])
def test_merged_is_the_same_function(inputs, outputs):
    layer = linear(inputs, outputs, CONFIG)
    x = jax.random.normal(jax.random.key(2), (2, 7, *inputs))
    adapted = layer(x, out=None)
    parts = (np.asarray(leaf[...]) for leaf in (layer.kernel, layer.lora.a, layer.lora.b))
    layer.kernel[...] = merge(*parts, scale=CONFIG.scale)
    layer.lora = None
    np.testing.assert_allclose(layer(x, out=None), adapted, rtol=1e-4, atol=1e-5)


def test_dropout_is_of_the_inputs_of_a_alone():
    config = dataclasses.replace(CONFIG, dropout=0.25)
    layer = linear((1000,), (1,), config)
    layer.kernel[...] *= 0
    layer.lora.a[...] = jnp.eye(1000, 3)
    layer.lora.b[...] = jnp.ones((3, 1))
    x = jnp.ones((1, 4000, 1000))
    y = np.asarray(layer(x, out=None))[0, :, 0] / config.scale
    # The sum of three inputs, each 0 or 1 / 0.75.
    counts = np.round(y * 0.75).astype(int)
    np.testing.assert_allclose(y, counts / 0.75, rtol=1e-5)
    assert abs(counts.mean() / 3 - 0.75) < 0.02
    layer.lora.key[...] = jax.random.key(9)
    assert not np.array_equal(np.asarray(layer(x, out=None))[0, :, 0] / config.scale, y)


def test_every_matmul_of_the_layers_has_one_and_nothing_else():
    abstract = nnx.eval_shape(
        lambda: Llama(TextConfig.tiny(), init=Init(rngs=nnx.Rngs(0)), lora=LoRAConfig(rank=4))
    )
    parameters = flatten(nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
    kernels = {
        path for path in parameters if path.startswith("layers/") and path.endswith("/kernel")
    }
    adapters = {path for path in parameters if is_adapter(path)}
    assert len(kernels) == 7
    assert adapters == {
        f"{path.removesuffix('/kernel')}/lora/{which}" for path in kernels for which in "ab"
    }
    keys = flatten(nnx.to_pure_dict(nnx.state(abstract, StepKey)))
    assert len(keys) == 7
    assert {leaf.shape for leaf in keys.values()} == {(TextConfig.tiny().layers,)}


def test_layers_differ_in_a_and_begin_with_b_at_zero():
    config = TextConfig.tiny()
    llama = Llama(config, init=Init(rngs=nnx.Rngs(0)), lora=LoRAConfig(rank=4))
    leaves = flatten(nnx.to_pure_dict(nnx.state(llama, nnx.Param)))
    for path, leaf in leaves.items():
        if path.endswith("/lora/b"):
            assert not leaf.any(), path
        if path.endswith("/lora/a"):
            assert len(np.unique(np.asarray(leaf))) > 0.9 * leaf.size, path
            bound = 1 / np.sqrt(np.prod(leaf.shape[1:-1]))
            assert 0.9 * bound < abs(leaf).max() <= bound, path
    plain = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    merged = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: Llama(config, init=Init(rngs=nnx.Rngs(0))))),
        unflatten(plain),
    )
    x = jax.random.normal(jax.random.key(0), (1, 5, config.width))
    marks = Marks.text(jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32))
    # The same sum, which the compiler may fuse in another order.
    np.testing.assert_allclose(
        llama(x, marks=marks),
        merged(x, marks=marks),
        rtol=1e-6,
        atol=1e-6,
    )


def test_bad_configs():
    with pytest.raises(ValueError, match=r"lora\.rank is 0; it must be at least 1"):
        LoRAConfig(rank=0)
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"lora\.alpha is {alpha}; it must be above"):
            LoRAConfig(alpha=alpha)
    with pytest.raises(ValueError, match=r"lora\.dropout is 1\.0; give 0 or more, below 1"):
        LoRAConfig(dropout=1.0)
