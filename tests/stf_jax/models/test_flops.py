"""FLOPs counted by hand beside XLA's own count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.batch import Batch
from stf_jax.models import flops
from stf_jax.models.layers import unstack
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import ShardingRules
from stf_jax.systems import SYSTEMS
from stf_jax.systems.base import LlavaConfig
from stf_jax.train.optimizer import split_trained

VISION = VisionConfig(image_size=112, width=256, mlp_width=512, layers=3, heads=4)
TEXT = TextConfig(
    vocab_size=1024, width=256, mlp_width=512, layers=3, heads=4, kv_heads=2, head_dim=64
)
CONFIGS = {
    name: LlavaConfig(vision=VISION, text=TEXT, system=system.for_model(vision=VISION, text=TEXT))
    for name, system in SYSTEMS.items()
}
ROWS, LENGTH, IMAGES = 2, 256, 2


def abstract_batch(config: LlavaConfig) -> Batch:
    text: Any = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    side = config.image_size
    pixels: Any = jax.ShapeDtypeStruct((ROWS, IMAGES, side, side, 3), jnp.float32)
    questions: Any = None
    if config.question_length:
        shape = (ROWS, IMAGES, config.question_length)
        questions = jax.ShapeDtypeStruct(shape, jnp.int32)
    return Batch(
        ids=text,
        labels=text,
        positions=text,
        segments=text,
        image_slots=text,
        pixels=pixels,
        questions=questions,
        question_lengths=questions and jax.ShapeDtypeStruct((ROWS, IMAGES), jnp.int32),
    )


def unstacked(config: LlavaConfig) -> Llava:
    """XLA counts the body of a loop once, so there must be none."""

    def make() -> Llava:
        model = Llava.abstract(config, rules=ShardingRules.none())
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nnx.state(model))
        nnx.update(model, zeros)
        model.text.layers, model.vision.layers = (
            unstack(model.text.layers), unstack(model.vision.layers),
        )  # fmt: skip
        return model

    return nnx.eval_shape(make)


def counted(function: Any, *arguments: Any) -> float:
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward(config: LlavaConfig) -> None:
    """What is not a matmul makes up the few per cent between."""
    graph, state = nnx.split(unstacked(config))
    by_hand = flops.forward(config, rows=ROWS, length=LENGTH, images=IMAGES).total
    lengths = config.system.layer_lengths(VISION, TEXT, length=LENGTH, images=IMAGES)
    shorter = any(length < LENGTH for length in lengths)
    if shorter:
        # What layers drop is dropped in prompts, which have a head at one position.
        by_hand -= 2 * ROWS * (LENGTH - 1) * TEXT.width * TEXT.vocab_size

    def run(state: Any, batch: Batch) -> Any:
        model = nnx.merge(graph, state)
        return model.prefill(batch)[0] if shorter else model(batch)

    batch = dataclasses.replace(abstract_batch(config), uniform=shorter)
    counted_flops = counted(run, state, batch)
    # Scores of tokens weigh more in three layers than in thirty.
    assert 1 <= counted_flops / by_hand < (1.08 if shorter else 1.06)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training(config: LlavaConfig, stage: Any) -> None:
    graph, state = nnx.split(unstacked(config))
    flat, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    shapes = dict(zip(names, (leaf for _, leaf in flat), strict=True))
    trained, frozen = split_trained(shapes, stage)

    def loss(trained: Any, frozen: Any, batch: Batch) -> jax.Array:
        both = {**trained, **frozen}
        merged = jax.tree.unflatten(tree, [both[name] for name in names])
        return nnx.merge(graph, merged).loss(batch, chunk=LENGTH)[0]

    counted_flops = counted(jax.grad(loss), trained, frozen, abstract_batch(config))
    estimated = flops.training(config, stage=stage, rows=ROWS, length=LENGTH, images=IMAGES)
    # The head runs again in the backward pass, which is no model FLOPs.
    views = len(config.system.training_budgets(VISION))
    head = 2 * views * ROWS * LENGTH * TEXT.width * TEXT.vocab_size
    # Fusion's inputs need no gradient: its first matmul runs twice, not three times.
    assert 0.97 < counted_flops / (estimated.total + head) < 1.012


def test_parts_add_up() -> None:
    flops_of_parts = flops.forward(CONFIGS["stf"], rows=1, length=8, images=1)
    assert flops_of_parts.total == sum(dataclasses.astuple(flops_of_parts))
