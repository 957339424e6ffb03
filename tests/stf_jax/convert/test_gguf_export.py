"""`export --layout gguf` writes what llama.cpp reads, and refuses what it does not compute."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stf_jax.cli.main import main
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.convert import export_checkpoint, import_checkpoint, open_source
from stf_jax.convert.gguf_exporter import check_llama_cpp
from stf_jax.convert.gguf_file import by_neighbors
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.store.checkpoint import open_native
from stf_jax.systems import SYSTEMS
from stf_jax.systems.base import LlavaConfig
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.convert.gguf_writer import draw_tensors
from tests.stf_jax.convert.gguf_writer import write_gguf as write_plain

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (extra gguf)")

TEXTS = ("What is the color of the bus?", "  a\n\n日本語 🎉 12,345", "")


@pytest.fixture(scope="module")
def llava(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's language model and tower as LLaVA-1.5, in native form."""
    root = tmp_path_factory.mktemp("llava")
    vicuna = shutil.copytree(reference / "vicuna", root / "vicuna")
    # As older releases of transformers wrote several templates.
    file = vicuna / "tokenizer_config.json"
    templates = [
        {"name": "other", "template": "{{ 1 }}"},
        {"name": "default", "template": "{{ 2 }}"},
    ]
    file.chmod(0o644)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": templates}))
    import_checkpoint(vicuna, root / "native", vision_tower=reference / "clip", system="llava")
    return root / "native"


@pytest.fixture(scope="module")
def exported(llava: Path) -> Path:
    """Its two files."""
    export_checkpoint(llava, llava.parent / "gguf", layout="gguf")
    return llava.parent / "gguf"


def test_the_language_model_comes_back_bit_for_bit(exported: Path, reference: Path) -> None:
    files = sorted(file.name for file in exported.iterdir())
    assert files == ["mmproj.gguf", "model.gguf"]
    back = open_source(exported / "model.gguf", vision_tower=reference / "clip")
    first = open_source(reference / "vicuna", vision_tower=reference / "clip")
    assert back.config.text == first.config.text
    written = gguf.GGUFReader(exported / "model.gguf").fields
    assert written["tokenizer.chat_template"].contents() == "{{ 2 }}"
    names = {name for name in first.tensors if name.startswith(("model.", "lm_head."))}
    assert names == {name for name in back.tensors if name.startswith(("model.", "lm_head."))}
    for name in names:
        np.testing.assert_array_equal(back.tensors[name].read(), first.tensors[name].read(), name)


def test_a_quantized_model_leaves_as_the_numbers_that_it_computes_with(
    llava: Path, reference: Path, tmp_path: Path
) -> None:
    quantized, out, plain = (tmp_path / name for name in ("quantized", "gguf", "plain"))
    export_checkpoint(llava, quantized, layout="native", quantize="int8")
    with pytest.raises(CheckpointError, match="cannot be written in layout gguf; add --dequantize"):
        export_checkpoint(quantized, out, layout="gguf")
    export_checkpoint(quantized, out, layout="gguf", dequantize=True)
    export_checkpoint(quantized, plain, layout="native", dequantize=True)
    back = open_source(out / "model.gguf", vision_tower=reference / "clip", system="llava")
    leaves = [leaf for leaf in back.leaves() if leaf.path.startswith("text/")]
    assert any(leaf.path.endswith("mlp/down/kernel") for leaf in leaves)
    expected = open_native(plain)
    for leaf in leaves:
        np.testing.assert_array_equal(leaf.read(), expected.read(leaf.path), leaf.path)


def test_its_tokenizer_comes_back(exported: Path, reference: Path, tmp_path: Path) -> None:
    clip = reference / "clip"
    import_checkpoint(exported / "model.gguf", tmp_path / "n", vision_tower=clip, system="llava")
    back, first = load_tokenizer(tmp_path / "n" / "hf"), load_tokenizer(reference / "vicuna")
    for text in TEXTS:
        assert back.encode(text) == first.encode(text)
    assert (back.bos_id, back.eos_id) == (first.bos_id, first.eos_id)


def test_the_tower_and_the_projector_have_the_names_of_llama_cpp(
    exported: Path, llava: Path, tmp_path: Path
) -> None:
    export_checkpoint(llava, tmp_path / "hf", layout="hf")
    theirs = {name: leaf.read() for name, leaf in open_source(tmp_path / "hf").tensors.items()}
    reader = gguf.GGUFReader(exported / "mmproj.gguf")
    found = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    pairs = {
        "v.patch_embd.weight": "vision_model.embeddings.patch_embedding.weight",
        "v.position_embd.weight": "vision_model.embeddings.position_embedding.weight",
        "v.blk.1.ffn_up.bias": "vision_model.encoder.layers.1.mlp.fc1.bias",
        "v.blk.1.ffn_down.weight": "vision_model.encoder.layers.1.mlp.fc2.weight",
        "v.blk.0.attn_q.weight": "vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "v.blk.0.attn_out.weight": "vision_model.encoder.layers.0.self_attn.out_proj.weight",
        "v.blk.2.ln2.weight": "vision_model.encoder.layers.2.layer_norm2.weight",
        "mm.0.weight": "mm_projector.0.weight",
        "mm.2.bias": "mm_projector.2.bias",
    }
    for name, hf in pairs.items():
        np.testing.assert_array_equal(found[name], theirs[hf], name)
    config = open_native(llava).config
    (tap,) = config.system.taps
    # Sixteen a layer; and patches, class, positions, two of a norm, four of the projector.
    assert len(found) == 16 * tap + 9
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["clip.projector_type"] == "mlp"
    assert fields["clip.vision.feature_layer"] == [fields["clip.vision.block_count"]] == [tap]


