"""VQToken by hand: its clusters, its clips, its weights, eight devices."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert.infer import infer_system, system_keys
from stf_jax.convert.mapping import connector_entries
from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IGNORED_LABEL
from stf_jax.models.clustering import (
    average_clusters,
    choose_seeds,
    find_clusters,
    normalize,
)
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import ShardingRules, make_mesh
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.vqtoken import VQToken
from tests.stf_jax.systems.conftest import build

VISION, TEXT = VisionConfig.tiny(), TextConfig.tiny()


def tiny(**fields: Any) -> LlavaConfig:
    system = dataclasses.replace(VQToken.for_model(vision=VISION, text=TEXT), **fields)
    return LlavaConfig(vision=VISION, text=TEXT, system=system)


def clip_batch(config: LlavaConfig, *, rows: int, frames: int, seed: int = 1) -> Batch:
    """Rows of text with a clip behind the second token; every second has one frame less."""
    rng = np.random.default_rng(seed)
    assert isinstance(config.system, VQToken)
    slots = config.system.clip_tokens(frames)
    first = frames * config.tokens_per_image if config.system.images == "whole" else 0
    length, side = slots + 6, config.image_size
    ids = rng.integers(3, config.text.vocab_size, (rows, length)).astype(np.int32)
    placed = np.full(length, -1, np.int32)
    placed[2 : 2 + slots] = first + np.arange(slots)
    clips = np.tile(np.arange(frames, dtype=np.int32), (rows, 1, 1))
    clips[1::2, :, -1] = -1
    pixels = rng.standard_normal((rows, frames, side, side, 3)).astype(np.float32)
    labels = np.where(placed < 0, ids, IGNORED_LABEL).astype(np.int32)
    whole = np.zeros((rows, length), np.int32)
    arrays = {
        "ids": ids,
        "labels": labels,
        "positions": whole + np.arange(length, dtype=np.int32),
        "segments": whole + 1,
        "image_slots": whole + placed,
        "pixels": pixels,
        "clips": clips,
    }
    return Batch(**jax.tree.map(jnp.asarray, arrays))


def loss_of(model: Llava, batch: Batch) -> tuple[jax.Array, Any]:
    graph, state = nnx.split(model)

    def total(state: nnx.State, batch: Batch) -> jax.Array:
        return nnx.merge(graph, state).loss(batch)[0]

    return jax.jit(jax.value_and_grad(total))(state, batch)


def test_eight_devices_compute_what_one_does() -> None:
    """Adaptive clips beside images that pass through: the loss and every gradient."""
    config = tiny(adaptive=True, clusters=6, least=2, images="whole")
    model = build(config, seed=3)
    batch = clip_batch(config, rows=8, frames=3)
    expected, gradient = loss_of(model, batch)
    rules = ShardingRules.default()
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        spread = Llava.abstract(config, rules=rules)
        placed = jax.tree.map(
            lambda like, leaf: jax.device_put(np.asarray(leaf), like.sharding),
            nnx.state(spread),
            nnx.state(model),
        )
        nnx.update(spread, placed)
        loss, found = loss_of(spread, jax.device_put(batch, rules.tokens))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
            largest = max(np.abs(wanted).max(), 1e-6)
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5 * largest)


@partial(jax.jit, static_argnames="steps")
def cluster(units: jax.Array, start: jax.Array, *, steps: int) -> tuple[jax.Array, jax.Array]:
    """Labels and codebook, all of the clusters over all of the tokens."""
    mask, used = jnp.ones((1, len(units)), bool), jnp.ones((1, len(start)), bool)
    labels, _ = find_clusters(units[None], mask, start[None], used, steps=steps)
    return labels[0, 0], average_clusters(units[None], mask, labels[:, 0], count=len(start))[0]


def random_units(*shape: int, seed: int = 0) -> jax.Array:
    return normalize(jnp.asarray(np.random.default_rng(seed).standard_normal(shape)))


def test_every_token_its_own_cluster_is_the_tokens() -> None:
    units = random_units(20, 5)
    order = np.random.default_rng(1).permutation(20)
    labels, means = cluster(units, units[order], steps=9)
    np.testing.assert_array_equal(order[np.asarray(labels)], np.arange(20))
    np.testing.assert_array_equal(means, units[order])


def test_a_codebook_adds_up_to_its_tokens_and_knows_no_length() -> None:
    tokens = np.random.default_rng(0).standard_normal((30, 5))
    lengths = np.random.default_rng(1).uniform(0.5, 9, (30, 1))
    units, scaled = normalize(jnp.asarray(tokens)), normalize(jnp.asarray(tokens * lengths))
    labels, means = cluster(units, units[:4], steps=9)
    np.testing.assert_array_equal(labels, cluster(scaled, scaled[:4], steps=9)[0])
    counts = np.bincount(labels, minlength=4)
    np.testing.assert_allclose(counts @ np.asarray(means), units.sum(axis=0), atol=1e-5)


def test_the_order_of_frames_is_no_matter_to_a_codebook() -> None:
    frames = random_units(3, 10, 5)
    order = np.array([2, 0, 1])
    labels, means = cluster(frames.reshape(30, 5), frames[0, :4], steps=9)
    moved, same = cluster(frames[order].reshape(30, 5), frames[0, :4], steps=9)
    np.testing.assert_array_equal(labels.reshape(3, 10)[order], moved.reshape(3, 10))
    np.testing.assert_allclose(same, means, atol=1e-6)


def test_seeds_are_tokens_of_the_clip_each_once() -> None:
    for tokens in (7, 16, 1000):
        (seeds,) = np.asarray(choose_seeds(jnp.array([tokens]), count=7, seed=0))
        assert len(set(seeds.tolist())) == 7
        assert seeds.min() >= 0
        assert seeds.max() < tokens
        assert seeds.tolist() != sorted(seeds.tolist())


@pytest.mark.parametrize("fields", [{}, {"adaptive": True, "clusters": 6, "least": 2}])
def test_a_clip_is_the_same_beside_a_longer_one(fields: dict[str, Any]) -> None:
    """Frames that are not there have no influence, whatever stands in them."""
    config = tiny(**fields)
    model, run = build(config, seed=4), jax.jit(Llava.encode)
    batch = clip_batch(config, rows=2, frames=3)
    tokens = run(model, batch)
    assert tokens.valid is not None
    other = dataclasses.replace(batch, pixels=batch.pixels.at[1, 2].set(5.0))
    np.testing.assert_allclose(run(model, other).values[1], tokens.values[1], atol=1e-6)
    alone = dataclasses.replace(batch, pixels=batch.pixels[:, :2], clips=batch.clips[..., :2])
    cut = run(model, alone)
    assert cut.valid is not None
    valid, expected = np.asarray(tokens.valid[1]), np.asarray(cut.valid[1])
    assert valid[-1]
    assert expected[-1]
    actual = tokens.values[1][valid]
    np.testing.assert_allclose(actual, cut.values[1][expected], rtol=0, atol=1e-5)


def test_an_image_is_a_clip_of_one_frame_where_asked() -> None:
    config = tiny()
    model, run = build(config), jax.jit(Llava.encode)
    batch = clip_batch(config, rows=2, frames=2)
    clips = jnp.array([[[0, -1], [1, -1]]] * 2, jnp.int32)
    single = run(model, dataclasses.replace(batch, clips=None)).values
    np.testing.assert_allclose(
        run(model, dataclasses.replace(batch, clips=clips)).values, single, rtol=0, atol=1e-5
    )


def test_an_image_passes_through_with_a_row_behind_it() -> None:
    """LLaVA-1.5's tokens, to the bit."""
    config = tiny(images="whole")
    model = build(config)
    batch = dataclasses.replace(clip_batch(config, rows=2, frames=2), clips=None)
    tokens = jax.jit(Llava.encode)(model, batch)
    assert tokens.valid is None
    flat = batch.pixels.reshape(-1, *batch.pixels.shape[2:])
    plain = jax.jit(lambda m, x: m.connector.project(m.vision(x).taps[0]))(model, flat)
    each = np.asarray(tokens.values).reshape(4, -1, TEXT.width)
    np.testing.assert_array_equal(each[:, :-1], plain)
    np.testing.assert_array_equal(each[:, -1], np.broadcast_to(model.connector.newline, (4, 64)))


