"""What people have that is no checkpoint of ours: one line says what it is, and what to do."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from stf_jax.cli.main import main
from stf_jax.convert import (
    export_checkpoint,
    import_checkpoint,
    inspect_checkpoint,
    open_source,
)
from stf_jax.store.checkpoint import Leaf, open_native
from stf_jax.store.checkpoint import write as write_native
from stf_jax.util.errors import CheckpointError
from tests.stf_jax.convert.refusal import edit_json, refused

OTHER_FORMATS = {
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n" + bytes(9), "is HDF5, a format of TensorFlow, which"),
    "flax_model.msgpack": (b"\xde\x00\x10" + bytes(9), "is MessagePack, a format of Flax, which"),
    "weights.npz": (b"PK\x03\x04" + bytes(9), "is NPZ, a format of NumPy and MLX, which"),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_files_of_other_formats(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = OTHER_FORMATS[name]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(content)
    assert main(["convert", "inspect", str(folder / name)]) == 1
    said = capsys.readouterr().out
    assert message in said
    assert said.rstrip().endswith("take the checkpoint that it was made from")
    assert "truncated" not in said
    if not name.endswith(".bin"):
        kind = message.partition("is ")[2]
        refused(folder, tmp_path / "out", f"model holds {name}: {kind}")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["consolidated.00.pth", "params.json"], r"Meta's own LLaMA; take .* Hugging Face form"),
        (
            ["zero_to_fp32.py", "latest"],
            r"DeepSpeed's ZeRO, .*zero_to_fp32.py \. pytorch_model.bin",
        ),
        (
            ["global_step40/x", "latest"],
            r"DeepSpeed's ZeRO, .*zero_to_fp32.py \. pytorch_model.bin",
        ),
        ([".metadata", "__0_0.distcp"], "of PyTorch's FSDP, .* dcp_to_torch_save of torch.distr"),
        (["checkpoint-500/x", "checkpoint-1000/x"], "name one of them: checkpoint-1000, checkp"),
        (["clip.onnx", "lm.gguf"], "in files of other tools; name one of them: .*clip.onnx, .*lm"),
        (["model.pt"], "holds model.pt and no model.safetensors .* save_pretrained, or rename"),
        (["model-00002-of-00003.safetensors"], r"no index \(model.safetensors.index.json\); down"),
        (["pytorch_model-00001-of-00002.bin"], r"no index \(pytorch_model.bin.index.json\); down"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_directories_of_other_tools(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(b"x")
    said = refused(tmp_path / "model", tmp_path / "out", message)
    assert "\n" not in said


@pytest.mark.parametrize("shard", ["model-{}.safetensors", "pytorch_model-{}.bin"])
def test_shards_without_their_index_are_no_adapter(
    shard: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the projector beside them, as in LLaVA-1.5's own repositories."""
    folder = tmp_path / "llava-v1.5"
    folder.mkdir()
    shutil.copy(reference / "llava-stf" / "config.json", folder)
    shutil.copy(reference / "mm_projector.bin", folder)
    (folder / shard.format("00001-of-00002")).write_bytes(b"x")
    options = {"base": reference / "vicuna", "vision_tower": reference / "clip"}
    refused(folder, tmp_path / "out", rf"holds {shard.format('00001-of-00002')} but no", **options)
    assert main(["convert", "inspect", str(folder)]) == 1
    assert "adapter" not in capsys.readouterr().out


