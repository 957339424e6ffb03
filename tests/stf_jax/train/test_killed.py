"""Killed at random moments, a run ends as if it had been left alone.

Three kills: while it starts, within a save, and in a step. `STF_JAX_TEST_ALL=1` has ten, and kills
a run of every system; `python -m tests.fuzz.kills` has a hundred.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import yaml

from stf_jax.convert import import_checkpoint
from stf_jax.systems import SYSTEMS
from stf_jax.train.config import TrainConfig
from tests.runs import Server
from tests.stf_jax.train.conftest import build_dataset
from tests.switch import ALL

KILLS = ["start", "save", "step"]
if ALL:
    KILLS += ["step", "start", "step", "save", "step", "save", "start"]
# Enough for six steps between kills, and some that nothing interrupts.
STEPS = 6 * sum(kill != "start" for kill in KILLS) + 2


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob("*tmp*"))


def write_yaml(config: TrainConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config.to_dict()))))
    return path


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


@pytest.mark.slow
def test_killed_and_continued(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    runs = [tmp_path / "alone", tmp_path / "killed"]

    def written(run: Path, workers: int) -> Path:
        keys = config(
            out=str(run),
            steps=STEPS,
            checkpoint={"every": 3, "keep": 2},
            data={"batch_size": 4, "workers": workers},
            mesh={"fsdp": 4, "tensor": 2},
        )
        return write_yaml(keys, tmp_path / f"{run.name}-{workers}.yaml")

    # A worker imports everything in each start; with and without one the data are the same.
    with_worker, without = (written(runs[1], workers) for workers in (1, 0))
    server = Server(tmp_path / "cache")
    try:
        server.start(written(runs[0], 0))
        assert server.answer() == 0
        rng = random.Random(7)
        for number, moment in enumerate(KILLS):
            child = server.start(with_worker if number % 5 == 2 else without)
            before = lines(runs[1])
            if moment == "start":
                time.sleep(rng.uniform(0, 3))
            else:
                aim = before + rng.randint(1, 4)
                until(lambda aim=aim: lines(runs[1]) >= aim)
            if moment == "save":
                until(lambda: is_saving(runs[1]))
            if moment == "step":
                time.sleep(rng.uniform(0, 0.1))
                assert lines(runs[1]) > before
            os.kill(child, signal.SIGKILL)
            assert server.answer() == -signal.SIGKILL
        assert 0 < lines(runs[1]) < STEPS
        server.start(without)
        assert server.answer() == 0
    finally:
        server.process.kill()
    assert_equal(runs, steps=STEPS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("cache"))
    yield server
    server.process.kill()


@pytest.mark.skipif(not ALL, reason="CI kills runs of one system")
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_killed_run_of_every_system(
    name: str, reference: Path, config: Callable[..., TrainConfig], tmp_path: Path, server: Server
) -> None:
    """One kill within a step, past a checkpoint."""
    steps, model = 9, tmp_path / "native"
    import_checkpoint(reference / "vicuna", model, vision_tower=reference / "clip", system=name)
    dataset = build_dataset(model, tmp_path, examples=12, workers=1)
    runs = [tmp_path / "alone", tmp_path / "killed"]

    def start(run: Path) -> int:
        keys = config(
            model=str(model),
            out=str(run),
            steps=steps,
            checkpoint={"every": 2, "keep": 2},
            data={"datasets": [{"path": str(dataset)}], "batch_size": 2},
        )
        return server.start(write_yaml(keys, tmp_path / f"{run.name}.yaml"))

    start(runs[0])
    assert server.answer() == 0
    child = start(runs[1])
    until(lambda: lines(runs[1]) >= 5)
    os.kill(child, signal.SIGKILL)
    assert server.answer() == -signal.SIGKILL
    assert lines(runs[1]) < steps
    start(runs[1])
    assert server.answer() == 0
    assert_equal(runs, steps=steps)


def assert_equal(runs: list[Path], *, steps: int) -> None:
    """The same losses, and all that a checkpoint holds, to the bit."""
    assert len(records(runs[0])) == steps
    assert records(runs[1]) == records(runs[0])
    alone, killed = (ocp.load(run / "checkpoints" / str(steps)) for run in runs)
    leaves = [dict(_leaves(state)) for state in (alone, killed)]
    assert leaves[0].keys() == leaves[1].keys()
    assert len(leaves[0]) > 50
    for name, leaf in leaves[0].items():
        np.testing.assert_array_equal(leaf, leaves[1][name], err_msg=name)


def _leaves(tree: Any) -> list[tuple[str, np.ndarray]]:
    return [
        (jax.tree_util.keystr(path), np.asarray(leaf))
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]
