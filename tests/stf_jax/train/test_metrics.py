"""What a run keeps of the metrics of its earlier steps."""

import json
import os
from pathlib import Path

import pytest

from stf_jax.train.metrics import MetricsLog


def kept(run: Path) -> list[str]:
    """The lines of a log that a run continues at step 3."""
    MetricsLog(run, start=3, stop=5, every=1, flops=0.0, writes=True).close()
    return (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def test_damaged_lines_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [json.dumps({"step": step, "loss": 1.0}) for step in range(5)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(right) + "\n")
    assert kept(tmp_path) == right[:3]
    assert capsys.readouterr().err == ""
    damaged = [b"\xff\xfe", b"null", b"[]", b'{"step": "a"}', b"[" * 10_000, b"9" * 5000]
    lines = [line.encode() for line in right]
    # The last one has been cut by a kill, which is nothing to speak of.
    path.write_bytes(b"\n".join([*damaged, *lines, b'{"step": 2, "lo']))
    assert kept(tmp_path) == right[:3]
    assert f"{path}: 6 lines are damaged and are left out" in capsys.readouterr().err
    with path.open("ab") as file:
        file.truncate(2**40)
    assert kept(tmp_path) == right[:3]


def test_a_log_that_is_none_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl: a pipe .*; move it away"):
        kept(tmp_path)