def test_a_token_of_zeros_is_no_nan() -> None:
    """Where the released code divides by its length."""
    units = normalize(jnp.zeros((6, 4)).at[1:].set(random_units(5, 4)))
    assert np.isfinite(cluster(units, units[:3], steps=5)[1]).all()
    slope = jax.grad(lambda x: normalize(x).sum())(jnp.zeros((2, 4)))
    assert np.isfinite(slope).all()


def test_the_weights_tell_vqtoken() -> None:
    """Published shapes: 10,762,112 parameters of VQ-Attn over SigLIP's 729 patches."""
    vision = VisionConfig(image_size=378, patch_size=14)
    text = dataclasses.replace(TextConfig.tiny(), width=896)
    system = VQToken.for_model(vision=vision, text=text)
    config = LlavaConfig(vision=vision, text=text, system=system)
    shapes = {name: e.shape for e in connector_entries(config) for name in e.tensors}
    attention = [s for n, s in shapes.items() if n.startswith("cross_attention.")]
    assert sum(int(np.prod(shape)) for shape in attention) == 10_762_112
    assert shapes["cross_attention.to_q_proj.weight"] == (896, 729)
    assert shapes["image_newline"] == (896,)
    keys = system_keys(config)
    assert keys == {"mm_vision_select_layer": -2}
    assert infer_system(shapes, keys, vision) == system


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clusters": 577}, "clusters is 577; a frame has 576 patches"),
        ({"adaptive": True, "clusters": 13}, "least is 12 and clusters is 13; an elbow needs"),
        ({"adaptive": True, "least": 1}, "least is 1 and clusters is 32"),
        ({"heads": 7}, "heads is 7, which does not divide the language model's width 4096"),
        ({"steps": 0}, "steps"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlavaConfig(
            vision=VisionConfig.clip_l_336(), text=TextConfig.vicuna_7b(), system=VQToken(**fields)
        )
