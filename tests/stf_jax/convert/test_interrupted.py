"""A crash in the middle leaves nothing that looks like a checkpoint."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stf_jax.convert import export_checkpoint, import_checkpoint, inspect_checkpoint, open_source
from stf_jax.convert.safetensors_file import SafetensorsFile, SafetensorsWriter
from stf_jax.store.checkpoint import is_native, open_native
from stf_jax.util.errors import CheckpointError

ROOT = Path(__file__).parents[3]

KILLED = """
import os, signal, sys
from stf_jax import convert
from stf_jax.convert.safetensors_file import SafetensorsFile, SafetensorsWriter

owners = {"import": (SafetensorsFile, "read"), "export": (SafetensorsWriter, "write")}
owner, name = owners[sys.argv[1]]
calls, original = 0, getattr(owner, name)

def dying(self, *args):
    global calls
    calls += 1
    if calls == 200:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args)

setattr(owner, name, dying)
if sys.argv[1] == "import":
    convert.import_checkpoint(sys.argv[2], sys.argv[3])
else:
    convert.export_checkpoint(sys.argv[2], sys.argv[3], layout="llava-stf")
"""


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_import_fails_in_the_middle(
    error: BaseException, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SafetensorsFile.read

    def failing(file: SafetensorsFile, name: str) -> np.ndarray:
        if name == "model.layers.1.mlp.down_proj.weight":
            raise error
        return read(file, name)

    monkeypatch.setattr(SafetensorsFile, "read", failing)
    with pytest.raises(type(error)):
        import_checkpoint(reference / "llava-stf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_export_fails_in_the_middle(
    error: BaseException, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_checkpoint(reference / "llava-stf", tmp_path / "native")
    write = SafetensorsWriter.write

    def failing(writer: SafetensorsWriter, name: str, array: np.ndarray) -> None:
        if name == "model.layers.1.mlp.down_proj.weight":
            raise error
        write(writer, name, array)

    monkeypatch.setattr(SafetensorsWriter, "write", failing)
    with pytest.raises(type(error)):
        export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


@pytest.mark.parametrize("verb", ["import", "export"])
def test_killed(verb: str, reference: Path, tmp_path: Path) -> None:
    source = reference / "llava-stf"
    if verb == "export":
        import_checkpoint(source, tmp_path / "native")
        source = tmp_path / "native"
    work = tmp_path / "work"
    work.mkdir()
    process = subprocess.run(
        [sys.executable, "-c", KILLED, verb, str(source), str(work / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    (left,) = work.iterdir()
    assert left.name.startswith("out.tmp-")
    assert not is_native(left)
    with pytest.raises(CheckpointError):
        open_native(left)
    with pytest.raises(CheckpointError):
        open_source(left)
    assert inspect_checkpoint(left).problem is not None


def test_no_progress_bar_in_a_pipe(reference: Path, tmp_path: Path) -> None:
    code = "import sys; from stf_jax import convert; convert.import_checkpoint(*sys.argv[1:])"
    process = subprocess.run(
        [sys.executable, "-c", code, str(reference / "llava-stf"), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == ""
    assert process.stderr == ""


def test_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "a.safetensors", {})
    with pytest.raises(KeyError):
        writer.write("x", np.zeros(1, np.float32))
