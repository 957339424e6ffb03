"""`stf-jax eval` in two processes over jax.distributed gives the files of one."""

import sys
from pathlib import Path

import pytest

from launch.local import LocalRun
from stf_jax.cli import main

# Each host has a folder of its own, named by the last flag, which the launcher adds.
HOST = 'number=${!#}; exec "$@" --out "$0/host${number#--process=}"'


@pytest.mark.slow
def test_two_processes_are_one_evaluation(
    reference: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "mme", str(reference / "llava-stf"), "--data", str(data), "--limit", "6"]
    stf_jax = [sys.executable, "-W", "ignore", "-m", "stf_jax", *arguments, "--slots", "2"]
    said: list[tuple[int, str, str]] = []

    def hear(process: int, stream: str, line: str) -> None:
        said.append((process, stream, line.removesuffix("\n")))

    command = ["bash", "-c", HOST, str(tmp_path), *stf_jax]
    with LocalRun(command, processes=2, devices=2, say=hear) as processes:
        assert main([*arguments, "--out", str(tmp_path / "alone")]) == 0
        assert processes.wait(seconds=300) == 0, said
    # Only the first host has a score to show.
    lines = [
        (process, line)
        for process, stream, line in said
        if stream == "stdout" and not line.startswith("[Gloo]")
    ]
    assert lines == [(0, line) for line in capsys.readouterr().out.splitlines()]
    alone, host = tmp_path / "alone" / "mme", tmp_path / "host0" / "mme"
    assert (host / "answers.jsonl").read_bytes() == (alone / "answers.jsonl").read_bytes()
    assert (host / "scores.json").exists()
    assert not list(tmp_path.rglob("answers.part-*"))
