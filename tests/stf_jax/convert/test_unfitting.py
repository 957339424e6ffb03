"""Whole checkpoints of no model that fits: what does not fit is named, and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stf_jax.convert import import_checkpoint, open_source
from tests.stf_jax.convert.refusal import edit_json, refused

TOWER = "model.vision_tower.vision_tower.vision_model."


def test_tensors_that_do_not_fit_are_all_listed(checkpoint: Callable, tmp_path: Path) -> None:
    spoiled = {
        "model.norm.weight": lambda array: None,
        f"{TOWER}encoder.layers.4.mlp.fc1.weight": lambda array: None,
        "lm_head.weight": lambda array: array[:-1].copy(),
        "model.mm_projector.2.bias": lambda array: array[None].copy(),
        "model.layers.1.mlp.up_proj.weight": lambda array: array.astype(np.int64),
    }
    source = checkpoint(
        lambda name, array: spoiled.get(name, lambda same: same)(array),
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
    """The reference's weights as transformers' Llava spells them, with its connector."""

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
        ({"mm_system": [1]}, "mm_system is .* give an object"),
        ({"mm_system": {"taps": "abc"}}, "mm_system in config.json .*taps.* abc.*; an example"),
        ({"mm_system": {"window": 2.5}}, "mm_system in config.json .*window.* 2.5.*; an example"),
        ({"mm_system": {"name": ["stf"]}}, r"system \['stf'\] is not one of llava, average"),
        ({"mm_system": {"mbtf": {"last_activation": 1}}}, "last_activation.* 1.*; an example"),
        ({"mm_fusion": {"window": 2.5}}, "mm_fusion in config.json .*window.* 2.5.*; an example"),
        ({"mm_fusion": {"reduction": ["stf"]}}, r"system \['stf'\] is not one of llava, average"),
        ({"mm_fusion": {"last_activation": 1}}, "last_activation.* 1.*; an example"),
    ],
)
def test_mistyped_settings(
    changes: dict[str, object], message: str, checkpoint: Callable, tmp_path: Path
) -> None:
    refused(checkpoint(config=changes), tmp_path / "out", message)


def test_unknown_tensors(tmp_path: Path, write: Callable) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write(source / "model.safetensors", {"transformer.blocks.0.ffn": np.zeros(2, np.float32)})
    (source / "config.json").write_text('{"model_type": "mamba"}')
    refused(source, tmp_path / "out", r"no CLIP, LLaMA or LLaVA checkpoint \(model_type 'mamba'\)")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_projector_type", "linear"),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_patch_merge_type", "maxpool"),
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
    refused(source, tmp_path / "out", r'mixes 3 hidden states .* add "mm_system": {"taps"')
    edit_json(source / "config.json", mm_system={"taps": [3, 2, 1], "tap": [1]})
    refused(source, tmp_path / "out", r"mm_system in config.json does not fit: .*tap")
    edit_json(source / "config.json", mm_system={"taps": [30, 2, 1]})
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
    refused(whole, out, r"these are no weights of QueCC$", system="quecc")
    refused(whole, out, r"system .nonesuch. is not one of llava, average", system="nonesuch")


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


def test_values_beyond_float16(checkpoint: Callable, tmp_path: Path) -> None:
    source = checkpoint(
        lambda name, array: array * np.float32(1e9) if name == "lm_head.weight" else array
    )
    message = r"lm_head.weight holds values beyond float16; choose bfloat16 or float32"
    refused(source, tmp_path / "out", message, dtype="float16")
    assert open_source(source).config
