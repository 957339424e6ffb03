"""VisToG: CLIP and GroupViT of transformers computed the reference; its properties by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert.infer import infer_system, system_keys
from stf_jax.convert.mapping import connector_entries, tower_entries
from stf_jax.models.clip import VisionTower
from stf_jax.models.connector import VisionFeatures
from stf_jax.models.layers import Init
from stf_jax.store.arrays import flatten
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.vistog import VisToG, VisToGConnector
from tests.stf_jax.systems.reference import Case, assert_near, fill, find_case


@dataclasses.dataclass(frozen=True)
class Parts:
    """Tower and connectors of the reference."""

    case: Case
    tower: VisionTower
    connectors: dict[str, VisToGConnector]
    names: dict[str, dict[str, str]]  # reference's name -> native path, by grouping

    @property
    def pixels(self) -> jax.Array:
        return jnp.asarray(self.case["pixel_values"].transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def reference_parts() -> Parts:
    case = find_case("vistog")
    sizes, hyper = case.json["sizes"], case.hyper
    vision = VisionConfig(
        image_size=sizes["image"],
        patch_size=sizes["patch"],
        width=sizes["channels"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        mlp_width=sizes["intermediate"],
        activation=hyper["clip_act"],
        norm_eps=hyper["layer_norm_eps"],
    )
    tap = vision.layers + 1 + hyper["select_layer"]
    text = dataclasses.replace(TextConfig.tiny(), width=sizes["llm_width"])
    tower = nnx.eval_shape(lambda: VisionTower(vision, taps=(tap,), init=Init(rngs=nnx.Rngs(0))))
    fill(tower, tower_entries(vision, layers=tap), case.group("w.clip."), at="vision/")
    shared = {"mm_grouping.semantic_tokens": case["w.semantic_tokens"]}
    shared |= {f"mm_projector.{k}": v for k, v in case.group("w.mm_projector.").items()}
    connectors, names = {}, {}
    for grouping, prefix in (("assign", "w.assign."), ("full", "w.full.")):
        system = VisToG(
            taps=(tap,),
            semantic_tokens=sizes["semantic_tokens"],
            projector_width=sizes["llm_width"],
            grouping=grouping,
            assign_eps=hyper["assign_eps"],
            temperature=hyper["gumbel_tau"],
        )
        ours = f"mm_grouping.{'assign.' if grouping == 'assign' else ''}"
        given = shared | {ours + name: tensor for name, tensor in case.group(prefix).items()}
        config = LlavaConfig(vision=vision, text=text, system=system)
        module = nnx.eval_shape(
            lambda s=system: s.connector(vision, text, init=Init(rngs=nnx.Rngs(0)))
        )
        entries = connector_entries(config)
        fill(module, entries, given, at="connector/")
        connectors[grouping] = module
        names[grouping] = {
            entry.torch.removeprefix("mm_grouping."): entry.native.removeprefix("connector/")
            for entry in entries
        }
    return Parts(case, tower, connectors, names)


@pytest.fixture(scope="module")
def features(reference_parts: Parts) -> VisionFeatures:
    parts = reference_parts
    run = jax.jit(lambda tower, pixels, extra: tower(pixels, extra))
    return run(parts.tower, parts.pixels, parts.connectors["assign"].extra_tokens())


def test_reference_tower(reference_parts: Parts, features: VisionFeatures) -> None:
    """The image's features are plain CLIP's to the bit; the semantic tokens saw everything."""
    parts = reference_parts
    allow, seen = parts.case["allow"], 1 + features.taps[0].shape[1]
    index = np.arange(len(allow))
    np.testing.assert_array_equal(allow, (index < seen) | (index[:, None] >= seen))
    plain = jax.jit(lambda tower, pixels: tower(pixels))(parts.tower, parts.pixels)
    assert_near(plain.taps[0], parts.case["plain.features"], tolerance=1e-5)
    assert_near(features.taps[0], parts.case["isolated.patches"], tolerance=1e-5)
    assert_near(features.extra, parts.case["isolated.semantic"], tolerance=1e-5)


def test_reference_groups(reference_parts: Parts, features: VisionFeatures) -> None:
    case, module = reference_parts.case, reference_parts.connectors["assign"]
    groups, (patches,) = features.extra, features.taps
    logits = module.assign.logits(groups, patches)
    assert_near(logits, case["eval.logits"], tolerance=1e-5)
    shares = np.asarray(module.assign.assign(logits, None))
    np.testing.assert_array_equal(shares.argmax(axis=1), case["eval.assignment"])
    np.testing.assert_array_equal(shares.sum(axis=2), case["eval.group_sizes"])
    assert_near(module.assign(groups, patches), case["eval.out"], tolerance=1e-5)
    assert_near(module.group(groups, patches), case["eval.tokens"], tolerance=1e-5)
    assert_near(module(features).values, case["eval.projected"], tolerance=1e-5)
    soft = jax.nn.softmax(logits, axis=1)
    assert_near(soft, case["eval.soft"], tolerance=1e-5)
    assert_near(module.assign.gather(soft, patches), case["soft.out"], tolerance=1e-5)


def test_reference_full_block(reference_parts: Parts, features: VisionFeatures) -> None:
    case, module = reference_parts.case, reference_parts.connectors["full"]
    groups, patches = module.block.before(features.extra, features.taps[0])
    assert_near(groups, case["eval.full.group_query"], tolerance=1e-5)
    logits = module.assign.logits(groups, patches)
    assert_near(jax.nn.softmax(logits, axis=1), case["eval.full.soft"], tolerance=1e-5)
    np.testing.assert_array_equal(logits.argmax(axis=1), case["eval.full.assignment"])
    tokens = module.group(features.extra, features.taps[0])
    assert_near(tokens, case["eval.full.tokens"], tolerance=1e-5)


@pytest.mark.parametrize("grouping", ["assign", "full"])
def test_reference_training(reference_parts: Parts, grouping: str) -> None:
    """With the given noise: through the frozen tower to the semantic tokens."""
    parts, case = reference_parts, reference_parts.case
    name = "train" if grouping == "assign" else "train.full"
    noise, target = jnp.asarray(case["train.gumbel"]), jnp.asarray(case["train.target"])
    graph, state = nnx.split(parts.connectors[grouping])

    @jax.jit
    def run(state: nnx.State) -> tuple[jax.Array, tuple[jax.Array, ...], nnx.State]:
        def loss(state: nnx.State) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            module = nnx.merge(graph, state)
            seen = parts.tower(parts.pixels, module.extra_tokens())
            groups, patches = seen.extra, seen.taps[0]
            tokens = module.group(groups, patches, noise)
            if module.block is not None:
                groups, patches = module.block.before(groups, patches)
            shares = module.assign.assign(module.assign.logits(groups, patches), noise)
            lost = jnp.square(module.project(tokens) - target).mean()
            return lost, (tokens, shares.argmax(axis=1))

        (lost, seen), gradient = jax.value_and_grad(loss, has_aux=True)(state)
        return lost, seen, gradient

    lost, (tokens, assignment), gradient = run(state)
    np.testing.assert_array_equal(assignment, case[f"{name}.assignment"])
    assert_near(tokens, case[f"{name}.tokens"], tolerance=1e-5)
    assert_near(lost, case[f"{name}.loss"], tolerance=1e-5)
    leaves = flatten(nnx.to_pure_dict(gradient))
    expected = case.group(f"{name}.grad.")
    if grouping == "assign":
        expected = {k: v for k, v in expected.items() if not k.startswith("full.")}
    assert expected
    for key, tensor in case.group(f"{name}.grad.").items():
        path = parts.names[grouping][key]
        found = np.asarray(leaves[path])
        assert_near(found.T if path.endswith("kernel") else found, tensor, tolerance=1e-5)


def test_identical_groups_leave_ties_to_the_first(reference_parts: Parts) -> None:
    module = reference_parts.connectors["assign"]
    count, width = module.semantic_tokens.shape
    groups = jnp.ones((1, count, width))
    patches = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, width)), jnp.float32)
    shares = module.assign.assign(module.assign.logits(groups, patches), None)
    assert shares.sum(axis=2).tolist() == [[9.0, *[0.0] * (count - 1)]]


def test_a_permutation_of_semantic_tokens_permutes_the_groups(
    reference_parts: Parts, features: VisionFeatures
) -> None:
    module = reference_parts.connectors["assign"]
    order = np.roll(np.arange(len(module.semantic_tokens)), 3)
    tokens = module.group(features.extra, features.taps[0])
    moved = module.group(features.extra[:, order], features.taps[0])
    np.testing.assert_allclose(moved, tokens[:, order], atol=1e-6)


@pytest.mark.parametrize("grouping", ["assign", "full"])
def test_the_weights_tell_the_grouping(grouping: str) -> None:
    vision, text = VisionConfig.clip_l_336(), TextConfig.vicuna_7b()
    system = VisToG(semantic_tokens=96, grouping=grouping)
    config = LlavaConfig(vision=vision, text=text, system=system)
    shapes = {name: e.shape for e in connector_entries(config) for name in e.tensors}
    assert system_keys(config) == {"mm_vision_select_layer": -2}
    assert infer_system(shapes, {"mm_vision_select_layer": -2}, vision) == system


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"semantic_tokens": 577}, "semantic_tokens is 577; an image has 576 patches"),
        ({"semantic_tokens": 0}, "semantic_tokens"),
        ({"temperature": 0.0}, "VisToG.temperature is 0.0; give more than 0"),
        ({"assign_eps": float("nan")}, "VisToG.assign_eps is nan; give more than 0"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlavaConfig(
            vision=VisionConfig.clip_l_336(), text=TextConfig.tiny(), system=VisToG(**fields)
        )
