"""Operations on the workers of a slice, which may be TPU VMs or hosts with ssh."""

import abc
import contextlib
import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from launch import remote
from launch.commands import Command, CommandFailed, LaunchError, Runner

_HERE = Path(__file__).parent.parent
# The status of ssh itself: the connection failed, not the command.
_DISCONNECTED = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What is installed on each worker.

    Attributes:
        extras: of stf-jax, separated by commas.
        bucket: a bucket to be mounted on /mnt/BUCKET; None for none.
    """

    extras: str
    bucket: str | None


class Workers(abc.ABC):
    """Machines that run one command together.

    Attributes:
        runner: runs the commands here.
    """

    def __init__(self, runner: Runner):
        self.runner = runner

    @abc.abstractmethod
    def shells(self, scripts: Sequence[str]) -> Mapping[str, Command]:
        """Local commands that run scripts on all workers: by worker, or one for all.

        Args:
            scripts: one for each worker; or one, for all of them.
        """

    @abc.abstractmethod
    def first(self, script: str) -> Command:
        """The local command that runs a script on worker 0."""

    @abc.abstractmethod
    def variants(self, command: Command) -> list[Command]:
        """The command for each worker, or one command for all."""

    @abc.abstractmethod
    def send(self, file: Path) -> Mapping[str, Command]:
        """Local commands that copy a file into the home directory of every worker."""

    @abc.abstractmethod
    def fetch(self, path: str, out: Path) -> Command:
        """The local command that copies a file or directory of worker 0 into `out`."""

    def failed_workers(self, failures: Mapping[str, CommandFailed]) -> list[str]:
        """The workers that failed."""
        return list(failures)

    def ready(self) -> bool:
        """Whether the workers exist and run."""
        return True

    def renew(self) -> None:
        """Rents the workers again.

        Raises:
            LaunchError: they are not rented.
        """
        raise LaunchError("these hosts cannot be had again by themselves")

    def everywhere(self, scripts: Sequence[str]) -> None:
        """Runs scripts on all workers and waits.

        Raises:
            LaunchError: some failed; names them.
        """
        self._together(self.shells(scripts))

    def setup(self, what: Setup) -> None:
        """Sends this clone, installs it, and checks that all workers find each other.

        Raises:
            LaunchError: a command failed.
        """
        archive = _HERE / "build" / remote.ARCHIVE
        # All files that git does not ignore, committed or not. Another setup may be sending it now.
        packed, unfinished = (shlex.quote(str(archive)) + more for more in ("", ".$$"))
        pack = (
            f"cd {shlex.quote(str(_HERE))} && mkdir -p build && "
            "git ls-files -z --cached --others --exclude-standard -- . ':!tests' ':!docs' "
            f"| tar --null -T - -czf {unfinished} && mv {unfinished} {packed}"
        )
        self.runner.run(["bash", "-o", "pipefail", "-c", pack])
        self._together(self.send(archive))
        self.everywhere([remote.setup(extras=what.extras, bucket=what.bucket)])
        check = self.variants(["python", "-m", "launch.check"])
        self.everywhere([remote.foreground(command) for command in check])

    def start(self, command: Command) -> None:
        """Starts a run on all workers at once, or on none, and returns.

        Raises:
            LaunchError: it did not start on all.
        """
        self.everywhere([remote.check_idle()])
        try:
            self.everywhere([remote.start(variant) for variant in self.variants(command)])
        except LaunchError:
            # The workers that did start would wait for the others.
            with contextlib.suppress(LaunchError):
                self.stop()
            raise

    def follow(self) -> int:
        """Shows the log of worker 0 until the run ends; the run's status.

        Ctrl-C ends the log only, not the run.
        """
        return self.runner.call(self.first(remote.follow()))

    def stop(self) -> None:
        """Asks the run to save and exit."""
        self.everywhere([remote.stop()])

    def state(self) -> None:
        """Shows the state of the run on each worker."""
        self.everywhere([remote.state()])

    def collect(self, out: Path, paths: Sequence[str]) -> None:
        """Copies the logs of worker 0, and paths from its home directory, into `out`."""
        self.runner.run(["mkdir", "-p", str(out)])
        for path in (remote.RUN, *paths):
            self.runner.run(self.fetch(path, out))

    def watch(self, command: Command, what: Setup | None, *, poll: float) -> int:
        """Follows a run, and starts it again until it is finished.

        Missing or preempted workers are rented and set up. After a restart of one worker all are
        set up. A run that is under way is followed.

        Args:
            command: status 75 means: interrupted; started again, it continues.
            what: the setup of new workers; None for hosts that are not rented.
            poll: seconds between looks.

        Returns:
            The status of the run, which is 0, or that of a mistake.

        Raises:
            LaunchError: a command failed, and the workers are still there.
        """
        under_way, killed = self.ready() and self._under_way(), False
        while True:
            if not under_way:
                try:
                    self._begin(command, what, killed=killed)
                except CommandFailed:
                    if self._look(poll) != "gone":
                        raise
                    continue
            status = self.follow()
            under_way = killed = False
            if status == 0 or self.runner.dry_run:
                return 0
            if status == remote.INTERRUPTED:
                self.runner.say("the run was interrupted; starting it again")
            elif (seen := self._look(poll)) == "gone":
                self.runner.say("the slice is not ready any more; renting it again")
            elif seen == "unknown" or status == _DISCONNECTED or self._under_way():
                self.runner.say("the connection is lost; trying again")
                under_way = True
            elif killed := self._was_killed():
                self.runner.say("setting up what has been restarted, and starting the run again")
            else:
                self.state()
                self.runner.say(f"the run has failed with status {status}; see its log")
                return status

    def _begin(self, command: Command, what: Setup | None, *, killed: bool) -> None:
        if what is not None and not self.ready():
            self.renew()
            self.setup(what)
        elif killed:
            # The others wait for the restarted worker, which has lost its mounts.
            self.stop()
            self.everywhere([remote.check_idle()])
            if what is not None:
                self.setup(what)
        self.start(command)

    def _under_way(self) -> bool:
        # Never with --dry-run, which is to show the start.
        return self.runner.call(self.first(remote.running())) == 0 and not self.runner.dry_run

    def _was_killed(self) -> bool:
        try:
            self.everywhere([remote.check_not_killed()])
        except CommandFailed:
            return True
        return False

    def _look(self, poll: float) -> Literal["ready", "gone", "unknown"]:
        """The state of the workers, after a moment in which the service may learn of it."""
        try:
            if self.ready():
                time.sleep(poll)
            return "ready" if self.ready() else "gone"
        except CommandFailed as error:
            # The connection to the service may be lost as well.
            self.runner.say(str(error))
            time.sleep(poll)
            return "unknown"

    def _together(self, commands: Mapping[str, Command]) -> None:
        failures = self.runner.together(commands)
        if failures:
            names = ", ".join(self.failed_workers(failures))
            first = next(iter(failures.values()))
            raise CommandFailed(first.command, first.status, first.said, where=f"{names}: ")
