"""PruMerge and PruMerge+ against what the released code computed, and by hand."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import stf_jax
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert import export_checkpoint, import_checkpoint
from stf_jax.data.batch import Batch
from stf_jax.models.connector import ClassAttention
from stf_jax.models.llava import Llava, marks_of
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.prumerge import (
    Kept,
    PruMerge,
    class_scores,
    count_outliers,
    find_nearest,
    find_rest,
    merge,
    select,
)
from stf_jax.systems.random import Random
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.systems.conftest import batch_of, build
from tests.stf_jax.systems.reference import Case, assert_near, find_case, insert_images


@pytest.fixture(scope="module")
def reference_case() -> Case:
    return find_case("prumerge")


def inputs(case: Case, part: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features, keys and scores of the patches of a part."""
    if part == "a":
        x, keys = jnp.asarray(case["a.x"]), jnp.asarray(case["a.k"])
        captured = ClassAttention(query=jnp.asarray(case["a.q"])[:, 0], keys=keys)
    else:
        features = jax.jit(lambda model, pixels: model.vision(pixels))(
            case.model(system_of(case), weights="b.weights."),
            jnp.asarray(case["b.images"].transpose(0, 2, 3, 1)),
        )
        assert_near(features.taps[0], case["b.x"][:, 1:], tolerance=1e-5)
        x = jnp.asarray(case["b.x"])
        captured = features.class_attention
        assert_near(captured.keys, case["b.k"], tolerance=1e-5)
        assert_near(captured.query, case["b.q"][:, 0], tolerance=1e-5)
    scores = class_scores(captured)
    assert_near(scores, case[f"{part}.cls_attention"], tolerance=1e-5)
    return x[:, 1:], captured.keys[:, 1:], scores


def system_of(case: Case, **fields: object) -> PruMerge:
    return PruMerge(
        taps=(case.tap,),
        projector_width=case.text.width,
        neighbors=case.hyper["neighbours"],
        **fields,
    )


@pytest.mark.parametrize("part", ["a", "b"])
def test_reference_selection_and_merging(reference_case: Case, part: str) -> None:
    """Every run of the two functions: what is kept, dropped and merged."""
    case = reference_case
    x, keys, scores = inputs(case, part)
    merging = jax.jit(merge, static_argnames="neighbors")
    nearest = jax.jit(find_nearest, static_argnames="count")
    for name, run in case.json["runs"].items():
        kind = name.removeprefix(f"{part}.")
        if f"{name}.kept_order" not in case.tensors or kind == name:
            continue
        images = _images(name, len(x))
        chosen = tuple(array[images] for array in (x, keys, scores))
        system = system_of(case, plus=run["variant"] == "plus", ratio=run.get("ratio"))
        if run["adaptive"]:
            system = dataclasses.replace(system, ratio=None)
        counts = None
        if run["adaptive"] and run["B"] > 1:
            # The released code counts over the batch.
            pooled = int(count_outliers(chosen[2].reshape(1, -1))[0])
            share = pooled / chosen[2].size
            counts = jnp.full(len(images), int(chosen[2].shape[1] * share))
        elif run["adaptive"]:
            assert count_outliers(chosen[2]).tolist() == [run["outliers"]]
        kept = select(system, chosen[2], counts=counts)
        rest = np.asarray(find_rest(kept, chosen[0].shape[1]))
        tokens = np.asarray(merging(*chosen, kept, neighbors=system.neighbors))
        candidate = np.concatenate([kept.valid, rest], axis=1)[:, None]
        candidate = candidate & ~np.eye(*kept.index.shape[1:], candidate.shape[2], dtype=bool)
        found = np.asarray(nearest(chosen[1], kept.index, candidate, count=system.neighbors))
        for row, order in enumerate(case[f"{name}.kept_order"]):
            valid = np.asarray(kept.valid[row])
            index = np.asarray(kept.index[row])[valid]
            np.testing.assert_array_equal(index, order, err_msg=name)
            np.testing.assert_array_equal(np.sort(index), case[f"{name}.kept"][row])
            if f"{name}.neighbours" in case.tensors:
                # Kept patches come by row, and then all patches.
                patches = np.append(np.asarray(kept.index[row]), range(rest.shape[1]))
                places = np.sort(patches[found[row][valid]], axis=1)
                np.testing.assert_array_equal(places, case[f"{name}.neighbours"][row])
            np.testing.assert_array_equal(np.flatnonzero(rest[row]), case[f"{name}.rest"][row])
            out = tokens[row][np.append(valid, True)]
            assert_near(out, case[f"{name}.out"][row], tolerance=1e-5)


def _images(name: str, count: int) -> np.ndarray:
    """The images of a run: the one that its name ends in, or all."""
    last = name.rpartition(".")[2]
    return np.array([int(last)] if last.isdigit() else range(count))


