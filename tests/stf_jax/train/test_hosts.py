"""Several processes as one, over jax.distributed on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from launch.local import LocalRun, free_port
from stf_jax.parallel.hosts import start
from stf_jax.train.config import TrainConfig
from stf_jax.train.loop import train

STF_JAX = [sys.executable, "-W", "ignore", "-m", "stf_jax"]


def until(condition: Callable[[], bool], *, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def written(config: TrainConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config.to_dict()))))
    return path


def losses(run: TrainConfig) -> list[float]:
    lines = Path(run.out, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def steps(run: TrainConfig) -> int:
    metrics = Path(run.out, "metrics.jsonl")
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_all_processes_of_a_run_are_told_to_end(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """As a scheduler does; the data worker lives until the run has saved and left."""
    run = config(steps=300, data={"batch_size": 4, "workers": 1})
    path = written(run, tmp_path / "run.yaml")
    with subprocess.Popen(
        [*STF_JAX, "train", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        until(lambda: process.poll() is not None or steps(run) >= 2)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 75, said
    done = steps(run)
    assert f"interrupted after step {done}; start it again to continue" in said
    assert "Traceback" not in said
    assert (Path(run.out) / "checkpoints" / str(done)).is_dir()
    until(lambda: not _alive(process.pid), seconds=20)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_two_processes_are_one_run(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Preempted in one of them, both leave; alone it continues; and the losses are those of one."""
    keys = {"steps": 16, "data": {"batch_size": 8}}
    expected = config(**keys)
    assert train(expected) == "finished"
    run = config(**keys, mesh={"data": 2, "fsdp": 2, "tensor": 2}, log_every=1)
    command = [*STF_JAX, "train", str(written(run, tmp_path / "run.yaml"))]
    said = ["", ""]

    def hear(process: int, stream: str, line: str) -> None:
        said[process] += line

    with LocalRun(command, processes=2, devices=4, say=hear) as processes:
        # Only one host of a pod may be told that it is preempted.
        until(lambda: processes.statuses[0] is not None or steps(run) >= 2)
        processes.processes[1].send_signal(signal.SIGTERM)
        processes.wait(seconds=240)
    assert processes.statuses == [75, 75], said
    (step,) = re.findall(r"interrupted after step (\d+)", said[0])
    assert "8 cpu devices on 2 hosts" in said[0]
    # The second host has nothing to say.
    assert "interrupted" not in said[1]
    assert len(losses(run)) == int(step) < 16
    assert train(run) == "finished"
    np.testing.assert_allclose(losses(run), losses(expected), rtol=1e-5)


def test_three_flags_or_none() -> None:
    with pytest.raises(ValueError, match="--coordinator, --processes and --process together"):
        start(processes=2, timeout=1)
    with pytest.raises(ValueError, match=r"--process is 2; with --processes 2 it is 0 to 1"):
        start("127.0.0.1:1", 2, 2, timeout=1)
    start(timeout=1)


def test_a_run_on_one_host_of_two(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """It says so instead of waiting, and nothing of a run is left."""
    run = config()
    path = written(run, tmp_path / "run.yaml")
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process", "0"]
    alone = subprocess.run(
        [*STF_JAX, "train", str(path), *flags, "--host-timeout", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert alone.returncode == 1
    (line,) = alone.stderr.splitlines()
    assert line.startswith("error: process 0 of 2 has waited 2 s for the other hosts in vain")
    assert not Path(run.out).exists()
