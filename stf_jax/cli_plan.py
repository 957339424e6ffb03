"""The verb `stf-jax plan`."""

import argparse
import json
import sys

from stf_jax.cli import Verbs, add_verb

# Other than that of a mistake, so that a script can tell.
DOES_NOT_FIT = 3


def add_plan(verbs: Verbs) -> None:
    """Adds `plan`."""
    parser = add_verb(verbs, "plan", _plan, "will a run fit a TPU slice, and what will it cost")
    parser.usage = "stf-jax plan CONFIG --topology v5e:4x4 [--section.key=value ...] [options]"
    parser.epilog = (
        "Asks the TPU compiler, which needs no TPU (pip install libtpu); minutes at 7B. "
        f"Exit status: 0 if the step fits, {DOES_NOT_FIT} if not."
    )
    parser.allow_abbrev = False
    parser.add_argument("config", metavar="CONFIG", help="YAML, as in configs/")
    parser.add_argument(
        "--topology", required=True, metavar="T", help="generation and chips along each axis"
    )
    parser.add_argument("--json", action="store_true", help="one object")
    # What no argument takes is for the config.
    parser.set_defaults(overrides=[])


def _plan(options: argparse.Namespace) -> int:
    from stf_jax.plan.asking import plan
    from stf_jax.plan.report import render

    made = plan(options.config, topology=options.topology, overrides=options.overrides)
    text = json.dumps(made.to_json()) if options.json else render(made)
    sys.stdout.write(f"{text}\n")
    return 0 if made.fits else DOES_NOT_FIT
