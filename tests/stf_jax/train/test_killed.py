"""Killed at random moments, a run ends as if it had been left alone.

Three kills: while it starts, within a save, and in a step. `STF_JAX_TEST_ALL=1` has ten, and
`python -m tests.fuzz.kills` a hundred.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import yaml

from stf_jax.train.config import TrainConfig
from tests.runs import Server
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


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


def test_killed_and_continued(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    runs = [tmp_path / "alone", tmp_path / "killed"]

    def written(run: Path, workers: int) -> Path:
        keys = config(
            out=str(run),
            steps=STEPS,
            checkpoint={"every": 3, "keep": 2},
            data={"batch_size": 4, "workers": workers},
            mesh={"fsdp": 4, "tensor": 2},
        ).to_dict()
        path = tmp_path / f"{run.name}-{workers}.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(keys))))
        return path

    # A worker imports everything in each start; with and without one the data are the same.
    with_worker, without = (written(runs[1], workers) for workers in (1, 0))
    server = Server(tmp_path / "cache")
    try:
        server.start(written(runs[0], 1))
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
    assert len(records(runs[0])) == STEPS
    assert records(runs[1]) == records(runs[0])
    alone, killed = (ocp.load(run / "checkpoints" / str(STEPS)) for run in runs)
    leaves = [dict(_leaves(state)) for state in (alone, killed)]
    assert leaves[0].keys() == leaves[1].keys()
    assert len(leaves[0]) > 60
    for name, leaf in leaves[0].items():
        np.testing.assert_array_equal(leaf, leaves[1][name], err_msg=name)


def _leaves(tree: Any) -> list[tuple[str, np.ndarray]]:
    import jax

    return [
        (jax.tree_util.keystr(path), np.asarray(leaf))
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]
