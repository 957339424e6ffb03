"""Checkpoints that are not read: what each of them is, and what to do."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from stf_jax.convert.safetensors_file import TensorInfo
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import check_file, explain_file, name_some

# Other formats, by what their files begin with and by their suffixes.
_MAGIC = {b"\x89HDF": "HDF5, a format of TensorFlow"}
_SUFFIXES = {
    ".h5": _MAGIC[b"\x89HDF"],
    ".msgpack": "MessagePack, a format of Flax",
    ".npz": "NPZ, a format of NumPy and MLX",
}
_TAKE_OTHER = "which stf_jax does not read; take the checkpoint that it was made from"
_META = (
    "Meta's own LLaMA; take the same model in its Hugging Face form, or make that with "
    "convert_llama_weights_to_hf.py of transformers"
)

# Families by how their `model_type` begins; the longest fits first.
_LANGUAGE_MODELS = {
    "mistral": "Mistral",
    "ministral": "Mistral",
    "mixtral": "Mixtral",
    "qwen": "Qwen",
    "gemma": "Gemma",
    "phi": "Phi",
    "mpt": "MPT",
    "llama4": "Llama 4",
    "gpt": "GPT",
    "falcon": "Falcon",
    "opt": "OPT",
}
_MODELS = {
    "llava_next": "LLaVA-NeXT (LLaVA-1.6), which cuts an image into tiles",
    "llava_onevision": "LLaVA-OneVision",
    "video_llava": "Video-LLaVA",
    "vipllava": "ViP-LLaVA",
    "mllama": "Llama 3.2 Vision",
    "paligemma": "PaliGemma",
    "idefics": "Idefics",
    "internvl": "InternVL",
}
_TOWERS = {
    "siglip": "SigLIP",
    "dinov2": "DINOv2",
    "dinov3": "DINOv3",
    "chinese_clip": "Chinese-CLIP",
    "clipseg": "CLIPSeg",
    "vit": "ViT",
    "intern_vit": "InternViT",
    "eva": "EVA-CLIP",
}

# What quantization adds to the names of weights, or puts in their place.
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|weight_packed|weight_scale|weight_scale_inv|absmax|quant_map"
    r"|quant_state\.\w+)$"
)
_METHODS = {
    "SCB": "bitsandbytes",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "fp8",
}


def refuse_file(path: epath.Path) -> None:
    """Refuses a file of weights in a format that is not read.

    Raises:
        CheckpointError: what the file is, and what to do.
    """
    with explain_file(path, CheckpointError, "download or copy it again"):
        check_file(path)
        with path.open("rb") as file:
            kind = _MAGIC.get(file.read(4)) or _SUFFIXES.get(path.suffix)
    if kind is not None:
        raise CheckpointError(f"{path} is {kind}, {_TAKE_OTHER}")


def refuse_directory(path: epath.Path) -> None:
    """Refuses a directory that holds weights in other forms only.

    Raises:
        CheckpointError: what the directory holds, and what to do.
    """
    names = sorted(child.name for child in path.iterdir())

    def find(pattern: str) -> str | None:
        return next((name for name in names if re.fullmatch(pattern, name)), None)

    if name := find(r"consolidated\.\d+\.pth"):
        raise CheckpointError(f"{path} holds {name}: {_META}")
    if find(r"zero_to_fp32\.py") or find(r".*zero_pp_rank_\d+.*") or find(r"global_step\d+"):
        raise CheckpointError(
            f"{path} holds a checkpoint of DeepSpeed's ZeRO, each process's part by itself; make "
            f"one of them: cd {path} && python zero_to_fp32.py . pytorch_model.bin"
        )
    if find(r".*\.distcp"):
        raise CheckpointError(
            f"{path} holds a checkpoint of PyTorch's FSDP, each process's part by itself; make one "
            "of them with dcp_to_torch_save of torch.distributed.checkpoint.format_utils"
        )
    if parts := [name for name in names if re.fullmatch(r"checkpoint-\d+", name)]:
        raise CheckpointError(
            f"{path} holds no weights but checkpoints of a training run; name one of them: "
            + name_some(parts)
        )
    if bundles := [name for name in names if name.endswith((".gguf", ".onnx"))]:
        raise CheckpointError(
            f"{path} holds no weights but in files of other tools; name one of them: "
            + name_some([path / name for name in bundles])
        )
    for suffix, kind in _SUFFIXES.items():
        if name := find(rf".*{re.escape(suffix)}"):
            raise CheckpointError(f"{path} holds {name}: {kind}, {_TAKE_OTHER}")
    if name := find(r".*\.(pth|pt|ckpt)"):
        raise CheckpointError(
            f"{path} holds {name} and no model.safetensors or pytorch_model.bin; save the model "
            "with save_pretrained, or rename that file if it holds the model's state dict alone"
        )


def refuse_family(path: epath.Path, hf: Mapping[str, Any]) -> None:
    """Refuses a config.json of a family that is not computed, or that has a part of one.

    Raises:
        CheckpointError: which family it is, and what to take in its place.
    """
    # LLaVA itself names a tower by its path, and says of LLaVA-1.6 how it lays its tiles together.
    tower = str(hf.get("mm_vision_tower", "")).lower().rpartition("/")[2]
    named = tower if tower.startswith(("siglip", "dinov2")) else None
    tiled = str(hf.get("mm_patch_merge_type", "")).startswith("spatial")
    kinds = [
        section.get("model_type")
        for section in (hf, hf.get("text_config"), hf.get("vision_config"))
        if isinstance(section, Mapping)
    ]
    for kind in (named, "llava_next" if tiled else None, *kinds):
        if not isinstance(kind, str):
            continue
        if family := _find(_TOWERS, kind):
            raise CheckpointError(
                f"{path} has a vision tower of the family {family} ({kind!r}); stf_jax computes "
                "CLIP's: give a directory with CLIP, such as openai/clip-vit-large-patch14-336"
            )
        family = _find(_MODELS, kind) or _find(_LANGUAGE_MODELS, kind.removeprefix("llava_"))
        if family:
            raise CheckpointError(
                f"{path} is of the family {family} ({kind!r}); stf_jax computes LLaMA and "
                "LLaVA-1.5 over it: take a Vicuna, a Llama 2 or 3, or a LLaVA of these"
            )


def refuse_tensors(
    path: epath.Path, infos: Mapping[str, TensorInfo], hf: Mapping[str, Any]
) -> None:
    """Refuses weights that are quantized, or empty.

    Raises:
        CheckpointError: what happened to them, and what to do.
    """
    if method := _find_quantization(infos, hf):
        raise CheckpointError(
            f"{path} holds quantized weights ({method}), which stf_jax does not read; take the "
            "checkpoint that they were made from, in float16, bfloat16 or float32"
        )
    if empty := [name for name, info in infos.items() if 0 in info.shape]:
        raise CheckpointError(
            f"{path} holds tensors without values ({name_some(empty, most=2)}): DeepSpeed's ZeRO-3 "
            "saved them without gathering; make whole ones with its zero_to_fp32.py, or train with "
            "stage3_gather_16bit_weights_on_model_save"
        )


def describe_names(names: Iterable[str]) -> str | None:
    """What a checkpoint is whose tensors are called so, and what to do; None if nobody knows."""
    names = set(names)
    if any(name.endswith("attention.wq.weight") for name in names):
        return f"is {_META}"
    if any("transformer.resblocks." in name for name in names):
        return (
            "is CLIP as OpenAI or OpenCLIP name its tensors; take its Hugging Face form, such as "
            "openai/clip-vit-large-patch14-336"
        )
    if any(".head.attention.in_proj_weight" in name for name in names):
        return "is a SigLIP; stf_jax computes CLIP's tower: give a directory with CLIP"
    return None


def _find(families: Mapping[str, str], model_type: str) -> str | None:
    fits = [start for start in families if model_type.startswith(start)]
    return families[max(fits, key=len)] if fits else None


def _find_quantization(infos: Mapping[str, TensorInfo], hf: Mapping[str, Any]) -> str | None:
    marks = {match[1] for name in infos if (match := _QUANTIZED.search(name))}
    small = {
        info.dtype.name
        for name, info in infos.items()
        if name.endswith(".weight") and info.dtype.itemsize == 1
    }
    if not marks and not small:
        # A config may say so of the model that an adapter was trained on.
        return None
    config = hf.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    known = [_METHODS[mark] for mark in sorted(marks) if mark in _METHODS]
    kind = method or next(iter(known), None) or ", ".join(sorted(small | marks))
    return str(kind)[:40]
