"""What the tests of TPU VMs share."""

import pytest

from tests.launch.conftest import Cloud

SLICE = ["--slice", "v5e:4x4"]
QUICK = ["--poll", "0.05"]


def verbs(cloud: Cloud) -> list[str]:
    return [" ".join(call[3:5]) for call in cloud.calls]


def errors(capfd: pytest.CaptureFixture[str]) -> list[str]:
    lines = capfd.readouterr().err.splitlines()
    assert not [line for line in lines if "Traceback" in line]
    return [line for line in lines if line.startswith("error: ")]


def log(cloud: Cloud, worker: str) -> str:
    path = cloud.worker(worker) / "launch" / "log"
    return path.read_text() if path.exists() else ""
