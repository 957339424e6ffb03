"""The searches against an independent computation, and by their own rules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stf_jax.models.marks import Marks
from stf_jax.models.pruning import PrunedLlama
from stf_jax.search.algorithms import (
    SLOPES,
    Counts,
    Criterion,
    Quality,
    Rule,
    fit_sigmoid,
    search_greedily,
    search_sigmoids,
)
from stf_jax.systems.gsearch import WHOLE, GSearchLlama, sigmoid_rates
from tests.stf_jax.systems.pruned import decoder_of, prompt_marks
from tests.stf_jax.systems.reference import Case, find_case


@pytest.fixture(scope="module")
def reference_case() -> Case:
    return find_case("gsearch")


@pytest.fixture(scope="module")
def evaluate(reference_case: Case) -> Callable[[Counts], Quality]:
    """All calibration samples at once; one compiled program for every schedule."""
    case, sizes = reference_case, reference_case.json["sizes"]
    layers, tokens = sizes["layers"], sizes["vision_tokens"]
    schedule = tuple((layer, 0) for layer in range(case.hyper["first_prunable_layer"], layers))
    model = decoder_of(case, GSearchLlama, schedule)
    x, targets = jnp.asarray(case["embeds"]), case["search.target"]
    rows, length, _ = x.shape
    marks = prompt_marks(length, start=case.hyper["sys_length"], tokens=tokens, rows=rows)

    @jax.jit
    def run(model: PrunedLlama, x: jax.Array, marks: Marks, counts: jax.Array) -> jax.Array:
        *_, stage = model.stages(x, marks, counts=counts, images=1)
        return model.logits(model.norm(stage.x[:, -1:]))[:, 0]

    known: dict[Counts, Quality] = {}

    def measure(counts: Counts) -> Quality:
        if counts not in known:
            logits = np.asarray(run(model, x, marks, jnp.array(counts[WHOLE:])), np.float64)
            right = logits[np.arange(rows), targets]
            lost = np.logaddexp.reduce(logits, axis=1) - right
            same = logits.argmax(axis=1) == targets
            known[counts] = Quality(agreement=float(same.mean()), cross_entropy=float(lost.mean()))
        return known[counts]

    return measure


@pytest.mark.parametrize("criterion", ["agree", "ce", "lambda"])
def test_reference_greedy_search(
    reference_case: Case, evaluate: Callable[[Counts], Quality], criterion: Criterion
) -> None:
    """Every schedule that is tried, in order, and what is found."""
    case, sizes, hyper = reference_case, reference_case.json["sizes"], reference_case.hyper
    rule = Rule(
        criterion=criterion,
        step=hyper["search_step"],
        tolerance=hyper["tol_ce"],
        weight=hyper["lam"],
    )
    done: list[tuple[int, int]] = []
    counts, trials = search_greedily(
        evaluate,
        tokens=sizes["vision_tokens"],
        layers=sizes["layers"],
        rule=rule,
        progress=lambda layer, total: done.append((layer, total)),
    )
    np.testing.assert_array_equal(counts, case[f"search.{criterion}.schedule"])
    found = [[t.layer, t.count, t.quality.agreement, t.quality.cross_entropy] for t in trials]
    expected = case[f"search.{criterion}.trace"]
    np.testing.assert_array_equal(np.array(found)[:, :3], expected[:, :3])
    np.testing.assert_allclose(np.array(found)[:, 3], expected[:, 3], rtol=1e-4)
    assert done[-1] == (sizes["layers"] - WHOLE,) * 2


def test_reference_sigmoid_fit(reference_case: Case) -> None:
    counts = tuple(reference_case["search.ce.schedule"].tolist())
    sigmoid, error = fit_sigmoid(counts)
    found = [sigmoid.slope, sigmoid.midpoint, error]
    np.testing.assert_allclose(found, reference_case["psigmoid.fit"], rtol=1e-5)


def test_reference_sigmoid_search(
    reference_case: Case, evaluate: Callable[[Counts], Quality]
) -> None:
    case, sizes = reference_case, reference_case.json["sizes"]
    np.testing.assert_allclose(SLOPES, case["psigmoid.slopes"], rtol=1e-6)
    for budget in case.hyper["budgets"]:
        tried: list[float] = []

        def measure(counts: Counts, tried: list[float] = tried) -> Quality:
            quality = evaluate(counts)
            tried.append(quality.cross_entropy)
            return quality

        counts, sigmoid = search_sigmoids(
            measure,
            tokens=sizes["vision_tokens"],
            layers=sizes["layers"],
            budget=budget,
            progress=lambda done, total: None,
        )
        np.testing.assert_allclose(tried, case[f"psigmoid.{budget}.ce"], rtol=1e-4)
        found = [sigmoid.slope, sigmoid.midpoint, evaluate(counts).cross_entropy]
        np.testing.assert_allclose(found, case[f"psigmoid.{budget}.best"], rtol=1e-4)


def damage(counts: Counts) -> Quality:
    """A model that suffers from every token that is gone, more in shallow layers."""
    lost = sum((counts[0] - count) / (1 + layer) for layer, count in enumerate(counts))
    return Quality(agreement=1.0 if lost < 9 else 0.5, cross_entropy=1 + 0.01 * lost)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(3, 9),
    tokens=st.integers(1, 20),
    step=st.integers(1, 9),
    tolerance=st.floats(0, 0.5),
    criterion=st.sampled_from(["agree", "ce"]),
)
def test_what_is_found_never_grows_and_is_acceptable(
    layers: int, tokens: int, step: int, tolerance: float, criterion: Criterion
) -> None:
    rule = Rule(criterion=criterion, step=step, tolerance=tolerance)
    counts, _ = search_greedily(
        damage, tokens=tokens, layers=layers, rule=rule, progress=lambda done, total: None
    )
    assert counts[:WHOLE] == (tokens,) * WHOLE
    assert list(counts) == sorted(counts, reverse=True)
    assert rule.accepts(damage(counts), damage((tokens,) * layers))
    assert all(count % step == 0 or count == tokens for count in counts)


def test_the_ends_of_the_tolerance() -> None:
    """Without limit nothing stays behind the first layers; with an impossible one all does."""
    sizes = {"tokens": 8, "layers": 5, "progress": lambda done, total: None}
    everything = Rule(criterion="ce", step=2, tolerance=1e9)
    assert search_greedily(damage, rule=everything, **sizes)[0] == (8, 8, 0, 0, 0)

    def never(counts: Counts) -> Quality:
        return Quality(agreement=0.5, cross_entropy=1.0)

    nothing = Rule(criterion="agree", step=2)
    assert search_greedily(never, rule=nothing, **sizes)[0] == (8,) * 5


def test_the_fit_finds_a_sigmoid_of_its_grid() -> None:
    rates = sigmoid_rates(0.5, 4.25, layers=12)
    counts = tuple(round(1_000_000 * rate) for rate in rates)
    sigmoid, error = fit_sigmoid(counts)
    assert (sigmoid.slope, sigmoid.midpoint) == (0.5, 4.25)
    assert error < 1e-9
