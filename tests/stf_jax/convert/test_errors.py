"""Bad input: one clear message that names the fix, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
from etils import epath

from stf_jax.convert import export_checkpoint, import_checkpoint
from stf_jax.convert.safetensors_file import SafetensorsFile
from stf_jax.convert.torch_file import import_torch
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.convert.refusal import edit_json, refused


@pytest.fixture
def sharded(reference: Path, tmp_path: Path) -> Path:
    """A copy of the reference's LLaVA-STF to spoil, with its tower's config beside it."""
    parent = tmp_path / "parent"
    shutil.copytree(reference / "clip", parent / "clip")
    return Path(shutil.copytree(reference / "llava-stf", parent / "source"))


def shard(source: Path, number: int) -> Path:
    return source / f"model-{number:05}-of-00008.safetensors"


def test_missing_source(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "out", r"nowhere does not exist$")
    name = "liuhaotian/llava-v1.5-7b"
    message = (
        rf"^{name} does not exist; nothing is downloaded, .*: hf download {name} --local-dir DIR$"
    )
    refused(Path(name), tmp_path / "out", message)
    refused(Path("tests/nowhere"), tmp_path / "out", "does not exist$")


def test_out_that_cannot_be_made(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    with pytest.raises(
        CheckpointError, match=rf"^{out} cannot be made \(Not a directory\); choose"
    ):
        import_checkpoint(sharded, out)


def test_existing_out(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    refused(sharded, out, r"out exists; remove it or choose another name$")
    assert not list(out.iterdir())


def test_missing_shard(sharded: Path, tmp_path: Path) -> None:
    shard(sharded, 3).unlink()
    refused(sharded, tmp_path / "out", r"00003-of-00008.safetensors is missing; download or copy")


@pytest.mark.parametrize("keep", [0.001, 0.5, 0.999])
def test_truncated_shard(keep: float, sharded: Path, tmp_path: Path) -> None:
    file = shard(sharded, 5)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)])
    message = refused(sharded, tmp_path / "out", r"00005-of-00008.safetensors.*truncated")
    assert "\n" not in message


def test_empty_shard(sharded: Path, tmp_path: Path) -> None:
    shard(sharded, 1).write_bytes(b"")
    refused(sharded, tmp_path / "out", r"00001-of-00008.safetensors is empty; download")


def test_git_lfs_pointer(sharded: Path, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
    shard(sharded, 2).write_text(pointer)
    refused(sharded, tmp_path / "out", r"is a git-lfs pointer, .* run `git lfs pull` in /")


def test_garbage(sharded: Path, tmp_path: Path) -> None:
    shard(sharded, 2).write_bytes(bytes(range(256)) * 4)
    refused(sharded, tmp_path / "out", "is not a safetensors file")
    shard(sharded, 2).write_bytes((2).to_bytes(8, "little") + b"[]" + b"0" * 99)
    refused(sharded, tmp_path / "out", "is not a safetensors file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": {"data_offsets": [16, 32]}}, r"damaged: \w begins at byte \d+, not at \d+; down"),
        ({"a": {"data_offsets": [8, 24]}}, r"damaged: \w begins at byte \d+, not at \d+; down"),
        ({"b": {"data_offsets": [24, 40]}}, r"damaged: b begins at byte \d+, not at \d+; down"),
        ({"a": {"data_offsets": [-8, 8]}}, "damaged: the shape or the place of a is none; down"),
        ({"a": {"shape": [-2, -2]}}, "damaged: the shape or the place of a is none; down"),
        ({"a": {"shape": [2.0, 2]}}, "damaged: the shape or the place of a is none; down"),
        ({"a": {"shape": [2, True, 2]}}, "damaged: the shape or the place of a is none; down"),
        ({"a": {"shape": [2, 3]}}, "damaged: a has 16 bytes, not 24; download"),
        ({"a": {"shape": "ab"}}, "damaged|is not a safetensors file"),
        ({"a": {"shape": 4}}, "is not a safetensors file"),
        ({"a": {"data_offsets": [0]}}, "is not a safetensors file"),
    ],
)
def test_damaged_header(
    change: dict[str, dict[str, object]], message: str, tmp_path: Path, write: Callable
) -> None:
    """Each of them is refused by the library of safetensors, too."""
    file = tmp_path / "model.safetensors"
    write(file, {"a": np.zeros((2, 2), np.float32), "b": np.ones((2, 2), np.float32)})
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for name, changed in change.items():
        header[name] |= changed
    spoiled = json.dumps(header).encode()
    file.write_bytes(len(spoiled).to_bytes(8, "little") + spoiled + whole[8 + length :])
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(file, "np")
    with pytest.raises(CheckpointError, match=message):
        _ = SafetensorsFile(epath.Path(file)).infos


def test_several_damages_in_one_error(sharded: Path, tmp_path: Path) -> None:
    shard(sharded, 1).unlink()
    shard(sharded, 2).write_bytes(b"")
    message = refused(sharded, tmp_path / "out", r"source is not whole:\n")
    assert "00001-of-00008.safetensors is missing" in message
    assert "00002-of-00008.safetensors is empty" in message


def test_index_and_shards_disagree(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    moved, first = weight_map["lm_head.weight"], weight_map.pop("model.norm.weight")
    edit_json(
        index,
        weight_map={
            **weight_map,
            "no.such": moved,
            "lm_head.weight": "model-00001-of-00008.safetensors",
        },
    )
    message = refused(sharded, tmp_path / "out", "is not whole")
    assert f"the index puts no.such into {moved}, which does not hold it" in message
    assert f"{first} holds model.norm.weight, which the index puts into no shard" in message
    assert f"{moved} holds lm_head.weight, which the index puts into model-00001" in message


def test_tensor_twice(sharded: Path, tmp_path: Path, read: Callable, write: Callable) -> None:
    tensors = read(sharded)
    extra = {
        "model.norm.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    write(shard(sharded, 8), extra)
    refused(
        sharded, tmp_path / "out", "holds model.norm.weight, which the index puts|does not hold"
    )


def test_index_without_map(sharded: Path, tmp_path: Path) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map=None)
    refused(sharded, tmp_path / "out", "has no weight_map")


def test_no_index(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    refused(sharded, tmp_path / "out", r"but no index \(model.safetensors.index.json\)")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["{", "", "[1]"])
def test_bad_json(name: str, content: str, sharded: Path, tmp_path: Path) -> None:
    (sharded / name).write_text(content)
    refused(sharded, tmp_path / "out", rf"{name}(: not valid JSON|: holds a list where a dict)")


def test_no_config(sharded: Path, tmp_path: Path) -> None:
    (sharded / "config.json").unlink()
    refused(sharded, tmp_path / "out", r"has no config.json; download or copy it, too$")


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    refused(tmp_path / "source", tmp_path / "out", "holds no weights: no model.safetensors")


def test_options(sharded: Path, tmp_path: Path) -> None:
    refused(sharded, tmp_path / "out", "dtype is 'int8'; supported: float32", dtype="int8")
    refused(sharded, tmp_path / "out", "give 1 or more", vocabulary_multiple=0)


def test_native_and_pytorch_mixed_up(reference: Path, tmp_path: Path) -> None:
    native = tmp_path / "native"
    import_checkpoint(reference / "llava-stf", native)
    refused(native, tmp_path / "out", "is a native checkpoint; a PyTorch one is expected here")
    for source, message in (
        (
            reference / "llava-stf",
            r"neither a native checkpoint nor a run; import it first: stf-jax convert import",
        ),
        (tmp_path / "nowhere", "does not exist"),
        (reference / "images", "is neither a native checkpoint nor a run"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(source, tmp_path / "out", layout="llava-stf")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists; remove it"):
        export_checkpoint(native, tmp_path / "there", layout="llava-stf")
    with pytest.raises(CheckpointError, match=r"layout is 'foo'; supported: llava-stf, llava, hf"):
        export_checkpoint(native, tmp_path / "out", layout="foo")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"dtype is 'int8'; supported: float32"):
        export_checkpoint(native, tmp_path / "out", layout="llava-stf", dtype="int8")
    for rows in (0, 10, 599):
        for layout, least in (("llava-stf", 600), ("adapter", 600)):
            with pytest.raises(CheckpointError, match=rf"is {rows}, .*; give {least} or more"):
                export_checkpoint(native, tmp_path / "out", layout=layout, vocabulary=rows)
    assert {path.name for path in tmp_path.iterdir()} == {"native", "there"}


def test_without_pytorch(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"pip install 'stf-jax\[torch\]'"):
        import_torch("here")
    import_checkpoint(sharded, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    with pytest.raises(CheckpointError, match=r"PyTorch is needed to write mm_projector.bin"):
        export_checkpoint(tmp_path / "native", tmp_path / "adapter", layout="adapter")
    assert not (tmp_path / "adapter").exists()
    refused(
        Path(shutil.copy(sharded / "tokenizer.model", tmp_path / "mm_projector.bin")),
        tmp_path / "other",
        r"PyTorch is needed to read .*mm_projector.bin: pip install",
    )
