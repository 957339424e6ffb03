"""The command line of the launcher."""

import argparse
import math
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

from launch.commands import LaunchError, Runner
from launch.local import LocalRun
from launch.slices import Slices
from launch.ssh import Hosts
from launch.tpu import Renting, TpuVm
from launch.workers import Setup, Workers
from launch.xpk import Xpk

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 1 for a mistake, or the status of the run that it follows."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, command = given, []
    if "--" in given:
        cut = given.index("--")
        own, command = given[:cut], given[cut + 1 :]
    parser = _parser()
    options, unknown = parser.parse_known_args(own)
    # An error shows the usage of its verb.
    if unknown:
        hint = "; write the command after --" if options.takes_command and not command else ""
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if options.takes_command and not command:
        options.parser.error("write the command after --")
    if command and not options.takes_command:
        options.parser.error("no command here; leave out -- and what comes after it")
    options.command = command
    try:
        return options.run(options) or 0
    except LaunchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("launch: left; what runs elsewhere continues\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch", description="Start a run elsewhere.")
    places = parser.add_subparsers(required=True, metavar="tpu|xpk|ssh|local")
    _add_tpu(places)
    _add_xpk(places)
    _add_ssh(places)
    _add_local(places)
    return parser


def _group(places: Verbs, name: str, summary: str) -> Verbs:
    parser = places.add_parser(name, help=summary, description=summary)
    return parser.add_subparsers(required=True, metavar="VERB")


def _verb(
    verbs: Verbs, name: str, run: Run, summary: str, *, takes_command: bool = False
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run, takes_command=takes_command, parser=parser)
    if takes_command:
        parser.epilog = "The command comes last, after --: -- stf-jax train CONFIG"
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    return parser


def _add_slice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slice", required=True, metavar="TOPOLOGY", help="as for stf-jax plan, such as v5e:4x4"
    )


def _add_setup(parser: argparse.ArgumentParser, extras: str) -> None:
    parser.add_argument("--bucket", metavar="NAME", help="mount this bucket on /mnt/NAME")
    parser.add_argument("--extras", default=extras, help=f"of stf-jax to install ({extras})")


def _add_poll(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--poll", type=_positive(float), default=30, metavar="SECONDS", help="look again after (30)"
    )


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A parser of numbers above 0, for the command line."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        # This order of the comparison refuses NaN.
        if not 0 < number < math.inf:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"'{text}' is not a {whole}number above 0")
        return number

    return read


