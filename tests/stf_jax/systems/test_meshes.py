"""Every system on eight devices: the same loss, gradients and answers as on one.

The mesh that uses all axes is enough to see what a system's own operations do;
`STF_JAX_TEST_ALL=1` takes `fsdp 8` for every system, too, and prompts of those that end before the
language model begins: what a mesh does to their connectors, gradients show.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.engine import Engine
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import GREEDY
from stf_jax.infer.session import Session
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import BATCH_AXES, ShardingRules, make_mesh
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.systems import SYSTEMS
from tests.stf_jax.systems.conftest import batch_of, build, config_of, own_tokens
from tests.stf_jax.systems.test_engine import ask
from tests.switch import ALL

MESHES = {"data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2}, "fsdp 8": {"fsdp": 8}}
CASES = [
    (name, mesh) for mesh in MESHES for name in SYSTEMS if ALL or mesh != "fsdp 8" or name == "stf"
]
INSIDE = ("voco", "proxyv", "videollm_mod", "pmod", "fastv", "pyramiddrop", "gsearch")
PROMPTS = SYSTEMS if ALL else ("stf", *INSIDE)
Result = tuple[jax.Array | None, jax.Array, dict[str, jax.Array]]


def compute(model: Llava, batch: Batch) -> Result:
    """Logits after the prompt, where that is one of `PROMPTS`; loss, and gradients."""
    graph, state, keys = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(state: nnx.State, batch: Batch) -> tuple[jax.Array | None, jax.Array, nnx.State]:
        def mean(state: nnx.State) -> jax.Array:
            total, count = nnx.merge(graph, state, keys).loss(batch)
            return total / count

        logits = None
        if model.config.system.name in PROMPTS:
            logits, _ = nnx.merge(graph, state, keys).prefill(batch)
        return logits, *jax.value_and_grad(mean)(state)

    logits, loss, gradient = run(state, batch)
    return logits, loss, flatten(nnx.to_pure_dict(gradient))


@functools.cache
def alone(name: str) -> tuple[Llava, Batch, Result]:
    """On one device: the model, a batch, and what it computes."""
    config = config_of(name)
    model, batch = build(config, seed=1, training=True), batch_of(config, rows=8)
    batch = dataclasses.replace(batch, uniform=config.system.compacts)
    return model, batch, compute(model, batch)


def check_gradients(gradients: dict[str, jax.Array]) -> None:
    """Finite everywhere, not zero in the connector's weights, and none in the tower."""
    for path, leaf in gradients.items():
        assert np.isfinite(leaf).all(), path
        if path.startswith("vision/"):
            assert not np.any(leaf), path
        if path.startswith("connector/"):
            assert np.any(leaf), path


@pytest.mark.parametrize(("name", "axes"), CASES)
def test_gradients_reach_the_connector_and_a_mesh_changes_nothing(name: str, axes: str) -> None:
    model, batch, expected = alone(name)
    check_gradients(expected[2])
    weights = flatten(nnx.to_pure_dict(nnx.state(model)))
    mesh = make_mesh(**MESHES[axes])
    with jax.set_mesh(mesh):
        model = Llava.abstract(model.config, rules=ShardingRules.default(), training=True)
        like = flatten(nnx.to_pure_dict(nnx.state(model)))
        placed = {path: jax.device_put(weights[path], like[path].sharding) for path in like}
        nnx.update(model, unflatten(placed))
        rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        logits, loss, gradients = compute(model, jax.device_put(batch, rows))
    if expected[0] is not None:
        np.testing.assert_allclose(logits, expected[0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(loss, expected[1], rtol=1e-5)
    for path, gradient in gradients.items():
        wanted = np.asarray(expected[2][path])
        largest = max(float(np.abs(wanted).max()), 1e-4)
        np.testing.assert_allclose(
            np.asarray(gradient), wanted, rtol=0, atol=2e-5 * largest, err_msg=path
        )
        assert jnp.asarray(gradient).sharding.spec == like[path].sharding.spec, path


# Groups of layers with caches of several lengths, positions of their own, a compacted cache.
ANSWERING = ("pyramiddrop", "pmod", "voco") if ALL else ("pyramiddrop",)


@pytest.mark.parametrize("name", ANSWERING)
def test_a_mesh_gives_the_same_answers(name: str) -> None:
    """Of the engine, and of a chat over two turns."""
    config = config_of(name)
    rng = np.random.default_rng(0)
    side, tokens = config.image_size, config.tokens_per_image
    pixels = rng.standard_normal((1, side, side, 3)).astype(np.float32)
    image = [*np.full(tokens, IMAGE_TOKEN_ID), *own_tokens(config)]
    shown = [
        Prompt(
            ids=np.concatenate([[7, 8], image, rng.integers(3, 599, 4 + n)]).astype(np.int32),
            pixels=pixels,
            image_key=1,
            budget=tokens,
        )
        for n in range(3)
    ]
    plain = Prompt(ids=rng.integers(3, 599, 9).astype(np.int32), pixels=pixels[:0], budget=tokens)

    def answers(model: Llava, mesh: Mesh | None) -> list[list[int]]:
        engine = Engine(model, mesh=mesh)
        said = ask(engine, [*shown, plain], slots=4)
        session = Session(engine.program)

        def turn(ids: np.ndarray) -> list[int]:
            prompt = dataclasses.replace(shown[0], ids=ids)
            stream = session.stream(prompt, sampling=GREEDY, max_new_tokens=4, every=2)
            return np.concatenate(list(stream)).tolist()

        first = turn(shown[0].ids)
        later = np.concatenate([shown[0].ids, first, [9, 10, 11]]).astype(np.int32)
        return [said[number] for number in range(4)] + [first, turn(later)]

    one = build(config, seed=1)
    weights = flatten(nnx.to_pure_dict(nnx.state(one)))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        split = Llava.abstract(config, rules=ShardingRules.default())
        like = flatten(nnx.to_pure_dict(nnx.state(split)))
        placed = {path: jax.device_put(weights[path], like[path].sharding) for path in like}
        nnx.update(split, unflatten(placed))
    assert answers(split, mesh) == answers(one, None)
