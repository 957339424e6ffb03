"""`stf-jax eval` on a mesh, and in two processes over jax.distributed, gives the files of one."""

import sys
from pathlib import Path

import pytest

from launch.local import LocalRun
from stf_jax.cli.main import main

# Each host has a folder of its own, named by the last flag, which the launcher adds.
HOST = 'number=${!#}; exec "$@" --out "$0/host${number#--process=}"'


def arguments_of(model: Path, data: Path) -> list[str]:
    return ["eval", "mme", str(model), "--data", str(data), "--limit", "6"]


@pytest.mark.slow
def test_two_processes_are_one_evaluation(
    native: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process has a mesh of its own devices; one device alone gives the same."""
    arguments = arguments_of(native, data)
    stf_jax = [sys.executable, "-W", "ignore", "-m", "stf_jax", *arguments]
    stf_jax += ["--slots", "2", "--mesh", "data=2,tensor=2"]
    said: list[tuple[int, str, str]] = []

    def hear(process: int, stream: str, line: str) -> None:
        said.append((process, stream, line.removesuffix("\n")))

    command = ["bash", "-c", HOST, str(tmp_path), *stf_jax]
    with LocalRun(command, processes=2, devices=4, say=hear) as processes:
        assert main([*arguments, "--out", str(tmp_path / "alone")]) == 0
        assert processes.wait(seconds=300) == 0, said
    # Only the first host has a score to show. Gloo's own lines, of several threads, are torn.
    scores = capsys.readouterr().out.splitlines()
    lines = [(process, line) for process, _, line in said if line in scores]
    assert lines == [(0, line) for line in scores]
    alone, host = tmp_path / "alone" / "mme", tmp_path / "host0" / "mme"
    assert (host / "answers.jsonl").read_bytes() == (alone / "answers.jsonl").read_bytes()
    assert (host / "scores.first-6.json").exists()
    assert not list(tmp_path.rglob("answers.part-*"))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data", "error: --mesh is 'data'; write it as data=2,tensor=4"),
        ("data=2,pipe=4", "error: --mesh is 'data=2,pipe=4'; write it as data=2,tensor=4"),
        ("tensor=3", "error: the mesh data 1 x fsdp 1 x tensor 3 does not fit 8 devices"),
        ("tensor=8", "error: the mesh does not divide the model: text.heads 4 by tensor 8"),
    ],
)
def test_meshes_that_do_not_fit(
    native: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mesh: str,
    message: str,
) -> None:
    arguments = [*arguments_of(native, data), "--out", str(tmp_path / "out"), "--mesh", mesh]
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert not (tmp_path / "out").exists()