def train_batch(case: Case, tokens: int) -> Batch:
    ids, labels, mask = (case[f"b.train.{n}"] for n in ("input_ids", "labels", "attention_mask"))
    black = np.zeros_like(case["b.images"][:1])
    images = np.concatenate([case["b.images"][:1], black, case["b.images"][2:3]])
    return insert_images(ids, labels, mask, tokens=tokens, images=images)


def test_reference_training(reference_case: Case) -> None:
    """Both variants with a fixed share over a batch; gradients of PruMerge+."""
    case = reference_case
    for plus in (False, True):
        system = system_of(case, plus=plus, ratio=case.hyper["fixed_ratio_b"])
        model = case.model(system, weights="b.weights.")
        name = f"b.train.{'plus' if plus else 'base'}"
        batch = train_batch(case, model.config.tokens_per_image)
        graph, state = nnx.split(model)

        def mean(state: nnx.State, graph=graph, batch=batch) -> jax.Array:
            total, count = nnx.merge(graph, state).loss(batch)
            return total / count

        loss, gradient = jax.jit(jax.value_and_grad(mean))(state)
        assert_near(loss, case[f"{name}.loss"][0], tolerance=1e-5)
        logits = np.asarray(jax.jit(Llava.__call__)(model, batch))
        real = np.asarray(batch.segments) > 0
        np.testing.assert_array_equal(real, case[f"{name}.mask"])
        np.testing.assert_array_equal(batch.labels, case[f"{name}.labels"])
        assert_near(logits[real], case[f"{name}.logits"][real], tolerance=1e-4)
        if plus:
            case.check_gradients(model, gradient, prefix="b.grad.")


def test_reference_answers_in_one_batch(reference_case: Case) -> None:
    """Adaptive counts, all images beside each other: one at a time is what upstream can do."""
    case = reference_case
    length = int(
        case.json["tensors"]["b.infer.base.0.last_logits"][2].split("[0,:")[1].split("]")[0]
    )
    for variant in ("base", "plus"):
        system = system_of(case, plus=variant == "plus")
        model = case.model(system, weights="b.weights.")
        images = case["b.images"]
        ids = np.repeat(case["b.train.input_ids"][:1, :length], len(images), axis=0)
        batch = insert_images(
            ids,
            np.full_like(ids, -100),
            np.ones_like(ids),
            tokens=model.config.tokens_per_image,
            images=images,
        )
        logits, _ = jax.jit(Llava.prefill)(model, batch)
        for image in range(len(images)):
            expected = case[f"b.infer.{variant}.{image}.last_logits"][0]
            assert_near(logits[image], expected, tolerance=1e-4)


def test_a_permutation_of_the_patches_permutes_what_is_kept() -> None:
    scores = jnp.asarray(np.random.default_rng(0).random((1, 16)), jnp.float32)
    order = np.random.default_rng(1).permutation(16)
    system = PruMerge(ratio=0.25)
    kept, moved = select(system, scores), select(system, scores[:, order])
    np.testing.assert_array_equal(order[np.asarray(moved.index)], kept.index)


def test_everything_without_neighbors_is_the_image() -> None:
    """In raster order; the sum of the dropped is zero then."""
    rng = np.random.default_rng(0)
    x, scores = rng.standard_normal((2, 16, 3)).astype(np.float32), rng.random((2, 16))
    system = PruMerge(ratio=1.0, neighbors=0, order="raster")
    kept = select(system, jnp.asarray(scores, jnp.float32))
    tokens = merge(jnp.asarray(x), jnp.asarray(x), jnp.asarray(scores), kept, neighbors=0)
    np.testing.assert_array_equal(tokens[:, :16], x)
    np.testing.assert_array_equal(tokens[:, 16:], 0)


def test_nothing_kept_is_the_sum_of_all() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 16, 3)), jnp.float32)
    scores = jnp.asarray(rng.random((1, 16)), jnp.float32)
    kept = select(PruMerge(neighbors=0), scores, counts=jnp.array([0]))
    assert not kept.valid.any()
    tokens = merge(x, x, scores, kept, neighbors=0)
    np.testing.assert_allclose(tokens[0, -1], (scores[0, :, None] * x[0]).sum(0), atol=1e-5)


