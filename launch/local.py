"""A pod on this machine: several processes with virtual CPU devices, over loopback."""

import functools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, Self

from launch import remote
from launch.commands import Command, forward, start
from launch.ssh import process_flags

Say = Callable[[int, Literal["stdout", "stderr"], str], None]

# Seconds that the other processes of a failed run get to end.
_GRACE = 10


class LocalRun:
    """A command in several processes: a context manager that starts and ends them.

    Args:
        command: a verb of `stf-jax` that runs on several hosts; it gets the same flags as from
            `launch ssh`.
        processes: how many.
        devices: virtual devices of each.
        say: called with every line: the process, its stream and the text.

    Attributes:
        processes: in the order of their numbers.
    """

    def __init__(self, command: Command, *, processes: int, devices: int, say: Say):
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        self._variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
        self._commands = [
            [*command, *more] for more in process_flags(f"127.0.0.1:{free_port()}", processes)
        ]
        self._say = say
        self._interrupted = False
        self._threads: list[threading.Thread] = []
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        """Starts the processes.

        Raises:
            LaunchError: there is no such command.
        """
        try:
            for command in self._commands:
                self._start(command)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kill()

    @property
    def shell_commands(self) -> list[Command]:
        """What a user would type to start the processes, each in a terminal of its own."""
        variables = [f"{name}={value}" for name, value in self._variables.items()]
        return [["env", *variables, *command] for command in self._commands]

    def interrupt(self) -> None:
        """Makes `wait` ask all to save and exit; a signal handler may call this before they run."""
        self._interrupted = True

    def wait(self, *, seconds: float = float("inf")) -> int:
        """Waits until all have ended; ends the others when one fails.

        Returns:
            0 if all are finished, 75 if they were interrupted; otherwise what the first to fail
            returned, 128 and more being a signal.

        Raises:
            TimeoutError: they take longer; they are killed.
        """
        deadline, failed, signaled = time.monotonic() + seconds, 0, False
        while None in self.statuses:
            if self._interrupted and not signaled:
                signaled = True
                self._signal(signal.SIGTERM)
            if not failed and (failed := _failure(self.statuses)):
                self._signal(signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + _GRACE)
            if time.monotonic() > deadline:
                self._kill()
                if not failed:
                    raise TimeoutError(f"the run takes longer than {seconds:g} s")
            time.sleep(0.05)
        for thread in self._threads:
            thread.join()
        failed = failed or _failure(self.statuses)
        return failed or (remote.INTERRUPTED if remote.INTERRUPTED in self.statuses else 0)

    @property
    def statuses(self) -> list[int | None]:
        """The status of each process; None while it runs."""
        return [process.poll() for process in self.processes]

    def _start(self, command: Command) -> None:
        process = start(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | self._variables,
            # Ctrl-C reaches them through this process only; one signal reaches their children.
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        number = len(self.processes)
        self.processes.append(process)
        self._threads += [
            forward(process.stdout, functools.partial(self._say, number, "stdout")),
            forward(process.stderr, functools.partial(self._say, number, "stderr")),
        ]

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            # Popen leaves a process alone that has ended.
            process.send_signal(number)

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _failure(statuses: Sequence[int | None]) -> int:
    """The first status of a process that has failed, or 0."""
    for status in statuses:
        if status not in (None, 0, remote.INTERRUPTED):
            # Popen returns the negated signal of a process that a signal ended.
            return status if status > 0 else 128 - status
    return 0


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
