"""What holds for every system, whatever its paper; a new one is tested as soon as it is listed."""

import ast
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stf_jax
from stf_jax.convert.infer import infer_system, system_keys
from stf_jax.convert.mapping import connector_entries, own_entries, table
from stf_jax.data.batch import Batch
from stf_jax.models.cache import Stored
from stf_jax.models.llava import Llava
from stf_jax.store.arrays import flatten
from stf_jax.systems import SYSTEMS, config_from_dict, named_config
from stf_jax.systems.base import LlavaConfig
from tests.stf_jax.systems.conftest import TEXT, VISION, batch_of, build, config_of
from tests.switch import ALL

PACKAGE = Path(stf_jax.__file__).parent


# Compiled, as users run them: one operation after the other takes several times as long.
prefill, extend = jax.jit(Llava.prefill), jax.jit(Llava.extend)
# In `cut_of` the last tokens are missing, which the cache then has room for.
LATER, ROOM = 3, 5


@jax.jit
def forward(model: Llava, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An image's tokens, the segments of all positions, and logits: one program for all tests."""
    return model.encode(batch).values, model.insert(batch)[1].segment, model(batch)


def logits_of(model: Llava, batch: Batch) -> np.ndarray:
    return np.asarray(forward(model, batch)[2])


def padded(config: LlavaConfig) -> Batch:
    """The batch of most tests, so that they share a program."""
    return batch_of(config, padding=5)


def cut_of(batch: Batch) -> Batch:
    """The same rows without their last tokens."""
    cut = jax.tree.map(lambda array: array[:, : batch.ids.shape[1] - LATER], batch)
    return dataclasses.replace(cut, pixels=batch.pixels)


def test_as_many_tokens_as_it_says(system_model: Llava) -> None:
    config = system_model.config
    tokens, _, _ = forward(system_model, padded(config))
    assert tokens.shape == (2, config.tokens_per_image, config.text.width)
    assert np.isfinite(tokens).all()


def test_neighbors_change_nothing(system_model: Llava) -> None:
    """A row's logits are its own: another row's image does not reach them."""
    batch = padded(system_model.config)
    other = dataclasses.replace(batch, pixels=batch.pixels.at[1].multiply(-3.0))
    first, second = logits_of(system_model, batch), logits_of(system_model, other)
    np.testing.assert_allclose(first[0], second[0], rtol=0, atol=1e-6)
    assert np.abs(first[1] - second[1]).max() > 1e-3


# Of each kind one; of the others the next test compares the last positions.
PADDED = SYSTEMS if ALL else ("stf", "quecc", "voco", "pmod", "pyramiddrop")


@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing(name: str) -> None:
    model = build(config_of(name))
    _, segments, expected = jax.device_get(forward(model, batch_of(model.config)))
    logits, real = logits_of(model, padded(model.config))[:, : expected.shape[1]], segments > 0
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=1e-5)


def test_prefill_and_decode_are_the_forward_pass(system_model: Llava) -> None:
    """The last tokens one by one against the cache; the forward pass has padding behind them."""
    whole = batch_of(system_model.config)
    length = whole.ids.shape[1]
    expected = logits_of(system_model, padded(system_model.config))
    logits, cache = prefill(system_model, cut_of(whole))
    np.testing.assert_allclose(logits, expected[:, length - LATER - 1], rtol=0, atol=1e-4)
    cache = cache.grow(ROOM)
    for position in range(length - LATER, length):
        logits, cache = extend(
            system_model,
            whole.ids[:, position : position + 1],
            start=jnp.full(2, position, jnp.int32),
            lengths=jnp.ones(2, jnp.int32),
            cache=cache,
        )
        np.testing.assert_allclose(logits, expected[:, position], rtol=0, atol=1e-4)


