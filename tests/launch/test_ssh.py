"""Hosts with ssh: what is other than with TPU VMs."""

import json
import sys
import threading

import pytest

from launch.__main__ import main
from tests.launch.arguments import ODD, WRITE_ARGUMENTS
from tests.launch.conftest import Cloud
from tests.launch.waiting import until

HOSTS = "me@h0,me@h1,h2"
NAMES = HOSTS.split(",")


@pytest.fixture
def hosts(cloud: Cloud) -> Cloud:
    """Three that are set up."""
    assert main(["ssh", "setup", HOSTS]) == 0
    return cloud


def flags(number: int) -> list[str]:
    return ["--coordinator=h0:8476", "--processes=3", f"--process={number}"]


def test_setup(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    """And each is told of the others."""
    assert main(["ssh", "setup", HOSTS]) == 0
    said = capfd.readouterr().out
    for number, name in enumerate(NAMES):
        assert (cloud.worker(name) / "stf-jax" / "stf_jax" / "__main__.py").exists()
        check = " ".join(["-m launch.check", *flags(number)])
        assert f"[{name}] {name} checks: {check}" in said


def test_every_argument_arrives(hosts: Cloud) -> None:
    assert main(["ssh", "run", HOSTS, "--", sys.executable, "-c", WRITE_ARGUMENTS, *ODD]) == 0
    assert main(["ssh", "log", HOSTS]) == 0
    for number, name in enumerate(NAMES):
        arrived = json.loads((hosts.worker(name) / "argv.json").read_text())
        assert arrived == [*ODD, *flags(number)]


def test_one_host_fails(hosts: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    hosts.note("broken", "me@h1")
    assert main(["ssh", "run", HOSTS, "--", "sleep", "60"]) == 1
    said = capfd.readouterr().err
    assert "error: me@h1: ssh failed with status 1: me@h1: disk full\n" in said
    assert not (hosts.worker("me@h0") / "launch" / "pid").exists()


@pytest.mark.parametrize("names", ["", "h0,", "h0,,h1"])
def test_a_host_without_a_name(cloud: Cloud, capfd: pytest.CaptureFixture[str], names: str) -> None:
    assert main(["ssh", "run", names, "--", "true"]) == 1
    assert capfd.readouterr().err == f"error: a host has no name in '{names}'; write gpu0,gpu1\n"
    assert cloud.calls == []


def test_a_host_that_is_there_twice(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["ssh", "run", "h0,h1,h0", "--", "true"]) == 1
    assert capfd.readouterr().err == "error: h0 is there twice in 'h0,h1,h0'; name it once\n"
    assert cloud.calls == []


def test_dry_run_of_watch(cloud: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    """Shows how the run is started, not only how one that is under way is followed."""
    assert main(["ssh", "watch", HOSTS, "--dry-run", "--", "stf-jax", "train", "it.yaml"]) == 0
    said = capfd.readouterr().out
    for number in range(len(NAMES)):
        assert " ".join(["stf-jax train it.yaml", *flags(number)]) in said
    assert cloud.calls == []


def test_stopped_and_continued(hosts: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    """`watch` starts again what was interrupted."""
    script = (
        "[ -e ~/saved ] && exit 0; trap 'touch ~/saved; exit 75' TERM; sleep 60 & touch ~/on; wait"
    )
    statuses: list[int] = []
    watch = ["ssh", "watch", HOSTS, "--poll", "0.05", "--", "bash", "-c", script]
    thread = threading.Thread(target=lambda: statuses.append(main(watch)))
    thread.start()
    for name in NAMES:
        until((hosts.worker(name) / "on").exists)
    assert main(["ssh", "stop", HOSTS]) == 0
    thread.join(60)
    assert statuses == [0]
    assert "the run was interrupted; starting it again" in capfd.readouterr().err


def test_a_connection_that_is_cut_off(hosts: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    """The run does not mind; a run's own 255 is no cut."""
    hosts.note("cuts", "2")
    watch = ["ssh", "watch", HOSTS, "--poll", "0.05"]
    script = "echo x >> ~/times; exit 255"
    assert main([*watch, "--", "bash", "-c", script]) == 254
    assert capfd.readouterr().err.count("the connection is lost; trying again") == 2
    assert (hosts.worker("me@h0") / "times").read_text() == "x\n"
