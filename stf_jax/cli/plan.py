"""The verb `stf-jax plan`."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from stf_jax.cli.verbs import Verbs, add_verb, path

if TYPE_CHECKING:
    from stf_jax.plan.phases import InferencePlan
    from stf_jax.plan.request import Plan
    from stf_jax.plan.sweep import Ask

# Other than that of a mistake, so that a script can tell.
DOES_NOT_FIT = 3


def add_plan(verbs: Verbs) -> None:
    """Adds `plan`."""
    parser = add_verb(verbs, "plan", _plan, "will a run fit a TPU slice, and what will it cost")
    parser.usage = "stf-jax plan CONFIG --topology v5e:4x4 [--section.key=value ...] [options]"
    parser.epilog = (
        "Asks the TPU compiler, which needs no TPU (pip install libtpu); minutes at 7B. "
        f"Exit status: 0 if it fits, {DOES_NOT_FIT} if not."
    )
    parser.allow_abbrev = False
    parser.add_argument("config", metavar="CONFIG", type=path, help="YAML, as in configs/")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help="generation and chips along each axis; 2xv5e:4x4 is two slices",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="try meshes, micro-batches and remat policies; the best that fit, an hour at 7B",
    )
    parser.add_argument("--json", action="store_true", help="one object a plan")
    # What no argument takes is for the config.
    parser.set_defaults(overrides=[])


def _plan(options: argparse.Namespace) -> int:
    from stf_jax.plan.client import plan as make_plan
    from stf_jax.plan.report import render, render_changes

    def ask(changes: tuple[str, ...] = ()) -> "Plan | InferencePlan":
        overrides = [*options.overrides, *changes]
        return make_plan(options.config, topology=options.topology, overrides=overrides)

    if options.sweep:
        return _sweep(options, ask)
    plan = ask()
    if options.json:
        sys.stdout.write(f"{json.dumps(plan.to_json())}\n")
    else:
        sys.stdout.write(f"{render(plan)}\n")
        if not plan.fits:
            sys.stdout.write(f"{render_changes(plan, _changes(options, plan, ask))}\n")
    return 0 if plan.fits else DOES_NOT_FIT


def _sweep(options: argparse.Namespace, ask: "Ask") -> int:
    from stf_jax.infer.config import is_inference
    from stf_jax.plan.chips import Topology
    from stf_jax.plan.report import progress, render_sweep
    from stf_jax.plan.sweep import best, sweep
    from stf_jax.train.config import TrainConfig

    if is_inference(options.config):
        raise ValueError("--sweep is for training; vary --slots=N and --mesh.tensor=N by hand")
    config = TrainConfig.load(options.config, options.overrides)
    tried = []
    for attempt in sweep(config, chips=Topology.parse(options.topology).chips, ask=ask):
        sys.stderr.write(f"{progress(attempt)}\n")
        tried.append(attempt)
    chosen = best(tried)
    text = (
        "\n".join(
            json.dumps({"overrides": changes} | attempt.to_json()) for changes, attempt in chosen
        )
        if options.json
        else render_sweep(chosen)
    )
    sys.stdout.write(f"{text}\n")
    return 0 if chosen else DOES_NOT_FIT


def _changes(
    options: argparse.Namespace, plan: "Plan | InferencePlan", ask: "Ask"
) -> list[tuple[str, ...]]:
    """The changes of the config with which the run would fit."""
    from stf_jax.plan.request import Plan
    from stf_jax.plan.sweep import inference_changes, training_changes
    from stf_jax.train.config import TrainConfig

    if not isinstance(plan, Plan):
        return inference_changes(plan, ask=ask)
    config = TrainConfig.load(options.config, options.overrides)
    return training_changes(config, chips=plan.chips, ask=ask)
