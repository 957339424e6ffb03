"""One device and eight give the same numbers, and every array lies where it is said to lie."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.engine import Engine
from stf_jax.infer.prompts import Prompt, pad_prompts
from stf_jax.infer.sampling import GREEDY, Sampling
from stf_jax.models.cache import KVCache
from stf_jax.models.layers import Init, Linear, stack
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import BATCH_AXES, ShardingRules, make_mesh
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.systems import tiny_config
from stf_jax.systems.average import Average
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.mesh import check_divisible
from stf_jax.systems.stf import STF, MBTFConfig
from tests.switch import ALL

Arrays = dict[str, np.ndarray]

LENGTH = 64  # of the batch

MESHES = {
    "fsdp 8": {"data": 1, "fsdp": 8, "tensor": 1},
    "fsdp 2 x tensor 4": {"data": 1, "fsdp": 2, "tensor": 4},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}

TINY = tiny_config()
CONFIGS = {
    "untied": TINY,
    "tied, padded": dataclasses.replace(
        TINY,
        text=dataclasses.replace(TINY.text, vocab_size=597, vocab_padding=3, tie_embeddings=True),
    ),
}

QKV_KERNELS = [f"vision/layers/attention/{name}/kernel" for name in ("query", "key", "value")]
QKV_BIASES = [f"vision/layers/attention/{name}/bias" for name in ("query", "key", "value")]

# Where each parameter of `TINY` lies: its shape and, axis by axis, what splits it.
LAYOUT: dict[str, tuple[tuple[int, str], ...]] = {
    "vision/patch_embedding/kernel": ((588, ""), (32, "")),
    "vision/class_embedding": ((32, ""),),
    "vision/position_embedding": ((17, ""), (32, "")),
    "vision/pre_norm/scale": ((32, ""),),
    "vision/pre_norm/bias": ((32, ""),),
    "vision/layers/attention_norm/scale": ((3, ""), (32, "")),
    "vision/layers/attention_norm/bias": ((3, ""), (32, "")),
    "vision/layers/mlp_norm/scale": ((3, ""), (32, "")),
    "vision/layers/mlp_norm/bias": ((3, ""), (32, "")),
    **dict.fromkeys(QKV_KERNELS, ((3, ""), (32, "fsdp"), (4, "tensor"), (8, ""))),
    **dict.fromkeys(QKV_BIASES, ((3, ""), (4, "tensor"), (8, ""))),
    "vision/layers/attention/output/kernel": ((3, ""), (4, "tensor"), (8, ""), (32, "fsdp")),
    "vision/layers/attention/output/bias": ((3, ""), (32, "")),
    "vision/layers/mlp/linear_1/kernel": ((3, ""), (32, "fsdp"), (64, "tensor")),
    "vision/layers/mlp/linear_1/bias": ((3, ""), (64, "tensor")),
    "vision/layers/mlp/linear_2/kernel": ((3, ""), (64, "tensor"), (32, "fsdp")),
    "vision/layers/mlp/linear_2/bias": ((3, ""), (32, "")),
    "connector/mbtf/linear_1/kernel": ((64, "fsdp"), (128, "tensor")),
    "connector/mbtf/linear_1/bias": ((128, "tensor"),),
    "connector/mbtf/linear_2/kernel": ((128, "tensor"), (32, "fsdp")),
    "connector/mbtf/linear_2/bias": ((32, ""),),
    "connector/projector/linear_1/kernel": ((128, "fsdp"), (512, "tensor")),
    "connector/projector/linear_1/bias": ((512, "tensor"),),
    "connector/projector/linear_2/kernel": ((512, "tensor"), (64, "fsdp")),
    "connector/projector/linear_2/bias": ((64, ""),),
    "text/embedding": ((600, "tensor"), (64, "fsdp")),
    "text/layers/attention_norm/scale": ((2, ""), (64, "")),
    "text/layers/mlp_norm/scale": ((2, ""), (64, "")),
    "text/layers/attention/query/kernel": ((2, ""), (64, "fsdp"), (8, "tensor"), (8, "")),
    "text/layers/attention/key/kernel": ((2, ""), (64, "fsdp"), (4, "tensor"), (8, "")),
    "text/layers/attention/value/kernel": ((2, ""), (64, "fsdp"), (4, "tensor"), (8, "")),
    "text/layers/attention/output/kernel": ((2, ""), (8, "tensor"), (8, ""), (64, "fsdp")),
    "text/layers/mlp/gate/kernel": ((2, ""), (64, "fsdp"), (112, "tensor")),
    "text/layers/mlp/up/kernel": ((2, ""), (64, "fsdp"), (112, "tensor")),
    "text/layers/mlp/down/kernel": ((2, ""), (112, "tensor"), (64, "fsdp")),
    "text/norm/scale": ((64, ""),),
    "text/head/kernel": ((64, "fsdp"), (600, "tensor")),
}


def weights_for(config: LlavaConfig) -> Arrays:
    """Weights with which logits differ and biases count."""
    rng = np.random.default_rng(0)
    shapes = flatten(nnx.to_pure_dict(nnx.state(Llava.abstract(config))))
    return {
        path: rng.normal(path.endswith("scale"), 0.12, leaf.shape).astype(np.float32)
        for path, leaf in shapes.items()
    }


def make_prompts(config: LlavaConfig) -> list[Prompt]:
    """Eleven rows, which no mesh divides, with none to two images."""
    rng, size, prompts = np.random.default_rng(1), config.vision.image_size, []
    for row in range(11):
        count = row % 3
        ids = rng.integers(3, 597, 5 + 4 * row)
        places = np.repeat(rng.integers(1, len(ids), count), config.tokens_per_image)
        prompts.append(
            Prompt(
                ids=np.insert(ids, places, IMAGE_TOKEN_ID).astype(np.int32),
                pixels=rng.standard_normal((count, size, size, 3), dtype=np.float32),
            )
        )
    return prompts


def make_batch(config: LlavaConfig) -> Batch:
    """Sixteen rows; every third position is supervised."""
    batch: Any = pad_prompts(make_prompts(config), rows=16, image_size=config.vision.image_size)
    supervised = (batch.image_slots < 0) & (batch.segments > 0) & (batch.positions % 3 == 0)
    return dataclasses.replace(batch, labels=np.where(supervised, batch.ids, -100))


def loss_and_gradients(model: Llava, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    graph, parameters = nnx.split(model)

    def mean(parameters: nnx.State, batch: Batch) -> jax.Array:
        total, count = nnx.merge(graph, parameters).loss(batch, chunk=24)
        return total / count

    loss, gradients = jax.jit(jax.value_and_grad(mean))(parameters, batch)
    return loss, flatten(nnx.to_pure_dict(gradients))


def generated(engine: Engine, sampling: Sampling) -> list[list[int]]:
    prompts = make_prompts(engine.config)
    answers: list[list[int]] = [[] for _ in prompts]

    def take(number: int, ids: np.ndarray) -> bool:
        answers[number] += ids.tolist()
        return True

    list(engine.run(prompts, slots=16, max_new_tokens=12, sampling=sampling, every=12, take=take))
    return answers


def loaded(config: LlavaConfig, weights: Arrays, rules: ShardingRules) -> Llava:
    model = Llava.abstract(config, rules=rules)
    like = flatten(nnx.to_pure_dict(nnx.state(model)))
    placed = {path: jax.device_put(weights[path], like[path].sharding) for path in like}
    nnx.update(model, unflatten(placed))
    return model


@dataclasses.dataclass(frozen=True)
class Expected:
    """What one device computes."""

    weights: Arrays
    batch: Batch
    logits: np.ndarray
    loss: float
    gradients: Arrays


@functools.cache
def expected_of(name: str) -> Expected:
    weights, batch = weights_for(CONFIGS[name]), make_batch(CONFIGS[name])
    model = loaded(CONFIGS[name], weights, ShardingRules.none())
    loss, gradients = loss_and_gradients(model, batch)
    return Expected(
        weights=weights,
        batch=batch,
        logits=np.asarray(jax.jit(Llava.__call__)(model, batch)),
        loss=float(loss),
        gradients=jax.tree.map(np.asarray, gradients),
    )


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """The same model and batch, spread over eight devices."""

    name: str
    axes: dict[str, int]
    mesh: jax.sharding.Mesh
    model: Llava
    batch: Batch

    @property
    def rows(self) -> int:
        return 16 // (self.axes["data"] * self.axes["fsdp"])

    def part(self, path: str) -> tuple[int, ...]:
        """The shape of one device's part of a parameter."""
        return tuple(size // self.axes.get(axis, 1) for size, axis in LAYOUT[path])


CASES = [
    ("untied", "fsdp 8"),
    ("untied", "data 2 x fsdp 2 x tensor 2"),
    ("tied, padded", "fsdp 2 x tensor 4"),
]
if ALL:
    CASES.append(("untied", "fsdp 2 x tensor 4"))


@pytest.fixture(params=CASES, ids=": ".join)
def on_mesh(request: pytest.FixtureRequest) -> Iterator[OnMesh]:
    name, axes = request.param
    expected, rules, mesh = expected_of(name), ShardingRules.default(), make_mesh(**MESHES[axes])
    with jax.set_mesh(mesh):
        model = loaded(CONFIGS[name], expected.weights, rules)
        batch = jax.device_put(expected.batch, rules.tokens)
        yield OnMesh(name, MESHES[axes], mesh, model, batch)


def assert_shards(array: jax.Array, shape: tuple[int, ...], name: str = "") -> None:
    """Every device holds a part of this shape, and the parts make up the array."""
    assert len(array.addressable_shards) == 8, name
    assert {shard.data.shape for shard in array.addressable_shards} == {shape}, name
    parts = {str(shard.index) for shard in array.addressable_shards}
    assert len(parts) * np.prod(shape) == array.size, name


@pytest.mark.portable
def test_parameters_lie_as_laid_out(on_mesh: OnMesh) -> None:
    parameters = flatten(nnx.to_pure_dict(nnx.state(on_mesh.model)))
    tied = on_mesh.model.config.text.tie_embeddings
    assert parameters.keys() == LAYOUT.keys() - ({"text/head/kernel"} if tied else set())
    for path, array in parameters.items():
        assert array.shape == tuple(size for size, _ in LAYOUT[path]), path
        assert_shards(array, on_mesh.part(path), path)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_random_parameters_are_made_in_place(axes: dict[str, int]) -> None:
    """The same values as on one device, layer by layer, each part on its own device."""

    def kernel(rules: ShardingRules) -> jax.Array:
        def linear(init: Init) -> Linear:
            return Linear((64,), (8, 8), init=init, kernel=rules.column, use_bias=False)

        def made() -> jax.Array:
            return stack(linear, 3, init=Init(rngs=nnx.Rngs(7), rules=rules)).kernel[...]

        return jax.jit(made)()

    expected = np.asarray(kernel(ShardingRules.none()))
    assert len(np.unique(expected)) > 0.9 * expected.size
    with jax.set_mesh(make_mesh(**axes)):
        actual = kernel(ShardingRules.default())
    assert_shards(actual, (3, 64 // axes["fsdp"], 8 // axes["tensor"], 8))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.portable
def test_loss_and_gradients(on_mesh: OnMesh) -> None:
    expected = expected_of(on_mesh.name)
    loss, gradients = loss_and_gradients(on_mesh.model, on_mesh.batch)
    np.testing.assert_allclose(loss, expected.loss, rtol=1e-6)
    assert gradients.keys() == expected.gradients.keys()
    for path, gradient in gradients.items():
        # A gradient lies where its parameter does: it is scattered, not gathered.
        assert_shards(gradient, on_mesh.part(path), path)
        wanted = expected.gradients[path]
        largest = np.abs(wanted).max()
        assert (largest == 0) == path.startswith("vision/"), path
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-5 * largest, err_msg=path)


def test_logits_and_activations(on_mesh: OnMesh) -> None:
    seen = {}

    def forward(model: Llava, batch: Batch) -> dict[str, jax.Array]:
        images, (spliced, marks) = model.encode(batch).values, model.insert(batch)
        hidden = model.text(spliced, marks=marks)
        actual = {"images": images, "spliced": spliced, "hidden": hidden}
        actual["logits"] = model.text.logits(hidden)
        seen.update({name: jax.typeof(array).sharding.spec for name, array in actual.items()})
        return actual

    actual = jax.jit(forward)(on_mesh.model, on_mesh.batch)
    real = np.asarray(on_mesh.batch.segments) > 0
    logits = np.asarray(actual["logits"])
    np.testing.assert_allclose(
        logits[real], expected_of(on_mesh.name).logits[real], rtol=0, atol=2e-5
    )
    rows, width = on_mesh.rows, on_mesh.model.config.text.width
    assert_shards(actual["images"], (rows, 2 * on_mesh.model.config.tokens_per_image, width))
    assert_shards(actual["spliced"], (rows, LENGTH, width))
    assert_shards(actual["hidden"], (rows, LENGTH, width))
    assert_shards(actual["logits"], (rows, LENGTH, 600 // on_mesh.axes["tensor"]))
    # Known while tracing, too: an explicit mesh leaves nothing to the compiler's choice.
    for name, spec in seen.items():
        channels = "tensor" if name == "logits" else None
        assert tuple(spec) + (None,) * (3 - len(spec)) == (BATCH_AXES, None, channels), name


def test_cache(on_mesh: OnMesh) -> None:
    text, tensor = on_mesh.model.config.text, on_mesh.axes["tensor"]
    specs = []

    @jax.jit
    def prefill(model: Llava, batch: Batch) -> tuple[jax.Array, KVCache]:
        logits, cache = model.prefill(batch)
        cache = cache.grow(4)
        specs.extend(jax.typeof(array).sharding.spec for array in (*cache.keys, *cache.values))
        return logits, cache

    logits, cache = prefill(on_mesh.model, on_mesh.batch)
    assert len(specs) == 2 * text.layers
    assert {spec[:2] for spec in specs} == {(BATCH_AXES, "tensor")}
    for _ in range(2):
        assert_shards(logits, (on_mesh.rows, 600 // tensor))
        for array in (*cache.keys, *cache.values):
            part = (on_mesh.rows, text.kv_heads // tensor, LENGTH + 4, text.head_dim)
            assert_shards(array, part)
        at = jax.device_put(jnp.full(16, 60), on_mesh.model.rules.tokens)
        logits, cache = jax.jit(Llava.extend)(
            on_mesh.model, at[:, None], start=at, lengths=jnp.ones_like(at), cache=cache
        )


@functools.cache
def alone(name: str) -> Engine:
    return Engine(loaded(CONFIGS[name], expected_of(name).weights, ShardingRules.none()))


# Of one model the mesh of all three axes tells more than `fsdp 8`.
@pytest.mark.parametrize(("name", "axes"), CASES if ALL else CASES[1:])
def test_generated_tokens(name: str, axes: str) -> None:
    samplings = [GREEDY]
    if axes.startswith("data"):  # Once: it compiles everything anew.
        samplings.append(Sampling(temperature=0.8, top_k=50, top_p=0.9, seed=3))
    weights, mesh = expected_of(name).weights, make_mesh(**MESHES[axes])
    with jax.set_mesh(mesh):
        spread = Engine(loaded(CONFIGS[name], weights, ShardingRules.default()), mesh=mesh)
    for sampling in samplings:
        expected = generated(alone(name), sampling)
        assert len(set(itertools.chain(*expected))) > 20
        assert generated(spread, sampling) == expected


def test_wrong_number_of_devices() -> None:
    with pytest.raises(ValueError, match="data 2 x fsdp 3 x tensor 1 makes 6 devices; there are 8"):
        make_mesh(data=2, fsdp=3)


def test_every_offender_is_listed() -> None:
    config = LlavaConfig(
        vision=VisionConfig(image_size=56, width=30, mlp_width=63, layers=2, heads=3),
        text=TextConfig(
            vocab_size=601, width=62, mlp_width=111, layers=1, heads=6, kv_heads=2, head_dim=8
        ),
        system=STF(taps=(2, 1), mbtf=MBTFConfig(mlp_width=120), projector_width=480),
    )
    mesh = make_mesh(fsdp=2, tensor=4)
    with pytest.raises(ValueError, match="the mesh does not divide the model: ") as error:
        check_divisible(config, mesh)
    listed = str(error.value).partition(": ")[2].split(", ")
    assert listed == [
        "vocabulary (pad it on import) 601 by tensor 4",
        "text.heads 6 by tensor 4",
        "text.kv_heads 2 by tensor 4",
        "text.mlp_width 111 by tensor 4",
        "vision.heads 3 by tensor 4",
        "vision.mlp_width 63 by tensor 4",
    ]
    with pytest.raises(ValueError, match=r"text\.width 62 by fsdp 8"):
        check_divisible(config, make_mesh(fsdp=8))


@settings(derandomize=True, deadline=None, database=None, max_examples=25)
@given(
    axes=st.sampled_from([*MESHES.values(), {"data": 1, "fsdp": 4, "tensor": 2}]),
    changes=st.dictionaries(
        st.sampled_from(["vocab_size", "width", "mlp_width", "kv_heads", "vision", "projector"]),
        st.integers(1, 3),
        max_size=2,
    ),
)
def test_refused_exactly_when_it_does_not_divide(
    axes: dict[str, int], changes: dict[str, int]
) -> None:
    """What the check lets through can be laid out, and what it refuses cannot."""
    text = {
        "vocab_size": 600 + changes.get("vocab_size", 0),
        "width": 64 + changes.get("width", 0),
        "mlp_width": 112 + changes.get("mlp_width", 0),
        "kv_heads": 8 // 2 ** changes.get("kv_heads", 0),
    }
    config = LlavaConfig(
        vision=VisionConfig(
            image_size=56, width=32 + 4 * changes.get("vision", 0), mlp_width=64, layers=1, heads=4
        ),
        text=TextConfig(layers=1, heads=8, head_dim=8, **text),
        system=Average(taps=(1,), projector_width=64 + changes.get("projector", 0)),
    )
    mesh = make_mesh(**axes)
    try:
        check_divisible(config, mesh)
        fits = True
    except ValueError:
        fits = False
    outcome = contextlib.nullcontext() if fits else pytest.raises(ValueError, match="divi")
    with jax.set_mesh(mesh), outcome:
        Llava.abstract(config, rules=ShardingRules.default())
