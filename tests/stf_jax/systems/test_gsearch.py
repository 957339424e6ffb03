"""G-Search's schedules against an independent computation, and by their own rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.config.vision import VisionConfig
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.models import flops
from stf_jax.models.marks import Marks
from stf_jax.models.pruning import PrunedLlama
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.gsearch import (
    GSearch,
    GSearchLlama,
    default_schedule,
    sigmoid_counts,
    solve_midpoint,
)
from tests.stf_jax.systems.pruned import (
    answer,
    decoder_of,
    drops,
    prompt_marks,
    run_stages,
)
from tests.stf_jax.systems.reference import Case, assert_near, find_case


@pytest.fixture(scope="module")
def reference_case() -> Case:
    return find_case("gsearch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sized(GSearch):
    """With as many tokens an image as a folder has, which need not be a square."""

    def tokens(self, vision: VisionConfig) -> int:
        return self.schedule[0]


def marks_for(case: Case, *, rows: int = 1) -> Marks:
    tokens, length = case.json["sizes"]["vision_tokens"], case["embeds"].shape[1]
    return prompt_marks(length, start=case.hyper["sys_length"], tokens=tokens, rows=rows)


@pytest.mark.parametrize("rows", ["text", "last"])
def test_reference_schedule_by_hand(reference_case: Case, rows: str) -> None:
    """Scores, what is alive in each layer and what comes out of it, for one sample."""
    case, marks = reference_case, marks_for(reference_case)
    counts = case["hand.schedule"]
    name = "hand" if rows == "text" else "hand_last"
    kind = GSearchLlama if rows == "text" else PrunedLlama
    model = decoder_of(case, kind, drops(counts))
    embeds = case["embeds"][:1]
    stages = run_stages(model, embeds, marks, gather=True, images=1)
    for layer, stage in enumerate(stages):
        position = np.asarray(stage["marks"].position)[0]
        np.testing.assert_array_equal(position, case[f"{name}.positions.{layer}"])
        if f"{name}.scores.{layer}" in case.tensors:
            at_image = np.asarray(stages[layer - 1]["marks"].image)[0] >= 0
            scores = np.asarray(stage["scores"])[0, at_image]
            assert_near(scores, case[f"{name}.scores.{layer}"], tolerance=1e-5)
        if f"{name}.layer.{layer}.out" in case.tensors:
            assert_near(stage["x"], case[f"{name}.layer.{layer}.out"], tolerance=1e-4)
    assert_near(stages[-1]["logits"], case[f"{name}.logits"], tolerance=1e-4)
    if rows == "last":
        return
    # Hidden where it stands.
    logits = run_stages(model, embeds, marks)[-1]["logits"]
    alive = case[f"{name}.positions.{len(counts) - 1}"]
    assert_near(np.asarray(logits)[:, alive], case[f"{name}.logits"], tolerance=1e-4)


def test_reference_decoding(reference_case: Case) -> None:
    """As the system has it: only the layers that drop anything divide it into stages."""
    case = reference_case
    system, vision = Sized(schedule=tuple(case["hand.schedule"].tolist())), VisionConfig.tiny()
    model = decoder_of(case, GSearchLlama, system.schedule_of(vision))
    steps = len(case["hand.decode.tokens"])
    greedy = answer(model, case["embeds"][:1], marks_for(case), steps=steps)
    np.testing.assert_array_equal(greedy.tokens, case["hand.decode.tokens"])
    assert_near(greedy.logits, case["hand.decode.logits"], tolerance=1e-4)
    groups, layers = greedy.cache.groups, greedy.cache.layer_groups
    lengths = [int((groups[group].marks.segment > 0).sum()) for group in layers]
    np.testing.assert_array_equal(lengths, case["hand.cache_lengths"])
    text, length = case.decoder_text, case["embeds"].shape[1]
    assert system.layer_lengths(vision, text, length=length, images=1) == tuple(lengths)
    ids = np.full(length, IMAGE_TOKEN_ID)
    ids[system.schedule[0] :] = 1
    held = system.held(ids, vision)
    assert tuple(held[group] for group in layers) == tuple(lengths)


def test_reference_flops(reference_case: Case) -> None:
    """Of the layers, as exact integers."""
    case = reference_case
    text, length = case.decoder_text, case["embeds"].shape[1]
    tokens, vision = case.json["sizes"]["vision_tokens"], VisionConfig.tiny()
    for name, expected in case.hyper["flops"].items():
        counts = case.tensors.get(f"{name}.schedule", np.full(text.layers, tokens))
        system = Sized(schedule=tuple(counts.tolist()), taps=(vision.layers - 1,))
        config = LlavaConfig(vision=vision, text=text, system=system)
        found = flops.forward(config, rows=1, length=length, images=1).text
        assert found - 2 * length * text.width * text.vocab_size == expected


def test_reference_dense_logits(reference_case: Case) -> None:
    case = reference_case
    marks = marks_for(case, rows=len(case["embeds"]))
    logits = run_stages(decoder_of(case, PrunedLlama, ()), case["embeds"], marks)[-1]["logits"]
    assert_near(np.asarray(logits)[:, -1], case["dense.last_logits"], tolerance=1e-4)
    targets = jnp.asarray(case["search.target"])
    np.testing.assert_array_equal(np.argmax(case["dense.last_logits"], axis=1), targets)
    entropy = -jax.nn.log_softmax(logits[:, -1])[jnp.arange(len(targets)), targets].mean()
    assert_near(entropy, case["search.dense_ce"], tolerance=1e-4)


def test_reference_sigmoids_under_a_budget(reference_case: Case) -> None:
    """Every slope: the midpoint, and the counts, which never exceed the budget."""
    case = reference_case
    layers, tokens = case.json["sizes"]["layers"], case.json["sizes"]["vision_tokens"]
    for budget in case.hyper["budgets"]:
        for slope, midpoint, counts in zip(
            case["psigmoid.slopes"].tolist(),
            case[f"psigmoid.{budget}.midpoints"].tolist(),
            case[f"psigmoid.{budget}.schedules"],
            strict=True,
        ):
            found = solve_midpoint(slope, budget, layers=layers)
            assert found == pytest.approx(midpoint, abs=1e-4)
            schedule = sigmoid_counts(slope, found, tokens=tokens, layers=layers)
            np.testing.assert_array_equal(schedule, counts)
            assert sum(schedule) <= budget * tokens * layers


def test_a_budget_that_the_first_layers_exceed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the first 2 of 8 layers keep all tokens, so give more "):
        solve_midpoint(1.0, 0.25, layers=8)


def test_the_default_keeps_half_of_the_tokens() -> None:
    for layers in (2, 3, 32, 40):
        schedule = default_schedule(576, layers)
        assert len(schedule) == layers
        assert list(schedule) == sorted(schedule, reverse=True)
        assert schedule[0] == 576
        if layers > 8:
            assert 0.49 < sum(schedule) / (576 * layers) <= 0.5
