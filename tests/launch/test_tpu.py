"""TPU VMs, with a gcloud that only seems to rent them."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import remote
from launch.__main__ import main
from tests.launch.arguments import ODD, WRITE_ARGUMENTS
from tests.launch.conftest import Cloud
from tests.launch.tpu import QUICK, SLICE, errors, log
from tests.launch.waiting import until


def gcloud(group: str, verb: str, *rest: str) -> list[str]:
    return ["gcloud", "compute", "tpus", group, verb, *rest]


def test_a_slice_from_the_queue(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    cloud.note("queue", "ACCEPTED\nWAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nACTIVE")
    place = ["--zone", "us-west4-a", "--project", "p"]
    assert main(["tpu", "create", "s", *SLICE, "--spot", *place, *QUICK]) == 0
    at = ["--zone=us-west4-a", "--project=p"]
    describe = gcloud("queued-resources", "describe", "s", *at, "--format=value(state.state)")
    assert cloud.calls == [
        gcloud(
            "queued-resources",
            "create",
            *("s", *at, "--node-id=s", "--accelerator-type=v5litepod-16"),
            *("--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
        ),
        *[describe] * 4,
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
    [
        ("v5e:4x4x4", "a slice of v5e has 2 axes"),
        (
            "v6e:3x3",
            "nobody rents a slice v6e:3x3: v6e comes in 1, 4, 8, 16, 32, 64, 128 or 256 ch",
        ),
        ("2xv5e:4x4", "for several use launch xpk"),
    ],
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
        assert (home / "stf-jax" / "stf_jax" / "__main__.py").exists()
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
