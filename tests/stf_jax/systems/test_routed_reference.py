"""VideoLLM-MoD and p-MoD against their reference: a decoder, whose vision tokens are given.

The relative LION-FS, whose tensors lie beside these, is not computed here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config.vision import VisionConfig
from stf_jax.convert.mapping import text_entries
from stf_jax.data.batch import Batch
from stf_jax.models.cache import KVCache
from stf_jax.models.layers import Init, unstack
from stf_jax.models.llava import Llava
from stf_jax.models.marks import IMAGE, TEXT, Marks
from stf_jax.models.routing import RoutedLlama, Routing
from stf_jax.store.arrays import flatten
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.pmod import PMoD, PMoDLlama
from stf_jax.systems.videollm_mod import MoDLlama, RoutedSystem, VideoLLMMoD
from tests.stf_jax.systems.conftest import VISION
from tests.stf_jax.systems.reference import Case, assert_near, fill, find_case

IGNORED = -100


@pytest.fixture(scope="module")
def case() -> Case:
    return find_case("videollm_mod")


def paper_system(case: Case) -> VideoLLMMoD:
    return VideoLLMMoD(
        layers=tuple(case.hyper["paper.mod_layers"]),
        ratio=case.hyper["paper.keep_ratio"],
        stream_loss_weight=case.hyper["paper.stream_loss_weight"],
    )


def pmod_system(case: Case) -> PMoD:
    keys = {name.removeprefix("pmod."): value for name, value in case.hyper.items()}
    return PMoD(depth=case.json["sizes"]["layers"], **(PMoD.read_hf(keys) or {}))


def decoder_of(
    case: Case, system: RoutedSystem, make: Callable[..., RoutedLlama], tokens: int, routers: Any
) -> RoutedLlama:
    """With the reference's weights, through the table that imports them."""
    text = case.decoder_text
    decoder = nnx.eval_shape(
        lambda: make(system, tokens, text, init=Init(rngs=nnx.Rngs(0)), lora=None)
    )
    given = {
        name: tensor
        for name, tensor in case.group("w.").items()
        if name.startswith(("model.", "lm_head."))
    }
    entries = (
        *text_entries(text, vocabulary=text.vocab_size),
        *system.decoder_weights(VISION, text),
    )
    fill(decoder, entries, {**given, **routers}, at="text/")
    return decoder


@pytest.fixture(scope="module")
def paper(case: Case) -> RoutedLlama:
    routers = {
        f"model.layers.{layer}.router.weight": row[None]
        for layer, row in case.group("w.paper.router.").items()
    }
    tokens = case.json["sizes"]["tokens_per_frame"]
    return decoder_of(case, paper_system(case), MoDLlama, tokens, routers)


@pytest.fixture(scope="module")
def pmod(case: Case) -> RoutedLlama:
    routers = {}
    for name, tensor in case.group("w.pmod.router.").items():
        layer, kind = name.split(".")
        routers[f"model.layers.{layer}.router.router.{kind}"] = tensor
    tokens = case.json["sizes"]["pmod_vision_tokens"]
    return decoder_of(case, pmod_system(case), PMoDLlama, tokens, routers)


def marks_of(mask: np.ndarray, image: np.ndarray) -> Marks:
    """Of rows with one sequence each."""
    position = np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape)
    return Marks(
        position=jnp.asarray(position),
        segment=jnp.asarray(mask.astype(np.int32)),
        kind=jnp.asarray(np.where(image >= 0, IMAGE, TEXT).astype(np.int32)),
        image=jnp.asarray(image.astype(np.int32)),
    )


def run_layers(
    decoder: RoutedLlama, x: jax.Array, marks: Marks
) -> list[tuple[jax.Array, jax.Array, Routing]]:
    """Of each layer its output, its routers' logits and what they decide; the masked form."""

    @jax.jit
    def run(decoder: RoutedLlama, x: jax.Array) -> list[Any]:
        angles, candidates = decoder.inputs(marks).angles, decoder.candidates(marks)
        found = []
        for index, layer in enumerate(unstack(decoder.layers)):
            routing = decoder.route(x, candidates, index)
            routed = decoder.depths.layers
            row = routed.index(index) if index in routed else 0
            logits = decoder.router(x, row)
            x, _ = decoder.apply(layer, x, marks, angles, routing)
            found.append((x, logits, routing))
        return found

    return run(decoder, x)


