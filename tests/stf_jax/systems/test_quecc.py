"""QueCC against what its released code computed, and by hand."""

import dataclasses
from functools import partial

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
from stf_jax.data.conversation import render_prompt
from stf_jax.data.question import encode_question, find_question
from stf_jax.data.templates import get_template
from stf_jax.data.tokenizer import Tokenizer, encode_prompt, load_tokenizer
from stf_jax.infer.prompts import make_prompt
from stf_jax.models.llava import Llava
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.quecc import QueCC, QueCCConnector
from tests.conftest import REFERENCE
from tests.stf_jax.systems.reference import Case, assert_near, find_case, insert_images


@pytest.fixture(scope="module")
def reference_case() -> Case:
    return find_case("quecc")


@pytest.fixture(scope="module")
def model(reference_case: Case) -> Llava:
    case = reference_case
    return case.model(system_of(case, case.hyper["end_to_end_stride"]))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(REFERENCE / "vicuna")


def system_of(case: Case, stride: int) -> QueCC:
    return QueCC(
        taps=tuple(case.hyper["taps"]),
        stride=stride,
        heads=case.json["sizes"]["heads"],
        projector_width=case.text.width,
        question_length=case["mid.query_ids"].shape[1],
    )


def make_batch(case: Case, tokens: int) -> Batch:
    batch = insert_images(
        case["in.input_ids"],
        case["in.labels"],
        case["in.attention_mask"],
        tokens=tokens,
        images=case["in.images"],
    )
    lengths = case["mid.query_mask"].sum(axis=1)
    assert batch.pixels.shape[1] == 1
    return dataclasses.replace(
        batch,
        questions=jnp.asarray(case["mid.query_ids"])[:, None],
        question_lengths=jnp.asarray(lengths, jnp.int32)[:, None],
    )


def test_reference_questions(reference_case: Case, tokenizer: Tokenizer) -> None:
    """Every prompt of the reference: its text, and the ids of the batch's."""
    for case in reference_case.json["query_cases"]:
        ids = encode_prompt(tokenizer, case["prompt"])
        assert {find_question(tokenizer, ids)} == set(case["texts"]), case
    rows = zip(
        reference_case.json["talks"],
        reference_case["mid.query_ids"],
        reference_case["mid.query_mask"],
        strict=True,
    )
    for talk, expected, mask in rows:
        ids = encode_prompt(tokenizer, talk["prompt"])
        question = encode_question(tokenizer, ids, length=len(expected))
        assert question.tolist() == expected[mask > 0].tolist()


def test_reference_question_embedding(reference_case: Case, model: Llava) -> None:
    case = reference_case
    batch = make_batch(case, model.config.tokens_per_image)
    embed = jax.jit(lambda model, batch: model._read_questions(batch))
    assert_near(embed(model, batch), case["mid.query_embedding"], tolerance=1e-5)
    projected = jax.jit(lambda model, text: model.connector.text(text))
    found = projected(model, jnp.asarray(case["mid.query_embedding"]))
    assert_near(found, case["mid.text_projected"], tolerance=1e-5)
    # An embedding that the norm almost cancels: only there does its epsilon show.
    probe = projected(model, jnp.asarray(case["probe.eps.text"])[None])
    assert_near(probe[0], case["probe.eps.text_projected"], tolerance=2e-4)


