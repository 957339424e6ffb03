"""FastV against what its released code computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.models.layers import layer_at
from stf_jax.models.marks import Marks
from stf_jax.models.pruning import PrunedLlama, attention_received
from stf_jax.systems.fastv import FastV
from tests.stf_jax.systems.pruned import answer, decoder_of, drops, prompt_marks, run_stages
from tests.stf_jax.systems.reference import Case, assert_near, find_case


@pytest.fixture(scope="module")
def reference_case() -> Case:
    return find_case("fastv")


@pytest.fixture(scope="module")
def model(reference_case: Case) -> PrunedLlama:
    """One drop, as the system has it."""
    hyper = reference_case.hyper
    system = FastV(layer=hyper["agg_layer_K"], keep=hyper["attention_rank"])
    return decoder_of(reference_case, system.llama, ((system.layer, system.keep),))


def image_marks(case: Case, length: int) -> Marks:
    hyper = case.hyper
    return prompt_marks(length, start=hyper["sys_length"], tokens=hyper["image_token_length"])


def whole_marks(case: Case) -> Marks:
    return image_marks(case, case["embeds"].shape[1])


def test_reference_hidden_states(reference_case: Case) -> None:
    """Scores, what stays, and what goes into each layer."""
    case, hyper = reference_case, reference_case.hyper
    layer, kept, tokens = hyper["agg_layer_K"], hyper["attention_rank"], hyper["image_token_length"]
    layers = case.json["sizes"]["layers"]
    # No drop before K, and none after: each layer is a stage all the same.
    counts = [tokens if number < layer else kept for number in range(layers)]
    model = decoder_of(case, PrunedLlama, drops(counts))
    stages = run_stages(model, case["embeds"], whole_marks(case), gather=True, images=1)
    image = slice(hyper["sys_length"], hyper["sys_length"] + tokens)
    assert_near(stages[layer]["scores"][0, image], case["scores"], tolerance=1e-5)
    np.testing.assert_array_equal(stages[layer]["marks"].position[0], case["kept_positions"])
    np.testing.assert_array_equal(case["embeds"], case["inplace.hidden.0"])
    for number, stage in enumerate(stages[:-1]):
        # Recorded before the cut.
        assert_near(stage["x"], case[f"inplace.hidden.{number + 1}"], tolerance=1e-4)
    assert_near(stages[-1]["normed"], case[f"inplace.hidden.{layers}"], tolerance=1e-4)
    assert_near(stages[-1]["logits"], case["inplace.logits"], tolerance=1e-4)


def test_reference_attention(reference_case: Case, model: PrunedLlama) -> None:
    """Head by head: of the last position, in layer K-1."""
    case, marks = reference_case, whole_marks(reference_case)
    layer = case.hyper["agg_layer_K"] - 1

    @jax.jit
    def run(model: PrunedLlama, x: jax.Array) -> jax.Array:
        query, key, _ = layer_at(model.layers, layer).project(x, model.inputs(marks).angles)
        last = marks.take(jnp.array([[x.shape[1] - 1]]))
        return jnp.concatenate(
            [
                attention_received(
                    query[:, -1:, head : head + 1],
                    key[:, :, head : head + 1],
                    weights=jnp.ones((1, 1), bool),
                    queries=last,
                    keys=marks,
                    rule=model.rule,
                )
                for head in range(query.shape[2])
            ]
        )

    found = run(model, jnp.asarray(case[f"inplace.hidden.{layer}"]))
    assert_near(found, case["attention.K-1"], tolerance=1e-5)


def test_reference_masked_form(reference_case: Case, model: PrunedLlama) -> None:
    """Hidden where it stands, what is dropped changes nothing; nothing dropped is LLaVA-1.5."""
    case, marks = reference_case, whole_marks(reference_case)
    logits = run_stages(model, case["embeds"], marks)[-1]["logits"]
    kept = case["kept_positions"]
    assert_near(np.asarray(logits)[:, kept], case["masked.logits"], tolerance=1e-4)
    dense = decoder_of(case, PrunedLlama, ())
    logits = run_stages(dense, case["embeds"], marks)[-1]["logits"]
    assert_near(logits, case["dense.logits"], tolerance=1e-4)


def test_reference_decoding_with_a_cache(reference_case: Case, model: PrunedLlama) -> None:
    """Ranked once."""
    case = reference_case
    greedy = answer(model, case["embeds"], whole_marks(case), steps=len(case["static.tokens"]))
    np.testing.assert_array_equal(greedy.tokens, case["static.tokens"])
    assert_near(greedy.logits, case["static.logits"], tolerance=1e-4)
    lengths = [
        int((greedy.cache.groups[group].marks.segment > 0).sum())
        for group in greedy.cache.layer_groups
    ]
    np.testing.assert_array_equal(lengths, case["static.cache_lengths"])


def test_reference_decoding_without_a_cache(reference_case: Case, model: PrunedLlama) -> None:
    """The whole row at every step, whose newest token ranks; rows have room for the last step."""
    case, x = reference_case, jnp.asarray(reference_case["embeds"])
    steps, length = len(case["reprune.tokens"]), x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, steps), (0, 0)))
    whole = image_marks(case, length + steps)

    @jax.jit
    def run(model: PrunedLlama, x: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        real = jnp.arange(length + steps) < end
        marks = Marks(
            position=whole.position,
            segment=jnp.where(real, whole.segment, 0),
            kind=whole.kind,
            image=whole.image,
        )
        *_, stage = model.stages(x, marks)
        return model.logits(model.norm(stage.x))[0, end - 1], stage.marks.segment[0]

    image = np.flatnonzero(np.asarray(whole.image)[0] >= 0)
    for step in range(steps):
        logits, segment = run(model, x, jnp.int32(length + step))
        token = jnp.argmax(logits)
        assert int(token) == case["reprune.tokens"][step]
        assert_near(logits, case["reprune.logits"][step], tolerance=1e-4)
        kept = image[np.asarray(segment)[image] > 0]
        np.testing.assert_array_equal(kept, case["reprune.kept_vision"][step])
        x = x.at[:, length + step].set(model.embed(token[None, None])[:, 0])
