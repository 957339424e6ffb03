"""A run on TPU VMs that is kept going, with a gcloud that only seems to rent them."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.launch.conftest import Cloud
from tests.launch.tpu import QUICK, SLICE, errors, verbs
from tests.launch.waiting import until

# Counts to eight in a file that outlives the slice, as a bucket does; saves when it is told to.
COUNTER = """
import os, pathlib, signal, sys, time
def leave(*_): print("saved", flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, leave)
file = pathlib.Path(sys.argv[1], os.path.basename(os.environ["HOME"]))
for step in range(len(file.read_text().split()) if file.exists() else 0, 8):
    time.sleep(0.1)
    print("step", step, flush=True)
    with file.open("a") as done: done.write(f"{step} ")
"""


def steps(file: Path) -> list[str]:
    """That were done; what is killed may leave them at any moment."""
    return file.read_text().split() if file.exists() else []


@pytest.mark.parametrize("warned", [True, False])
def test_preempted_in_the_middle(
    cloud: Cloud, capfd: pytest.CaptureFixture[str], tmp_path: Path, warned: bool
) -> None:
    bucket = tmp_path / "bucket"
    bucket.mkdir()

    def take_away() -> None:
        until(lambda: len(steps(bucket / "w-0")) >= 3)
        if warned:
            main(["tpu", "stop", "s"])
            until((cloud.worker("w-0") / "launch" / "status").exists)
        cloud.preempt()

    thread = threading.Thread(target=take_away)
    thread.start()
    command = [sys.executable, "-c", COUNTER, str(bucket)]
    assert main(["tpu", "watch", "s", *SLICE, "--spot", *QUICK, "--", *command]) == 0
    thread.join(60)
    # Every step once and in order: the second slice continued where the first one was.
    assert steps(bucket / "w-0") == [str(step) for step in range(8)]
    assert verbs(cloud).count("queued-resources create") == 2
    assert verbs(cloud).count("tpu-vm scp") == 2
    said = capfd.readouterr()
    assert ("saved" in said.out) == warned
    assert "step 0" in said.out
    assert "step 7" in said.out
    # One that is finished is not rented again.
    assert "s is deleted" in said.err
    assert (cloud.folder / "state").read_text() == "READY"


def test_interrupted_on_a_slice_that_stays(rented: Cloud, tmp_path: Path) -> None:
    """As by maintenance: the same machines run it again."""
    script = f"echo x >> {tmp_path}/times; [ $(wc -l < {tmp_path}/times) -ge 5 ] || exit 75"
    before = len(rented.calls)
    watch = ["tpu", "watch", "s", *SLICE, *QUICK]
    assert main([*watch, "--", "bash", "-c", script]) == 0
    assert "queued-resources create" not in verbs(rented)[before:]


def test_a_slice_that_is_repaired(
    rented: Cloud, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is waited for, not deleted; its machines have begun anew."""
    capfd.readouterr()

    def repair() -> None:
        until((tmp_path / "begun").exists)
        rented.note("state", "REPAIRING")
        rented.kill()
        until(lambda: "s: REPAIRING" in said())
        rented.note("state", "READY")

    heard: list[str] = []

    def said() -> str:
        heard.append(capfd.readouterr().err)
        return "".join(heard)

    thread = threading.Thread(target=repair)
    thread.start()
    script = f"[ -e {tmp_path}/begun ] && exit 0; touch {tmp_path}/begun; sleep 60"
    watch = ["tpu", "watch", "s", *SLICE, *QUICK]
    assert main([*watch, "--", "bash", "-c", script]) == 0
    thread.join(60)
    assert verbs(rented).count("queued-resources create") == 1
    assert "queued-resources delete" not in verbs(rented)
    assert verbs(rented).count("tpu-vm scp") == 2


@pytest.mark.parametrize("worker", ["w-0", "w-1"])
def test_a_worker_that_is_restarted(rented: Cloud, tmp_path: Path, worker: str) -> None:
    """The slice stays ready, and the others may wait or fail; mounts have to be made again."""

    def restart() -> None:
        for name in ("w-0", "w-1"):
            until((rented.worker(name) / "begun").exists)
        pid = rented.worker(worker) / "launch" / "pid"
        until(lambda: pid.exists() and pid.read_text() != "")
        os.killpg(int(pid.read_text()), signal.SIGKILL)
        if worker != "w-0":
            (tmp_path / "lost").touch()

    thread = threading.Thread(target=restart)
    thread.start()
    wait = f"until [ -e {tmp_path}/lost ]; do sleep 0.1; done"
    script = f"[ -e ~/begun ] && exit 0; touch ~/begun; {wait}; exit 1"
    watch = ["tpu", "watch", "s", *SLICE, "--bucket", "b", *QUICK]
    assert main([*watch, "--", "bash", "-c", script]) == 0
    thread.join(60)
    mounted = (rented.worker(worker) / "tools.log").read_text().splitlines()
    assert mounted.count("gcsfuse --implicit-dirs b /mnt/b") == 1
    assert verbs(rented).count("queued-resources create") == 1


