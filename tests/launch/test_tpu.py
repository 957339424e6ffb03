"""TPU VMs, with a gcloud that only seems to rent them."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import remote
from launch.__main__ import main
from tests.launch.arguments import ODD, WRITE_ARGUMENTS
from tests.launch.conftest import Cloud
from tests.launch.waiting import until

SLICE = ["--slice", "v5e:4x4"]
QUICK = ["--poll", "0.05"]


def gcloud(group: str, verb: str, *rest: str) -> list[str]:
    return ["gcloud", "compute", "tpus", group, verb, *rest]


def verbs(cloud: Cloud) -> list[str]:
    return [" ".join(call[3:5]) for call in cloud.calls]


def errors(capfd: pytest.CaptureFixture[str]) -> list[str]:
    lines = capfd.readouterr().err.splitlines()
    assert not [line for line in lines if "Traceback" in line]
    return [line for line in lines if line.startswith("error: ")]


@pytest.fixture
def rented(cloud: Cloud) -> Cloud:
    """A slice that is set up."""
    assert main(["tpu", "create", "s", *SLICE, *QUICK]) == 0
    assert main(["tpu", "setup", "s"]) == 0
    return cloud


def test_a_slice_from_the_queue(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    cloud.note("queue", "ACCEPTED\nWAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nACTIVE")
    place = ["--zone", "us-west4-a", "--project", "p"]
    assert main(["tpu", "create", "s", *SLICE, "--spot", *place, *QUICK]) == 0
    at = ["--zone=us-west4-a", "--project=p"]
    asked = gcloud("queued-resources", "describe", "s", *at, "--format=value(state.state)")
    assert cloud.calls == [
        gcloud(
            "queued-resources",
            "create",
            *("s", *at, "--node-id=s", "--accelerator-type=v5litepod-16"),
            *("--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
        ),
        *[asked] * 4,
        gcloud("tpu-vm", "describe", "s", *at, "--format=value(state)"),
    ]
    said = capfd.readouterr().err
    assert said.count("s: WAITING_FOR_RESOURCES") == 1
    assert "s is ready" in said


@pytest.mark.parametrize(
    ("topology", "accelerator", "version"),
    [
        ("v4:2x2x2", "v4-16", "tpu-ubuntu2204-base"),
        ("v5e:2x4", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p:2x2x1", "v5p-8", "v2-alpha-tpuv5"),
        ("v6e:2x4", "v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_a_slice_at_once(cloud: Cloud, topology: str, accelerator: str, version: str) -> None:
    """By the names of cloud.google.com/tpu/docs: v4 and v5p count cores, the others chips."""
    assert main(["tpu", "create", "s", "--slice", topology, "--now", *QUICK]) == 0
    flags = [f"--accelerator-type={accelerator}", f"--version={version}"]
    assert cloud.calls[0] == gcloud("tpu-vm", "create", "s", *flags)


@pytest.mark.parametrize(
    ("topology", "fix"),
    [("v5e:4x4x4", "a slice of v5e has 2 axes"), ("2xv5e:4x4", "for several use launch xpk")],
)
def test_no_such_slice(
    cloud: Cloud, capfd: pytest.CaptureFixture[str], topology: str, fix: str
) -> None:
    assert main(["tpu", "create", "s", "--slice", topology]) == 1
    (error,) = errors(capfd)
    assert fix in error
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("refusal", "fix"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'V5Lite' has been exceeded. Limit: 0", "IAM & Admin"),
        ("There is no more capacity in the zone", "wait in the queue"),
        ("PERMISSION_DENIED: tpu.nodes.create", "PERMISSION_DENIED"),
    ],
)
@pytest.mark.parametrize("how", [[], ["--now"]])
def test_refused(
    cloud: Cloud, capfd: pytest.CaptureFixture[str], refusal: str, fix: str, how: list[str]
) -> None:
    cloud.note("refuse", refusal)
    assert main(["tpu", "create", "s", *SLICE, *how]) == 1
    (error,) = errors(capfd)
    assert refusal in error
    assert fix in error
    assert len(cloud.calls) == 1


@pytest.mark.parametrize(("name", "key"), [("zone", "compute/zone"), ("project", "project")])
def test_nothing_is_set(
    cloud: Cloud, capfd: pytest.CaptureFixture[str], name: str, key: str
) -> None:
    """What gcloud 528 says on several lines, of which the first does not tell."""
    cloud.note(
        "refuse",
        "(gcloud.compute.tpus.queued-resources.create) Error parsing [queued_resource].\n"
        "The [queued_resource] resource is not properly specified.\n"
        f"Failed to find attribute [{name}]. The attribute can be set in the following ways: \n"
        f"- provide the argument `--{name}` on the command line\n",
    )
    assert main(["tpu", "create", "s", *SLICE]) == 1
    (error,) = errors(capfd)
    assert error.endswith(f"no {name} is set; give --{name}, or 'gcloud config set {key} ...' once")


def test_twice(rented: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["tpu", "create", "s", *SLICE]) == 1
    (error,) = errors(capfd)
    assert "delete s first, or choose another name" in error
    assert [main(["tpu", "delete", "s"]) for _ in range(2)] == [0, 0]
    said = capfd.readouterr().err
    assert "s is deleted" in said
    assert "there is no s" in said
    assert gcloud("queued-resources", "delete", "s", "--force", "--quiet") in rented.calls


def test_a_request_that_failed(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    cloud.note("queue", "WAITING_FOR_RESOURCES\nFAILED")
    assert main(["tpu", "create", "s", *SLICE, *QUICK]) == 1
    (error,) = errors(capfd)
    assert "s is FAILED instead of ACTIVE; see why with 'gcloud compute tpus queued-resou" in error


def test_no_gcloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["tpu", "delete", "s"]) == 1
    assert errors(capfd) == [
        "error: gcloud is not installed, or not on the PATH; "
        "see https://cloud.google.com/sdk/docs/install"
    ]


def test_setup(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["tpu", "create", "s", *SLICE, *QUICK]) == 0
    assert main(["tpu", "setup", "s", "--bucket", "my-bucket"]) == 0
    for name in ("w-0", "w-1"):
        home = cloud.worker(name)
        assert (home / "stf-jax" / "stf_jax" / "cli.py").exists()
        assert (home / "stf-jax" / "launch" / "check.py").exists()
        assert not (home / "stf-jax" / "tests").exists()
        assert "gcsfuse --implicit-dirs my-bucket /mnt/my-bucket" in (
            (home / "tools.log").read_text().splitlines()
        )


def test_setup_fails_on_one_worker(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["tpu", "create", "s", *SLICE, *QUICK]) == 0
    cloud.note("broken", "w-1")
    assert main(["tpu", "setup", "s"]) == 1
    assert errors(capfd) == ["error: worker 1: gcloud failed with status 1: w-1: disk full"]


def test_every_argument_arrives(rented: Cloud) -> None:
    command = [sys.executable, "-c", WRITE_ARGUMENTS, *ODD]
    assert main(["tpu", "run", "s", "--", *command]) == 0
    for name in ("w-0", "w-1"):
        until((rented.worker(name) / "argv.json").exists)
        arrived = json.loads((rented.worker(name) / "argv.json").read_text())
        assert arrived == [*ODD]


def test_a_run(rented: Cloud, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On all workers; the log of the first, the status of the run; and its files."""
    capfd.readouterr()
    script = 'echo "this is $(hostname)"; echo score > ~/result; exit 7'
    assert main(["tpu", "run", "s", "--", "bash", "-c", script]) == 7
    said = capfd.readouterr().out
    assert "this is w-0" in said
    assert "this is w-1" not in said
    until((rented.worker("w-1") / "launch" / "status").exists)
    assert main(["tpu", "status", "s"]) == 0
    said = capfd.readouterr().out
    assert sorted(said.splitlines()) == [
        "w-0: ended with status 7",
        "w-1: ended with status 7",
    ]
    assert main(["tpu", "log", "s"]) == 7
    assert main(["tpu", "collect", "s", str(tmp_path / "here"), "result"]) == 0
    assert (tmp_path / "here" / "result").read_text() == "score\n"
    assert "this is w-0" in (tmp_path / "here" / "launch" / "log").read_text()
    # The next run has a log of its own; the first one's is kept.
    capfd.readouterr()
    assert main(["tpu", "run", "s", "--", "echo", "another"]) == 0
    assert capfd.readouterr().out == "another\n"
    assert "this is w-0" in next((rented.worker("w-0") / "launch").glob("log-*")).read_text()


