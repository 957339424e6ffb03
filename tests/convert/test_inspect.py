from pathlib import Path

import pytest

from convert import import_checkpoint, inspect_checkpoint
from stf_jax.checkpoint import CheckpointError


def test_whole_model(reference: Path) -> None:
    report = inspect_checkpoint(reference / "llava-stf")
    assert report.kind == "llava-stf"
    assert report.problem is None
    assert report.tokens_per_image == 4
    assert report.tensors == 420
    assert report.parameters == {"float32": 513_376}
    text = str(report)
    assert "LLaVA-STF (PyTorch)" in text
    assert "tokens per image  4" in text
    assert "taps 23, 21, 18, 15, 12, 9, 6, 3" in text
    assert text.endswith("whole")


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("clip", "clip", "vision tower alone"),
        ("vicuna", "llama", "--vision-tower"),
        ("images", "unknown", "holds no weights"),
    ],
)
def test_parts(name: str, kind: str, problem: str, reference: Path) -> None:
    report = inspect_checkpoint(reference / name)
    assert report.kind == kind
    assert report.config is None
    assert problem in str(report)


def test_native(reference: Path, tmp_path: Path) -> None:
    import_checkpoint(reference / "llava-stf", tmp_path / "native", dtype="bfloat16")
    report = inspect_checkpoint(tmp_path / "native")
    assert (report.kind, report.problem, report.tokens_per_image) == ("native", None, 4)
    assert report.parameters.keys() == {"bfloat16"}
    (file,) = (tmp_path / "native" / "params").rglob("text.norm.scale/0")
    file.write_bytes(b"")
    report = inspect_checkpoint(tmp_path / "native")
    assert report.kind == "native"
    assert "text.norm.scale/0: 0 bytes of 128" in str(report)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_checkpoint(tmp_path / "nowhere")
