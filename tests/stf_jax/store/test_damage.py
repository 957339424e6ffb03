"""A byte that changes on disk is found, or changes nothing."""

import gc
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import yaml

from stf_jax.store import checkpoint
from stf_jax.store.arrays import host_like
from stf_jax.store.checkpoint import Leaf, open_native
from stf_jax.store.run import open_model
from stf_jax.systems import tiny_config
from stf_jax.train.checkpoint import Checkpoints
from stf_jax.train.optimizer import OptimizerConfig, make_optimizer
from stf_jax.train.step import TrainState, init_state
from stf_jax.util.errors import CheckpointError
from tests.switch import ALL

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(autouse=True)
def collect() -> Iterator[None]:
    """What Orbax drops is collected here, not in another test; what was there before is skipped."""
    gc.freeze()
    yield
    gc.collect()


TRIALS = 25 if ALL else 8
ARRAYS = {
    "text/norm/scale": np.random.default_rng(0).standard_normal(64, np.float32),
    "text/head/kernel": np.random.default_rng(1).standard_normal((64, 32)).astype("bfloat16"),
    "vision/bias": np.random.default_rng(2).standard_normal(80).astype(np.float16),
}


def flip(folder: Path, rng: random.Random, *, least: int = 0) -> Path:
    """Changes one byte of one of the larger files, so likely a file as it is long."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = [path.stat().st_size * (path.stat().st_size > least) for path in files]
    (file,) = rng.choices(files, sizes)
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return file


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "model"

    def extras(directory) -> None:
        (directory / "hf").mkdir()
        (directory / "hf" / "tokenizer.model").write_bytes(bytes(range(200)))
        (directory / "pytorch").mkdir()
        (directory / "pytorch" / "carried.safetensors").write_bytes(bytes(range(100)))

    leaves = (
        Leaf(path=name, shape=array.shape, dtype=array.dtype, read=lambda array=array: array)
        for name, array in ARRAYS.items()
    )
    checkpoint.write(path, config=tiny_config(), leaves=leaves, extras=extras)
    return path


def test_one_byte_of_a_native_checkpoint(native: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    found_errors = 0
    for trial in range(TRIALS):
        path = tmp_path / str(trial)
        shutil.copytree(native, path)
        flip(path, rng)
        try:
            opened = open_native(path)
            like = {name: host_like(array.shape, np.float32) for name, array in ARRAYS.items()}
            loaded = opened.load(like)
        # Orbax and its storage have their own errors for what they find themselves.
        except (ValueError, OSError, KeyError):
            found_errors += 1
            continue
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(loaded[name], array.astype(np.float32), err_msg=name)
    assert found_errors > TRIALS // 2


@pytest.mark.parametrize("name", [*ARRAYS])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_bit_of_an_array_is_found_by_its_name(
    name: str, bit: int, native: Path, tmp_path: Path
) -> None:
    shutil.copytree(native, tmp_path / "model")
    (folder,) = (tmp_path / "model" / "params").rglob(name.replace("/", "."))
    (chunk,) = (path for path in folder.iterdir() if path.name[0].isdigit())
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1 << bit
    chunk.write_bytes(data)
    opened = open_native(tmp_path / "model")
    other = next(other for other in ARRAYS if other != name)
    np.testing.assert_array_equal(opened.read(other), ARRAYS[other])
    line = rf"^{tmp_path}/model is damaged \({name} is not what was written\); copy or import it"
    with pytest.raises(CheckpointError, match=line):
        opened.read(name)
    shape = ARRAYS[name].shape
    with pytest.raises(CheckpointError, match=line):
        opened.load({name: jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16, sharding=ONE_DEVICE)})
    with pytest.raises(CheckpointError, match=f"{name} is not what was written"):
        opened.verify()


ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def test_what_is_whole_is_verified(native: Path) -> None:
    open_native(native).verify()


@pytest.mark.parametrize("section", ["vision", "text", "checksums"])
def test_a_digit_of_the_config(section: str, native: Path, tmp_path: Path) -> None:
    shutil.copytree(native, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    text = config.read_text()
    digit = text.index("0", text.index(f'"{section}"'))
    config.write_text(text[:digit] + "1" + text[digit + 1 :])
    with pytest.raises(CheckpointError, match=r"config.json is damaged; copy or import it again$"):
        open_native(tmp_path / "model")


@pytest.mark.parametrize("name", ["hf/tokenizer.model", "pytorch/carried.safetensors"])
def test_a_byte_beside_the_parameters(name: str, native: Path, tmp_path: Path) -> None:
    shutil.copytree(native, tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(b"X" + file.read_bytes()[1:])
    with pytest.raises(CheckpointError, match="damaged.*\n  " + name + " is not what was written"):
        open_native(tmp_path / "model")


# Of a run.

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3), steps=20)


def make_state(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    trained = {
        name: jax.numpy.asarray(rng.standard_normal(array.shape, np.float32))
        for name, array in ARRAYS.items()
    }
    state = init_state(trained, OPTIMIZER)
    return jax.tree.map(lambda leaf: leaf + step if leaf.ndim else leaf, state)


def checkpoints_of(path: Path) -> Checkpoints:
    return Checkpoints(path, config={"model": "x"}, every=1, keep=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    with checkpoints_of(path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    return path


def is_same(left: TrainState, right: TrainState) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(first, second) for first, second in pairs)


def test_one_byte_of_a_run(run: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    fell_back = 0
    for trial in range(TRIALS):
        path = tmp_path / str(trial)
        shutil.copytree(run, path)
        flip(path / "2", rng, least=100)
        said: list[str] = []
        with checkpoints_of(path) as checkpoints:
            state = checkpoints.restore(make_state(0), report=said.append)
            assert state is not None
            assert checkpoints.latest == (1 if said else 2)
            assert is_same(state, make_state(1 if said else 2))
            if said:
                fell_back += 1
                (line,) = said
                assert "checkpoints/2 is damaged" in line.replace(f"{trial}/", "checkpoints/")
                assert line.endswith("it is 2.damaged now, and the run continues from step 1")
                # The step is written again under its own name.
                checkpoints.save(2, make_state(2))
                checkpoints.wait()
        with checkpoints_of(path) as checkpoints:
            again = checkpoints.restore(make_state(0), report=pytest.fail)
            assert again is not None
            assert is_same(again, make_state(2))
    assert fell_back > TRIALS // 2


def test_what_orbax_gives_up_prints_nothing(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Beside our one line on stderr it would put a traceback for each of its other reads."""
    rng = random.Random(0)
    said: list[str] = []
    for trial in range(8):
        path = tmp_path / str(trial)
        shutil.copytree(run, path)
        flip(path / "2" / "state" / "d", rng)
        with checkpoints_of(path) as checkpoints:
            checkpoints.restore(make_state(0), report=said.append)
    gc.collect()
    assert len(said) > 4
    assert capfd.readouterr().err == ""
    assert not caplog.records


