"""Killed at random moments, a run ends as if it had been left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import yaml

from stf_jax.train.config import TrainConfig

KILLS = 10

# A process that has imported everything forks one run after the other: a run begins within
# a fraction of a second, so that the kills fall into its work and not into its imports.
SERVER = """
import os, sys
from stf_jax.train.config import TrainConfig
from stf_jax.train.loop import train

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if train(TrainConfig.load(line.strip())) == "finished" else 75
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Begins runs, each in a process of its own."""

    def __init__(self, cache: Path):
        # Not that of all tests: a kill may cut an entry short.
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, path: Path) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_killed_ten_times(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "steps": 40,
        "checkpoint": {"every": 3, "keep": 2},
        "data": {"batch_size": 4, "workers": 1},
        "mesh": {"fsdp": 4, "tensor": 2},
    }
    paths, runs = [], []
    for _ in range(2):
        run = config(**keys)
        path = tmp_path / f"{Path(run.out).name}.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(run.to_dict()))))
        paths.append(path)
        runs.append(Path(run.out))
    server = Server(tmp_path / "cache")
    try:
        server.start(paths[0])
        assert server.answer() == 0
        rng = random.Random(7)
        kills = progress = 0
        while kills < KILLS:
            child = server.start(paths[1])
            before = lines(runs[1])
            # Some die at any moment of their start, others once they have come further.
            if rng.random() < 0.3:
                time.sleep(rng.uniform(0, 3))
            else:
                aim, deadline = before + rng.randint(1, 6), time.monotonic() + 60
                while lines(runs[1]) < aim and time.monotonic() < deadline:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            if server.answer() == 0:
                break
            kills += 1
            progress += lines(runs[1]) != before
        assert kills == KILLS
        assert progress >= 4
        assert lines(runs[1]) < 40
        server.start(paths[1])
        assert server.answer() == 0
    finally:
        server.process.kill()
    assert len(records(runs[0])) == 40
    assert records(runs[1]) == records(runs[0])
    alone, killed = (ocp.load(run / "checkpoints" / "40") for run in runs)
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
