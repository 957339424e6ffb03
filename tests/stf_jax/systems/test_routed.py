"""What holds for routed layers, of small decoders with random weights."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.layers import Init, unstack
from stf_jax.models.llama import Llama, take
from stf_jax.models.llava import Llava
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.marks import ANSWER, IMAGE, TEXT, Marks
from stf_jax.models.routing import RoutedLlama, Routing
from stf_jax.store.arrays import flatten
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.pmod import PMoD, PMoDLlama
from stf_jax.systems.videollm_mod import MoDLlama, RoutedSystem, VideoLLMMoD
from stf_jax.train.optimizer import OptimizerConfig, make_optimizer, split_trained
from stf_jax.train.step import init_state, make_step
from tests.stf_jax.systems.conftest import TEXT as TINY
from tests.stf_jax.systems.conftest import VISION, batch_of

LAYERS, EACH, LENGTH = 4, 4, 24
SMALL = dataclasses.replace(TINY, layers=LAYERS)
SYSTEMS: dict[str, tuple[RoutedSystem, Callable[..., RoutedLlama]]] = {
    "videollm_mod": (VideoLLMMoD(layers=(1, 3), ratio=0.5), MoDLlama),
    "pmod": (PMoD(depth=LAYERS), PMoDLlama),
}


def draw(module: nnx.Module, seed: int = 0) -> None:
    """Weights large enough to tell right from wrong."""
    rng = np.random.default_rng(seed)
    noise = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32),
        nnx.state(module, nnx.Param),
    )
    nnx.update(module, noise)


def small(name: str, system: RoutedSystem | None = None) -> RoutedLlama:
    given, make = SYSTEMS[name]
    init = Init(rngs=nnx.Rngs(0))
    decoder = make(system or given, EACH, SMALL, init=init, lora=None)
    draw(decoder)
    return decoder


DECODERS = {name: small(name) for name in SYSTEMS}
forward = jax.jit(lambda decoder, x, marks: decoder(x, marks=marks))
prefill = jax.jit(
    lambda decoder, x, marks, last, images: decoder.prefill(
        x, marks=marks, last=last, images=images
    ),
    static_argnums=4,
)
extend = jax.jit(
    lambda decoder, x, marks, slots, cache: decoder.extend(x, marks=marks, slots=slots, cache=cache)
)


def row_of(segments: list[list[int]]) -> Marks:
    """A row of sequences, each of numbers of text tokens with an image after all but the last."""
    segment, image, position = [], [], []
    images = 0
    for number, texts in enumerate(segments):
        start = len(segment)
        for place, text in enumerate(texts):
            image += [-1] * text
            if place < len(texts) - 1:
                image += [images] * EACH
                images += 1
        segment += [number + 1] * (len(image) - start)
        position += range(len(image) - start)
    assert len(image) <= LENGTH
    padding = LENGTH - len(image)
    kinds = [TEXT if number < 0 else IMAGE for number in image]

    def row(values: list[int], fill: int = 0) -> jax.Array:
        return jnp.asarray([values + [fill] * padding], jnp.int32)

    return Marks(
        position=row(position), segment=row(segment), kind=row(kinds), image=row(image, -1)
    )


def embeddings(rows: int, seed: int) -> jax.Array:
    shape = (rows, LENGTH, SMALL.width)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


TEXTS = st.integers(1, 3)


@pytest.mark.parametrize("name", SYSTEMS)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_sequences_of_a_row_do_not_compete(name: str, data: st.DataObject, seed: int) -> None:
    """Packed, each has the output that it has alone."""
    sequences, left = [], LENGTH
    while left >= 4 + EACH:
        images = data.draw(st.integers(0, (left - 4) // (EACH + 3)))
        texts = data.draw(st.lists(TEXTS, min_size=images + 1, max_size=images + 1))
        sequences.append(texts)
        left -= sum(texts) + images * EACH
    packed, x = row_of(sequences), embeddings(1, seed)
    together = forward(DECODERS[name], x, packed)[0]
    start = 0
    for texts in sequences:
        length = sum(texts) + (len(texts) - 1) * EACH
        rest = jnp.zeros((1, LENGTH - length, SMALL.width))
        alone = jnp.concatenate([x[:, start : start + length], rest], axis=1)
        expected = forward(DECODERS[name], alone, row_of([texts]))[0, :length]
        np.testing.assert_allclose(together[start : start + length], expected, rtol=0, atol=2e-5)
        start += length


@pytest.mark.parametrize("name", SYSTEMS)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_masked_is_gathered_is_compact(name: str, data: st.DataObject, seed: int) -> None:
    """Rows with as many images; then two more tokens against either cache."""
    images = 2
    decoder, x = DECODERS[name], embeddings(2, seed)
    texts = st.lists(TEXTS, min_size=images + 1, max_size=images + 1)
    rows = [row_of([data.draw(texts)]) for _ in range(2)]
    marks: Marks = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
    real = (marks.segment > 0).sum(axis=1)
    expected = take(forward(decoder, x, marks), real - 1)
    masked, wide = prefill(decoder, x, marks, real - 1, None)
    gathered, compact = prefill(decoder, x, marks, real - 1, images)
    np.testing.assert_allclose(masked, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(gathered, expected, rtol=0, atol=2e-5)
    held = decoder.depths.held(LENGTH, images=images, tokens_per_image=EACH)
    assert compact.sizes == held
    assert max(held[1:]) < LENGTH
    wide, compact = wide.grow(2), compact.grow(2)
    more = jnp.asarray(
        np.random.default_rng(seed).standard_normal((2, 2, 1, SMALL.width)), jnp.float32
    )
    whole = jnp.zeros((2, LENGTH, SMALL.width))
    for step in range(2):
        new = Marks.text((real + step)[:, None], jnp.ones((2, 1), jnp.int32))
        one, wide = extend(decoder, more[step], new, (real + step)[:, None], wide)
        other, compact = extend(decoder, more[step], new, (real + step)[:, None], compact)
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    # The same tokens at once.
    if int(real.max()) + 2 > LENGTH:
        return
    places = real[:, None] + jnp.arange(2)
    rows_at = jnp.arange(2)[:, None]
    whole = x.at[rows_at, places].set(more[:, :, 0].swapaxes(0, 1))
    longer = dataclasses.replace(
        marks,
        position=marks.position.at[rows_at, places].set(places),
        segment=marks.segment.at[rows_at, places].set(1),
    )
    at_once = take(forward(decoder, whole, longer), real + 1)
    np.testing.assert_allclose(one[:, 0], at_once, rtol=0, atol=2e-5)


def plain_like(decoder: RoutedLlama) -> Llama:
    """LLaMA with the same weights."""
    plain = Llama(SMALL, init=Init(rngs=nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(decoder))
    del state["router"]
    nnx.update(plain, state)
    return plain


def test_pmod_of_everything_and_a_new_router_is_llama() -> None:
    """To the bit: a weight of 1 changes nothing."""
    decoder = small("pmod", PMoD(depth=LAYERS, schedule="shiftedlinear_decay_1.0_1.0"))
    assert len(decoder.depths.layers) == LAYERS
    nnx.update(decoder.router, jax.tree.map(jnp.zeros_like, nnx.state(decoder.router)))
    marks, x = row_of([[2, 3, 1], [2]]), embeddings(1, 0)
    expected = forward(plain_like(decoder), x, marks)
    real = np.asarray(marks.segment[0]) > 0
    np.testing.assert_array_equal(
        np.asarray(forward(decoder, x, marks))[0, real], np.asarray(expected)[0, real]
    )


class AllAlike(MoDLlama):
    """Scores of 1."""

    def weigh(self, logits: jax.Array) -> jax.Array:
        return jnp.ones_like(logits)


def test_mod_of_everything_at_a_score_of_1_is_llama() -> None:
    system = VideoLLMMoD(layers=(0, 1, 2, 3), ratio=1.0)
    decoder = AllAlike(system, EACH, SMALL, init=Init(rngs=nnx.Rngs(0)), lora=None)
    draw(decoder)
    marks, x = row_of([[2, 3, 1], [2]]), embeddings(1, 0)
    expected = forward(plain_like(decoder), x, marks)
    real = np.asarray(marks.segment[0]) > 0
    found = np.asarray(forward(decoder, x, marks))[0, real]
    np.testing.assert_allclose(found, np.asarray(expected)[0, real], rtol=0, atol=2e-5)


def test_a_new_router_of_pmod_keeps_the_first_tokens_and_skips_unchanged() -> None:
    decoder = small("pmod")
    nnx.update(decoder.router, jax.tree.map(jnp.zeros_like, nnx.state(decoder.router)))
    marks, x = row_of([[2, 3, 1]]), embeddings(1, 0)
    last = decoder.depths.layers[-1]

    @jax.jit
    def run(decoder: RoutedLlama, x: jax.Array) -> tuple[Routing, jax.Array]:
        routing = decoder.route(x, decoder.candidates(marks), last)
        layer = unstack(decoder.layers)[last]
        return routing, decoder.apply(layer, x, marks, decoder.inputs(marks).angles, routing)[0]

    routing, out = run(decoder, x)
    vision = np.flatnonzero(np.asarray(marks.kind[0]) == IMAGE)
    (keep,) = decoder.depths.keep(np.array([2 * EACH]), dict(decoder.depths.ratios)[last])
    skips = np.setdiff1d(vision, vision[:keep])
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(routing.kept[0, :, 0])), skips)
    np.testing.assert_array_equal(out[0, skips], x[0, skips])


def test_what_a_row_holds_is_what_the_prompt_says() -> None:
    """The engine makes room by `held`, of prompts with any number of images."""
    vision = VisionConfig.clip_l_336()
    for system in (VideoLLMMoD(), PMoD()):
        for images in (0, 1, 2):
            ids = np.concatenate([np.arange(7), np.full(images * vision.patches, -200)])
            lengths = system.layer_lengths(
                vision, TextConfig.vicuna_7b(), length=len(ids), images=images
            )
            held = system.held(ids, vision)
            groups = system.depths.groups(32)
            assert tuple(held[group] for group in groups) == lengths
    # 576 and 115 by turns, of an image.
    assert set(VideoLLMMoD().held(np.full(576, -200), vision)) == {576, 115}


REFUSED: list[tuple[Callable[[], object], str]] = [
    (partial(VideoLLMMoD, ratio=0.0), "ratio is 0.0; give more than 0, at most 1"),
    (partial(VideoLLMMoD, layers=(3, 1)), "must be one or more numbers from 0, ascending"),
    (partial(VideoLLMMoD, layers=()), "must be one or more numbers from 0, ascending"),
    (partial(VideoLLMMoD, stream_loss_weight=-1.0), "stream_loss_weight is -1.0; give 0 or more"),
    (partial(PMoD, schedule="cosine"), "give one such as shiftedcos_decay_0.85_0.15"),
    (partial(PMoD, schedule="shiftedcos_decay_0.15_0.85"), "give one such as"),
    (partial(PMoD, gate="softmax"), "gate is 'softmax'; give one such as tanh_0.2_1"),
    (partial(PMoD, depth=1), "depth is 1; the schedule runs over 2 layers or more"),
    (
        lambda: LlavaConfig(vision=VISION, text=TINY, system=PMoD(taps=(2,))),
        f"the language model has {TINY.layers}; give depth {TINY.layers}",
    ),
    (
        lambda: LlavaConfig(vision=VISION, text=TINY, system=VideoLLMMoD(taps=(2,))),
        f"layer 31 cannot be routed: the language model has {TINY.layers} layers",
    ),
    (
        lambda: PMoD.read_hf(
            {"mod_target_layers": "shiftedcos_decay_0.85_0.15", "mod_router_factor": 0.7}
        ),
        "mod_router_factor is 0.7 in config.json; p-MoD has 0.5",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[text for _, text in REFUSED])
def test_what_does_not_fit_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_only_vision_tokens_predict_less() -> None:
    """The weight of the streaming loss, by what a position holds."""
    decoder = small("videollm_mod", VideoLLMMoD(layers=(1, 3), stream_loss_weight=0.25))
    marks = row_of([[2, 1]])
    kind = jnp.where(marks.kind == TEXT, ANSWER, marks.kind)
    weights = decoder.loss_weights(dataclasses.replace(marks, kind=kind))
    np.testing.assert_array_equal(weights, jnp.where(marks.kind == IMAGE, 0.25, 1.0))
    assert small("videollm_mod").loss_weights(marks) is None


def test_lora_trains_routers_as_a_whole() -> None:
    """As the paper's recipe has it: adapters on every matmul, and what is new beside them."""
    text = dataclasses.replace(TINY, layers=2)
    system = VideoLLMMoD.for_model(vision=VISION, text=text)
    config = LlavaConfig(vision=VISION, text=text, system=system)
    model = Llava.abstract(config, lora=LoRAConfig(rank=2, alpha=4.0), training=True)
    draw(model)
    trained, frozen = split_trained(flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))), "lora")
    assert "text/router/kernel" in trained
    assert "text/layers/mlp/up/kernel" in frozen
    before = jax.tree.map(np.array, trained)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), steps=1)
    step = make_step(model, optimizer, remat="full")
    batch = jax.tree.map(lambda array: array[None], batch_of(config))
    state, metrics = step(init_state(trained, optimizer), frozen, batch)
    assert np.isfinite(metrics.loss)
    for path, leaf in state.parameters.items():
        assert not np.array_equal(leaf, before[path]), path
