"""GKE: the calls of xpk and kubectl as their documentation has them."""

import json
import sys

import pytest

from launch.__main__ import main
from tests.launch.arguments import ODD, WRITE_ARGUMENTS
from tests.launch.conftest import Cloud

RUN = ["xpk", "run", "c", "w", "--slice", "v5e:4x4", "--image", "i"]
PLACE = ["--zone", "us-west4-a", "--project", "p"]
AT = ["--zone=us-west4-a", "--project=p"]


def test_from_cluster_to_cluster(cloud: Cloud) -> None:
    assert main(["xpk", "create", "c", "--slice", "2xv6e:2x4", "--spot", *PLACE]) == 0
    command = ["--storage", "data", "--restarts", "9", *PLACE, "--", "true"]
    assert main([*RUN, *command]) == 0
    assert main(["xpk", "log", "c", "w"]) == 0
    assert main(["xpk", "watch", "c", "w", *PLACE]) == 0
    assert main(["xpk", "stop", "c", "w", *PLACE]) == 0
    assert main(["xpk", "delete", "c", *PLACE]) == 0
    pod = (
        "jobset.sigs.k8s.io/jobset-name=w,jobset.sigs.k8s.io/job-index=0,"
        "batch.kubernetes.io/job-completion-index=0"
    )
    assert cloud.calls == [
        [
            *("xpk", "cluster", "create", "--cluster=c", *AT),
            *("--tpu-type=v6e-8", "--num-slices=2", "--spot"),
        ],
        [
            *("xpk", "workload", "create", "--cluster=c", *AT, "--workload=w"),
            *("--tpu-type=v5litepod-16", "--num-slices=1", "--docker-image=i"),
            *("--max-restarts=9", "--restart-on-exit-codes=75"),
            *("--termination-grace-period-seconds=300", "--storage=data"),
            "--command=exec true --host-timeout=600",
        ],
        [
            *("kubectl", "logs", "--follow", "--tail=20"),
            *(f"--selector={pod}", "--container=jax-tpu"),
        ],
        ["xpk", "workload", "list", "--cluster=c", *AT, "--wait-for-job-completion=w"],
        ["xpk", "workload", "delete", "--cluster=c", *AT, "--workload=w"],
        ["xpk", "cluster", "delete", "--cluster=c", *AT],
    ]


def test_every_argument_arrives(cloud: Cloud) -> None:
    odd = [one for one in ODD if "\n" not in one]
    assert main([*RUN, "--", sys.executable, "-c", WRITE_ARGUMENTS, *odd]) == 0
    arrived = json.loads((cloud.worker("pod") / "argv.json").read_text())
    assert arrived == [*odd, "--host-timeout=600"]


def test_a_line_break(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    """It would end the line in the JobSet."""
    assert main([*RUN, "--", "echo", "two\nlines"]) == 1
    assert "error: XPK takes a command of one line" in capfd.readouterr().err
    assert cloud.calls == []


def test_a_run_that_failed(cloud: Cloud) -> None:
    cloud.note("xpk_status", "125")
    assert main(["xpk", "watch", "c", "w"]) == 125


def test_refused(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    cloud.note("xpk_status", "1")
    assert main(["xpk", "delete", "c"]) == 1
    assert "error: xpk failed with status 1: xpk cluster delete --cluster=c" in (
        capfd.readouterr().err
    )
