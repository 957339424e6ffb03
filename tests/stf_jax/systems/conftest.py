"""A small model of every system, on one device."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.batch import Batch
from stf_jax.infer.prompts import bucket
from stf_jax.models.llava import Llava
from stf_jax.systems import SYSTEMS
from stf_jax.systems.base import LlavaConfig

VISION, TEXT = VisionConfig.tiny(), TextConfig.tiny()


def config_of(name: str) -> LlavaConfig:
    return LlavaConfig(
        vision=VISION, text=TEXT, system=SYSTEMS[name].for_model(vision=VISION, text=TEXT)
    )


def build(config: LlavaConfig, seed: int = 0, *, training: bool = False) -> Llava:
    """A model with weights large enough to tell right from wrong."""
    model = Llava.abstract(config, training=training)
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        name = jax.tree_util.keystr(path)
        return jnp.asarray(1 + 0.1 * noise if "scale" in name else 0.1 * noise)

    nnx.update(model, jax.tree_util.tree_map_with_path(draw, nnx.state(model)))
    return model


def own_tokens(config: LlavaConfig) -> list[int]:
    """What the system wants behind an image."""
    return [] if config.images_first is None else config.images_first.tokens(1)


def batch_of(config: LlavaConfig, *, rows: int = 2, text: int = 7, padding: int = 0) -> Batch:
    """Rows of text with an image after the second token; `padding` positions behind."""
    rng = np.random.default_rng(1)
    images, own = config.tokens_per_image, own_tokens(config)
    length, end = text + images + len(own), 2 + images + len(own)
    ids = rng.integers(3, config.text.vocab_size - 1, (rows, length))
    ids[:, end - len(own) : end] = own
    slots = np.full(length, -1)
    slots[2 : 2 + images] = np.arange(images)
    labels = np.where(np.arange(length) >= end, ids, -100)
    side = config.image_size

    def pad(array: np.ndarray, value: int) -> jax.Array:
        wide = np.broadcast_to(array, (rows, length)).astype(np.int32)
        return jnp.asarray(np.pad(wide, ((0, 0), (0, padding)), constant_values=value))

    asked = config.question_length
    questions = rng.integers(3, config.text.vocab_size, (rows, 1, asked)).astype(np.int32)
    return Batch(
        ids=pad(ids, 5),
        labels=pad(labels, -100),
        positions=pad(np.arange(length), 0),
        segments=pad(np.ones(length), 0),
        image_slots=pad(slots, -1),
        pixels=jnp.asarray(rng.standard_normal((rows, 1, side, side, 3)), jnp.float32),
        questions=jnp.asarray(questions) if asked else None,
        question_lengths=jnp.full((rows, 1), 5, jnp.int32) if asked else None,
    )


def cache_bytes(
    config: LlavaConfig,
    prompts: Sequence[np.ndarray],
    layer_groups: Sequence[int],
    *,
    new: int,
    itemsize: int,
) -> tuple[int, int]:
    """Bytes of one slot for any of the prompts and `new` tokens: keys and values, and marks."""
    text, system = config.text, config.system
    held = zip(*(system.held(ids, config.vision) for ids in prompts), strict=True)
    sizes = [bucket(max(group) + new) for group in held]
    layers = [sizes[group] for group in layer_groups]
    vectors = 2 * text.kv_heads * text.head_dim * itemsize * sum(layers)
    # Position, segment, kind and image of each; and how many positions the row has dropped.
    return vectors, sum(4 * 4 * size + 4 for size in sizes)


@pytest.fixture(scope="session", params=SYSTEMS)
def system_model(request: pytest.FixtureRequest) -> Llava:
    return build(config_of(request.param))