FAMILIES = [
    ({"mm_patch_merge_type": "spatial_unpad"}, r"of the family LLaVA-NeXT \(LLaVA-1.6\), which"),
    (
        {"mm_vision_tower": "google/siglip-so400m-patch14"},
        "a vision tower of the family SigLIP",
    ),
    (
        {"model_type": "mistral"},
        "of the family Mistral .*'mistral'.* take a Vicuna, a Llama 2 or 3",
    ),
    ({"model_type": "llava_mistral"}, "of the family Mistral"),
    ({"model_type": "qwen2"}, "of the family Qwen"),
    ({"model_type": "llava_qwen"}, "of the family Qwen"),
    ({"model_type": "mpt"}, "of the family MPT"),
    ({"model_type": "llava_next"}, r"of the family LLaVA-NeXT \(LLaVA-1.6\), which cuts an image"),
    ({"model_type": "llava", "text_config": {"model_type": "mistral"}}, "of the family Mistral"),
    (
        {"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}},
        "a vision tower of the family SigLIP .* computes CLIP's: give a directory with CLIP",
    ),
    ({"model_type": "mamba"}, "model_type is 'mamba' in this config.json; supported: 'llama'"),
]


@pytest.mark.parametrize(("config", "message"), FAMILIES, ids=[str(c)[:40] for c, _ in FAMILIES])
def test_other_families(
    config: dict[str, object], message: str, checkpoint: Callable, tmp_path: Path
) -> None:
    said = refused(checkpoint(config=config), tmp_path / "out", message)
    assert "\n" not in said


@pytest.mark.parametrize("kind", ["siglip", "siglip_vision_model", "dinov2"])
def test_other_towers(kind: str, reference: Path, tmp_path: Path) -> None:
    tower = Path(shutil.copytree(reference / "clip", tmp_path / "tower"))
    edit_json(tower / "config.json", model_type=kind)
    message = r"tower.* has a vision tower of the family (SigLIP|DINOv2)"
    refused(reference / "vicuna", tmp_path / "out", message, vision_tower=tower)
    refused(tower, tmp_path / "out", message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.0.attention.wq.weight", "is Meta's own LLaMA; take the same model in its Hugging"),
        ("visual.transformer.resblocks.0.ln_1.weight", "is CLIP as OpenAI or OpenCLIP name"),
        ("vision_model.head.attention.in_proj_weight", "is a SigLIP; stf_jax computes CLIP's"),
    ],
)
def test_names_of_other_code(name: str, message: str, tmp_path: Path, write: Callable) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "model.safetensors", {name: np.zeros(2, np.float32)})
    refused(tmp_path / "model", tmp_path / "out", message)


UP = "model.layers.0.mlp.up_proj"
U8 = np.zeros((8, 1), np.uint8)
QUANTIZED = {
    "bitsandbytes": ({f"{UP}.weight": U8, f"{UP}.weight.absmax": U8}, None, "bitsandbytes"),
    "bitsandbytes by its config": (
        {f"{UP}.weight": U8},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "bitsandbytes",
    ),
    "bitsandbytes, 8 bits": (
        {f"{UP}.weight": U8.view(np.int8), f"{UP}.SCB": np.ones(8, np.float32)},
        None,
        "bitsandbytes",
    ),
    "GPTQ": ({f"{UP}.qweight": U8.view(np.int8), f"{UP}.g_idx": U8}, None, "GPTQ or AWQ"),
    "AWQ by its config": ({f"{UP}.qweight": U8}, {"quant_method": "awq"}, "awq"),
    "compressed-tensors": ({f"{UP}.weight_packed": U8}, None, "compressed-tensors"),
    "fp8": ({f"{UP}.weight": U8, f"{UP}.weight_scale_inv": np.ones(1, np.float32)}, None, "fp8"),
    "no name for it": ({f"{UP}.weight": U8}, None, "uint8"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights(kind: str, checkpoint: Callable, tmp_path: Path) -> None:
    tensors, config, method = QUANTIZED[kind]
    source = checkpoint(
        lambda name, array: None if name == f"{UP}.weight" else array,
        add=tensors,
        config={"quantization_config": config} if config else None,
    )
    message = rf"holds quantized weights \({method}\), which .*; take the checkpoint that they were"
    assert "\n" not in refused(source, tmp_path / "out", message)
    assert inspect_checkpoint(source).problem is not None


def test_whole_weights_whose_config_tells_of_quantization(checkpoint: Callable) -> None:
    """What QLoRA leaves when its adapter has been merged."""
    source = checkpoint(config={"quantization_config": {"quant_method": "bitsandbytes"}})
    assert inspect_checkpoint(source).problem is None


@pytest.mark.parametrize(
    "empty", ["model.embed_tokens.weight", "model.mm_projector.0.weight", "model.norm.weight"]
)
def test_empty_tensors_of_zero_3(empty: str, checkpoint: Callable, tmp_path: Path) -> None:
    source = checkpoint(lambda name, array: array.reshape(-1)[:0] if name == empty else array)
    message = rf"holds tensors without values \({empty}\): DeepSpeed's ZeRO-3 .*zero_to_fp32.py"
    refused(source, tmp_path / "out", message)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        lambda name: name.replace(".mlp.", "._orig_mod.mlp."),
    ],
    ids=["DistributedDataParallel", "torch.compile", "both", "FSDP", "a layer's torch.compile"],
)
def test_names_that_wrappers_change(
    wrap: Callable[[str], str], checkpoint: Callable, read: Callable, write: Callable
) -> None:
    source = checkpoint()
    expected = {leaf.path: leaf.read() for leaf in open_source(source).leaves()}
    wrapped = {wrap(name): array for name, array in read(source).items()}
    assert wrapped.keys() != read(source).keys()
    write(source / "model.safetensors", wrapped)
    found = open_source(source)
    assert found.layout == "llava-stf"
    for leaf in found.leaves():
        np.testing.assert_array_equal(leaf.read(), expected[leaf.path])