def test_a_run_that_is_stopped(rented: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    """It may save first; and there is no second run beside it."""
    script = "trap 'echo saved; exit 75' TERM; echo begun; while true; do sleep 0.1; done"
    statuses: list[int] = []
    thread = threading.Thread(
        target=lambda: statuses.append(main(["tpu", "run", "s", "--", "bash", "-c", script]))
    )
    thread.start()
    until(lambda: all("begun" in log(rented, name) for name in ("w-0", "w-1")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "PATIENCE", 0)
        assert main(["tpu", "run", "s", "--", "true"]) == 1
    (error,) = errors(capfd)
    assert "worker 0, worker 1: " in error
    assert "a run is under way; see log, or stop it" in error
    assert main(["tpu", "stop", "s"]) == 0
    thread.join(60)
    assert statuses == [75]
    assert "saved" in log(rented, "w-1")


def log(cloud: Cloud, worker: str) -> str:
    path = cloud.worker(worker) / "launch" / "log"
    return path.read_text() if path.exists() else ""


def test_a_run_that_does_not_start_on_one_worker(
    rented: Cloud, capfd: pytest.CaptureFixture[str]
) -> None:
    """It does not wait for that one on the others."""
    rented.note("broken", "w-1")
    assert main(["tpu", "run", "s", "--", "sleep", "60"]) == 1
    assert errors(capfd) == ["error: worker 1: gcloud failed with status 1: w-1: disk full"]
    assert not (rented.worker("w-0") / "launch" / "pid").exists()


def test_a_run_that_starts_on_one_worker_only(
    rented: Cloud, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is stopped there, where it would wait for the other."""
    rented.note("broken", "w-1 setsid")
    script = f"touch {rented.folder}/begun; sleep 60"
    assert main(["tpu", "run", "s", "--", "bash", "-c", script]) == 1
    assert errors(capfd) == ["error: worker 1: gcloud failed with status 1: w-1: disk full"]
    until((rented.worker("w-0") / "launch" / "status").exists)
    assert (rented.worker("w-0") / "launch" / "status").read_text() == "143\n"


def test_nothing_is_set_up(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["tpu", "create", "s", *SLICE, *QUICK]) == 0
    assert main(["tpu", "run", "s", "--", "true"]) == 1
    (error,) = errors(capfd)
    assert "nothing is installed here; use setup first" in error


# Counts to eight in a file that outlives the slice, as a bucket does; saves when it is told to.
COUNTER = """
import os, pathlib, signal, sys, time
def leave(*_): print("saved", flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, leave)
file = pathlib.Path(sys.argv[1], os.path.basename(os.environ["HOME"]))
for step in range(int(file.read_text()) if file.exists() else 0, 8):
    time.sleep(0.1)
    print("step", step, flush=True)
    file.write_text(str(step + 1))
    with open(f"{file}.steps", "a") as steps: steps.write(f"{step} ")
"""


@pytest.mark.parametrize("warned", [True, False])
def test_preempted_in_the_middle(
    cloud: Cloud, capfd: pytest.CaptureFixture[str], tmp_path: Path, warned: bool
) -> None:
    bucket = tmp_path / "bucket"
    bucket.mkdir()

    def take_away() -> None:
        until(lambda: (bucket / "w-0").exists() and (bucket / "w-0").read_text() >= "3")
        if warned:
            main(["tpu", "stop", "s"])
            until((cloud.worker("w-0") / "launch" / "status").exists)
        cloud.preempt()

    thread = threading.Thread(target=take_away)
    thread.start()
    command = [sys.executable, "-c", COUNTER, str(bucket)]
    assert main(["tpu", "watch", "s", *SLICE, "--spot", *QUICK, "--", *command]) == 0
    thread.join(60)
    # Every step once and in order: the second slice went on where the first one was.
    assert (bucket / "w-0.steps").read_text().split() == [str(step) for step in range(8)]
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


def test_the_log_of_a_run_whose_pid_is_taken(
    rented: Cloud, capfd: pytest.CaptureFixture[str]
) -> None:
    """By another process, after a restart."""
    assert main(["tpu", "run", "s", "--", "bash", "-c", "echo here; exit 7"]) == 7
    capfd.readouterr()
    with subprocess.Popen(["sleep", "10"], start_new_session=True) as other:
        # Else it would never be gone.
        threading.Thread(target=other.wait).start()
        (rented.worker("w-0") / "launch" / "pid").write_text(str(other.pid))
        assert main(["tpu", "log", "s"]) == 7
        assert other.poll() is None
        other.kill()
    assert capfd.readouterr().out == "here\n"


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


def test_dry_run(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    """Says all and does nothing; what it says can be pasted."""
    watch = ["tpu", "watch", "s", *SLICE, "--dry-run"]
    assert main([*watch, "--", "stf-jax", "train", "it's.yaml"]) == 0
    said = capfd.readouterr()
    assert cloud.calls == []
    assert said.err == ""
    groups = [line.split()[3:5] for line in said.out.splitlines() if line.startswith("gcloud ")]
    assert [" ".join(group) for group in groups] == [
        "tpu-vm describe",
        "tpu-vm describe",
        "queued-resources describe",
        "tpu-vm describe",
        "queued-resources describe",
        "queued-resources delete",
        "tpu-vm delete",
        "queued-resources create",
        "queued-resources describe",
        "tpu-vm describe",
        "tpu-vm scp",
        *["tpu-vm ssh"] * 5,
    ]


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["tpu", "run", "s"], "write the command after --"),
        (["tpu", "run", "s", "--"], "write the command after --"),
        (["tpu", "run", "s", "stf-jax", "train"], "stf-jax train; write the command after --"),
        (["tpu", "log", "s", "--", "true"], "no command here"),
    ],
)
def test_where_the_command_is(
    cloud: Cloud, capfd: pytest.CaptureFixture[str], arguments: list[str], fix: str
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    said = capfd.readouterr().err
    assert said.startswith(f"usage: python -m launch tpu {arguments[1]} ")
    assert fix in said
    assert cloud.calls == []


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_no_time(cloud: Cloud, capfd: pytest.CaptureFixture[str], seconds: str) -> None:
    with pytest.raises(SystemExit):
        main(["tpu", "create", "s", *SLICE, "--poll", seconds])
    assert f"argument --poll: '{seconds}' is not a number above 0" in capfd.readouterr().err
    assert cloud.calls == []
