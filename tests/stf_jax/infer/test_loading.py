"""`load`: what the files beside the weights say, and what is refused before weights are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import stf_jax
from stf_jax import Request
from stf_jax.convert import export_checkpoint, import_checkpoint, inspect_checkpoint
from stf_jax.convert.stored_model import load_processors, open_any
from stf_jax.systems.base import LlavaConfig
from stf_jax.util.errors import CheckpointError


@pytest.fixture
def source(reference: Path, tmp_path: Path) -> Path:
    """A copy of the reference's LLaVA-STF to change."""
    shutil.copytree(reference / "clip", tmp_path / "parent" / "clip")
    return Path(shutil.copytree(reference / "llava-stf", tmp_path / "parent" / "source"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_vocabulary(source: Path, rows: int) -> None:
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name] = np.ascontiguousarray(tensors[name][:rows])
        save_file(tensors, file)
    edit(source / "config.json", vocab_size=rows)


@pytest.mark.parametrize("multiple", [1, 64])
def test_a_tokenizer_beyond_the_embedding(source: Path, tmp_path: Path, multiple: int) -> None:
    """Its ids would be clamped; the rows that pad the embedding are none for them either."""
    cut_vocabulary(source, 590)
    message = r"an embedding of 590 rows and a tokenizer with 10 tokens beyond it, the first '.*' "
    with pytest.raises(CheckpointError, match=message + "with id 590; copy the tokenizer"):
        import_checkpoint(source, tmp_path / "native", vocabulary_multiple=multiple)
    assert not (tmp_path / "native").exists()
    with pytest.raises(CheckpointError, match=message):
        stf_jax.load(source)
    with pytest.raises(CheckpointError, match=message):
        load_processors(source)
    problem = inspect_checkpoint(source).problem
    assert problem is not None
    assert "10 tokens beyond it" in problem


def test_tokens_that_are_never_looked_up_need_no_row(reference: Path, tmp_path: Path) -> None:
    """`<image>` and `<pad>` of a Llava of transformers, exported as LLaVA with LLaVA's rows."""
    clip = reference / "clip"
    import_checkpoint(reference / "vicuna", tmp_path / "0", vision_tower=clip, system="llava")
    export_checkpoint(tmp_path / "0", tmp_path / "hf", layout="hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "1")
    export_checkpoint(tmp_path / "1", tmp_path / "llava", layout="llava", vocabulary=600)
    import_checkpoint(tmp_path / "llava", tmp_path / "2")
    assert inspect_checkpoint(tmp_path / "2").problem is None
    tokenizer = load_processors(tmp_path / "2").tokenizer
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (602, 601)


@pytest.mark.parametrize("native", [False, True])
def test_generation_config_says_what_ends_an_answer(
    source: Path, reference: Path, tmp_path: Path, native: bool
) -> None:
    request = Request(prompt="Why?")
    (whole,) = stf_jax.load(source).generate([request], max_new_tokens=8)
    last = whole.token_ids[4]
    assert last not in whole.token_ids[:4]
    edit(source / "generation_config.json", eos_token_id=last)
    model = source
    if native:
        model = tmp_path / "native"
        import_checkpoint(source, model)
    loaded = stf_jax.load(model)
    # And the tokenizer's own end, which training teaches.
    assert loaded.config.text.eos_ids == (last, 2)
    (answer,) = loaded.generate([request], max_new_tokens=8)
    assert answer.token_ids == whole.token_ids[:5]
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("wrong", ["2", [], [2, None], 2.0, True])
def test_wrong_ends(source: Path, wrong: object) -> None:
    edit(source / "generation_config.json", eos_token_id=wrong)
    with pytest.raises(CheckpointError, match=r"eos_token_id is .*; give an id, or a list of ids"):
        stf_jax.load(source)


def test_float16_on_cpu(source: Path) -> None:
    with pytest.raises(ValueError, match="float16 does not run on CPU; choose float32 or bfloat16"):
        stf_jax.load(source, dtype="float16")


@pytest.mark.parametrize(("ratio", "mode"), [("pad", "pad"), ("square", "crop"), (None, "crop")])
def test_images_are_padded_or_cropped_as_the_config_says(
    source: Path, ratio: str | None, mode: str
) -> None:
    """A bar beside the middle square stays when padded, and goes when cropped."""
    edit(source / "config.json", image_aspect_ratio=ratio)
    processor = load_processors(source).image_processor
    image = np.zeros((50, 150, 3), np.uint8)
    plain = processor.pixels(Image.fromarray(image))
    image[:, :20] = 255
    seen = not np.array_equal(processor.pixels(Image.fromarray(image)), plain)
    assert seen == (mode == "pad")


def test_another_aspect_ratio_is_refused(source: Path) -> None:
    edit(source / "config.json", image_aspect_ratio="anyres")
    with pytest.raises(CheckpointError, match=r"image_aspect_ratio 'anyres'; supported: 'pad'"):
        load_processors(source)


@pytest.mark.parametrize("name", ["pmod", "videollm_mod"])
def test_what_a_system_has_to_learn_is_not_made_up(
    reference: Path, tmp_path: Path, name: str
) -> None:
    """FastV and its like work over any LLaVA; routers would be random."""
    tower = reference / "clip"
    import_checkpoint(reference / "vicuna", tmp_path / "n", vision_tower=tower, system="llava")
    export_checkpoint(tmp_path / "n", tmp_path / "llava", layout="llava")
    message = rf"has no .*, which {name} has to learn; import it with .* --system {name}, and train"
    with pytest.raises(CheckpointError, match=message):
        stf_jax.load(tmp_path / "llava", system=name)
    assert stf_jax.load(tmp_path / "llava", system="fastv").config.system.name == "fastv"
    native = rf"has not all weights of .*convert import OUT MODEL --system {name}$"
    with pytest.raises(CheckpointError, match=native):
        stf_jax.load(tmp_path / "n", system=name)


def test_a_native_checkpoint_under_another_system(reference: Path, tmp_path: Path) -> None:
    """LLaVA-1.5's only, and no system that needs more than its weights."""
    tower, path = reference / "clip", tmp_path / "n"
    import_checkpoint(reference / "vicuna", path, vision_tower=tower, system="llava")
    config = load_native(path)
    fastv = load_native(path, system="fastv", fields={"keep": 3})
    assert fastv.system.to_dict() == {**config.system.to_dict(), "name": "fastv"} | {
        "layer": 1,
        "keep": 3,
    }
    for more, message in (
        ({"system": "voco"}, "has not all weights of VoCo-LLaMA; import it for that"),
        ({"system": "stf"}, "has not all weights of "),
        ({"system": "fastv", "fields": {"keep": 99}}, "keeps .99. of an image's"),
        ({"fields": {"keep": 3}}, "leave out --field"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_native(path, **more)
    import_checkpoint(reference / "llava-stf", tmp_path / "stf")
    with pytest.raises(CheckpointError, match="for one of LLaVA-1"):
        load_native(tmp_path / "stf", system="fastv")


def load_native(path: Path, **how: Any) -> LlavaConfig:
    return open_any(path, **how).config
