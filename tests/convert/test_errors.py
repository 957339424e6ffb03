"""Bad input: one clear message that names the fix, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
from etils import epath
from safetensors.numpy import save_file

from convert import export_checkpoint, import_checkpoint, open_source
from convert.safetensors_file import SafetensorsFile
from convert.torch_file import import_torch
from stf_jax.checkpoint import CheckpointError

TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture
def sharded(reference: Path, tmp_path: Path) -> Path:
    """A copy of the reference's LLaVA-STF to spoil, with its tower's config beside it."""
    parent = tmp_path / "parent"
    shutil.copytree(reference / "clip", parent / "clip")
    return Path(shutil.copytree(reference / "llava-stf", parent / "source"))


def refused(source: Path, out: Path, message: str, **options: object) -> str:
    """The message of the error that an import raises, which leaves nothing behind."""
    before = set(out.parent.iterdir())
    with pytest.raises(CheckpointError, match=message) as caught:
        import_checkpoint(source, out, **options)
    assert set(out.parent.iterdir()) == before
    return str(caught.value)


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


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
    spoilt = json.dumps(header).encode()
    file.write_bytes(len(spoilt).to_bytes(8, "little") + spoilt + whole[8 + length :])
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
    refused(sharded, tmp_path / "out", rf"{name} (is not JSON|holds no JSON object)")


def test_no_config(sharded: Path, tmp_path: Path) -> None:
    (sharded / "config.json").unlink()
    refused(sharded, tmp_path / "out", r"has no config.json; download or copy it, too$")


def test_tensors_that_do_not_fit_are_all_listed(checkpoint: Callable, tmp_path: Path) -> None:
    spoilt = {
        "model.norm.weight": lambda array: None,
        f"{TOWER}encoder.layers.4.mlp.fc1.weight": lambda array: None,
        "lm_head.weight": lambda array: array[:-1].copy(),
        "model.mm_projector.2.bias": lambda array: array[None].copy(),
        "model.layers.1.mlp.up_proj.weight": lambda array: array.astype(np.int64),
    }
    source = checkpoint(
        lambda name, array: spoilt.get(name, lambda same: same)(array),
        add={
            "model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32),
            "what": np.ones(1, np.float32),
        },
    )
    message = refused(source, tmp_path / "out", r"does not fit its config.json \(7 tensors\)")
    for line in (
        "missing: model.norm.weight (64,)",
        "missing: vision_model.encoder.layers.4.mlp.fc1.weight (64, 32)",
        "shape of lm_head.weight: (599, 64), expected (600, 64)",
        "shape of model.mm_projector.2.bias: (1, 64), expected (64,)",
        "dtype of model.layers.1.mlp.up_proj.weight: int64, expected float32, float16, bfloat16",
        "extra: model.layers.0.self_attn.q_proj.bias",
        "extra: what",
    ):
        assert f"\n  {line}" in message


def test_hundreds_of_problems_are_listed_by_layer(checkpoint: Callable, tmp_path: Path) -> None:
    def cut(name: str, array: np.ndarray) -> np.ndarray | None:
        return None if name == "model.layers.1.mlp.up_proj.weight" else array

    source = checkpoint(cut, config={"num_hidden_layers": 40})
    message = refused(source, tmp_path / "out", r"does not fit its config.json \(343 tensors\)")
    assert len(message.splitlines()) == 10
    assert "\n  missing: model.layers.1-39.mlp.up_proj.weight (112, 64)" in message
    assert "\n  missing: model.layers.2-39.mlp.gate_proj.weight (112, 64)" in message


def test_one_problem_is_counted_as_one(checkpoint: Callable, tmp_path: Path) -> None:
    source = checkpoint(lambda name, array: None if name == "model.norm.weight" else array)
    refused(source, tmp_path / "out", r"does not fit its config.json \(1 tensor\):")


def llava_hf(checkpoint: Callable, **changes: object) -> Path:
    """The reference's weights as transformers' Llava spells them, the fusion being LLaVA-1.5's."""

    def spell(name: str) -> str:
        for ours, theirs in (
            ("model.vision_tower.vision_tower.", "vision_tower."),
            ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
            ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
            ("model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        ):
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        raise AssertionError(name)

    tensors: dict[str, np.ndarray] = {}

    def move(name: str, array: np.ndarray) -> None:
        if "crosslayer" not in name:
            one_token = "mm_projector.0.weight" in name
            tensors[spell(name)] = array[:, :32].copy() if one_token else array

    source: Path = checkpoint(move)
    save_file(tensors, source / "model.safetensors")
    inner = json.loads((source / "config.json").read_text())
    text = {key: value for key, value in inner.items() if not key.startswith("mm_")}
    vision = json.loads((source.parent / "clip" / "config.json").read_text())
    hf = {
        "model_type": "llava",
        "text_config": {**text, "model_type": "llama"},
        "vision_config": vision.get("vision_config", vision),
        **changes,
    }
    hf = {key: value for key, value in hf.items() if value != "absent"}
    (source / "config.json").write_text(json.dumps(hf))
    return source


def test_llava_hf(checkpoint: Callable, tmp_path: Path) -> None:
    assert import_checkpoint(llava_hf(checkpoint), tmp_path / "out").layout == "hf"


@pytest.mark.parametrize("absent", [None, "absent", {}])
def test_llava_hf_without_a_text_config(
    absent: object, checkpoint: Callable, tmp_path: Path
) -> None:
    source = llava_hf(checkpoint, text_config=absent)
    message = refused(source, tmp_path / "out", "does not fit its config.json")
    assert (
        "(config.json lacks the language model's vocab_size (32000), the language model's "
        "hidden_size (4096), " in message.splitlines()[0]
    )
    assert message.splitlines()[0].endswith("transformers' defaults were assumed):")


def test_llava_hf_with_a_bare_vision_config(checkpoint: Callable, tmp_path: Path) -> None:
    source = llava_hf(checkpoint, vision_config={"model_type": "clip_vision_model"})
    message = refused(source, tmp_path / "out", "no square window of tokens of the tower's width")
    assert "width 768" in message
    assert "lacks the vision tower's image_size (224), " in message
    assert "the vision tower's hidden_size (768), " in message
    # Without any, the tower is that of transformers.LlavaConfig().
    edit_json(source / "config.json", vision_config=None)
    message = refused(source, tmp_path / "out", "the vision tower's hidden_size \\(1024\\), ")


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_llava_hf_with_a_section_that_is_none(
    key: str, checkpoint: Callable, tmp_path: Path
) -> None:
    source = llava_hf(checkpoint, **{key: ["llama"]})
    refused(source, tmp_path / "out", rf"{key} is \['llama'\] in this config.json; give an object")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64' in this config.json; give a whole number"),
        ({"mm_vision_tower": 3}, "mm_vision_tower is 3 in config.json; give a path or a name"),
        ({"mm_fusion": [1]}, "mm_fusion is .* give an object"),
        ({"mm_fusion": {"taps": "abc"}}, "taps in mm_fusion of config.json is 'abc'; an example"),
        ({"mm_fusion": {"window": 2.0}}, "window in mm_fusion of config.json is 2.0; an example"),
        ({"mm_fusion": {"reduction": ["stf"]}}, "reduction in mm_fusion of config.json is"),
        ({"mm_fusion": {"last_activation": 1}}, "last_activation in mm_fusion of config.json is 1"),
    ],
)
def test_mistyped_settings(
    changes: dict[str, object], message: str, checkpoint: Callable, tmp_path: Path
) -> None:
    refused(checkpoint(config=changes), tmp_path / "out", message)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "mpt", "llava_mistral"])