def loss_and_gradients(
    decoder: RoutedLlama, x: jax.Array, marks: Marks, labels: np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Logits, the mean loss, its gradient by embeddings, and by parameters.

    Args:
        decoder: of the reference.
        x: embeddings.
        marks: of the positions.
        labels: of each position what it is itself, as a batch has them.
    """
    config = LlavaConfig(
        vision=VISION, text=decoder.config, system=VideoLLMMoD(layers=(1,), taps=(2,))
    )
    zeros: Any = jnp.zeros(labels.shape, jnp.int32)
    batch = Batch(
        ids=zeros,
        labels=jnp.asarray(labels),
        positions=zeros,
        segments=zeros,
        image_slots=zeros,
        pixels=zeros,
    )
    graph, state = nnx.split(decoder)

    @jax.jit
    def run(state: nnx.State, x: jax.Array) -> Any:
        def mean(state: nnx.State, x: jax.Array) -> Any:
            llava = Llava.abstract(config)
            llava.text = nnx.merge(graph, state)
            logits = llava.text.logits(llava.text(x, marks=marks))
            total, count = llava._entropy_of(batch, x, marks, chunk=16, remat="full")
            return total / count, logits

        return jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(state, x)

    (loss, logits), (gradient, slope) = run(state, x)
    return logits, loss, slope, flatten(nnx.to_pure_dict(gradient))


def check_decoding(
    decoder: RoutedLlama,
    x: np.ndarray,
    marks: Marks,
    *,
    images: int,
    tokens: np.ndarray,
    logits: np.ndarray,
) -> KVCache:
    """Greedy after a prompt, against the compact cache; that of the prompt comes back."""
    length = x.shape[1]

    @jax.jit
    def prefill(decoder: RoutedLlama, x: jax.Array) -> tuple[jax.Array, KVCache]:
        hidden, cache = decoder.prefill(x, marks=marks, last=jnp.array([length - 1]), images=images)
        return decoder.logits(hidden[:, None])[:, 0], cache

    @jax.jit
    def extend(
        decoder: RoutedLlama, token: jax.Array, at: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        marks = Marks.text(at[:, None], jnp.ones_like(at)[:, None])
        x = decoder.embed(token[:, None])
        hidden, cache = decoder.extend(x, marks=marks, slots=at[:, None], cache=cache)
        return decoder.logits(hidden)[:, 0], cache

    found, prompt = prefill(decoder, jnp.asarray(x))
    cache = prompt.grow(len(tokens))
    for step, (token, expected) in enumerate(zip(tokens, logits, strict=True)):
        assert_near(found[0], expected, tolerance=1e-4)
        assert int(found[0].argmax()) == token
        found, cache = extend(decoder, jnp.array([token]), jnp.array([length + step]), cache)
    return prompt


def lengths(cache: KVCache) -> list[int]:
    return [int((cache.groups[group].marks.segment > 0).sum()) for group in cache.layer_groups]


def test_paper_layers(case: Case, paper: RoutedLlama) -> None:
    """Outputs, scores and who goes through, layer by layer."""
    mask, frames = case["paper.mask"], case["paper.frame_id"]
    found = run_layers(paper, jnp.asarray(case["paper.embeds"]), marks_of(mask, frames))
    (ratio,), frame = paper.depths.distinct, case.json["sizes"]["tokens_per_frame"]
    assert paper.depths.keep(np.array([frame]), ratio) == [case.hyper["paper.k_per_frame"]]
    for layer, (out, scores, routing) in enumerate(found):
        expected = case[f"paper.layer.{layer}.out"]
        assert_near(np.asarray(out)[mask], expected[mask], tolerance=1e-5)
        if layer in paper.depths.layers:
            expected = case[f"paper.layer.{layer}.score"]
            assert_near(np.asarray(scores)[mask], expected[mask], tolerance=1e-5)
            kept = np.asarray(routing.kept[..., 0])
            np.testing.assert_array_equal(kept & mask, case[f"paper.layer.{layer}.kept"] & mask)
        else:
            assert np.asarray(routing.kept).all()


def test_paper_loss_and_gradients(case: Case, paper: RoutedLlama) -> None:
    """The labels say what a position predicts, so a row is one longer here."""
    x = np.pad(case["paper.embeds"], ((0, 0), (0, 1), (0, 0)))
    mask = np.pad(case["paper.mask"], ((0, 0), (0, 1)))
    frames = np.pad(case["paper.frame_id"], ((0, 0), (0, 1)), constant_values=-1)
    labels = np.pad(case["paper.labels"], ((0, 0), (1, 0)), constant_values=IGNORED)
    logits, loss, slope, gradients = loss_and_gradients(
        paper, jnp.asarray(x), marks_of(mask, frames), labels
    )
    real = case["paper.mask"]
    assert_near(np.asarray(logits)[:, :-1][real], case["paper.logits"][real], tolerance=1e-4)
    assert_near(loss, case["paper.loss"], tolerance=1e-5)
    assert_near(slope[:, :-1], case["paper.grad.embeds"], tolerance=1e-5)
    for layer, expected in case.group("paper.grad.router.").items():
        row = paper.depths.layers.index(int(layer))
        assert_near(gradients["router/kernel"][row], expected, tolerance=1e-5)
    check_weights(gradients, case.group("paper.grad.layers."))


def check_weights(gradients: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    """Of matrices of MLPs: "1.mlp.down_proj"."""
    assert expected
    for name, tensor in expected.items():
        layer, _, matrix = name.split(".")
        kernel = gradients[f"layers/mlp/{matrix.removesuffix('_proj')}/kernel"][int(layer)]
        assert_near(np.asarray(kernel).T, tensor, tolerance=1e-5)


def test_paper_decoding(case: Case, paper: RoutedLlama) -> None:
    """The first sample, of which routed layers keep little."""
    real = int(case["paper.mask"][0].sum())
    frames = case["paper.frame_id"][:1, :real]
    prompt = check_decoding(
        paper,
        case["paper.embeds"][:1, :real],
        marks_of(case["paper.mask"][:1, :real], frames),
        images=int(frames.max()) + 1,
        tokens=case["paper.decode.tokens"],
        logits=case["paper.decode.logits"],
    )
    assert lengths(prompt) == case["paper.stream.cache_lengths"].tolist()
    # There is no room for more.
    held = [prompt.sizes[group] for group in prompt.layer_groups]
    assert held == case["paper.stream.cache_lengths"].tolist()


def test_pmod_schedule(case: Case) -> None:
    system = pmod_system(case)
    ratios = dict(system.depths.ratios)
    found = [ratios.get(layer, 1.0) for layer in range(system.depth)]
    np.testing.assert_allclose(found, case["pmod.ratio"], rtol=1e-6)
    assert list(ratios) == case.hyper["pmod.layers"]
    assert system.depth - 1 == case.hyper["pmod.depth_divisor"]
    tokens = VisionConfig.clip_l_336().patches
    for name in ("pmod.published_counts", "pmod.published_counts_f32"):
        published = PMoD().depths.lengths(
            len(case[name]), length=tokens, images=1, tokens_per_image=tokens
        )
        assert list(published) == case[name].tolist()


def pmod_row(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, what is vision, and labels, made of ids and features."""
    features = case["pmod.image_features"]
    table, rows = case["w.model.embed_tokens.weight"], []
    inputs = (case[f"pmod.input_{name}"] for name in ("ids", "mask", "labels"))
    for ids, mask, labels, image in zip(*inputs, features, strict=True):
        ids, labels = ids[mask], labels[mask]
        (at,) = np.flatnonzero(ids < 0)
        vision = np.zeros(len(ids) - 1 + len(image), bool)
        vision[at : at + len(image)] = True
        x = np.concatenate([table[ids[:at]], image, table[ids[at + 1 :]]])
        none = np.full(len(image), IGNORED)
        rows.append((x, vision, np.concatenate([labels[:at], none, labels[at + 1 :]])))
    length = max(len(x) for x, _, _ in rows)

    def pad(array: np.ndarray, fill: int) -> np.ndarray:
        room = [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)]
        return np.pad(array, room, constant_values=fill)

    x, vision, labels = zip(*rows, strict=True)
    return (
        np.stack([pad(row, 0) for row in x]),
        np.stack([pad(row, 0) for row in vision]),
        np.stack([pad(row, IGNORED) for row in labels]),
    )