def test_a_name_twice_once_wrapped_is_refused(checkpoint: Callable, tmp_path: Path) -> None:
    source = checkpoint(add={"module.model.norm.weight": np.ones(64, np.float32)})
    refused(source, tmp_path / "out", r"\n  extra: (module\.)?model.norm.weight$")


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(np.nan, np.float32), (np.inf, np.float16), (-np.inf, ml_dtypes.bfloat16)],
)
@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.1.mlp.up_proj.weight",
        # Nothing computes with it; it is kept for the way back.
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
    ],
)
def test_weights_that_are_not_finite(
    name: str, dtype: type, value: float, checkpoint: Callable, tmp_path: Path
) -> None:
    def spoil(other: str, array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype)
        if other == name:
            array.reshape(-1)[-1] = value
        return array

    counts = "1 NaN and 0 infinite" if np.isnan(value) else "0 NaN and 1 infinite"
    message = rf"^{name} holds {counts} of \d+ values: .*; take an earlier checkpoint, or"
    assert "\n" not in refused(checkpoint(spoil), tmp_path / "out", message)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_largest_and_the_smallest_values_are_finite(
    dtype: type, checkpoint: Callable, tmp_path: Path
) -> None:
    info = ml_dtypes.finfo(dtype)

    def spread(name: str, array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype)
        if name == "lm_head.weight":
            array.reshape(-1)[:4] = [info.max, info.min, info.tiny, -0.0]
        return array

    import_checkpoint(checkpoint(spread), tmp_path / "out")


def test_what_is_not_finite_is_not_exported_either(native: Path, tmp_path: Path) -> None:
    opened = open_native(native)

    def read(name: str) -> np.ndarray:
        array = opened.read(name).copy()
        if name == "text/norm/scale":
            array[0] = np.nan
        return array

    leaves = (
        Leaf(path=name, shape=like.shape, dtype=like.dtype, read=partial(read, name))
        for name, like in opened.shapes.items()
    )
    spoiled = tmp_path / "spoiled"
    write_native(spoiled, config=opened.config, leaves=leaves, extras=opened.copy_extras)
    for layout in ("llava-stf", "native"):
        with pytest.raises(
            CheckpointError, match=r"^(model.norm.weight|text/norm/scale) holds 1 NaN"
        ):
            export_checkpoint(spoiled, tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()