def test_other_families(family: str, checkpoint: Callable, tmp_path: Path) -> None:
    source = checkpoint(config={"model_type": family})
    refused(source, tmp_path / "out", rf"model_type is '{family}' .*supported: 'llama'")


def test_unknown_tensors(tmp_path: Path, write: Callable) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write(source / "model.safetensors", {"transformer.blocks.0.ffn": np.zeros(2, np.float32)})
    (source / "config.json").write_text('{"model_type": "mpt"}')
    refused(source, tmp_path / "out", r"no CLIP, LLaMA or LLaVA checkpoint \(model_type 'mpt'\)")


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    refused(tmp_path / "source", tmp_path / "out", "holds no weights: no model.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_projector_type", "linear"),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_use_im_start_end", True),
    ],
)
def test_unsupported_settings(
    key: str, value: object, checkpoint: Callable, tmp_path: Path
) -> None:
    source = checkpoint(config={key: value})
    refused(source, tmp_path / "out", rf"{key} is {value!r} in config.json; stf_jax computes only")


def test_taps_that_nothing_tells(checkpoint: Callable, tmp_path: Path) -> None:
    def cut(name: str, array: np.ndarray) -> np.ndarray:
        return array[:, : 32 * 3].copy() if "crosslayer.0.weight" in name else array

    source = checkpoint(cut)
    refused(source, tmp_path / "out", r'mixes 3 hidden states .* add "mm_fusion": {"taps"')
    edit_json(source / "config.json", mm_fusion={"tap": [1]})
    refused(source, tmp_path / "out", r"mm_fusion in config.json has an unknown key 'tap'")
    edit_json(source / "config.json", mm_fusion={"taps": [30, 2, 1]})
    refused(source, tmp_path / "out", r"tap 30 lies beyond the tower's 24 layers")


