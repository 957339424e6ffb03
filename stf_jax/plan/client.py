"""Asks the TPU compiler for a plan, in a process of its own."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from stf_jax.plan.chips import Topology
from stf_jax.plan.phases import InferencePlan
from stf_jax.plan.request import Plan, Request

# What libtpu must be told on a machine without a TPU.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
_LINES = 5


class PlanError(ValueError):
    """The compiler cannot be asked, or the question is wrong; one line."""


def plan(config: str, *, topology: str, overrides: Sequence[str] = ()) -> Plan | InferencePlan:
    """The plan of a config on a slice: a training step, or the programs that answer questions.

    Takes minutes at 7B.

    Args:
        config: path of a config for training or for inference.
        topology: such as "v5e:4x4"; "2xv5e:4x4" is two slices.
        overrides: `--section.key=value`.

    Raises:
        PlanError: libtpu is missing, or topology, mesh and config do not go together.
    """
    Topology.parse(topology)
    if find_spec("libtpu") is None:
        raise PlanError("the TPU compiler is not installed; pip install libtpu")
    request = Request(config=config, overrides=tuple(overrides), topology=topology)
    done = subprocess.run(
        [sys.executable, "-m", "stf_jax.plan.worker"],
        input=json.dumps(dataclasses.asdict(request)),
        capture_output=True,
        text=True,
        env=os.environ | _ENVIRONMENT,
        check=False,
    )
    if done.returncode != 0 or not done.stdout:
        # libtpu's own lines are noise; the last of a failure are not.
        last = " | ".join(done.stderr.strip().splitlines()[-_LINES:])
        raise PlanError(f"the compiler's process ended with {done.returncode}: {last}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise PlanError(answer["error"])
    if "inference" in answer:
        return InferencePlan.from_json(answer["inference"])
    return Plan.from_json(answer["plan"])
