"""Stand-ins for gcloud, xpk, kubectl, ssh and scp on the PATH, and the machines behind them.

They keep all they were called with, and run what they are given in a real shell whose home
directory is a worker's.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.__main__ import main

HERE = Path(__file__).parent

# What a worker has, beside the system: none of it does anything but uv, which "installs".
WORKER_TOOLS = {
    "hostname": 'basename "$HOME"',
    "uv": 'mkdir -p .venv/bin; [ $1 = venv ] || ln -sf "$STANDINS/stf-jax" .venv/bin',
    "sudo": 'echo "sudo $*" >> ~/tools.log',
    "gcsfuse": 'echo "gcsfuse $*" >> ~/tools.log',
    "mountpoint": "exit 1",
    # Of the check that all workers find each other.
    "python": 'echo "$(hostname) checks: $*"',
}


@dataclasses.dataclass(frozen=True)
class Cloud:
    """What the stand-ins see and do.

    Attributes:
        folder: of the machines, by name, and of the notes that they leave.
    """

    folder: Path

    @property
    def calls(self) -> list[list[str]]:
        """The commands in the order in which they came."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def worker(self, name: str) -> Path:
        """The home directory of one."""
        return self.folder / "workers" / name

    def note(self, name: str, text: str = "") -> None:
        """Tells the stand-ins something; what is said in standin.py."""
        (self.folder / name).write_text(text)

    def preempt(self) -> None:
        """Takes the slice away: nothing of its machines is left."""
        self.kill()
        self.note("state", "PREEMPTED")

    def kill(self) -> None:
        """Kills all runs, without a warning."""
        for pid in (self.folder / "workers").glob("*/launch/pid"):
            for group in pid.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(group), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """No machine yet."""
    folder, tools, worker_tools = (tmp_path / name for name in ("cloud", "tools", "worker-tools"))
    for directory in (folder, tools, worker_tools):
        directory.mkdir()
    for name in ("gcloud", "xpk", "kubectl", "ssh", "scp"):
        _script(tools / name, f'exec "{sys.executable}" -S "{HERE / "standin.py"}" {name} "$@"')
    for name, text in WORKER_TOOLS.items():
        _script(worker_tools / name, text)
    _script(tools / "stf-jax", "exit 1")
    monkeypatch.setenv("STANDINS", str(tools))
    monkeypatch.setenv("CLOUD", str(folder))
    monkeypatch.setenv("WORKER_TOOLS", str(worker_tools))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    actual = Cloud(folder)
    yield actual
    actual.kill()


@pytest.fixture
def rented(cloud: Cloud) -> Cloud:
    """A slice that is set up."""
    assert main(["tpu", "create", "s", "--slice", "v5e:4x4", "--poll", "0.05"]) == 0
    assert main(["tpu", "setup", "s"]) == 0
    return cloud


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
