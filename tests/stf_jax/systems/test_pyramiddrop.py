"""PyramidDrop against what its released code computed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config.vision import VisionConfig
from stf_jax.convert.mapping import text_entries
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID
from stf_jax.models.marks import ANSWER, IMAGE, TEXT, Marks
from stf_jax.models.pruning import PrunedLlama, Schedule
from stf_jax.store.arrays import flatten
from stf_jax.systems.pyramiddrop import PyramidDrop
from tests.stf_jax.systems.pruned import (
    answer,
    decoder_of,
    marks_of,
    prompt_marks,
    run_stages,
)
from tests.stf_jax.systems.reference import Case, assert_near, find_case


@pytest.fixture(scope="module")
def reference_case() -> Case:
    return find_case("pyramiddrop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sized(PyramidDrop):
    """With as many tokens an image as a folder has, which need not be a square."""

    count: int

    def tokens(self, vision: VisionConfig) -> int:
        return self.count


def schedule_of(case: Case) -> Schedule:
    hyper = case.hyper
    system = Sized(
        layers=tuple(hyper["layer_list"]),
        ratios=tuple(hyper["image_token_ratio_list"]),
        count=case.json["sizes"]["vision_tokens"],
    )
    return system.schedule_of(VisionConfig.tiny())


@pytest.fixture(scope="module")
def model(reference_case: Case) -> PrunedLlama:
    return decoder_of(reference_case, PyramidDrop.llama, schedule_of(reference_case))


@dataclasses.dataclass(frozen=True)
class Training:
    """The folder's batch: ids with images spliced in, padded on the right."""

    marks: Marks
    slots: np.ndarray
    ids: np.ndarray

    def embed(self, model: PrunedLlama, features: jax.Array) -> jax.Array:
        inserted = jnp.take_along_axis(features, self.slots[..., None], axis=1)
        at_image = (self.marks.kind == IMAGE)[..., None]
        return jnp.where(at_image, inserted, model.embed(jnp.asarray(self.ids)))


@pytest.fixture(scope="module")
def training(reference_case: Case) -> Training:
    case, tokens = reference_case, reference_case.json["sizes"]["vision_tokens"]
    shape = case["mask"].shape
    ids, slots = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    image = np.full(shape, -1)
    for row, (given, mask) in enumerate(zip(case["input_ids"], case["input_mask"], strict=True)):
        real = given[mask]
        spliced = np.repeat(real, np.where(real == IMAGE_TOKEN_ID, tokens, 1))
        at_image = spliced == IMAGE_TOKEN_ID
        labels = np.repeat(
            case["input_labels"][row][mask], np.where(real == IMAGE_TOKEN_ID, tokens, 1)
        )
        np.testing.assert_array_equal(labels, case["labels"][row, : len(spliced)])
        ids[row, : len(spliced)] = np.where(at_image, 0, spliced)
        image[row, : len(spliced)][at_image] = 0
        slots[row, : len(spliced)][at_image] = np.arange(tokens)
    kind = np.where(case["labels"] == IGNORED_LABEL, TEXT, ANSWER)
    marks = marks_of(image, kind, segment=case["mask"].astype(np.int32))
    return Training(marks=marks, slots=slots, ids=ids)


def test_reference_training_stages(
    reference_case: Case, model: PrunedLlama, training: Training
) -> None:
    """What each stage takes in, by what it chooses, and what is left."""
    case = reference_case
    x = training.embed(model, jnp.asarray(case["image_features"]))
    mask = case["mask"]
    assert_near(np.asarray(x)[mask], case["embeds"][mask], tolerance=1e-6)
    stages = run_stages(model, x, training.marks)
    alive = mask
    for number in range(len(case.hyper["layer_list"])):
        name = f"train.stage{number}"
        before, after = stages[number], stages[number + 1]
        still = np.asarray(after["marks"].segment) > 0
        for row in range(len(mask)):
            real = case[f"{name}.mask"][row]
            was = np.asarray(before["x"])[row, alive[row]]
            expected = case[f"{name}.in"][row][: len(was)]
            assert_near(was, expected, tolerance=1e-4)
            held = np.asarray(before["x"])[row, still[row]]
            assert_near(held, case[f"{name}.out"][row, real], tolerance=1e-4)
            np.testing.assert_array_equal(
                np.asarray(after["marks"].position)[row, still[row]],
                case[f"{name}.position_ids"][row, real],
            )
            labels = case["labels"][row, still[row]]
            np.testing.assert_array_equal(labels, case[f"{name}.labels"][row, real])
            if f"{name}.scores.{row}" not in case.tensors:
                continue
            image = np.flatnonzero(alive[row] & (np.asarray(training.marks.image)[row] >= 0))
            scores = np.asarray(after["scores"])[row, image]
            assert_near(scores, case[f"{name}.scores.{row}"], tolerance=1e-5)
            kept = np.flatnonzero(still[row, image])
            np.testing.assert_array_equal(kept, case[f"{name}.kept.{row}"])
        alive = still
    for row, real in enumerate(case[f"{name}.mask"]):
        logits = np.asarray(stages[-1]["logits"])[row, alive[row]]
        assert_near(logits, case["train.logits"][row, real], tolerance=1e-4)