def test_wrong_tower(checkpoint: Callable, tmp_path: Path) -> None:
    source = checkpoint()
    edit_json(source.parent / "clip" / "config.json", hidden_size=36, num_attention_heads=4)
    refused(source, tmp_path / "out", r"no multiple of the tower's width 36; is this the right")


def test_tower_is_not_to_be_found(checkpoint: Callable, tmp_path: Path) -> None:
    source = checkpoint(config={"mm_vision_tower": "/data/my-clip"})
    refused(source, tmp_path / "out", r"'/data/my-clip', which is not here .*--vision-tower DIR$")
    source = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    edit_json(source / "config.json", mm_vision_tower=None)
    refused(source, tmp_path / "out", r"names no vision tower; give one: --vision-tower DIR$")
    refused(source, tmp_path / "out", "holds no config.json of a vision", vision_tower=tmp_path)


def test_published_tower_without_weights(
    checkpoint: Callable, tmp_path: Path, reference: Path
) -> None:
    name = "openai/clip-vit-large-patch14-336"
    source = checkpoint(
        lambda name, array: None if name.startswith(TOWER) else array,
        config={"mm_vision_tower": name},
    )
    refused(source, tmp_path / "out", r"has no vision tower inside; give .*--vision-tower DIR$")
    imported = import_checkpoint(source, tmp_path / "out", vision_tower=reference / "clip")
    assert imported.config.vision.width == 32


def test_parts_alone(reference: Path, tmp_path: Path, checkpoint: Callable) -> None:
    out = tmp_path / "out"
    refused(reference / "clip", out, r"is a vision tower alone; .*--vision-tower ")
    refused(reference / "vicuna", out, r"names no vision tower; give one: --vision-tower DIR$")
    whole = checkpoint()
    refused(whole, out, r"has a language model of its own; leave out --base", base=whole)
    refused(whole, out, r"has a fusion of its own; leave out --fusion stf$", fusion="stf")


def test_an_adapter_alone(reference: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    adapter = reference / "mm_projector.bin"
    advice = (
        rf"import it first: stf-jax convert import {adapter} OUT --base .* --vision-tower CLIP$"
    )
    refused(adapter, tmp_path / "out", advice)
    # A directory of several checkpoints is not the adapter among them.
    message = r"holds several checkpoints; name one of them: mm_projector.bin, clip, llava-stf, vic"
    refused(reference, tmp_path / "out", message)


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


def test_values_beyond_float16(checkpoint: Callable, tmp_path: Path) -> None:
    source = checkpoint(
        lambda name, array: array * np.float32(1e9) if name == "lm_head.weight" else array
    )
    message = r"lm_head.weight holds values beyond float16; choose bfloat16 or float32"
    refused(source, tmp_path / "out", message, dtype="float16")
    assert open_source(source).config
