"""What holds for every schedule: masked = gathered = cached, whatever the row holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.layers import Init, unstack
from stf_jax.models.llama import Llama
from stf_jax.models.lora import LoRAConfig, is_adapter, merge
from stf_jax.models.marks import ANSWER, TEXT, Marks
from stf_jax.models.pruning import PrunedLlama, choose_dropped, question_ends
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.fastv import FastV
from stf_jax.systems.gsearch import GSearch, GSearchLlama
from stf_jax.systems.pruning import PruningSystem
from stf_jax.systems.pyramiddrop import PyramidDrop, PyramidDropLlama
from tests.stf_jax.systems.pruned import extend, marks_of, prefill, run_stages
from tests.stf_jax.systems.reference import assert_near

TOKENS, LENGTH = 5, 24
TEXT_CONFIG = TextConfig(
    vocab_size=64, width=32, mlp_width=48, layers=3, heads=4, kv_heads=2, head_dim=8
)
KINDS = {"FastV": PrunedLlama, "PyramidDrop": PyramidDropLlama, "G-Search": GSearchLlama}


def new(kind: type[PrunedLlama], schedule: Any, seed: int = 0) -> PrunedLlama:
    init = Init(rngs=nnx.Rngs(seed))
    model = kind(TEXT_CONFIG, tokens=TOKENS, schedule=schedule, init=init)
    # Large enough for attention to differ.
    nnx.update(model, jax.tree.map(lambda leaf: 8 * leaf, nnx.state(model)))
    return model


def embeddings(seed: int, rows: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((rows, LENGTH, TEXT_CONFIG.width)), jnp.float32)


@st.composite
def prompts(draw: Any) -> np.ndarray:
    """Which image each position of a prompt is part of: one or two, text behind the last."""
    images = draw(st.integers(1, 2))
    gaps = [draw(st.integers(0, 3)) for _ in range(images)]
    row = []
    for image, gap in enumerate(gaps):
        row += [-1] * gap + [image] * TOKENS
    rest = LENGTH - len(row)
    return np.array([row + [-1] * rest])


schedules = st.lists(st.integers(0, TOKENS), min_size=2, max_size=2).map(
    lambda counts: tuple(enumerate([TOKENS, *sorted(counts, reverse=True)]))[1:]
)


TWO_IMAGES = np.array([[-1, *[0] * TOKENS, -1, -1, *[1] * TOKENS, *[-1] * (LENGTH - 13)]])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@settings(max_examples=2, deadline=None)
@given(image=prompts(), schedule=schedules, seed=st.integers(0, 99), uniform=st.booleans())
# Two images with text between, as many in every row; the second drop leaves nothing of them.
@example(image=TWO_IMAGES, schedule=((1, 3), (2, 0)), seed=0, uniform=True)
def test_hidden_and_gathered_are_the_same(
    kind: type[PrunedLlama], image: Any, schedule: Any, seed: int, uniform: bool
) -> None:
    """Prefill and decode with short caches, or those of full length, are the masked row."""
    model, x, later = new(kind, schedule, seed), embeddings(seed), 2
    images = int(image.max()) + 1
    # The prompt alone decides: the positions behind it are its answer.
    answered = np.where(np.arange(LENGTH) >= LENGTH - later, ANSWER, TEXT)[None]
    expected = run_stages(model, x, marks_of(image, answered))[-1]["logits"]
    count = images if uniform else None
    prompt = marks_of(image[:, :-later])
    logits, cache = prefill(model, x[:, :-later], prompt, images=count, room=later)
    assert_near(logits, np.asarray(expected)[:, -later - 1], tolerance=1e-4)
    for at in range(LENGTH - later, LENGTH):
        logits, cache = extend(model, x[:, at : at + 1], jnp.array([at], jnp.int32), cache)
        assert_near(logits[:, 0], np.asarray(expected)[:, at], tolerance=1e-4)
    left = [images * (TOKENS - kept) for kept in (TOKENS, *dict(schedule).values())]
    assert cache.sizes == tuple(LENGTH - (gone if uniform else 0) for gone in left)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_sequences_of_a_row_do_not_touch(kind: type[PrunedLlama]) -> None:
    """Two packed conversations, one with two images, each as it is alone."""
    model, x = new(kind, ((1, 3), (2, 0))), embeddings(3)
    image = np.full((1, LENGTH), -1)
    image[0, 1:6], image[0, 8:13], image[0, 15:20] = 0, 1, 2
    segment = np.where(np.arange(LENGTH) < 14, 1, 2)[None]
    kind_of = np.full((1, LENGTH), TEXT)
    kind_of[0, 7], kind_of[0, 13], kind_of[0, 22:] = ANSWER, ANSWER, ANSWER
    both = run_stages(model, x, marks_of(image, kind_of, segment))[-1]
    for start, stop in ((0, 14), (14, LENGTH)):
        part = slice(start, stop)
        alone = run_stages(model, x[:, part], marks_of(image[:, part], kind_of[:, part]))[-1]
        alive = np.asarray(alone["marks"].segment)[0] > 0
        np.testing.assert_array_equal(np.asarray(both["marks"].segment)[0, part] > 0, alive)
        logits = np.asarray(both["logits"])[0, part][alive]
        assert_near(logits, np.asarray(alone["logits"])[0, alive], tolerance=1e-4)
    # All tokens of all images are gone in the last layer.
    assert (np.asarray(both["marks"].segment)[image >= 0] < 0).all()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_everything_kept_is_the_plain_decoder(kind: type[PrunedLlama]) -> None:
    """Whether there are stages that drop nothing, or none."""
    image = np.full((2, LENGTH), -1)
    image[:, 2:7] = 0
    x, marks = embeddings(4, rows=2), marks_of(image)
    model = new(kind, ((1, TOKENS), (2, TOKENS)))
    plain = Llama.__call__
    expected = jax.jit(plain)(model, x, marks=marks)
    for schedule in ((), ((1, TOKENS), (2, TOKENS))):
        found = run_stages(new(kind, schedule), x, marks)[-1]["normed"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_prompt_without_images_costs_what_the_plain_decoder_does(kind: type[PrunedLlama]) -> None:
    """Nothing is scored, and nothing moves."""
    plain = Llama(TEXT_CONFIG, init=Init(rngs=nnx.Rngs(0)))
    x, marks, costs = embeddings(7), marks_of(np.full((1, LENGTH), -1)), []
    for model in (plain, new(kind, ((1, 3), (2, 0)))):
        # XLA counts the body of a loop once.
        model.layers = unstack(model.layers)
        lowered = prefill.lower(model, x, marks, images=0)
        assert "stablehlo.sort" not in lowered.as_text()
        costs.append(lowered.cost_analysis()["flops"])
    # A stage has rotary angles of its own.
    assert costs[1] == pytest.approx(costs[0], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_dropped_reaches_nothing_behind_the_drop(kind: type[PrunedLlama]) -> None:
    """With everything dropped before the first layer that text could read it from but one."""
    model = new(kind, ((1, 0),))
    image = np.full((1, LENGTH), -1)
    image[0, 2:7] = 0
    x, marks = embeddings(5), marks_of(image)
    logits = run_stages(model, x, marks)[-1]["logits"]
    # Text before the image has never seen it.
    other = run_stages(model, x.at[:, 2:7].multiply(-3.0), marks)[-1]["logits"]
    np.testing.assert_array_equal(logits[:, :2], other[:, :2])
    # The cache of later layers does not hold it.
    cache = prefill(model, x, marks, images=1)[1]
    assert cache.sizes == (LENGTH, LENGTH - TOKENS)
    assert (np.asarray(cache.groups[1].marks.image) < 0).all()


def test_adapters_score_as_the_weights_that_they_become() -> None:
    """LoRA is in the attention that ranks."""
    lora, schedule = LoRAConfig(rank=2, alpha=8.0, dropout=0.0), ((1, 3), (2, 1))
    init = Init(rngs=nnx.Rngs(1))
    model = PyramidDropLlama(TEXT_CONFIG, tokens=TOKENS, schedule=schedule, init=init, lora=lora)
    rng = np.random.default_rng(2)
    leaves = {
        path: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32)
        for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items()
    }
    nnx.update(model, unflatten(leaves))
    merged = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    for path in [path for path in leaves if path.endswith("/lora/a")]:
        kernel, b = path.replace("lora/a", "kernel"), path.replace("lora/a", "lora/b")
        arrays = (np.asarray(leaves[name]) for name in (kernel, path, b))
        parts = zip(*arrays, strict=True)
        merged[kernel] = jnp.stack([merge(w, a, b, scale=lora.scale) for w, a, b in parts])
    plain = new(PyramidDropLlama, schedule)
    nnx.update(plain, unflatten(merged))
    image = np.full((1, LENGTH), -1)
    image[:, 2:7] = 0
    x, marks = embeddings(6), marks_of(image)
    expected = np.asarray(run_stages(plain, x, marks)[-1]["logits"])
    assert_near(run_stages(model, x, marks)[-1]["logits"], expected, tolerance=1e-4)


def test_ties_go_to_the_lower_index() -> None:
    marks = marks_of([[-1, 0, 0, 0, 1, 1, 1, -1]])
    scores = jnp.array([[9, 1, 2, 2, 0, 0, 0, 9]], jnp.float32)
    gone = choose_dropped(scores, marks, 1)
    np.testing.assert_array_equal(gone[0], [0, 1, 0, 1, 0, 1, 1, 0])


def test_the_positions_that_ask() -> None:
    """Just before each answer; the last one where nothing is answered; none of padding."""
    segment = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0]])
    kind = np.array([[0, 0, ANSWER, ANSWER, 0, ANSWER, 0, 0, 0, 0, 0]])
    marks = dataclasses.replace(
        Marks.text(jnp.zeros_like(jnp.asarray(segment)), jnp.asarray(segment)),
        kind=jnp.asarray(kind),
    )
    np.testing.assert_array_equal(np.flatnonzero(question_ends(marks)[0]), [1, 4, 8])


def system(kind: type[PruningSystem], **fields: Any) -> LlavaConfig:
    vision = VisionConfig.tiny()
    text = dataclasses.replace(TextConfig.tiny(), layers=4)
    made = kind(taps=(3,), projector_width=64, **fields)
    return LlavaConfig(vision=vision, text=text, system=made)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (FastV, {"layer": 4, "keep": 3}, r"drops at layers \[4\]; this .* can at 1 to 3"),
        (FastV, {"layer": 2, "keep": 17}, "keeps .17. of an image's 16 tokens; give 0 to 16"),
        (FastV, {"layer": 0}, "FastV.layer is 0"),
        (FastV, {"keep": 0}, "FastV.keep is 0"),
        (PyramidDrop, {"layers": (2, 1), "ratios": (0.5, 0.25)}, "each once, ascending"),
        (PyramidDrop, {"layers": (1, 2), "ratios": (0.25, 0.5)}, "none above the one before"),
        (PyramidDrop, {"layers": (1, 2), "ratios": (0.5,)}, "2 layers and 1 ratios"),
        (PyramidDrop, {"layers": (1,), "ratios": (1.5,)}, "parts from 0 to 1"),
        (GSearch, {"schedule": (16, 8)}, "give 4 numbers, one a layer, the first 16"),
        (GSearch, {"schedule": (8, 8, 8, 8)}, "the first 16; 'stf-jax search' finds them"),
        (GSearch, {"schedule": (16, 8, 9, 8)}, "none above the one before"),
        (GSearch, {"schedule": (16, 8, 4, -1)}, "none above the one before"),
    ],
)
def test_schedules_that_no_model_can_follow(
    kind: type[PruningSystem], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        system(kind, **fields)


def test_published_keys() -> None:
    """FastV's two spellings, and PyramidDrop's lists as text."""
    assert FastV.read_hf({"fast_v_agg_layer": 3, "fast_v_attention_rank": 144}) == {
        "layer": 3,
        "keep": 144,
    }
    newer = {"fastv_k": 2, "fastv_r": 0.75, "image_token_length": 576}
    assert FastV.read_hf(newer) == {"layer": 2, "keep": 144}
    text = {"layer_list": "[8,16,24]", "image_token_ratio_list": "[0.5,0.25,0.125]"}
    fields = PyramidDrop.read_hf(text)
    assert fields is not None
    assert PyramidDrop(**{name: tuple(value) for name, value in fields.items()}) == PyramidDrop()
    assert FastV.read_hf({}) is None
    assert PyramidDrop.read_hf({}) is None
