"""Files that PyTorch and transformers wrote, and what they make of ours."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

from stf_jax.convert import export_checkpoint, import_checkpoint, open_source
from stf_jax.store.checkpoint import open_native
from stf_jax.util.errors import CheckpointError

pytestmark = pytest.mark.torch

TOWER = "model.vision_tower.vision_tower.vision_model."


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    return {
        name: (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }


def load(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def tiny_hf(
    llava: Mapping[str, object] | None = None, /, **text: object
) -> transformers.LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    language = transformers.LlamaConfig(
        **{
            "vocab_size": 640,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            **text,
        }
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=600,
        pad_token_id=601,
        **(llava or {}),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    # As `from_pretrained` does: the tied tensors become one.
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def classic(name: str) -> str:
    """What transformers 4 calls a tensor of this layout on disk."""
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        name = "language_model.model." + name.removeprefix("language_model.")
    if name.startswith("lm_head."):
        name = "language_model." + name
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        name = "vision_tower.vision_model." + name.removeprefix("vision_tower.")
    return name


SPELLINGS: dict[str, Callable[[str], str]] = {
    "in memory": lambda name: name,
    "in memory, vision_model": lambda name: name.replace(
        "model.vision_tower.", "model.vision_tower.vision_model."
    ),
    "on disk": classic,
    "on disk, transformers 5": lambda name: classic(name).replace(".vision_model.", "."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hf_spellings(spelling: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_hf().to(dtype)
    state = {SPELLINGS[spelling](name): t for name, t in model.state_dict().items()}
    source = tmp_path / "source"
    model.save_pretrained(source)
    safetensors.torch.save_file(state, source / "model.safetensors", {"format": "pt"})
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="hf")
    expected = {classic(name): tensor for name, tensor in model.state_dict().items()}
    assert bits(load(tmp_path / "out")) == bits(expected)
    before = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_what_transformers_saves(shard: str, tmp_path: Path) -> None:
    tiny_hf().save_pretrained(tmp_path / "source", max_shard_size=shard)
    config = open_source(tmp_path / "source").config
    assert config.system.taps == (2,)
    assert config.tokens_per_image == 16
    assert config.text.kv_heads == 4


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_tied_if_either_config_says_so(inner: bool, outer: bool, tmp_path: Path) -> None:
    model = tiny_hf({"tie_word_embeddings": outer}, tie_word_embeddings=inner)
    model.save_pretrained(tmp_path / "source")
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert tied == (inner or outer)
    assert open_source(tmp_path / "source").config.text.tie_embeddings == tied


@pytest.mark.parametrize("layer", [-2, [-2], -1, 1])
def test_selected_layer(layer: int | list[int], tmp_path: Path) -> None:
    """The hidden state that transformers picks, and again after every layout."""
    model = tiny_hf({"vision_feature_layer": layer}).eval()
    model.save_pretrained(tmp_path / "source")
    imported = import_checkpoint(tmp_path / "source", tmp_path / "native")
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        (picked,) = imported.config.system.taps
        expected = model.model.multi_modal_projector(states[picked][:, 1:])
        found = model.model.get_image_features(pixels).pooler_output[0]
    torch.testing.assert_close(found, expected[0])
    export_checkpoint(tmp_path / "native", tmp_path / "llava", layout="llava")
    import_checkpoint(tmp_path / "llava", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "hf", layout="hf")
    for name in ("llava", "hf"):
        assert open_source(tmp_path / name).config.system.taps == imported.config.system.taps
    assert check_loads(tmp_path / "hf").config.vision_feature_layer == picked - 4


def test_tied_embeddings(tmp_path: Path) -> None:
    model = tiny_hf({"tie_word_embeddings": True}, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    imported = import_checkpoint(tmp_path / "source", tmp_path / "native")
    assert imported.config.text.tie_embeddings
    assert "text/head/kernel" not in open_native(tmp_path / "native").shapes
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="hf")
    loaded = check_loads(tmp_path / "out")
    assert bits(loaded.state_dict()) == bits(model.state_dict())


def check_loads(directory: Path) -> transformers.LlavaForConditionalGeneration:
    """transformers finds every key, at its shape, and no other."""
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    return model


def test_hf_export_loads(tmp_path: Path) -> None:
    model = tiny_hf()
    model.save_pretrained(tmp_path / "source")
    import_checkpoint(tmp_path / "source", tmp_path / "native", vocabulary_multiple=256)
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="hf", shard_bytes=200_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert bits(check_loads(tmp_path / "out").state_dict()) == bits(model.state_dict())


def test_llava_to_hf_pads_the_vocabulary(reference: Path, tmp_path: Path) -> None:
    import_checkpoint(
        reference / "vicuna", tmp_path / "native", vision_tower=reference / "clip", system="llava"
    )
    export_checkpoint(tmp_path / "native", tmp_path / "llava", layout="llava")
    export_checkpoint(tmp_path / "native", tmp_path / "hf", layout="hf", dtype="bfloat16")
    model = check_loads(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    assert model.config.image_token_id == 600
    assert model.config.text_config.vocab_size == 640
    # The first is the next multiple of 64 that has room for the image and the padding token.
    llava = load(tmp_path / "llava")
    hf = load(tmp_path / "hf")
    embedding = hf["language_model.model.embed_tokens.weight"]
    assert embedding.shape == (640, 64)
    assert torch.equal(embedding[:600], llava["model.embed_tokens.weight"].bfloat16())
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [600, 601]
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    assert prompt.endswith(" USER: <image>\nWhy? ASSISTANT:")
    # The way back: the same model, with the rows that it was given.
    import_checkpoint(tmp_path / "hf", tmp_path / "back")
    export_checkpoint(tmp_path / "back", tmp_path / "llava2", layout="llava", vocabulary=600)
    expected = {name: tensor.bfloat16() for name, tensor in llava.items()}
    assert bits(load(tmp_path / "llava2")) == bits(expected)


@pytest.mark.parametrize(
    "path", [[("llava", 640)], [("hf", None), ("llava", None)]], ids=["more rows", "there already"]
)
def test_the_image_token_is_the_tokenizers(
    path: list[tuple[str, int | None]], reference: Path, tmp_path: Path
) -> None:
    """Also where the embedding has more rows than the tokenizer, or the tokenizer the token."""
    import_checkpoint(
        reference / "vicuna", tmp_path / "vicuna", vision_tower=reference / "clip", system="llava"
    )
    native = tmp_path / "vicuna"
    for i, (layout, rows) in enumerate(path):
        export_checkpoint(native, tmp_path / f"{i}", layout=layout, vocabulary=rows)
        native = tmp_path / f"native{i}"
        import_checkpoint(tmp_path / f"{i}", native)
    export_checkpoint(native, tmp_path / "out", layout="hf")
    model = check_loads(tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    image, pad = processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"])
    assert model.config.image_token_id == image == 600
    assert model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id == pad == 601
    assert model.config.text_config.vocab_size == 640
    assert len(processor.tokenizer) == 602
    photograph = Image.open(reference / "images" / "0.png")
    inputs = processor(
        images=photograph, text="USER: <image>\nWhy? ASSISTANT:", return_tensors="pt"
    )
    assert (inputs.input_ids == image).sum() == 16
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    for few in (600, 601):
        with pytest.raises(CheckpointError, match=f"vocabulary is {few}, .*; give 602 or more$"):
            export_checkpoint(native, tmp_path / "few", layout="hf", vocabulary=few)


def test_no_vocabulary(reference: Path, tmp_path: Path) -> None:
    import_checkpoint(reference / "llava-stf", tmp_path / "native")
    for few in (0, -3, 599):
        with pytest.raises(CheckpointError, match=f"vocabulary is {few}, .*; give 600 or more$"):
            export_checkpoint(
                tmp_path / "native", tmp_path / "out", layout="llava-stf", vocabulary=few
            )


@pytest.mark.parametrize("kind", ["stf", "average"])
def test_hf_cannot_hold_a_system(kind: str, reference: Path, tmp_path: Path) -> None:
    vicuna, clip = reference / "vicuna", reference / "clip"
    import_checkpoint(vicuna, tmp_path / "native", vision_tower=clip, system=kind)
    right = "llava-stf" if kind == "stf" else "llava"
    with pytest.raises(CheckpointError, match=rf"no place for this system .*--layout {right}$"):
        export_checkpoint(tmp_path / "native", tmp_path / "hf", layout="hf")
    assert not (tmp_path / "hf").exists()


def test_clip_of_this_transformers(reference: Path, tmp_path: Path) -> None:
    tower = transformers.CLIPVisionModel.from_pretrained(reference / "clip")
    tower.save_pretrained(tmp_path / "clip")
    check_tower(reference, tmp_path / "clip")


def test_whole_clip(reference: Path, tmp_path: Path) -> None:
    tower = transformers.CLIPVisionModel.from_pretrained(reference / "clip")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(
        text_config={**text, "num_attention_heads": 2}, vision_config=tower.config.to_dict()
    )
    model = transformers.CLIPModel(config)
    weights = {k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}
    model.vision_model.load_state_dict(weights)
    model.save_pretrained(tmp_path / "clip")
    check_tower(reference, tmp_path / "clip")


def check_tower(reference: Path, clip: Path) -> None:
    ours = open_source(reference / "vicuna", vision_tower=clip)
    expected = open_source(reference / "vicuna", vision_tower=reference / "clip")
    assert ours.config == expected.config
    assert set(ours.carried) == set(expected.carried)
    for left, right in zip(ours.leaves(), expected.leaves(), strict=True):
        np.testing.assert_array_equal(left.read(), right.read())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files(
    dtype: torch.dtype, shards: int, zipped: bool, reference: Path, tmp_path: Path
) -> None:
    source = tmp_path / "parent" / "source"
    shutil.copytree(reference / "clip", tmp_path / "parent" / "clip")
    source.mkdir()
    for file in (reference / "llava-stf").glob("*"):
        if file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, source)
    state = {name: tensor.to(dtype) for name, tensor in load(reference / "llava-stf").items()}
    names = sorted(state)
    if shards == 1:
        torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    else:
        weight_map = {}
        for i in range(shards):
            file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
            shard = {name: state[name] for name in names[i::shards]}
            torch.save(shard, source / file, _use_new_zipfile_serialization=zipped)
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out", layout="llava-stf")
    assert bits(load(tmp_path / "out")) == bits(state)


def test_adapter_of_the_reference(reference: Path, tmp_path: Path) -> None:
    file, base, clip = reference / "mm_projector.bin", reference / "vicuna", reference / "clip"
    imported = import_checkpoint(file, tmp_path / "native", base=base, vision_tower=clip)
    vision = imported.config.vision
    assert imported.config.tokens_per_image == (vision.image_size // vision.patch_size // 2) ** 2
    export_checkpoint(tmp_path / "native", tmp_path / "adapter", layout="adapter")
    original = torch.load(file, weights_only=True)
    written = torch.load(tmp_path / "adapter" / "mm_projector.bin", weights_only=True)
    assert list(written) != []
    assert bits(written) == bits(original)
    # As a directory, with the config.json that came out beside it.
    again = open_source(tmp_path / "adapter", base=base, vision_tower=clip)
    assert again.config == imported.config
    export_checkpoint(tmp_path / "native", tmp_path / "whole", layout="llava-stf")
    whole = load(tmp_path / "whole")
    assert bits({name: whole[name] for name in original}) == bits(original)
    language = load(base)
    assert bits({name: whole[name] for name in language}) == bits(language)
    tower = {TOWER + k.removeprefix("vision_model."): v for k, v in load(clip).items()}
    assert whole.keys() == original.keys() | language.keys() | tower.keys()


def test_adapter_over_the_reference_s_llava(reference: Path) -> None:
    source = open_source(reference / "mm_projector.bin", base=reference / "llava-stf")
    (kernel,) = (
        leaf for leaf in source.leaves() if leaf.path == "connector/projector/linear_2/kernel"
    )
    adapter = torch.load(reference / "mm_projector.bin", weights_only=True)
    np.testing.assert_array_equal(kernel.read().T, adapter["model.mm_projector.2.weight"].numpy())