def test_reference_module_at_every_stride(reference_case: Case, model: Llava) -> None:
    case = reference_case
    multi = jnp.asarray(case["mid.x_multi"])
    taps = tuple(jnp.split(multi, len(case.hyper["taps"]), axis=-1))
    text = jnp.asarray(case["mid.text_projected"])
    keys, values = (part(multi[:1])[0] for part in (model.connector.key, model.connector.value))
    assert_near(keys, case["mid.k0"], tolerance=1e-5)
    assert_near(values, case["mid.v0"], tolerance=1e-5)

    @partial(jax.jit, static_argnames="stride")
    def run(connector: QueCCConnector, stride: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        connector.stride = stride
        windows = connector.windows
        queries = connector.window(windows(connector.query(taps[-1] + text[:, None])))
        attention = connector.attention
        query, key = (
            jnp.einsum("...c,cnd->...nd", x, attention.kernel[...][:, part])
            + attention.bias[...][part]
            for part, x in enumerate((queries, windows(connector.key(multi))))
        )
        weights = attention.weigh(query, key).mean(axis=2)
        return queries, weights, connector.compress(taps, text)

    for stride in case.hyper["strides"]:
        connector = nnx.clone(model.connector)
        if f"module.{stride}.q_downsample.weight" in case.tensors:
            entries = {
                entry.native: entry
                for entry in connector_entries(case.config(system_of(case, stride)))
            }
            for name in ("weight", "bias"):
                native = f"connector/window/{'kernel' if name == 'weight' else 'bias'}"
                tensor = case[f"module.{stride}.q_downsample.{name}"]
                leaf = nnx.Param(jnp.asarray(entries[native].transform.native(tensor)))
                setattr(connector.window, native.rpartition("/")[2], leaf)
        queries, weights, out = run(connector, stride)
        if f"module.{stride}.queries" in case.tensors:
            assert_near(queries, case[f"module.{stride}.queries"], tolerance=1e-5)
        assert_near(weights, case[f"module.{stride}.attention"], tolerance=1e-5)
        assert_near(out, case[f"module.{stride}.out"], tolerance=1e-5)


def test_reference_logits_loss_and_gradients(reference_case: Case, model: Llava) -> None:
    case = reference_case
    batch = make_batch(case, model.config.tokens_per_image)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State) -> tuple[jax.Array, ...]:
        model = nnx.merge(graph, state)

        def mean(state: nnx.State) -> jax.Array:
            total, count = nnx.merge(graph, state).loss(batch)
            return total / count

        tokens, embeds = model.encode(batch).values, model.insert(batch)[0]
        return tokens, embeds, model(batch), *jax.value_and_grad(mean)(state)

    tokens, embeds, logits, loss, gradient = run(state)
    np.testing.assert_array_equal(batch.labels, case["mid.labels"])
    assert_near(tokens, case["mid.projected"], tolerance=1e-5)
    real = case["mid.attention_mask"] > 0
    assert_near(np.asarray(embeds)[real], case["mid.embeds"][real], tolerance=1e-5)
    rows, positions = case["out.logits_at"].T
    assert_near(np.asarray(logits)[rows, positions], case["out.logits"], tolerance=1e-4)
    assert_near(loss, case["out.loss"][0], tolerance=1e-5)
    case.check_gradients(model, gradient, prefix="grad.")
    found = case.gradients(model, gradient)
    for name, expected in case.group("grad_rownorm.").items():
        assert_near(np.linalg.norm(found[name], axis=1), expected, tolerance=1e-5)


def test_one_patch_a_window_reads_no_question() -> None:
    """Softmax over one key is 1: neither the image's queries nor the text have influence."""
    vision, text = VisionConfig.tiny(), TextConfig.tiny()
    system = dataclasses.replace(QueCC.for_model(vision=vision, text=text), stride=1)
    from tests.stf_jax.systems.conftest import build

    model = build(LlavaConfig(vision=vision, text=text, system=system))
    rng = np.random.default_rng(0)
    taps = tuple(
        jnp.asarray(rng.standard_normal((1, vision.patches, vision.width)), jnp.float32)
        for _ in system.taps
    )
    asked = [jnp.full((1, vision.width), value) for value in (0.0, 9.0)]
    first, second = (model.connector.compress(taps, text) for text in asked)
    np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("stride", [5, 7, 9])
def test_a_window_that_does_not_divide_is_refused(stride: int) -> None:
    """The released code computes something else there."""
    with pytest.raises(ValueError, match=f"window {stride} does not divide the tower's 24x24"):
        LlavaConfig(
            vision=VisionConfig.clip_l_336(),
            text=TextConfig.vicuna_7b(),
            system=QueCC(stride=stride),
        )


def test_published_shapes() -> None:
    """21 million parameters (paper), and the keys that its code writes."""
    vision, text = VisionConfig.clip_l_336(), TextConfig.vicuna_7b()
    config = LlavaConfig(vision=vision, text=text, system=QueCC())
    shapes = {name: e.shape for e in connector_entries(config) for name in e.tensors}
    compressor = {n: s for n, s in shapes.items() if n.startswith("mm_projector.0.")}
    assert round(sum(np.prod(s) for s in compressor.values()) / 1e6, 2) == 21.01
    assert shapes["mm_projector.0.clip_attn.in_proj_weight"] == (3072, 1024)
    assert shapes["mm_projector.0.k_proj.0.weight"] == (1024, 4096)
    assert shapes["mm_projector.0.text_projection.0.weight"] == (1024, 4096)
    keys = system_keys(config)
    assert keys["mm_vision_token_compression_type"] == "quecc"
    assert infer_system(shapes, keys, vision) == QueCC()


def test_a_template_without_an_end_of_the_question_is_refused(tokenizer: Tokenizer) -> None:
    pixels = np.zeros((1, 4, 4, 3), np.float32)
    for name in ("plain", "v0", "llava_llama_2"):
        text = render_prompt("<image>\nWhat?", template=get_template(name))
        with pytest.raises(ValueError, match=r"this model reads the question, .*take template v1$"):
            make_prompt(text, pixels, tokenizer=tokenizer, tokens_per_image=4, question_length=8)
    text = render_prompt("<image>\nWhat?", template=get_template("v1"))
    prompt = make_prompt(text, pixels, tokenizer=tokenizer, tokens_per_image=4, question_length=8)
    assert tokenizer.decode(prompt.question) == "What?"
