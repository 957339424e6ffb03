"""Quantized weights compute what their dequantized numbers do."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config.quantization import parse_scheme
from stf_jax.config.text import TextConfig
from stf_jax.models import quantization
from stf_jax.models.quantization import QuantizedKernel
from stf_jax.systems import named_config
from stf_jax.systems.mesh import check_divisible

SHAPES = {"column": ((64,), (4, 8)), "row": ((96,), (32,)), "heads": ((4, 16), (24,))}


def make_kernel(scheme: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> QuantizedKernel:
    """A kernel of random integers and scales."""
    kernel = QuantizedKernel(parse_scheme(scheme), inputs, outputs, spec=None)
    rng = np.random.default_rng(0)
    least, most = (-128, 128) if scheme == "int8" else (-8, 8)
    integers = rng.integers(least, most, kernel.integers.shape)
    kernel.integers[...] = jnp.asarray(integers, kernel.integers.dtype)
    kernel.scales[...] = jnp.asarray(rng.uniform(size=kernel.scales.shape), kernel.scales.dtype)
    return kernel


def to_numbers(kernel: QuantizedKernel) -> np.ndarray:
    """integers * scales, by hand."""
    integers, scales = (
        np.asarray(part[...]).astype(np.float64) for part in (kernel.integers, kernel.scales)
    )
    return (integers * scales).reshape(*kernel.inputs, *kernel.outputs)


@pytest.mark.parametrize("block", [2**20, 512], ids=["whole", "in blocks"])
@pytest.mark.parametrize("scheme", ["int8", "int4-8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_and_its_gradient_are_those_of_the_numbers(
    shape: str, scheme: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "_BLOCK_BYTES", block)
    inputs, outputs = SHAPES[shape]
    kernel = make_kernel(scheme, inputs, outputs)
    assert (kernel._blocks() > 1) == (block < 2**20)
    graph, state = nnx.split(kernel)
    x = np.random.default_rng(1).normal(size=(2, 3, *inputs)).astype(np.float32)
    y, back = jax.vjp(lambda x: nnx.merge(graph, state).dot(x, out=None), jnp.asarray(x))
    weight = to_numbers(kernel)
    expected = np.tensordot(x, weight, axes=len(inputs))
    np.testing.assert_allclose(y, expected, atol=1e-5 * abs(expected).max(), rtol=0)
    slope = np.random.default_rng(2).normal(size=y.shape).astype(np.float32)
    through = np.tensordot(slope, weight, axes=(range(2, y.ndim), range(len(inputs), weight.ndim)))
    found = back(jnp.asarray(slope))[0]
    np.testing.assert_allclose(found, through, atol=1e-5 * abs(through).max(), rtol=0)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_numbers_of_a_whole_weight_never_exist_on_a_cpu(scheme: str) -> None:
    kernel = make_kernel(scheme, (1024,), (8192,))
    graph, state = nnx.split(kernel)
    compute = jax.jit(lambda state, x: nnx.merge(graph, state).dot(x, out=None))
    compiled: Any = compute.lower(state, jnp.ones((1, 1024), jnp.bfloat16)).compile()
    numbers = 4 * math.prod(kernel.integers.shape)
    assert compiled.memory_analysis().temp_size_in_bytes < numbers / 2


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("int5", "quantization 'int5' is unknown; choose int8, int4, or int4-N for groups of N"),
        ("int4-24", "quantization 'int4-24' is unknown; .* a power of two"),
        ("int4-64", "groups of 64 do not divide mlp_width 112; choose int4-16"),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused(scheme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(width=64, mlp_width=112, head_dim=16, quantization=scheme)


def test_a_mesh_that_cuts_a_group_is_refused() -> None:
    mesh = jax.sharding.AbstractMesh((1, 1, 4), ("data", "fsdp", "tensor"))
    check_divisible(named_config("llava_stf_7b", quantization="int4"), mesh)
    with pytest.raises(ValueError, match="mlp_width in groups of 128 86 by tensor 4"):
        check_divisible(named_config("llava_stf_7b", quantization="int4-128"), mesh)
