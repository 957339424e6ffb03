"""The small CLIP of the demo, and how it learns to see: by captions, a patch at a time.

A linear layer reads the caption of a cell from its patch token: row, column, digit, color. That
layer is thrown away afterwards. Captioners have to find out which word belongs to which place; here
each word is supervised at its place, which is easier. Captions teach vision as well as CLIP's
contrast does (Tschannen et al. 2023, arXiv 2306.07915). On two cores CLIP's own way is too slow: a
batch of 64 images gives little contrast, and teaches the class token alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from stf_jax.config.vision import VisionConfig
from stf_jax.data.images import ImageProcessor
from stf_jax.demo import scenes
from stf_jax.demo.scenes import CELL, GRID, NAMES, SIDE, Scans, Scene
from stf_jax.models.clip import VisionTower
from stf_jax.models.layers import Init
from stf_jax.store.arrays import flatten

VISION = VisionConfig(image_size=SIDE, patch_size=CELL, width=96, mlp_width=384, layers=5, heads=4)

STEPS, SCENES = 1200, 10000
_TILT = 12  # degrees; there are few scans, and a tower that knows them by heart knows no others
_BATCH, _RATE, _EVERY = 64, 2e-3, 100

# How many words each part of a patch's caption can be: a digit or nothing, color, row, column.
_WORDS = (11, len(NAMES), GRID, GRID)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Captioned:
    """Images, and for each patch the number of each word of its caption; -1 where none is due."""

    pixels: Float[Array, "B height width 3"]  # uint8 until they go into a step
    words: Int[Array, "B P 4"]


class Captioner(nnx.Module):
    """The tower, and a linear layer with a part for each word."""

    def __init__(self, *, rngs: nnx.Rngs):
        init = Init(rngs=rngs)
        self.tower = VisionTower(VISION, taps=(VISION.layers,), init=init)
        self.words = nnx.Linear(VISION.width, sum(_WORDS), rngs=rngs)

    def __call__(self, pixels: Float[Array, "B height width 3"]) -> list[Float[Array, "B P _"]]:
        """Scores of the words, by their part of the caption."""
        (features,) = self.tower(pixels).taps
        return jnp.split(self.words(features), np.cumsum(_WORDS)[:-1].tolist(), axis=-1)

    def loss(self, batch: Captioned) -> Array:
        """Cross entropy a patch, in nats."""
        total = jnp.float32(0)
        for part, scores in enumerate(self(batch.pixels)):
            words = batch.words[..., part]
            lost = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(words, 0))
            total += jnp.where(words >= 0, lost, 0).mean()
        return total


def caption_patches(split: str, count: int, *, seed: int) -> Captioned:
    """Random scenes of the scans of a split."""
    rng, scans = np.random.default_rng(seed), Scans.load(split)
    drawn = [Scene.draw(rng) for _ in range(count)]
    pixels: Any = np.stack([scenes.render(scene, scans, rng, tilt=_TILT) for scene in drawn])
    rows, columns = np.indices((GRID, GRID))
    words = [
        np.stack(
            [
                scene.digits + 1,
                scene.colors,
                rows,
                columns,
            ],
            axis=-1,
        ).reshape(GRID * GRID, len(_WORDS))
        for scene in drawn
    ]
    stacked: Any = np.stack(words)
    return Captioned(pixels=pixels, words=stacked)


def train_tower(
    *, seed: int, say: Callable[[str], None], steps: int = STEPS, scene_count: int = SCENES
) -> dict[str, Any]:
    """Trains the tower on training scans; its parameters by native path, "vision/..."."""
    pool, processor = (
        caption_patches("train", scene_count, seed=seed),
        ImageProcessor(image_size=SIDE),
    )
    graph, parameters = nnx.split(Captioner(rngs=nnx.Rngs(seed)))
    rate = optax.warmup_cosine_decay_schedule(0, _RATE, min(50, steps), steps + 1)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.05)
    )

    @jax.jit
    def step(parameters: nnx.State, moments: Any, batch: Captioned) -> tuple[nnx.State, Any, Array]:
        lost, slope = jax.value_and_grad(lambda state: nnx.merge(graph, state).loss(batch))(
            parameters
        )
        updates, moments = optimizer.update(slope, moments, parameters)
        return optax.apply_updates(parameters, updates), moments, lost

    moments, rng = optimizer.init(parameters), np.random.default_rng(seed)
    for number in range(1, steps + 1):
        chosen = rng.integers(scene_count, size=_BATCH)
        batch = Captioned(pixels=processor.normalize(pool.pixels[chosen]), words=pool.words[chosen])
        parameters, moments, lost = step(parameters, moments, batch)
        if number % _EVERY == 0 or number == steps:
            say(f"tower: step {number} of {steps}, loss {float(lost):.3f}")
    trained = nnx.to_pure_dict(parameters)["tower"]
    return flatten({"vision": jax.device_get(trained)})