def test_empty_slots_are_not_seen(system_model: Llava) -> None:
    """What stands in slots that carry no marks reaches nothing."""
    batch = cut_of(batch_of(system_model.config))
    _, cache = prefill(system_model, batch)
    cache = cache.grow(ROOM)

    def spoil(layers: tuple[Stored, ...]) -> tuple[Stored, ...]:
        empty = [cache.groups[group].marks.segment == 0 for group in cache.layer_groups]
        return tuple(
            jnp.where(hidden[:, None, :, None], 7.0, layer)
            for hidden, layer in zip(empty, layers, strict=True)
        )

    spoiled = dataclasses.replace(cache, keys=spoil(cache.keys), values=spoil(cache.values))
    start = jnp.full(2, batch.ids.shape[1], jnp.int32)
    steps = [
        extend(
            system_model, batch.ids[:, :1], start=start, lengths=jnp.ones(2, jnp.int32), cache=one
        )[0]
        for one in (cache, spoiled)
    ]
    np.testing.assert_array_equal(*steps)


def test_every_parameter_has_a_tensor(system_model: Llava) -> None:
    """The table of weights is the model, name by name and shape by shape."""
    parameters = flatten(nnx.to_pure_dict(nnx.state(system_model, nnx.Param)))
    entries = {entry.native: entry.native_shape for entry in table(system_model.config)}
    assert entries == {path: leaf.shape for path, leaf in parameters.items()}


def test_weights_come_back(system_model: Llava) -> None:
    """To PyTorch's layout and back, to the bit."""
    parameters = flatten(nnx.to_pure_dict(nnx.state(system_model, nnx.Param)))
    for entry in connector_entries(system_model.config):
        array = np.asarray(parameters[entry.native])
        tensor = entry.transform.torch(array)
        assert tensor.shape == entry.shape
        np.testing.assert_array_equal(entry.transform.native(tensor), array)


def test_config_comes_back(system_model: Llava) -> None:
    """From a dictionary, and from what an export writes into config.json."""
    config = system_model.config
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    shapes = {name: e.shape for e in own_entries(config) for name in e.tensors}
    keys = json.loads(json.dumps(system_keys(config)))
    assert infer_system(shapes, keys, config.vision, config.text) == config.system


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("size", ["7b", "13b"])
def test_published_sizes(name: str, size: str) -> None:
    config = named_config(f"{SYSTEMS[name].family}_{size}")
    assert config.system.name == name
    # One more may end an image.
    assert 0 < config.tokens_per_image <= config.vision.patches + 1
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_nothing_outside_tests_a_name() -> None:
    """A system's name is compared with nothing but in `systems/`: what differs is a method."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if path.parent == PACKAGE / "systems":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Compare | ast.MatchValue):
                continue
            named = [
                child.value
                for child in ast.walk(node)
                if isinstance(child, ast.Constant) and child.value in SYSTEMS
            ]
            about = ast.unparse(node)
            if named and ("system" in about or "name" in about):
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {about}")
    assert not wrong


# What makes a system keep everything, where its paper says that LLaVA-1.5 remains.
EVERYTHING: dict[str, dict[str, object]] = {
    "average": {"window": 1},
    "random": {"keep": VISION.patches},
    "downsample": {"side": VISION.image_size},
    "m3": {},
    "fastv": {"keep": VISION.patches},
    "pyramiddrop": {"ratios": (1.0,)},
    "gsearch": {"schedule": (VISION.patches,) * TEXT.layers},
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_everything_kept_is_llava(name: str) -> None:
    """The same weights give the same logits."""
    plain = build(config_of("llava"))
    system = dataclasses.replace(config_of(name).system, **EVERYTHING[name])
    model = build(dataclasses.replace(plain.config, system=system))
    nnx.update(model, nnx.state(plain))
    batch = padded(plain.config)
    assert model.config.tokens_per_image == plain.config.tokens_per_image
    np.testing.assert_allclose(logits_of(model, batch), logits_of(plain, batch), rtol=0, atol=1e-6)
