import shutil
from pathlib import Path

import pytest

from stf_jax.cli.main import main
from stf_jax.convert import import_checkpoint, inspect_checkpoint
from stf_jax.util.errors import CheckpointError


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
    assert "tokenizer         600 tokens" in text
    assert "image processor   56 px, mode pad" in text
    assert "kept for export" not in text
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
    # Together as many as came.
    assert "504,768 in 41 tensors (bfloat16 504,768) + 8,608 kept for export" in str(report)
    assert "image processor   56 px, mode pad" in str(report)
    (file,) = (tmp_path / "native" / "params").rglob("text.norm.scale/0")
    file.write_bytes(b"")
    report = inspect_checkpoint(tmp_path / "native")
    assert report.kind == "native"
    assert "text.norm.scale/0: 0 bytes of 128" in str(report)


@pytest.mark.parametrize("option", ["vision_tower", "base"])
def test_parts_for_a_native_checkpoint(option: str, native: Path, reference: Path) -> None:
    message = rf"is a whole model; leave out --{option.replace('_', '-')} .*clip$"
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(native, **{option: reference / "clip"})


def test_padded_vocabulary(reference: Path, tmp_path: Path) -> None:
    import_checkpoint(reference / "llava-stf", tmp_path / "native", vocabulary_multiple=64)
    assert "vocabulary 600, padded to 640" in str(inspect_checkpoint(tmp_path / "native"))


def test_without_processors(reference: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(reference / "llava-stf", source)
    shutil.copytree(reference / "clip", tmp_path / "clip")
    (source / "tokenizer.model").unlink()
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    import_checkpoint(source, tmp_path / "native")
    for place, folder in ((source, source), (tmp_path / "native", tmp_path / "native" / "hf")):
        text = str(report := inspect_checkpoint(place))
        assert report.config is not None
        assert "tokenizer         none" in text
        assert "image processor   none" in text
        assert f"not usable as it is: {folder}: no tokenizer.model" in text
        assert f"{folder} has no preprocessor_config.json; copy it there" in text
    shutil.rmtree(tmp_path / "native" / "hf")
    assert "damaged" in str(inspect_checkpoint(tmp_path / "native"))


def test_damaged_tokenizer(reference: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(reference / "llava-stf", source)
    (source / "tokenizer.model").write_bytes(b"damaged")
    problem = inspect_checkpoint(source, vision_tower=reference / "clip").problem
    assert problem is not None
    assert "unreadable tokenizer (tokenizer.model is damaged or of another kind)" in problem
    assert "tiktoken" not in problem


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"hf download liuhaotian/llava-v1.5-7b --local-dir"):
        inspect_checkpoint("liuhaotian/llava-v1.5-7b")


def test_verify(
    reference: Path, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(native, tmp_path / "native"))
    assert main(["convert", "inspect", str(copy), "--verify"]) == 0
    assert capsys.readouterr().out.endswith("  whole, every array verified\n")
    (file,) = (copy / "params").rglob("text.norm.scale/0")
    file.write_bytes(b"X" + file.read_bytes()[1:])
    # Its size is right, and nothing else is looked at unless it is asked for.
    assert main(["convert", "inspect", str(copy)]) == 0
    assert main(["convert", "inspect", str(copy), "--verify"]) == 1
    assert "text/norm/scale is not what was written" in capsys.readouterr().out
    assert main(["convert", "inspect", str(reference / "llava-stf"), "--verify"]) == 1
    assert "PyTorch's files have no checksums; compare" in capsys.readouterr().err
