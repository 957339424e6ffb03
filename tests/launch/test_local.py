"""The pod on this machine."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.local import LocalRun, free_port
from tests.launch.waiting import until

CHECK = [sys.executable, "-W", "ignore", "-m", "launch.check"]
# A minute, in which a shell hears its signals.
RUN = "for _ in {1..600}; do sleep 0.1; done"


def bash(script: str) -> list[str]:
    """A command to which its number is known as $N."""
    return ["bash", "-c", f"N=${{3#--process=}}; {script}", "bash"]


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def start(script: str, *, said: list[str] | None = None) -> LocalRun:
    return LocalRun(
        bash(script),
        processes=2,
        devices=1,
        say=lambda process, stream, line: (
            None if said is None else said.append(f"{process} {stream} {line}")
        ),
    )


@contextlib.contextmanager
def launcher(*command: str, devices: int = 1) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "launch", "local", "--processes", "2"),
            *("--devices", str(devices), "--", *command),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            yield run
        finally:
            # A test that has failed must not wait for it.
            run.kill()


def test_processes_find_each_other() -> None:
    with launcher(*CHECK, devices=3) as run:
        said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    # Gloo has lines of its own.
    lines = [line for line in said[0].splitlines() if "worker" in line]
    assert sorted(lines) == [
        "[0] worker 0 of 2: 3 of 6 devices, cpu",
        "[1] worker 1 of 2: 3 of 6 devices, cpu",
    ]


def test_dry_run_prints_commands_that_find_each_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    touch = ["bash", "-c", f'echo "$XLA_FLAGS $*" >> {tmp_path}/ran', "bash"]
    assert main(["local", "--processes", "2", "--devices", "3", "--dry-run", "--", *touch]) == 0
    assert not (tmp_path / "ran").exists()
    subprocess.run(["bash", "-e"], input=capsys.readouterr().out, text=True, check=True)
    first, second = (tmp_path / "ran").read_text().splitlines()
    assert "--xla_force_host_platform_device_count=3 --coordinator=127.0.0.1:" in first
    assert first.endswith("--processes=2 --process=0")
    assert second == first.removesuffix("0") + "1"


def test_no_such_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local", "--", "stf-jacks", "train"]) == 1
    said = capsys.readouterr().err
    assert said == "error: stf-jacks is not installed, or not on the PATH; install it\n"
    assert main(["local", "--", str(tmp_path), "train"]) == 1
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path} cannot be run; it is not marked as a program\n"


@pytest.mark.parametrize("flag", ["--processes", "--devices"])
@pytest.mark.parametrize("count", ["0", "-2", "1.5"])
def test_no_process(capsys: pytest.CaptureFixture[str], flag: str, count: str) -> None:
    with pytest.raises(SystemExit):
        main(["local", flag, count, "--", "true"])
    assert f"{flag}: '{count}' is not a whole number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_is_alone_says_so(number: int) -> None:
    """On one line, soon, and with the fix; JAX itself waits for minutes and prints its stack."""
    begun = time.monotonic()
    run = subprocess.run(
        [
            *(*CHECK, "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"),
            *("--process", str(number), "--host-timeout", "2"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert time.monotonic() - begun < 50
    assert run.returncode == 1
    assert run.stderr == (
        f"error: process {number} of 2 has waited 2 s for the other hosts in vain; start the same "
        "command on all of them at once, as 'python -m launch' does (docs/launching.md)\n"
    )


def test_streams_and_statuses() -> None:
    said: list[str] = []
    with start("echo out $N; echo error $N >&2; [ $N = 0 ] || exit 75", said=said) as run:
        assert run.wait(seconds=60) == 75
    assert sorted(said) == [
        "0 stderr error 0\n",
        "0 stdout out 0\n",
        "1 stderr error 1\n",
        "1 stdout out 1\n",
    ]


@pytest.mark.parametrize(("ending", "status"), [("exit 3", 3), ("kill -KILL $$", 137)])
def test_one_that_fails_ends_the_others(ending: str, status: int) -> None:
    with start(f"[ $N = 1 ] && {ending}; sleep 60") as run:
        assert run.wait(seconds=60) == status
        assert run.statuses[0] == -signal.SIGTERM


def test_one_that_is_interrupted_does_not_end_the_others() -> None:
    """They leave by themselves, after they have saved."""
    with start("[ $N = 1 ] && exit 75; sleep 1; exit 75") as run:
        assert run.wait(seconds=60) == 75
        assert run.statuses == [75, 75]


def test_one_that_hangs() -> None:
    with start("sleep 60 & wait") as run, pytest.raises(TimeoutError, match=r"longer than 0\.5 s"):
        run.wait(seconds=0.5)
    for process in run.processes:
        # The system buries its children, and may take a moment for it.
        until(lambda group=process.pid: not alive(group))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C as SIGTERM, since that is what a run on several hosts listens to."""
    script = f"trap 'echo saved; exit 75' TERM; touch {tmp_path}/$N; {RUN}"
    with launcher(*bash(script)) as run:
        until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        run.send_signal(number)
        out, errors = run.communicate(timeout=60)
    assert run.returncode == 75, errors
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]


def test_a_second_signal_kills(tmp_path: Path) -> None:
    script = f"trap 'touch {tmp_path}/told-$N' TERM; touch {tmp_path}/$N; {RUN}"
    with launcher(*bash(script)) as run:
        until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        run.send_signal(signal.SIGINT)
        until(lambda: (tmp_path / "told-0").exists())
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
    assert run.returncode == 130
