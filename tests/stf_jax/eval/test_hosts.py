"""`stf-jax eval` in two processes over jax.distributed gives the files of one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stf_jax.cli import main

COMMAND = "import sys; from stf_jax.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_two_processes_are_one_evaluation(
    reference: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "mme", str(reference / "llava-stf"), "--data", str(data), "--limit", "6"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-c", COMMAND, *arguments),
                *("--out", str(tmp_path / f"host{number}"), "--slots", "2"),
                *("--coordinator", f"127.0.0.1:{port}"),
                *("--processes", "2", "--process", str(number)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        )
        for number in range(2)
    ]
    assert main([*arguments, "--out", str(tmp_path / "alone")]) == 0
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    # Only the first host has a score to show.
    lines = [
        [line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in said
    ]
    assert lines == [capsys.readouterr().out.splitlines(), []]
    alone, host = tmp_path / "alone" / "mme", tmp_path / "host0" / "mme"
    assert (host / "answers.jsonl").read_bytes() == (alone / "answers.jsonl").read_bytes()
    assert (host / "scores.json").exists()
    assert not list(tmp_path.rglob("answers.part-*"))