def test_pmod_layers(case: Case, pmod: RoutedLlama) -> None:
    mask, vision = case["pmod.mask"], case["pmod.target_mask"]
    embeds, expected_vision, _ = pmod_row(case)
    np.testing.assert_array_equal(vision, expected_vision)
    np.testing.assert_array_equal(embeds[mask], case["pmod.embeds"][mask])
    assert_near(embeds[mask], case["pmod.hidden.0"][mask], tolerance=1e-6)
    found = run_layers(pmod, jnp.asarray(embeds), marks_of(mask, np.where(vision, 0, -1)))
    for layer, (out, _, routing) in enumerate(found):
        last = layer == len(found) - 1
        out = pmod.norm(out) if last else out
        expected = case[f"pmod.hidden.{layer + 1}"]
        assert_near(np.asarray(out)[mask], expected[mask], tolerance=1e-5)
        if layer not in pmod.depths.layers:
            continue
        weight = np.where(vision, np.asarray(routing.weight[..., 0]), 0)
        assert_near(weight, case[f"pmod.layer.{layer}.weight"], tolerance=1e-5)
        kept = np.asarray(routing.kept[..., 0]) & mask
        for row, places in zip(kept, case[f"pmod.layer.{layer}.kept_positions"], strict=True):
            expected = np.zeros(len(places), int)
            expected[: row.sum()] = np.flatnonzero(row)
            np.testing.assert_array_equal(expected, places)