def test_watch_waits_for_a_request_that_is_in_the_queue(cloud: Cloud) -> None:
    """Its place there is not given up."""
    cloud.note("queue", "WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nACTIVE")
    assert main(["tpu", "create", "s", *SLICE, "--spot", *QUICK]) == 0
    cloud.note("queue", "WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nACTIVE")
    cloud.note("state", "CREATING")

    def arrive() -> None:
        until(lambda: (cloud.folder / "queue").read_text() == "ACTIVE")
        cloud.note("state", "READY")

    thread = threading.Thread(target=arrive)
    thread.start()
    assert main(["tpu", "watch", "s", *SLICE, *QUICK, "--", "true"]) == 0
    thread.join(60)
    assert verbs(cloud).count("queued-resources create") == 1
    assert "queued-resources delete" not in verbs(cloud)


def test_a_mistake_is_not_repeated(
    rented: Cloud, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f'echo x >> {tmp_path}/times-$(basename $HOME); echo "error: no such key" >&2; exit 1'
    watch = ["tpu", "watch", "s", *SLICE, *QUICK]
    assert main([*watch, "--", "bash", "-c", script]) == 1
    assert (tmp_path / "times-w-0").read_text() == "x\n"
    said = capfd.readouterr()
    assert "error: no such key" in said.out
    assert "w-0: ended with status 1" in said.out
    assert "the run has failed with status 1; see its log" in said.err


def test_quota_that_is_gone_when_it_is_needed_again(
    cloud: Cloud, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def take_away() -> None:
        until((tmp_path / "begun").exists)
        cloud.note("refuse", "RESOURCE_EXHAUSTED: Quota limit exceeded")
        cloud.preempt()

    thread = threading.Thread(target=take_away)
    thread.start()
    watch = ["tpu", "watch", "s", *SLICE, *QUICK]
    assert main([*watch, "--", "bash", "-c", f"touch {tmp_path}/begun; sleep 60"]) == 1
    thread.join(60)
    (error,) = errors(capfd)
    assert "Quota limit exceeded; ask for more" in error


def test_watch_outlives_an_outage(
    rented: Cloud, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the slice nor the run has changed."""
    wait = f"until [ -e {tmp_path}/on ]; do sleep 0.1; done"
    script = f"echo x >> {tmp_path}/times-$(basename $HOME); {wait}"
    heard: list[str] = []

    def said(text: str) -> bool:
        heard.append(capfd.readouterr().err)
        return text in "".join(heard)

    def cut_off() -> None:
        until((tmp_path / "times-w-0").exists)
        until((rented.folder / "follower").exists)
        rented.note("outage")
        # What shows the log is cut off, too.
        os.kill(int((rented.folder / "follower").read_text()), signal.SIGKILL)
        until(lambda: said("a problem with the network"))
        (rented.folder / "outage").unlink()
        (tmp_path / "on").touch()

    thread = threading.Thread(target=cut_off)
    thread.start()
    watch = ["tpu", "watch", "s", *SLICE, *QUICK]
    assert main([*watch, "--", "bash", "-c", script]) == 0
    thread.join(60)
    assert (tmp_path / "times-w-0").read_text() == "x\n"
    assert verbs(rented).count("queued-resources create") == 1


def test_watch_follows_a_run_that_is_under_way(rented: Cloud, tmp_path: Path) -> None:
    script = f"echo x >> {tmp_path}/times-$(basename $HOME); sleep 1"
    watch = ["tpu", "watch", "s", *SLICE, *QUICK]
    statuses: list[int] = []
    runs = [["tpu", "run", "s"], watch]
    threads = []
    for run in runs:
        threads.append(
            threading.Thread(
                target=lambda run=run: statuses.append(main([*run, "--", "bash", "-c", script]))
            )
        )
        threads[-1].start()
        until((tmp_path / "times-w-0").exists)
    for thread in threads:
        thread.join(60)
    assert statuses == [0, 0]
    assert (tmp_path / "times-w-0").read_text() == "x\n"
