"""Hosts with plain ssh; the first is process 0."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.commands import Command, LaunchError, Runner
from launch.workers import Workers

# Never ask for a password, and end when the host no longer answers.
_OPTIONS = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=30")


def process_flags(coordinator: str, processes: int) -> list[list[str]]:
    """The flags for each process, where JAX cannot find the others by itself."""
    return [
        [f"--coordinator={coordinator}", f"--processes={processes}", f"--process={number}"]
        for number in range(processes)
    ]


class Hosts(Workers):
    """Hosts that ssh reaches; see `Workers`.

    Attributes:
        hosts: as ssh takes them; with USER@ or not.
        port: on the first host, for the others.

    Raises:
        LaunchError: a name is empty, or there twice.
    """

    def __init__(self, runner: Runner, hosts: Sequence[str], *, port: int):
        super().__init__(runner)
        if "" in hosts:
            raise LaunchError(f"a host has no name in '{','.join(hosts)}'; write gpu0,gpu1")
        if twice := [host for host in hosts if list(hosts).count(host) > 1]:
            raise LaunchError(f"{twice[0]} is there twice in '{','.join(hosts)}'; name it once")
        self.hosts, self.port = list(hosts), port

    def shells(self, scripts: Sequence[str]) -> Mapping[str, Command]:
        """A command for each host."""
        all_scripts = scripts if len(scripts) > 1 else [*scripts] * len(self.hosts)
        return {
            host: self._ssh(host, script)
            for host, script in zip(self.hosts, all_scripts, strict=True)
        }

    def first(self, script: str) -> Command:
        """The command for the first host."""
        return self._ssh(self.hosts[0], script)

    def variants(self, command: Command) -> list[Command]:
        """The command for each host, with the flags that connect each process to the others."""
        coordinator = f"{self.hosts[0].rpartition('@')[2]}:{self.port}"
        return [[*command, *flags] for flags in process_flags(coordinator, len(self.hosts))]

    def send(self, file: Path) -> Mapping[str, Command]:
        """A command for each host."""
        return {host: ["scp", "-q", *_OPTIONS, str(file), f"{host}:"] for host in self.hosts}

    def fetch(self, path: str, out: Path) -> Command:
        """The command that copies a file or directory of the first host."""
        return ["scp", "-q", "-r", *_OPTIONS, f"{self.hosts[0]}:{path}", str(out)]

    def _ssh(self, host: str, script: str) -> Command:
        return ["ssh", *_OPTIONS, host, script]
