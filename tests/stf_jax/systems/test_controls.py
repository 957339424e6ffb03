"""The two controls: random patches, and a smaller image."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.clip import VisionTower
from stf_jax.models.connector import VisionFeatures
from stf_jax.models.layers import Init
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.downsample import Downsample
from stf_jax.systems.random import Random

VISION, TEXT = VisionConfig.tiny(), TextConfig.tiny()


def test_random_keeps_raster_order() -> None:
    system = Random(taps=(3,), keep=5, seed=3, projector_width=8)
    module = system.connector(VISION, TEXT, init=Init(rngs=nnx.Rngs(0)))
    numbers = jnp.arange(VISION.patches, dtype=jnp.float32)[None, :, None]
    (tokens,) = module.reduce(VisionFeatures(taps=(numbers,)))[..., 0].tolist()
    assert tokens == sorted(tokens) == system.indices(VISION).tolist()
    assert len(set(tokens)) == 5


def test_every_seed_is_another_draw_and_every_patch_may_be_drawn() -> None:
    draws = [tuple(Random(keep=4, seed=seed).indices(VISION)) for seed in range(40)]
    assert len(set(draws)) > 30
    assert {patch for draw in draws for patch in draw} == set(range(VISION.patches))
    assert draws[7] == tuple(Random(keep=4, seed=7).indices(VISION))


def test_all_patches_are_llava() -> None:
    indices = Random(keep=VISION.patches).indices(VISION)
    assert indices.tolist() == list(range(VISION.patches))


@pytest.mark.parametrize(
    ("system", "message"),
    [
        (Random(taps=(3,), keep=17), "keep is 17; an image has 16 patches"),
        (Downsample(taps=(3,), side=30), "14 to 56 pixels in steps of 14"),
        (Downsample(taps=(3,), side=70), "14 to 56 pixels in steps of 14"),
        (Random(taps=(3, 1)), "random patches reads one hidden state"),
    ],
)
def test_refusals(system: Random | Downsample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlavaConfig(vision=VISION, text=TEXT, system=system)


@pytest.mark.parametrize(("side", "tokens"), [(14, 1), (28, 4), (42, 9), (56, 16)])
def test_a_smaller_image_has_fewer_tokens(side: int, tokens: int) -> None:
    system = Downsample(taps=(3,), side=side, projector_width=8)
    assert system.tokens(VISION) == tokens
    tower = VisionTower(VISION, taps=system.taps, init=Init(rngs=nnx.Rngs(0)))
    pixels = jnp.zeros((1, side, side, 3))
    (tap,) = jax.eval_shape(lambda tower, pixels: tower(pixels).taps, tower, pixels)
    assert tap.shape == (1, tokens, VISION.width)


@pytest.mark.torch
@pytest.mark.parametrize("grid", [1, 2, 3, 5])
def test_positions_are_interpolated_as_in_transformers(grid: int) -> None:
    torch = pytest.importorskip("torch")
    vision = dataclasses.replace(VISION, image_size=14 * 6)
    tower = VisionTower(vision, taps=(1,), init=Init(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    table = rng.standard_normal((37, vision.width)).astype(np.float32)
    tower.position_embedding[...] = jnp.asarray(table)
    square = torch.from_numpy(table[1:]).reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(
        square, size=(grid, grid), mode="bicubic", align_corners=False
    )
    expected = small.permute(0, 2, 3, 1).reshape(grid * grid, -1).numpy()
    positions = np.asarray(tower.positions(grid))
    np.testing.assert_array_equal(positions[0], table[0])
    np.testing.assert_allclose(positions[1:], expected, rtol=0, atol=1e-5)