@pytest.mark.parametrize("plus", [False, True])
def test_a_fixed_count_is_the_same_as_counted(plus: bool) -> None:
    """Slots beyond the count have no influence on the tokens of the others."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((1, 64, 5)), jnp.float32)
    scores = jnp.asarray(rng.random((1, 64)) ** 8, jnp.float32)
    counted = select(PruMerge(plus=plus), scores, counts=jnp.array([8]))
    valid = np.asarray(counted.valid[0])
    alone = Kept(index=counted.index[:, valid], valid=counted.valid[:, valid], full=True)
    tokens = merge(x, x, scores, counted, neighbors=7)[0][np.append(valid, True)]
    np.testing.assert_allclose(tokens, merge(x, x, scores, alone, neighbors=7)[0], atol=1e-6)


def test_without_repeats_a_patch_is_kept_once() -> None:
    scores = jnp.asarray(np.random.default_rng(0).random((3, 64)), jnp.float32)
    system = PruMerge(plus=True, ratio=1 / 8, repeats=False)
    kept = select(system, scores)
    for index, valid in zip(np.asarray(kept.index), np.asarray(kept.valid), strict=True):
        assert len(set(index[valid])) == valid.sum()
        assert set(system.places(64)) <= set(index[valid])
    ascending = select(dataclasses.replace(system, order="raster"), scores)
    for index, valid in zip(np.asarray(ascending.index), np.asarray(ascending.valid), strict=True):
        assert (np.diff(index[valid]) > 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"plus": True, "ratio": 1 / 2}, "PruMerge\\+ needs as many of both: try 1/3, 1/4"),
        ({"plus": True, "ratio": 0.3}, "PruMerge\\+ needs as many of both"),
        ({"ratio": 1 / 1000}, "keeps none of 576 patches"),
        ({"neighbors": 576}, "neighbors is 576; an image has 576 patches"),
        ({"ratio": 0.0}, "ratio is 0.0; give more than 0, at most 1"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"taps": (24,)}, "tap 24 is the tower's last"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlavaConfig(
            vision=VisionConfig.clip_l_336(), text=TextConfig.tiny(), system=PruMerge(**fields)
        )


def test_positions_skip_empty_slots() -> None:
    """Two images in each of two segments of a packed row, by hand."""
    slots = jnp.array([[-1, 0, 1, 2, -1, -1, 3, 4, 5, -1]])
    batch = Batch(
        ids=jnp.zeros((1, 10), jnp.int32),
        labels=jnp.zeros((1, 10), jnp.int32),
        positions=jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]),
        segments=jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2]]),
        image_slots=slots,
        pixels=jnp.zeros((1, 2, 4, 4, 3)),
    )
    valid = jnp.array([[False, True, True, False, False, True]])
    marks = marks_of(batch, valid, tokens_per_image=3)
    assert marks.image.tolist() == [[-1, 0, 0, 0, -1, -1, 1, 1, 1, -1]]
    assert marks.segment.tolist() == [[1, 0, 1, 1, 1, 2, 0, 0, 2, 2]]
    seen = np.asarray(marks.position)[np.asarray(marks.segment) > 0]
    assert seen.tolist() == [0, 1, 2, 3, 0, 1, 2]


def test_an_image_has_its_own_count() -> None:
    """Beside another image or alone, the logits are the same."""
    vision, text = VisionConfig.tiny(), TextConfig.tiny()
    system = dataclasses.replace(PruMerge.for_model(vision=vision, text=text), neighbors=3)
    model = build(LlavaConfig(vision=vision, text=text, system=system), seed=5)
    batch = batch_of(model.config, rows=3)
    alone = jax.tree.map(lambda array: array[1:2], batch)
    run = jax.jit(Llava.__call__)
    np.testing.assert_allclose(run(model, batch)[1], run(model, alone)[0], rtol=0, atol=1e-5)


def test_a_plain_llava_answers_as_prumerge(reference: Path, tmp_path: Path) -> None:
    """Without training, from a PyTorch directory whose config.json says nothing of it."""
    native, published = tmp_path / "native", tmp_path / "llava"
    tower = reference / "clip"
    import_checkpoint(reference / "vicuna", native, vision_tower=tower, system="llava")
    export_checkpoint(native, published, layout="llava")
    plain = stf_jax.load(published)
    fixed = PruMerge(
        taps=plain.config.system.taps,
        projector_width=plain.config.system.projector_width,
        neighbors=3,
        ratio=0.25,
    )
    merged = stf_jax.load(published, system=fixed)
    patches = plain.config.vision.patches
    assert plain.config.tokens_per_image == patches
    assert merged.config.tokens_per_image == patches // 4 + 1
    question = [stf_jax.Request(prompt="What is it?", images=Image.new("RGB", (9, 9), "red"))]
    (answer,) = merged.generate(question, max_new_tokens=2)
    assert len(answer.token_ids) == 2
    assert stf_jax.load(published, system="prumerge").config.system.neighbors == patches - 1
    with pytest.raises(CheckpointError, match="neighbors is 32; an image has 16 patches"):
        stf_jax.load(published, system=dataclasses.replace(fixed, neighbors=32))
    assert isinstance(stf_jax.load(published, system="random").config.system, Random)