def test_pmod_loss_and_gradients(case: Case, pmod: RoutedLlama) -> None:
    mask, vision = case["pmod.mask"], case["pmod.target_mask"]
    embeds, _, labels = pmod_row(case)
    np.testing.assert_array_equal(labels, case["pmod.labels"])
    logits, loss, slope, gradients = loss_and_gradients(
        pmod, jnp.asarray(embeds), marks_of(mask, np.where(vision, 0, -1)), labels
    )
    assert_near(np.asarray(logits)[mask], case["pmod.logits"][mask], tolerance=1e-4)
    assert_near(loss, case["pmod.loss"], tolerance=1e-5)
    expected = case["pmod.grad.image_features"]
    assert_near(np.asarray(slope)[vision].reshape(expected.shape), expected, tolerance=1e-5)
    for name, expected in case.group("pmod.grad.router.").items():
        layer, kind = name.split(".")
        row = pmod.depths.layers.index(int(layer))
        found = gradients["router/kernel" if kind == "weight" else "router/bias"][row]
        assert_near(np.asarray(found).reshape(expected.shape), expected, tolerance=1e-5)
    check_weights(gradients, case.group("pmod.grad.layers."))


def test_pmod_decoding(case: Case, pmod: RoutedLlama) -> None:
    """Upstream's own greedy answer."""
    (ids,) = case["pmod.dec.input_ids"]
    (at,) = np.flatnonzero(ids < 0)
    table, image = case["w.model.embed_tokens.weight"], case["pmod.image_features"][0]
    x = np.concatenate([table[ids[:at]], image, table[ids[at + 1 :]]])[None]
    index = np.arange(x.shape[1])
    vision = (index >= at) & (index < at + len(image))
    prompt = check_decoding(
        pmod,
        x,
        marks_of(np.ones(x.shape[:2], bool), np.where(vision, 0, -1)[None]),
        images=1,
        tokens=case["pmod.dec.tokens"],
        logits=case["pmod.dec.logits"],
    )
    assert lengths(prompt) == case["pmod.dec.cache_lengths"].tolist()
    held = [prompt.sizes[group] for group in prompt.layer_groups]
    assert held == case["pmod.dec.cache_lengths"].tolist()