def _add_workers_verbs(
    verbs: Verbs,
    add_workers: Callable[[argparse.ArgumentParser], None],
    workers: Callable[[argparse.Namespace], Workers],
    *,
    extras: str,
    add_renting: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """The verbs that TPU VMs and hosts with ssh share; hosts are not rented."""

    def verb(
        name: str, run: Callable[[Workers, argparse.Namespace], int | None], summary: str
    ) -> argparse.ArgumentParser:
        parser = _verb(
            verbs,
            name,
            lambda options: run(workers(options), options),
            summary,
            takes_command=name in ("run", "watch"),
        )
        add_workers(parser)
        return parser

    def setup_of(options: argparse.Namespace) -> Setup:
        return Setup(extras=options.extras, bucket=options.bucket)

    def start_and_follow(workers: Workers, options: argparse.Namespace) -> int:
        workers.start(options.command)
        return workers.follow()

    parser = verb(
        "setup",
        lambda workers, options: workers.setup(setup_of(options)),
        "send this clone to all workers, install it there, and check that they find each other",
    )
    _add_setup(parser, extras)
    verb("run", start_and_follow, "start a command on all workers, and show worker 0's log")
    verb("log", lambda workers, _: workers.follow(), "show worker 0's log until the run ends")
    verb("status", lambda workers, _: workers.state(), "the state of the run on each worker")
    verb("stop", lambda workers, _: workers.stop(), "let the run save and leave")
    parser = verb(
        "collect",
        lambda workers, options: workers.collect(options.out, options.paths),
        "copy the logs and other files of worker 0",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the directory to copy to")
    parser.add_argument(
        "paths", metavar="PATH", nargs="*", help="in the home directory, or absolute"
    )
    parser = verb(
        "watch",
        lambda workers, options: workers.watch(
            options.command, setup_of(options) if add_renting else None, poll=options.poll
        ),
        "run a command until it is finished: start it again after an interruption"
        + (", on a new slice if the old one is gone" if add_renting else ""),
    )
    if add_renting:
        add_renting(parser)
        _add_setup(parser, extras)
    _add_poll(parser)


def _add_tpu(places: Verbs) -> None:
    verbs = _group(places, "tpu", "TPU VMs, through gcloud")

    def add_name(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("name", metavar="NAME", help="of the slice")
        _add_place(parser)

    def add_renting(parser: argparse.ArgumentParser) -> None:
        _add_slice(parser)
        parser.add_argument("--spot", action="store_true", help="cheaper; may be preempted")
        parser.add_argument(
            "--now", action="store_true", help="at once or not at all, not from the queue"
        )

    def slice_of_vms(options: argparse.Namespace) -> TpuVm:
        runner, place = Runner(options.dry_run), _place(options)
        if "slice" not in options:
            return TpuVm(runner, options.name, place=place)
        what = Renting(slice=Slices.parse(options.slice), spot=options.spot, queue=not options.now)
        return TpuVm(runner, options.name, place=place, renting=what, poll=options.poll)

    parser = _verb(
        verbs, "create", lambda options: slice_of_vms(options).create(), "rent a slice, and wait"
    )
    add_name(parser)
    add_renting(parser)
    _add_poll(parser)
    _add_workers_verbs(verbs, add_name, slice_of_vms, extras="tpu,gcs", add_renting=add_renting)
    parser = _verb(
        verbs, "delete", lambda options: slice_of_vms(options).delete(), "give the slice back"
    )
    add_name(parser)


def _add_ssh(places: Verbs) -> None:
    verbs = _group(places, "ssh", "hosts with ssh, which see the same directories")

    def add_hosts(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "hosts", metavar="HOST,HOST", help="as ssh takes them; the first is process 0"
        )
        parser.add_argument(
            "--port", type=int, default=8476, help="on the first host, for the others (8476)"
        )

    def hosts(options: argparse.Namespace) -> Hosts:
        return Hosts(Runner(options.dry_run), options.hosts.split(","), port=options.port)

    _add_workers_verbs(verbs, add_hosts, hosts, extras="gpu")


def _add_xpk(places: Verbs) -> None:
    verbs = _group(places, "xpk", "GKE, through xpk and kubectl")

    def verb(
        name: str, run: Callable[[Xpk, argparse.Namespace], int | None], summary: str
    ) -> argparse.ArgumentParser:
        def act(options: argparse.Namespace) -> int | None:
            cluster = Xpk(Runner(options.dry_run), options.cluster, place=_place(options))
            return run(cluster, options)

        parser = _verb(verbs, name, act, summary, takes_command=name == "run")
        parser.add_argument("cluster", metavar="CLUSTER")
        if name not in ("create", "delete"):
            parser.add_argument("workload", metavar="WORKLOAD", help="a name for the run")
        _add_place(parser)
        return parser

    parser = verb(
        "create",
        lambda cluster, options: cluster.create(Slices.parse(options.slice), spot=options.spot),
        "make a cluster with a slice or several",
    )
    _add_slice(parser)
    parser.add_argument("--spot", action="store_true", help="cheaper; may be preempted")
    parser = verb(
        "run",
        lambda cluster, options: cluster.run(
            options.workload,
            Slices.parse(options.slice),
            options.command,
            image=options.image,
            storage=options.storage,
            restarts=options.restarts,
        ),
        "submit a run, which restarts after an interruption",
    )
    _add_slice(parser)
    parser.add_argument("--image", required=True, help="with stf-jax; launch/Dockerfile makes one")
    parser.add_argument("--storage", metavar="NAME", help="attached to the cluster; mount it")
    parser.add_argument("--restarts", type=int, default=50, metavar="N", help="at most (50)")
    verb("log", lambda cluster, options: cluster.log(options.workload), "show worker 0's log")
    verb(
        "watch",
        lambda cluster, options: cluster.watch(options.workload),
        "wait for the end: status 0 if the run is finished, 125 if it failed",
    )
    verb("stop", lambda cluster, options: cluster.stop(options.workload), "end the run")
    verb("delete", lambda cluster, _: cluster.delete(), "give the cluster back")


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--zone", help="(gcloud's compute/zone)")
    parser.add_argument("--project", help="(gcloud's project)")


def _place(options: argparse.Namespace) -> list[str]:
    named = {"zone": options.zone, "project": options.project}
    return [f"--{name}={value}" for name, value in named.items() if value]


def _add_local(places: Verbs) -> None:
    summary = "several processes with virtual CPU devices on this machine"
    parser = _verb(places, "local", _local, summary, takes_command=True)
    parser.add_argument("--processes", type=_positive(int), default=2, metavar="N", help="(2)")
    parser.add_argument(
        "--devices", type=_positive(int), default=4, metavar="N", help="of each (4)"
    )


def _local(options: argparse.Namespace) -> int:
    def listen(handler: Callable[[int, FrameType | None], Any]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)

    def say(process: int, stream: str, line: str) -> None:
        getattr(sys, stream).write(f"[{process}] {line}")
        getattr(sys, stream).flush()

    def interrupt(number: int, frame: FrameType | None) -> None:
        # A second signal ends them at once.
        listen(signal.default_int_handler)
        run.interrupt()

    run = LocalRun(options.command, processes=options.processes, devices=options.devices, say=say)
    if options.dry_run:
        runner = Runner(dry_run=True)
        for command in run.shell_commands:
            runner.run(command)
        return 0
    # Before they run, so that every signal reaches them.
    listen(interrupt)
    with run:
        return run.wait()


if __name__ == "__main__":
    sys.exit(main())