def damage(path: Path) -> None:
    """Writes it again with other moments, as if they were right: only the checksums tell."""
    tree = ocp.load(path)
    tree["optimizer"] = jax.tree.map(lambda leaf: leaf + 1, tree["optimizer"])
    shutil.rmtree(path)
    with ocp.training.Checkpointer(path.with_name("again")) as checkpointer:
        checkpointer.save(int(path.name), tree)
    path.with_name("again").joinpath(path.name).rename(path)
    shutil.rmtree(path.with_name("again"))


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"custom_metadata": {"config": [1]}}', b"\xff"])
def test_what_describes_the_run_is_damaged(run: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metadata" / "_ROOT_METADATA").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run/metadata is damaged \(.*; move it away, and"):
        checkpoints_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "metadata")
    with checkpoints_of(tmp_path / "run") as checkpoints:
        state = checkpoints.restore(make_state(0), report=pytest.fail)
    assert state is not None
    assert is_same(state, make_state(2))


def test_what_storage_itself_takes_for_whole(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run" / "2")
    said: list[str] = []
    with checkpoints_of(tmp_path / "run") as checkpoints:
        state = checkpoints.restore(make_state(0), report=said.append)
    assert state is not None
    assert is_same(state, make_state(1))
    assert re.search(r"optimizer/\S+ is not what was written", said[0])


def test_all_are_damaged(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run" / "2")
    damage(tmp_path / "run" / "1")
    said: list[str] = []
    with (
        checkpoints_of(tmp_path / "run") as checkpoints,
        pytest.raises(CheckpointError, match=r"run/1 is damaged .*no other; delete it to begin"),
    ):
        checkpoints.restore(make_state(0), report=said.append)
    assert len(said) == 1


def test_one_of_an_older_release_is_taken_as_it_is(tmp_path: Path) -> None:
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, make_state(1))
    with checkpoints_of(tmp_path / "run") as checkpoints:
        state = checkpoints.restore(make_state(0), report=pytest.fail)
    assert state is not None
    assert is_same(state, make_state(1))


def test_what_cannot_be_read_for_now_is_not_set_aside(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "run")

    def refuse(*arguments: object) -> None:
        raise ValueError("UNAVAILABLE: try again")

    with checkpoints_of(tmp_path / "run") as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, "load", refuse)
        with pytest.raises(
            CheckpointError, match=r"cannot be read \(UNAVAILABLE: try again\); see"
        ):
            checkpoints.restore(make_state(0), report=pytest.fail)
    assert (tmp_path / "run" / "2").is_dir()


@pytest.fixture
def trained(native: Path, run: Path, tmp_path: Path) -> Path:
    """The directory of a run over the native checkpoint."""
    path = tmp_path / "trained"
    shutil.copytree(run, path / "checkpoints")
    (path / "config.yaml").write_text(yaml.safe_dump({"model": str(native), "lora": {}}))
    return path


def test_the_model_of_a_run(trained: Path) -> None:
    opened = open_model(trained)
    opened.verify()
    expected = make_state(2).parameters["text/head/kernel"]
    np.testing.assert_array_equal(opened.read("text/head/kernel"), expected.astype("bfloat16"))
    tree = ocp.load(trained / "checkpoints" / "2")
    tree["parameters"]["text/head/kernel"] += 1
    shutil.rmtree(trained / "checkpoints" / "2")
    with ocp.training.Checkpointer(trained / "checkpoints") as checkpointer:
        checkpointer.save(2, tree)
    opened = open_model(trained)
    line = r"checkpoints/2 is damaged \(.*text/head/kernel is not what was written\); move it away"
    with pytest.raises(CheckpointError, match=line):
        opened.read("text/head/kernel")
    with pytest.raises(CheckpointError, match=line):
        opened.verify()
    np.testing.assert_array_equal(opened.read("vision/bias").shape, (80,))
