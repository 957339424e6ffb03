"""Checkpoints to convert, written and read by the `safetensors` library rather than by ours."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

# Without PyTorch, these modules cannot even be imported.
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_torch_*.py"]

NUMPY = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
}

Tensors = dict[str, np.ndarray]


def read_file(path: Path) -> Tensors:
    return {
        name: np.frombuffer(bytes(entry["data"]), NUMPY[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(path.read_bytes())
    }


def read_all(directory: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= read_file(file)
    return tensors


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def read() -> Callable[[Path], Tensors]:
    """Every tensor of a directory of safetensors files."""
    return read_all


@pytest.fixture(scope="session")
def write() -> Callable[[Path, Mapping[str, np.ndarray]], None]:
    """Writes one safetensors file."""
    return write_file


@pytest.fixture
def assert_same() -> Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], None]:
    """The same names, shapes, dtypes and bits."""

    def check(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].shape == array.shape, name
            assert found[name].dtype == array.dtype, name
            assert found[name].tobytes() == array.tobytes(), name

    return check


@pytest.fixture
def checkpoint(reference: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the reference's LLaVA-STF, with its tensors changed, into one file."""

    def is_weights(_: str, names: list[str]) -> list[str]:
        return [name for name in names if "model-" in name or "index" in name]

    def make(
        change: Callable[[str, np.ndarray], np.ndarray | None] = lambda name, array: array,
        *,
        add: Mapping[str, np.ndarray] | None = None,
        config: Mapping[str, object] | None = None,
    ) -> Path:
        directory = tmp_path / "parent" / "source"
        shutil.copytree(reference / "llava-stf", directory, ignore=is_weights)
        shutil.copytree(reference / "clip", tmp_path / "parent" / "clip", dirs_exist_ok=True)
        tensors = {
            name: changed
            for name, array in read_all(reference / "llava-stf").items()
            if (changed := change(name, array)) is not None
        }
        write_file(directory / "model.safetensors", {**tensors, **(add or {})})
        hf = json.loads((directory / "config.json").read_text()) | dict(config or {})
        (directory / "config.json").write_text(json.dumps(hf))
        return directory

    return make
