"""Weights become integers on import, and come back as the numbers that the model computes with."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from stf_jax.convert import export_checkpoint, import_checkpoint, inspect_checkpoint
from stf_jax.convert.quantize import quantize
from stf_jax.models.llava import Llava
from stf_jax.models.marks import Marks
from stf_jax.models.quantization import is_quantized
from stf_jax.parallel.sharding import ShardingRules, make_mesh
from stf_jax.store.checkpoint import open_native
from stf_jax.store.checksum import NO_MESH
from stf_jax.store.packing import pack, unpack, unpack_on_device
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.convert.refusal import refused

# The reference's language model is 64 wide: no group of 32 divides its 112 hidden channels.
SCHEMES = ("int8", "int4-8")
STEPS = {"int8": 127.5, "int4-8": 7.5}


@pytest.fixture(scope="session", params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    """Each of them."""
    return request.param


@pytest.fixture(scope="session")
def quantized(native: Path, scheme: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's LLaVA-STF in it."""
    path = tmp_path_factory.mktemp("quantized") / scheme
    export_checkpoint(native, path, layout="native", quantize=scheme)
    return path


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_a_number_is_at_most_half_a_step_from_its_integer(data: st.DataObject) -> None:
    four = data.draw(st.booleans())
    exponent = data.draw(st.integers(-20, 20))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weight = (rng.standard_t(2, size=(16, 6)) * 2.0**exponent).astype(np.float32)
    count, most = (4, 7.5) if four else (1, 127.5)
    integers, scales = quantize(
        weight,
        integers=jax.ShapeDtypeStruct((count, 16 // count, 6), jnp.int4 if four else np.int8),
        scales=jax.ShapeDtypeStruct((count, 1, 6), np.float32),
    )
    groups = weight.reshape(count, -1, 6)
    np.testing.assert_allclose(scales[:, 0], abs(groups).max(axis=1) / most, rtol=1e-6)
    error = groups - integers.astype(np.float32) * scales
    assert (abs(error) <= scales * 0.50001).all()


def test_what_lies_on_disk_is_the_integers_of_every_projection(
    native: Path, quantized: Path, scheme: str
) -> None:
    plain, stored = open_native(native), open_native(quantized)
    weights = {name for name in plain.shapes if "text/layers/" in name and name.endswith("/kernel")}
    assert len(weights) == 7
    assert stored.shapes.keys() - plain.shapes.keys() == {
        f"{name}/{part}" for name in weights for part in ("integers", "scales")
    }
    for name in weights:
        weight, integers, scales = (
            checkpoint.read(path).astype(np.float64)
            for checkpoint, path in (
                (plain, name),
                (stored, f"{name}/integers"),
                (stored, f"{name}/scales"),
            )
        )
        # One scale for the inputs of a channel, or for eight of them along their last axis.
        count = 2 if "output" in name else 1
        shared: tuple[int, ...] = tuple(range(1, 1 + count))
        if scheme != "int8":
            last = weight.shape[count]
            weight = weight.reshape(*weight.shape[:count], last // 8, 8, *weight.shape[count + 1 :])
            shared = (count + 1,)
        steps = abs(weight).max(axis=shared, keepdims=True) / STEPS[scheme]
        np.testing.assert_allclose(scales, steps, rtol=2**-8)
        # A scale in bfloat16 moves the largest of seven steps a little.
        assert (abs(weight - integers * scales) <= scales * 0.53).all()
    report = str(inspect_checkpoint(quantized, verify=True))
    assert f"{scheme} weights" in report
    assert "whole, every array verified" in report


def logits(path: Path, mesh: jax.sharding.Mesh | None = None) -> np.ndarray:
    """Of the language model, for tokens drawn at random."""
    checkpoint = open_native(path)
    rules = ShardingRules.none() if mesh is None else ShardingRules.default()
    with jax.set_mesh(NO_MESH if mesh is None else mesh):
        text = Llava.abstract(checkpoint.config, rules=rules).text
        tree = {"text": nnx.to_pure_dict(nnx.state(text))}
        graph = nnx.graphdef(text)
        # A mesh need not be entered for that.
        with jax.set_mesh(NO_MESH):
            weights = checkpoint.restore(tree)["text"]
        ids = np.random.default_rng(0).integers(3, 600, (8, 12)).astype(np.int32)

        @jax.jit
        def run(weights: dict, ids: jax.Array) -> jax.Array:
            text = nnx.merge(graph, weights)
            places = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), ids.shape)
            places = places if mesh is None else jax.sharding.reshard(places, rules.tokens)
            marks = Marks.text(places, jnp.ones_like(ids))
            return text.logits(text(text.embed(ids), marks=marks))

        placed = ids if mesh is None else jax.device_put(ids, jax.NamedSharding(mesh, rules.tokens))
        return np.asarray(run(weights, placed))


def test_a_model_computes_with_the_numbers_that_an_export_writes(
    quantized: Path, tmp_path: Path
) -> None:
    export_checkpoint(quantized, tmp_path / "plain", layout="native", dequantize=True)
    assert open_native(tmp_path / "plain").config.text.quantization is None
    expected, found = logits(tmp_path / "plain"), logits(quantized)
    np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max(), rtol=0)
    split = logits(quantized, make_mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(split, expected, atol=1e-5 * abs(expected).max(), rtol=0)


def test_an_import_rounds_what_it_reads_once(
    reference: Path, quantized: Path, scheme: str, tmp_path: Path
) -> None:
    source, out = reference / "llava-stf", tmp_path / "native"
    import_checkpoint(source, out, vocabulary_multiple=8, quantize=scheme, dtype="bfloat16")
    imported, exported = open_native(out), open_native(quantized)
    assert imported.shapes["text/norm/scale"].dtype == jnp.bfloat16
    rounded = {name for name in imported.shapes if is_quantized(name)}
    assert len(rounded) == 14
    for name in rounded:
        assert imported.checksums[name] == exported.checksums[name], name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "llava-stf"}, "weights and cannot be written in layout llava-stf; add"),
        ({"layout": "native", "quantize": "int8"}, "cannot be quantized again; leave out"),
        ({"layout": "hf-code", "quantize": "int8"}, "plain numbers; leave out --quantize"),
    ],
)
def test_exports_that_are_refused(
    quantized: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(quantized, tmp_path / "out", **options)


def test_groups_that_do_not_divide_are_refused(reference: Path, tmp_path: Path) -> None:
    message = "llava-stf: quantization int4: groups of 32 do not divide mlp_width 112; choose int4"
    refused(reference / "llava-stf", tmp_path / "out", message, quantize="int4")


def test_two_integers_lie_in_a_byte() -> None:
    integers = np.random.default_rng(0).integers(-8, 8, (3, 5, 6)).astype(jnp.int4)
    packed = pack(integers)
    assert (packed.shape, packed.dtype) == ((3, 5, 3), np.uint8)
    assert (unpack(packed) == integers).all()
    like = jax.ShapeDtypeStruct(integers.shape, jnp.int4)
    assert (np.asarray(unpack_on_device(jnp.asarray(packed), like)) == integers).all()
