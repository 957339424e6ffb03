"""M3 against what its released code computed, and by hand."""

import dataclasses

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
from stf_jax.models.llava import Llava
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.llava import Llava as Plain
from stf_jax.systems.m3 import M3, pool_to
from tests.stf_jax.systems.reference import Case, assert_near, find_case, insert_images


@pytest.fixture(scope="module")
def reference_case() -> Case:
    return find_case("m3")


@pytest.fixture(scope="module")
def model(reference_case: Case) -> Llava:
    case = reference_case
    return case.model(
        M3(
            taps=(case.tap,),
            projector_width=case.text.width,
            scales=tuple(case.hyper["scales"]),
        )
    )


def batch_at(case: Case, scale: int) -> Batch:
    batch = insert_images(
        case["in.input_ids"],
        case["in.labels"],
        case["in.attention_mask"],
        tokens=scale,
        images=case["in.images"],
    )
    return dataclasses.replace(batch, budget=scale)


def test_reference_pooling(reference_case: Case) -> None:
    projected = jnp.asarray(reference_case["mid.projected"])
    for scale in (*reference_case.hyper["pool_only"], *reference_case.hyper["scales"]):
        expected = reference_case.tensors.get(f"out.pooled.{scale}", projected)
        assert_near(pool_to(projected, scale), np.asarray(expected), tolerance=1e-6)
    # What the released code cuts off is refused.
    for name in reference_case.group("quirk.pooled."):
        with pytest.raises(ValueError, match=f"^{name} tokens are no grid of whole windows"):
            reference_case.config(M3(taps=(reference_case.tap,), scales=(int(name),)))


def test_reference_tower_and_projector(reference_case: Case, model: Llava) -> None:
    pixels = jnp.asarray(reference_case["in.images"].transpose(0, 2, 3, 1))
    features = jax.jit(lambda model, pixels: model.vision(pixels))(model, pixels)
    assert_near(features.taps[0], reference_case["mid.tower_features"], tolerance=1e-5)
    projected = jax.jit(lambda model, features: model.connector(features))(model, features).values
    assert_near(projected, reference_case["mid.projected"], tolerance=1e-5)


def test_reference_logits(reference_case: Case, model: Llava) -> None:
    """Of every scale, and what goes into the decoder."""

    @jax.jit
    def run(model: Llava, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return model.insert(batch)[0], model(batch)

    for scale in reference_case.hyper["scales"]:
        batch = batch_at(reference_case, scale)
        np.testing.assert_array_equal(batch.labels, reference_case[f"mid.labels.{scale}"])
        embeds, logits = run(model, batch)
        real = reference_case[f"mid.attention_mask.{scale}"] > 0
        if f"mid.embeds.{scale}" in reference_case.tensors:
            expected = reference_case[f"mid.embeds.{scale}"][real]
            assert_near(np.asarray(embeds)[real], expected, tolerance=1e-5)
        expected = reference_case[f"out.logits.{scale}"][real]
        assert_near(np.asarray(logits)[real], expected, tolerance=1e-4)


def test_reference_loss_and_gradients(reference_case: Case, model: Llava) -> None:
    """One pass of the tower over a batch that is laid out at the largest scale."""
    case, largest = reference_case, max(reference_case.hyper["scales"])
    batch = dataclasses.replace(batch_at(case, largest), budget=None)
    assert largest == model.config.vision.patches
    graph, state = nnx.split(model)

    @jax.jit
    def loss_of(state: nnx.State) -> tuple[jax.Array, nnx.State]:
        def mean(state: nnx.State) -> jax.Array:
            total, count = nnx.merge(graph, state).loss(batch)
            return total / count

        return jax.value_and_grad(mean)(state)

    loss, gradient = loss_of(state)
    assert_near(loss, case["out.loss"][0], tolerance=1e-5)
    case.check_gradients(model, gradient, prefix="grad.")
    for scale, expected in zip(case.hyper["scales"], case["out.loss_per_scale"], strict=True):
        one = case.model(dataclasses.replace(model.config.system, scales=(scale,)))
        total, count = jax.jit(Llava.loss)(one, batch)
        assert_near(total / count, expected, tolerance=1e-5)


def test_reference_tokens(reference_case: Case, model: Llava) -> None:
    """Greedy, each scale by prefill and decoding."""
    case = reference_case
    generated = {name: t for name, t in case.group("out.generated.").items()}
    start = 1 + int(np.flatnonzero(case["in.input_ids"][0] < 0)[0])
    for scale, expected in generated.items():
        tokens = int(scale)
        length = len(case["in.input_ids"][0][: _prompt_length(case)])
        ids = case["in.input_ids"][:1, :length]
        prompt = insert_images(
            ids,
            np.full_like(ids, -100),
            np.ones_like(ids),
            tokens=tokens,
            images=case["in.images"],
        )
        assert start <= length
        prompt = dataclasses.replace(prompt, budget=tokens)
        logits, cache = jax.jit(Llava.prefill)(model, prompt)
        cache = cache.grow(expected.shape[1])
        answer = []
        for step in range(expected.shape[1]):
            answer.append(int(logits[0].argmax()))
            logits, cache = jax.jit(Llava.extend)(
                model,
                jnp.array([[answer[-1]]]),
                start=jnp.array([prompt.ids.shape[1] + step]),
                lengths=jnp.array([1]),
                cache=cache,
            )
        assert answer == expected[0].tolist()


def _prompt_length(case: Case) -> int:
    """As `case.json` says in words: "... after in.input_ids[0,:9] with ..."."""
    return int(case.hyper["generated"].split("in.input_ids[0,:")[1].split("]")[0])


def test_everything_is_llava() -> None:
    """With as many tokens as patches nothing is averaged."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.standard_normal((2, 16, 3)), jnp.float32)
    np.testing.assert_array_equal(pool_to(tokens, 16), tokens)
    np.testing.assert_allclose(pool_to(pool_to(tokens, 4), 1), pool_to(tokens, 1), atol=1e-6)


@pytest.mark.parametrize("scale", [2, 8, 10, 25, 0, -1, 1024])
def test_a_scale_that_is_no_grid_is_refused(scale: int) -> None:
    vision, text = VisionConfig.clip_l_336(), TextConfig.tiny()
    with pytest.raises(ValueError, match="choose among 576, 144, 64, 36, 16, 9, 4, 1"):
        LlavaConfig(vision=vision, text=text, system=M3(scales=(576, scale)))


def test_the_published_config_is_known() -> None:
    """Its weights are LLaVA-1.5's; the key tells."""
    vision, text = VisionConfig.clip_l_336(), TextConfig.vicuna_7b()
    config = LlavaConfig(vision=vision, text=text, system=M3())
    shapes = {name: e.shape for e in connector_entries(config) for name in e.tensors}
    hf = {"mm_vision_select_layer": -2, "matryoshka_vis_token_scale": [576, 144, 36, 9, 1]}
    assert infer_system(shapes, hf, vision) == M3()
    assert system_keys(config) == hf
    more = hf | {"mm_system": {"projector_width": 4096}}
    assert infer_system(shapes, more, vision) == M3()
    other = hf | {"mm_system": {"name": "average"}}
    assert infer_system(shapes, other, vision).name == "average"
    del hf["matryoshka_vis_token_scale"]
    assert infer_system(shapes, hf, vision) == Plain()
