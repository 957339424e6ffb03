"""The native checkpoint: written leaf by leaf, restored onto any mesh, checked first."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stf_jax.store import checkpoint
from stf_jax.store.arrays import flatten, unflatten
from stf_jax.store.checkpoint import Leaf, open_native
from stf_jax.systems import tiny_config
from stf_jax.util.errors import CheckpointError

CONFIG = tiny_config()
ARRAYS = {
    "text/norm/scale": np.arange(64, dtype=np.float32),
    "text/head/kernel": np.arange(64 * 32).reshape(64, 32).astype(ml_dtypes.bfloat16),
    "vision/bias": np.arange(8, dtype=np.float16),
}


def leaves() -> Iterator[Leaf]:
    for name, array in ARRAYS.items():
        yield Leaf(path=name, shape=array.shape, dtype=array.dtype, read=lambda a=array: a)


def extras(directory: epath.Path) -> None:
    (directory / "hf").mkdir()
    (directory / "hf" / "tokenizer.model").write_bytes(b"tokens")
    (directory / "pytorch").mkdir()
    (directory / "pytorch" / "origin.json").write_text("{}")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "model"
    checkpoint.write(path, config=CONFIG, leaves=leaves(), extras=extras)
    return path


@pytest.fixture
def spoiled(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def test_read_back(written: Path) -> None:
    native = open_native(written)
    assert native.config == CONFIG
    assert native.shapes.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        actual = native.read(name)
        assert (actual.shape, actual.dtype) == (array.shape, array.dtype)
        assert actual.tobytes() == array.tobytes()
    assert [path.name for path in written.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("checksums", [False, True])
def test_a_checkpoint_from_before_systems(checksums: bool, tmp_path: Path) -> None:
    """Version 1 had a fusion and a projector, each at the root, and at first no checksums."""
    arrays = {
        "fusion/mbtf/linear_1/bias": np.arange(4, dtype=np.float32),
        "projector/linear_1/bias": np.arange(5, dtype=np.float32),
        "text/norm/scale": np.arange(6, dtype=np.float32),
    }
    older = (
        Leaf(path=name, shape=array.shape, dtype=array.dtype, read=lambda array=array: array)
        for name, array in arrays.items()
    )
    path = tmp_path / "model"
    checkpoint.write(path, config=CONFIG, leaves=older, extras=extras)
    content = json.loads((path / "config.json").read_text())
    system = content["model"].pop("system")
    name = system.pop("name")
    content["model"]["fusion"] = system | {"reduction": name}
    # It is of what was written.
    del content["digest"]
    assert content["checksums"].keys() == arrays.keys()
    if not checksums:
        del content["checksums"], content["digests"]
    (path / "config.json").write_text(json.dumps(content | {"version": 1}))
    native = open_native(path)
    assert native.config == CONFIG
    today = {
        "connector/mbtf/linear_1/bias": 4,
        "connector/projector/linear_1/bias": 5,
        "text/norm/scale": 6,
    }
    assert {name: leaf.shape for name, leaf in native.shapes.items()} == {
        name: (size,) for name, size in today.items()
    }
    for name, size in today.items():
        np.testing.assert_array_equal(native.read(name), np.arange(size))
    if checksums:
        native.verify()
        (file,) = (path / "params").rglob("projector.linear_1.bias/0")
        file.write_bytes(b"X" + file.read_bytes()[1:])
        with pytest.raises(CheckpointError, match="projector/linear_1/bias is not what was"):
            native.read("connector/projector/linear_1/bias")
    else:
        with pytest.raises(CheckpointError, match="has no checksums; it was written by an older"):
            native.verify()


def test_large_leaves_are_stored_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 1024)
    monkeypatch.setattr(checkpoint, "_BATCH_BYTES", 100)  # Every leaf is saved alone.
    checkpoint.write(tmp_path / "model", config=CONFIG, leaves=leaves(), extras=extras)
    chunks = list((tmp_path / "model" / "params").rglob("text.head.kernel/[0-9]*"))
    assert len(chunks) == 4
    assert all(chunk.stat().st_size == 1024 for chunk in chunks)
    native = open_native(tmp_path / "model")
    for name, array in ARRAYS.items():
        assert native.read(name).tobytes() == array.tobytes()


@pytest.mark.parametrize(("shape", "axes"), [((8,), ("fsdp",)), ((2, 4), ("fsdp", "tensor"))])
def test_restore_onto_a_mesh(shape: tuple[int, ...], axes: tuple[str, ...], written: Path) -> None:
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Explicit,) * len(axes))
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    wanted = {
        "text/head/kernel": jax.ShapeDtypeStruct((64, 32), np.float32, sharding=sharding),
        "vision/bias": jax.ShapeDtypeStruct((8,), np.float16),
    }
    actual = flatten(open_native(written).restore(unflatten(wanted)))
    assert actual.keys() == wanted.keys()
    kernel = actual["text/head/kernel"]
    assert kernel.sharding == sharding
    assert kernel.dtype == np.float32
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8
    np.testing.assert_array_equal(kernel, ARRAYS["text/head/kernel"].astype(np.float32))
    assert len(actual["vision/bias"].devices()) == 1
    np.testing.assert_array_equal(actual["vision/bias"], ARRAYS["vision/bias"])


def test_restore_lists_everything_that_does_not_fit(written: Path) -> None:
    wanted = {
        "text/norm/scale": jax.ShapeDtypeStruct((65,), np.float32),
        "text/no/such": jax.ShapeDtypeStruct((1,), np.float32),
    }
    with pytest.raises(CheckpointError, match="does not fit the model") as caught:
        open_native(written).restore(unflatten(wanted))
    assert "missing: text/no/such" in str(caught.value)
    assert "shape of text/norm/scale: (64,) stored, (65,) wanted" in str(caught.value)


def test_extras_travel_on(written: Path, tmp_path: Path) -> None:
    native = open_native(written)
    checkpoint.write(tmp_path / "next", config=CONFIG, leaves=leaves(), extras=native.copy_extras)
    assert (tmp_path / "next" / "hf" / "tokenizer.model").read_bytes() == b"tokens"
    assert (tmp_path / "next" / "pytorch" / "origin.json").read_text() == "{}"


def test_damage_is_found_before_anything_is_read(spoiled: Path) -> None:
    (chunk,) = (spoiled / "params").rglob("text.head.kernel/0.0")
    chunk.write_bytes(chunk.read_bytes()[:100])
    (gone,) = (spoiled / "params").rglob("vision.bias/0")
    gone.unlink()
    with pytest.raises(CheckpointError, match="is damaged; copy or import it again") as caught:
        open_native(spoiled)
    assert "text.head.kernel/0.0: 100 bytes of 4096" in str(caught.value)
    assert "vision.bias/0: no bytes of 16" in str(caught.value)


def test_damage_beside_the_parameters_is_found(spoiled: Path) -> None:
    (spoiled / "hf" / "tokenizer.model").write_bytes(b"tok")
    (spoiled / "pytorch" / "origin.json").unlink()
    with pytest.raises(CheckpointError, match="is damaged; copy or import it again") as caught:
        open_native(spoiled)
    assert "hf/tokenizer.model: 3 bytes of 6" in str(caught.value)
    assert "pytorch/origin.json: no bytes of 2" in str(caught.value)


@pytest.mark.parametrize("key", ["version", "model", "files"])
@pytest.mark.parametrize("change", ["missing", "null", "other"])
def test_damaged_config(spoiled: Path, key: str, change: str) -> None:
    config = spoiled / "config.json"
    content = json.loads(config.read_text())
    value = content.pop(key)
    if change != "missing":
        content[key] = (
            None if change == "null" else {"files": [1], "version": "1"}.get(key, {"text": 1})
        )
    assert value
    config.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config.json is damaged; copy or import it again$"):
        open_native(spoiled)


# Orbax drops what it was reading with the event loop; that is collected here, not in another test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("content", [b"\0", b"{}"])
@pytest.mark.parametrize("name", ["_METADATA", ".zarray"])
def test_damaged_description_of_the_parameters(spoiled: Path, name: str, content: bytes) -> None:
    for file in (spoiled / "params").rglob(name):
        file.write_bytes(content.ljust(file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"params is damaged; copy or import it again$"):
        _ = open_native(spoiled).shapes
    gc.collect()


def test_other_versions(spoiled: Path) -> None:
    config = spoiled / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"version": 99}))
    with pytest.raises(CheckpointError, match="format version 99, this stf_jax reads 2; install"):
        open_native(spoiled)


def test_not_native(spoiled: Path, tmp_path: Path, reference: Path) -> None:
    assert checkpoint.is_native(spoiled)
    assert not checkpoint.is_native(reference / "llava-stf")
    assert not checkpoint.is_native(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        open_native(tmp_path / "nowhere")
    for content in ("", "[]", "{}"):
        (spoiled / "config.json").write_text(content)
        assert not checkpoint.is_native(spoiled)
    with pytest.raises(CheckpointError, match=r"is not a native checkpoint; `stf-jax convert"):
        open_native(spoiled)


def test_an_existing_directory_is_left_alone(written: Path) -> None:
    before = sorted(written.rglob("*"))
    with pytest.raises(CheckpointError, match="exists; remove it or choose another name"):
        checkpoint.write(written, config=CONFIG, leaves=leaves(), extras=extras)
    assert sorted(written.rglob("*")) == before


def test_a_link_that_leads_nowhere_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="exists; remove it or choose another name"):
        checkpoint.write(tmp_path / "model", config=CONFIG, leaves=iter(()), extras=pytest.fail)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Leaf]:
        yield from leaves()
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="there is no room"):
        checkpoint.write(tmp_path / "model", config=CONFIG, leaves=failing(), extras=extras)
    assert not list(tmp_path.iterdir())


def test_flatten_and_unflatten() -> None:
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
    assert unflatten({}) == {}