def test_reference_loss_and_gradients(
    reference_case: Case, model: PrunedLlama, training: Training
) -> None:
    """As a run computes them: layers are computed again in the backward pass."""
    case = reference_case
    targets = np.pad(case["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    known = targets != IGNORED_LABEL
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, features: jax.Array) -> tuple[jax.Array, Any]:
        def loss(state: nnx.State, features: jax.Array) -> jax.Array:
            model = nnx.merge(graph, state)
            x = training.embed(model, features)
            logits = model.logits(model(x, marks=training.marks, remat="full"))
            right = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)
            lost = jax.nn.logsumexp(logits, axis=-1) - right[..., 0]
            return jnp.where(known, lost, 0).sum() / known.sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(state, features)

    loss, (of_state, of_features) = run(state, jnp.asarray(case["image_features"]))
    assert_near(loss, case["train.loss"], tolerance=1e-5)
    gradients = case.group("train.grad.")
    assert_near(of_features, gradients.pop("image_features"), tolerance=1e-5)
    leaves = flatten(nnx.to_pure_dict(of_state))
    text = case.decoder_text
    found = {}
    for entry in text_entries(text, vocabulary=text.vocab_size):
        if entry.layers is not None:
            leaf = np.asarray(leaves[entry.native.removeprefix("text/")])
            for name, part in zip(entry.tensors, leaf, strict=True):
                short = name.removeprefix("model.").removesuffix(".weight")
                found[short] = entry.transform.torch(part)
    for name, expected in gradients.items():
        assert_near(found[name], expected, tolerance=1e-5)


def test_reference_inference(reference_case: Case, model: PrunedLlama) -> None:
    """The prompt's last position ranks; a new token has another position in each stage."""
    case, tokens = reference_case, reference_case.json["sizes"]["vision_tokens"]
    (ids,) = case["infer.input_ids"]
    start = int(np.flatnonzero(ids == IMAGE_TOKEN_ID)[0])
    length = len(ids) - 1 + tokens
    x = case["embeds"][:1, :length]
    marks = prompt_marks(length, start=start, tokens=tokens)
    before = np.asarray(marks.image)[0] >= 0
    stages = run_stages(model, x, marks)
    for number, stage in enumerate(stages[1:]):
        scores, after = np.asarray(stage["scores"])[0], np.asarray(stage["marks"].segment)[0] > 0
        assert_near(scores[before], case[f"infer.stage{number}.scores"], tolerance=1e-5)
        kept = case[f"infer.stage{number}.kept"]
        assert len(kept) == schedule_of(case)[number][1]
        np.testing.assert_array_equal(np.flatnonzero(after[before]), kept)
        before = before & after
    stages = run_stages(model, x, marks, gather=True, images=1)
    assert_near(stages[-1]["logits"], case["infer.prefill.logits"], tolerance=1e-4)
    greedy = answer(model, x, marks, steps=len(case["infer.tokens"]))
    np.testing.assert_array_equal(greedy.tokens, case["infer.tokens"])
    assert_near(greedy.logits, case["infer.logits"], tolerance=1e-4)
    groups, layers = greedy.cache.groups, greedy.cache.layer_groups
    lengths = [int((groups[group].marks.segment > 0).sum()) for group in layers]
    np.testing.assert_array_equal(lengths, case["infer.cache_lengths"])
    for step, expected in enumerate(case["infer.decode_position_ids"]):
        token = jnp.array([[length + step]], jnp.int32)
        new = [group.place(token, Marks.text(token, jnp.ones_like(token)))[1] for group in groups]
        positions = [int(new[group].position[0, 0]) for group in layers]
        np.testing.assert_array_equal(positions, expected)
