"""TPU VMs, through `gcloud compute tpus`."""

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.commands import Command, CommandFailed, LaunchError, Runner
from launch.slices import Slices
from launch.workers import Workers

# What has a state, and the field in which gcloud shows it.
_REQUEST = ("queued-resources", "state.state")
_SLICE = ("tpu-vm", "state")
# Temporary states.
_WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
_COMING = ("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING")
_GOING = ("SUSPENDING", "STOPPING", "DELETING")
_ACTIVE, _READY = "ACTIVE", "READY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renting:
    """How a slice is rented.

    Attributes:
        slice: its names.
        spot: cheaper, and preempted when somebody else pays more.
        queue: wait until one is free; otherwise now or not at all.

    Raises:
        LaunchError: several slices.
    """

    slice: Slices
    spot: bool
    queue: bool

    def __post_init__(self) -> None:
        if self.slice.count > 1:
            raise LaunchError("TPU VMs are rented as one slice here; for several use launch xpk")


class TpuVm(Workers):
    """A slice of TPU VMs and, of the same name, the request for it in the queue.

    Attributes:
        name: in the project and zone.
        place: flags that name the zone and the project where gcloud's configuration does not.
        renting: how to rent it; None for a slice that exists.
        poll: seconds between looks.
    """

    def __init__(
        self,
        runner: Runner,
        name: str,
        *,
        place: Sequence[str],
        renting: Renting | None = None,
        poll: float = 30,
    ):
        super().__init__(runner)
        self.name, self.place, self.renting, self.poll = name, place, renting, poll

    def create(self) -> None:
        """Asks for the slice and waits until it is ready.

        Raises:
            LaunchError: the service refuses.
        """
        assert self.renting is not None
        wanted = self.renting
        kind = f"--accelerator-type={wanted.slice.accelerator}"
        spot = ["--spot"] if wanted.spot else []
        self.runner.say(f"asking for {wanted.slice.accelerator} as {self.name}")
        if wanted.queue:
            version = f"--runtime-version={wanted.slice.runtime}"
            more = [f"--node-id={self.name}", kind, version, *spot]
            self._ask_for(self._gcloud("queued-resources", "create", *more))
            self._expect(_ACTIVE, _REQUEST, _WAITING)
        else:
            version = f"--version={wanted.slice.runtime}"
            self._ask_for(self._gcloud("tpu-vm", "create", kind, version, *spot))
        self._expect(_READY, _SLICE, _COMING)
        self.runner.say(f"{self.name} is ready")

    def delete(self) -> None:
        """Gives the slice and the request for it back; says so if there is neither."""
        self._settle(_REQUEST, _GOING, pretend="")
        # A slice may exist without a request, and a request without a slice.
        gone = [self._is_deleted("queued-resources", "--force"), self._is_deleted("tpu-vm")]
        self.runner.say(f"{self.name} is deleted" if any(gone) else f"there is no {self.name}")

    def ready(self) -> bool:
        """Whether the slice is ready; never with --dry-run."""
        return self._state(_SLICE, pretend="") == _READY

    def renew(self) -> None:
        """Waits for a slice that is on its way or in repair; otherwise replaces it."""
        self._settle(_REQUEST, _WAITING, pretend="")
        if self._settle(_SLICE, _COMING, pretend="") != _READY:
            self.delete()
            self.create()

    def shells(self, scripts: Sequence[str]) -> Mapping[str, Command]:
        """One command: gcloud itself reaches all workers."""
        (script,) = scripts
        return {"": self._ssh(script, worker="all")}

    def first(self, script: str) -> Command:
        """The command for worker 0, as gcloud numbers the workers."""
        return self._ssh(script, worker="0")

    def variants(self, command: Command) -> list[Command]:
        """The same command for all: on TPU VMs JAX finds the others by itself."""
        return [command]

    def send(self, file: Path) -> Mapping[str, Command]:
        """One command for all."""
        return {
            "": self._gcloud("tpu-vm", "scp", "--worker=all", files=[str(file), f"{self.name}:"])
        }

    def fetch(self, path: str, out: Path) -> Command:
        """The command that copies a file or directory of worker 0."""
        files = [f"{self.name}:{path}", str(out)]
        return self._gcloud("tpu-vm", "scp", "--worker=0", "--recurse", files=files)

    def failed_workers(self, failures: Mapping[str, CommandFailed]) -> list[str]:
        """The workers that gcloud names on stderr."""
        said = "".join(failure.said for failure in failures.values())
        numbers = re.findall(r"on worker (\d+) failed", said)
        return [f"worker {number}" for number in sorted(set(numbers), key=int)] or [self.name]

    def _ssh(self, script: str, *, worker: str) -> Command:
        # A preempted slice does not close the connection.
        alive = "--ssh-flag=-o ServerAliveInterval=30"
        return self._gcloud("tpu-vm", "ssh", f"--worker={worker}", alive, f"--command={script}")

    def _gcloud(
        self, group: str, verb: str, *flags: str, files: Sequence[str] | None = None
    ) -> list[str]:
        what = [self.name] if files is None else files
        return ["gcloud", "compute", "tpus", group, verb, *what, *self.place, *flags]

    def _ask_for(self, command: Command) -> None:
        try:
            self.runner.ask(command, pretend="")
        except CommandFailed as error:
            reason = error.said.lower()
            if "already exists" in reason or "already_exists" in reason:
                hint = f"delete {self.name} first, or choose another name"
            elif "quota" in reason:
                hint = "ask for more under IAM & Admin > Quotas, or try another zone or --spot"
            elif "no more capacity" in reason or "stockout" in reason:
                hint = "wait in the queue (without --now), or try another zone"
            else:
                raise
            raise LaunchError(f"{error}; {hint}") from error

    def _expect(self, wanted: str, what: tuple[str, str], passing: Sequence[str]) -> None:
        if (state := self._settle(what, passing, pretend=wanted)) != wanted:
            raise LaunchError(
                f"{self.name} is {state or 'gone'} instead of {wanted}; see why with 'gcloud "
                f"compute tpus {what[0]} describe {self.name}', then delete it"
            )

    def _settle(self, what: tuple[str, str], passing: Sequence[str], *, pretend: str) -> str:
        """The first state that is not temporary."""
        last = ""
        while (state := self._state(what, pretend=pretend)) in passing:
            if state != last:
                self.runner.say(f"{self.name}: {state}")
            last = state
            time.sleep(self.poll)
        return state

    def _state(self, what: tuple[str, str], *, pretend: str) -> str:
        """The state of the slice or the request; empty if there is none."""
        group, field = what
        command = self._gcloud(group, "describe", f"--format=value({field})")
        try:
            return self.runner.ask(command, pretend=pretend)
        except CommandFailed as error:
            if _not_there(error):
                return ""
            raise

    def _is_deleted(self, group: str, *flags: str) -> bool:
        try:
            self.runner.ask(self._gcloud(group, "delete", *flags, "--quiet"), pretend="")
        except CommandFailed as error:
            if _not_there(error):
                return False
            raise
        return True


def _not_there(error: CommandFailed) -> bool:
    return "NOT_FOUND" in error.said or "was not found" in error.said
