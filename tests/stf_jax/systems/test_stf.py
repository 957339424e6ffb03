"""The paper by hand: its drawing, its arithmetic on small numbers, its published sizes."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.connector import VisionFeatures
from stf_jax.models.layers import Init
from stf_jax.systems.average import average_pooling
from stf_jax.systems.stf import MBTF, STF, STF_TAPS, MBTFConfig, spatial_token_fusion


def test_the_drawing() -> None:
    """The docstring's 4x4 grid, each patch a number."""
    patches = jnp.arange(16.0).reshape(1, 16, 1)
    fused = spatial_token_fusion(patches, window=2)
    assert fused[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert average_pooling(patches, window=2)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


def test_channels_of_a_token_are_row_column_channel() -> None:
    """Two channels a patch: those of one patch stay together."""
    patches = jnp.stack([jnp.arange(4.0), 10 + jnp.arange(4.0)], axis=-1)[None]
    (token,) = spatial_token_fusion(patches, window=2)[0].tolist()
    assert token == [0, 10, 1, 11, 2, 12, 3, 13]


@pytest.mark.parametrize("window", [1, 2, 3, 6])
def test_fusion_loses_nothing(window: int) -> None:
    """Every feature of every patch is in exactly one token."""
    patches = jnp.arange(2 * 36 * 3.0).reshape(2, 36, 3)
    fused = spatial_token_fusion(patches, window=window)
    assert fused.shape == (2, 36 // window**2, 3 * window**2)
    np.testing.assert_array_equal(jnp.sort(fused.ravel()), patches.ravel())


def test_mbtf_on_small_numbers() -> None:
    """Two blocks of one channel, mixed by matrices that can be followed with a pencil."""
    mixer = MBTF(MBTFConfig(mlp_width=2), blocks=2, vision_width=1, init=Init(rngs=nnx.Rngs(0)))
    mixer.linear_1.kernel[...] = jnp.array([[1.0, 0.0], [0.0, -1.0]])
    mixer.linear_1.bias[...] = jnp.array([0.0, 1.0])
    mixer.linear_2.kernel[...] = jnp.array([[1.0], [10.0]])
    mixer.linear_2.bias[...] = jnp.array([0.5])
    low, high = jnp.array([[[2.0]]]), jnp.array([[[3.0]]])
    # gelu(2) = 1.954500, gelu(1 - 3) = -0.045500.
    expected = 1.954500 + 10 * -0.045500 + 0.5
    np.testing.assert_allclose(mixer.mix((low, high))[0, 0, 0], expected, atol=1e-5)


def test_blocks_are_fused_before_space() -> None:
    """Paper, figure 2: MBTF over all patches, then STF."""
    vision = VisionConfig.tiny()
    system = STF(taps=(3, 1), mbtf=MBTFConfig(mlp_width=8), projector_width=16)
    module = system.connector(vision, TextConfig.tiny(), init=Init(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    taps = tuple(
        jnp.asarray(rng.standard_normal((1, vision.patches, vision.width)), jnp.float32)
        for _ in range(2)
    )
    assert module.mbtf is not None
    expected = spatial_token_fusion(module.mbtf.mix(taps), window=2)
    np.testing.assert_array_equal(module.reduce(VisionFeatures(taps=taps)), expected)


def test_the_released_sizes() -> None:
    vision, text = VisionConfig.clip_l_336(), TextConfig.vicuna_7b()
    system = STF.for_model(vision=vision, text=text)
    assert system == STF()
    assert system.taps == STF_TAPS == (23, 21, 18, 15, 12, 9, 6, 3)
    assert (system.tokens(vision), system.token_width(vision)) == (144, 4096)
