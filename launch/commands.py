"""Runs commands, prints them instead with --dry-run, and reports their failures."""

import dataclasses
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

Command = Sequence[str]

_INSTALL = {
    "gcloud": "see https://cloud.google.com/sdk/docs/install",
    "kubectl": "gcloud components install kubectl",
    "xpk": "pip install xpk",
}


class LaunchError(Exception):
    """An error; its message is one line for the user."""


class CommandFailed(LaunchError):
    """A command ended with another status than 0.

    Attributes:
        command: the command.
        status: its status.
        said: what it wrote to stderr, if that was kept.
    """

    def __init__(self, command: Command, status: int, said: str = "", *, where: str = ""):
        self.command, self.status, self.said = command, status, said
        what = f"{where}{command[0]} failed with status {status}"
        super().__init__(f"{what}: {_reason(said) or shlex.join(command)}")


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs commands, or prints them as you would type them.

    Attributes:
        dry_run: print only.
    """

    dry_run: bool = False

    def call(self, command: Command) -> int:
        """Runs a command on this terminal; returns its status."""
        if self._show(command):
            return 0
        with start(command) as process:
            return process.wait()

    def run(self, command: Command) -> None:
        """Runs a command on this terminal.

        Raises:
            CommandFailed: its status is not 0.
        """
        if status := self.call(command):
            raise CommandFailed(command, status)

    def ask(self, command: Command, *, pretend: str) -> str:
        """Runs a command and returns its stdout; with --dry-run returns `pretend`.

        Raises:
            CommandFailed: its status is not 0.
        """
        if self._show(command):
            return pretend
        with start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            answer, said = process.communicate()
        if process.returncode:
            raise CommandFailed(command, process.returncode, said)
        return answer.strip()

    def together(self, commands: Mapping[str, Command]) -> dict[str, CommandFailed]:
        """Runs all at the same time, and prefixes each line of output with the name of its command.

        Returns:
            Those that failed.
        """
        if self.dry_run:
            for command in commands.values():
                self._show(command)
            return {}
        processes = {
            name: start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for name, command in commands.items()
        }
        stderr: dict[str, list[str]] = {name: [] for name in commands}
        threads = []
        for name, process in processes.items():
            prefix = f"[{name}] " if name else ""
            assert process.stdout is not None
            assert process.stderr is not None

            def say_error(line: str, prefix: str = prefix, said: list[str] = stderr[name]) -> None:
                said.append(line)
                sys.stderr.write(prefix + line)

            def say(line: str, prefix: str = prefix) -> None:
                sys.stdout.write(prefix + line)
                sys.stdout.flush()

            threads += [forward(process.stdout, say), forward(process.stderr, say_error)]
        for thread in threads:
            thread.join()
        statuses = {name: process.wait() for name, process in processes.items()}
        return {
            name: CommandFailed(commands[name], status, "".join(stderr[name]))
            for name, status in statuses.items()
            if status
        }

    def say(self, text: str) -> None:
        """Tells the user what happens; silent with --dry-run."""
        if not self.dry_run:
            sys.stderr.write(f"launch: {text}\n")
            sys.stderr.flush()

    def _show(self, command: Command) -> bool:
        if self.dry_run:
            sys.stdout.write(f"{shlex.join(command)}\n")
        return self.dry_run


def _reason(said: str) -> str:
    """The line of stderr with the reason; empty if there is none."""
    # gcloud takes several lines to say that a zone or project is missing.
    if missing := re.search(r"Failed to find attribute \[(\w+)\]", said):
        name = missing[1]
        key = {"zone": "compute/zone"}.get(name, name)
        return f"no {name} is set; give --{name}, or 'gcloud config set {key} ...' once"
    # It gives its reason after "ERROR:", and counts workers after "#####".
    lines = [line for line in said.splitlines() if line.strip() and line[0] != "#"]
    reasons = [line for line in lines if line.startswith("ERROR:")] or lines
    return reasons[-1] if reasons else ""


def forward(stream: IO[str], say: Callable[[str], None]) -> threading.Thread:
    """Hands each line to `say` until the stream ends; join the thread to wait for the end."""

    def read() -> None:
        with stream:
            for line in stream:
                say(line if line.endswith("\n") else f"{line}\n")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def start(command: Command, **options: Any) -> subprocess.Popen[str]:
    """Starts a process whose streams are text.

    Raises:
        LaunchError: there is no such program, or it cannot be run.
    """
    name = command[0]
    try:
        return subprocess.Popen(command, text=True, errors="replace", **options)
    except FileNotFoundError as error:
        raise LaunchError(
            f"{name} is not installed, or not on the PATH; {_INSTALL.get(name, 'install it')}"
        ) from error
    except PermissionError as error:
        raise LaunchError(f"{name} cannot be run; it is not marked as a program") from error
