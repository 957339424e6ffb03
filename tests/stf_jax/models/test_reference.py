"""The tensors that the PyTorch reference computed: every stage of the model, loss and gradients."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from stf_jax.convert.mapping import table
from stf_jax.data.batch import Batch
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import ShardingRules, make_mesh
from stf_jax.store.arrays import flatten, unflatten
from tests.switch import ALL

pytestmark = pytest.mark.portable

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tensors(reference: Path) -> Tensors:
    return load_file(reference / "tensors.safetensors")


@dataclasses.dataclass(frozen=True)
class Loaded:
    model: Llava
    batch: Batch


MESHES = {"one device": None, "fsdp 2 x tensor 4": {"fsdp": 2, "tensor": 4}}
if ALL:
    MESHES["fsdp 8"] = {"fsdp": 8}


@pytest.fixture(scope="module", params=MESHES)
def loaded(request: pytest.FixtureRequest, source, weights, reference_batch):
    """The reference's model and batch, on one device or spread over a mesh."""
    axes, batch = MESHES[request.param], reference_batch(multiple=8)
    if axes is None:
        model = Llava.abstract(source.config)
        nnx.update(model, unflatten(jax.tree.map(jnp.asarray, weights)))
        yield Loaded(model, jax.tree.map(jnp.asarray, batch))
        return
    rules = ShardingRules.default()
    with jax.set_mesh(make_mesh(**axes)):
        model = Llava.abstract(source.config, rules=rules)
        like = flatten(nnx.to_pure_dict(nnx.state(model)))
        placed = {path: jax.device_put(weights[path], like[path].sharding) for path in like}
        nnx.update(model, unflatten(placed))
        yield Loaded(model, jax.device_put(batch, rules.tokens))


def tile(array: np.ndarray, multiple: int = 8) -> np.ndarray:
    """Its rows again and again, up to a number that every mesh divides."""
    return np.resize(array, (-(-len(array) // multiple) * multiple, *array.shape[1:]))


def close(actual: jax.Array, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


def test_mbtf(loaded: Loaded, tensors: Tensors):
    model, concatenated = loaded.model, tensors["mbtf.input"]
    count = concatenated.shape[-1] // model.config.vision.width
    taps = [
        jax.device_put(tile(tap), model.rules.tokens)
        for tap in np.split(concatenated, count, axis=-1)
    ]
    mixed = np.asarray(model.connector.mbtf.mix(tuple(taps)))
    close(mixed[: len(concatenated)], tensors["mbtf.output"], 1e-5)


def test_tower_and_connector(loaded: Loaded, tensors: Tensors):
    model = loaded.model
    images = len(tensors["pixel_values.pad"])
    pixels = tile(tensors["pixel_values.pad"].transpose(0, 2, 3, 1))
    pixels = jax.device_put(pixels, model.rules.tokens)
    features = model.vision(pixels)
    concatenated = np.concatenate([np.asarray(tap) for tap in features.taps], axis=-1)
    close(concatenated[:images], tensors["mbtf.input"], 1e-5)
    fused = model.connector.reduce(features)
    channels = model.config.vision.width
    window = fused.shape[-1] // channels
    # Ours is (row, column, channel); the published order is (channel, row, column).
    parts = np.asarray(fused).reshape(len(pixels), -1, window, channels)
    published = parts.swapaxes(2, 3).reshape(fused.shape)
    close(published[:images], tensors["stf.fused_input"], 1e-5)
    tokens = model.connector(features).values
    close(np.asarray(tokens)[:images], tensors["stf.output"], 1e-5)


def test_insert(loaded: Loaded, tensors: Tensors):
    real = tensors["spliced.attention_mask"] > 0
    spliced = np.asarray(loaded.model.insert(loaded.batch)[0])[: len(real)]
    close(spliced[real], tensors["spliced.embeds"][real], 1e-5)


def test_logits(loaded: Loaded, tensors: Tensors):
    real = tensors["spliced.attention_mask"] > 0
    logits = np.asarray(jax.jit(lambda model, batch: model(batch))(loaded.model, loaded.batch))
    assert logits.dtype == np.float32
    close(logits[: len(real)][real], tensors["logits"][real], 1e-4)


def test_loss_and_gradients(loaded: Loaded, source, tensors: Tensors, compiler_options):
    graph, parameters = nnx.split(loaded.model)
    length = loaded.batch.ids.shape[1]

    def mean_loss(parameters: nnx.State, batch: Batch):
        # Three chunks, the last one shorter.
        total, count = nnx.merge(graph, parameters).loss(batch, chunk=length // 3 + 1)
        return total / count

    gradient_of = jax.jit(jax.value_and_grad(mean_loss), compiler_options=compiler_options)
    loss, gradients = gradient_of(parameters, loaded.batch)
    close(loss, tensors["loss"][0], 1e-5)
    actual = flatten(nnx.to_pure_dict(gradients))
    wanted = {
        name.removeprefix("grad.").replace("model.mm_", "mm_"): gradient
        for name, gradient in tensors.items()
        if name.startswith("grad.")
    }
    compared = 0
    for entry in table(source.config, vocabulary=source.vocabulary):
        gradient = np.asarray(actual[entry.native])
        if entry.native.startswith("vision/"):
            assert not gradient.any(), f"a gradient entered the frozen tower at {entry.native}"
            continue
        for layer, name in enumerate(entry.tensors):
            ours = gradient if entry.layers is None else gradient[layer]
            theirs = wanted[name]
            back = entry.transform.torch(ours)
            assert back.shape == theirs.shape
            # Elements that cancel to nearly nothing are measured against the largest one.
            tiny = 1e-6 * np.abs(theirs).max()
            np.testing.assert_allclose(back, theirs, rtol=1e-4, atol=tiny, err_msg=name)
            compared += 1
    assert compared == len(wanted)
