"""The verb `stf-jax train`."""

import argparse

from stf_jax.cli.verbs import Verbs, add_verb, path

# "Try again later" of sysexits.h: a launcher starts such a run again, and no other.
INTERRUPTED = 75

# Seconds: who starts a run on one host of a pod is told within a minute.
HOST_TIMEOUT = 50


def add_train(verbs: Verbs) -> None:
    """Adds `train`."""
    parser = add_verb(verbs, "train", _train, "train a model, or continue a run")
    parser.usage = "stf-jax train CONFIG [--section.key=value ...] [options]"
    parser.epilog = (
        "The keys of a config are those of stf_jax/train/config.py; docs/training.md explains. "
        "A run that was stopped continues when it is called again. Exit status: 0 when the run is "
        f"finished, {INTERRUPTED} when SIGTERM or Ctrl-C has interrupted it, with a checkpoint."
    )
    parser.allow_abbrev = False
    parser.add_argument("config", metavar="CONFIG", type=path, help="YAML, as in configs/")
    add_hosts(parser)
    # What no argument takes is for the config.
    parser.set_defaults(overrides=[])


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `stf_jax.parallel.hosts.start`."""
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0; not needed on a TPU pod"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many hosts there are")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    parser.add_argument(
        "--host-timeout",
        type=float,
        default=HOST_TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for the other hosts to join (%(default)s)",
    )


def _train(options: argparse.Namespace) -> int:
    from stf_jax.train.config import TrainConfig

    config = TrainConfig.load(options.config, options.overrides)
    from stf_jax.parallel import hosts as distributed

    distributed.start(
        options.coordinator, options.processes, options.process, timeout=options.host_timeout
    )
    from stf_jax.train.loop import train

    return 0 if train(config) == "finished" else INTERRUPTED