@pytest.fixture
def wide_tower(reference: Path, tmp_path: Path) -> Path:
    """The reference's tower over 24 x 24 patches, as CLIP at 336 pixels sees them."""
    path = shutil.copytree(reference / "clip", tmp_path / "clip")
    config = json.loads((path / "config.json").read_text())
    (config.get("vision_config") or config)["image_size"] = 336
    (path / "config.json").write_text(json.dumps(config))
    images = json.loads((path / "preprocessor_config.json").read_text())
    images |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    tensors = load_file(path / "model.safetensors")
    (positions,) = (name for name in tensors if name.endswith("position_embedding.weight"))
    shape = (577, tensors[positions].shape[1])
    tensors[positions] = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
    save_file(tensors, path / "model.safetensors")
    return path


def test_a_quarter_of_the_tokens_of_m3_is_a_projector_whose_convolution_adds_nothing(
    reference: Path, wide_tower: Path, tmp_path: Path
) -> None:
    import_checkpoint(reference / "vicuna", tmp_path / "n", vision_tower=wide_tower, system="m3")
    export_checkpoint(tmp_path / "n", tmp_path / "out", layout="gguf")
    readers = {
        name: gguf.GGUFReader(tmp_path / "out" / f"{name}.gguf")
        for name in ("mmproj", "mmproj-144")
    }
    found = {
        name: {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
        for name, reader in readers.items()
    }
    quarter = found["mmproj-144"]
    assert readers["mmproj-144"].fields["clip.projector_type"].contents() == "ldpv2"
    for layer in ("0.weight", "0.bias", "2.weight", "2.bias"):
        np.testing.assert_array_equal(
            quarter[f"mm.model.mlp.{layer}"], found["mmproj"][f"mm.{layer}"]
        )
    width = len(quarter["mm.model.mlp.2.bias"])
    assert quarter["mm.model.peg.0.weight"].shape == (width, 1, 3, 3)
    assert not quarter["mm.model.peg.0.weight"].any()
    assert not quarter["mm.model.peg.0.bias"].any()


def test_rows_of_half_precision_and_a_byte_level_tokenizer(tmp_path: Path, reference: Path) -> None:
    tokens = [f"t{number}" for number in range(90)] + [*"abcde", "ab"]
    extra: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * 94],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    tensors = draw_tensors()
    path = write_plain(tmp_path / "model.gguf", tensors, extra=extra)
    import_checkpoint(path, tmp_path / "n", vision_tower=reference / "clip", system="llava")
    export_checkpoint(tmp_path / "n", tmp_path / "out", layout="gguf", dtype="float16")
    before = gguf.GGUFReader(path)
    after = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    for key in [*extra, "llama.rope.freq_base", "llama.attention.head_count_kv"]:
        assert after.fields[key].contents() == before.fields[key].contents(), key
    expected = {tensor.name: np.asarray(tensor.data) for tensor in before.tensors}
    for tensor in after.tensors:
        dtype = np.float32 if len(tensor.shape) == 1 else np.float16
        assert tensor.data.dtype == dtype
        np.testing.assert_array_equal(tensor.data, expected[tensor.name].astype(dtype))


def test_halves_become_neighbors() -> None:
    rows = np.arange(24).reshape(12, 2)
    turned = by_neighbors(rows, 2)
    # Of the first head of six rows: 0 3, 1 4, 2 5.
    np.testing.assert_array_equal(turned[:6, 0] // 2, [0, 3, 1, 4, 2, 5])


def test_only_systems_with_a_projector_of_llama_cpp_are_written() -> None:
    vision, text = VisionConfig.clip_l_336(), TextConfig.vicuna_7b()
    written = {"llava": {576: "mlp"}, "m3": {576: "mlp", 144: "ldpv2"}}
    for name, system in SYSTEMS.items():
        config = LlavaConfig(
            vision=vision, text=text, system=system.for_model(vision=vision, text=text)
        )
        if name in written:
            assert check_llama_cpp(config) == written[name]
            continue
        with pytest.raises(CheckpointError, match=r"llama\.cpp has no projector"):
            check_llama_cpp(config)


def test_another_system_is_refused_and_nothing_is_left(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", "export", str(native), str(out), "--layout", "gguf"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no projector that computes this system (stf" in error
    assert not out.exists()
