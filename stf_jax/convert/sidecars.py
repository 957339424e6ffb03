"""The files beside the weights: config.json, tokenizer, image processor, generation settings.

They start from what came with the import, so that keys unknown here survive, and change only
where they no longer say what the model is.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from stf_jax.config.vision import VisionConfig
from stf_jax.convert.dtypes import FloatName
from stf_jax.convert.hf_config import (
    section,
    text_from_hf,
    text_to_hf,
    vision_from_hf,
    vision_to_hf,
)
from stf_jax.convert.infer import SYSTEM_KEYS, infer_system, replace_vocabulary, system_keys
from stf_jax.convert.mapping import own_entries
from stf_jax.convert.processor import (
    ImageTokens,
    Json,
    encode_json,
    processor_files,
    tokenizer_files,
)
from stf_jax.convert.readers import read_json
from stf_jax.convert.tower import PUBLISHED
from stf_jax.data.processors import MOST_TOKENIZER, find_image_settings
from stf_jax.systems.base import LlavaConfig
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import check_file, explain_file

# Files of a tokenizer, which come from one directory together.
_TOKENIZER = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
_OTHERS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def find_sidecars(*folders: epath.Path, tower: epath.Path | None = None) -> dict[str, epath.Path]:
    """The files that travel along, by their names in a native checkpoint's `hf/`.

    Args:
        folders: where they are looked for, one after the other.
        tower: the vision tower's directory. Its image processor counts where there is no other.

    Raises:
        CheckpointError: one of them is a pipe, a device, or too large for what it is.
    """
    files: dict[str, epath.Path] = {}
    for folder in folders:
        if not files.keys() & {"tokenizer.model", "tokenizer.json"}:
            files |= {name: folder / name for name in _TOKENIZER if (folder / name).exists()}
        for name in _OTHERS:
            if name not in files and (folder / name).exists():
                files[name] = folder / name
    if tower is not None:
        files["vision_tower/config.json"] = tower / "config.json"
        its = {name: tower / name for name in _OTHERS if (tower / name).exists()}
        if not _has_image_settings(files) and _has_image_settings(its):
            name = "processor_config.json"
            if not _has_image_settings({name: its[name]} if name in its else {}):
                name = "preprocessor_config.json"
            files[name] = its[name]
    for path in files.values():
        with explain_file(path, CheckpointError, "download or copy it again"):
            check_file(path, most=MOST_TOKENIZER)
    return files


def _has_image_settings(files: Mapping[str, epath.Path]) -> bool:
    try:
        return find_image_settings(files) is not None
    except CheckpointError:
        # Damaged: who reads it says so.
        return True


def llava_sidecars(
    stored: epath.Path,
    config: LlavaConfig,
    *,
    rows: int,
    dtype: FloatName | None,
) -> dict[str, bytes]:
    """The files of the layouts "llava-stf" and "llava".

    Args:
        stored: The folder of those that came with the import.
        config: The native model.
        rows: Rows of the exported embedding.
        dtype: The dtype to which the weights were cast; None: they are as they came.
    """
    files = _copy_keys(stored)
    if (first := config.images_first) is not None:
        files |= tokenizer_files(files, {first.token: first.token_id})
    config = replace_vocabulary(config, rows)
    files["config.json"] = encode_json(_llava_config(_dtype_name(stored), config, dtype))
    files["vision_tower/config.json"] = encode_json(_vision_config(stored, config.vision))
    return files


def hf_sidecars(
    stored: epath.Path,
    config: LlavaConfig,
    *,
    rows: int,
    tokens: ImageTokens | None,
    dtype: FloatName | None,
) -> dict[str, bytes]:
    """The files of the layout "hf"; arguments as those of `llava_sidecars`.

    A model that did not come in this layout gets the tokens `<image>` and `<pad>`, and a processor
    that knows them; `tokens` is None for one that did.
    """
    files = _copy_keys(stored)
    hf = _dtype_name(stored)
    vision = _vision_config(stored, config.vision)
    config = replace_vocabulary(config, rows)
    if tokens is not None:
        text = {**language_keys(hf), **text_to_hf(config.text), "pad_token_id": tokens.pad}
        for key in [key for key in text if key.startswith("mm_") or key in _LLAVA_ONLY]:
            del text[key]
        kind = text.pop("torch_dtype", text.pop("dtype", "float32"))
        hf = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": tokens.image,
            "image_seq_length": config.vision.patches,
            "pad_token_id": tokens.pad,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": config.system.taps[0] - config.vision.layers - 1,
            "tie_word_embeddings": config.text.tie_embeddings,
            "torch_dtype": kind,
            "text_config": {**text, "architectures": ["LlamaForCausalLM"]},
            "vision_config": {**vision, "model_type": "clip_vision_model"},
        }
    elif text_from_hf(language_keys(hf)) != config.text:
        hf = {**hf, "text_config": section(hf, "text_config") | text_to_hf(config.text)}
    files["config.json"] = encode_json(_with_dtype(hf, dtype))
    if tokens is not None:
        files |= processor_files(files, config.vision, tokens.new)
    return files


def language_keys(hf: Mapping[str, Any]) -> Json:
    """The keys of a config.json that describe the language model, in any layout."""
    inner = section(hf, "text_config")
    if not inner:
        return dict(hf)
    # To transformers, embeddings are tied if either config says so.
    if hf.get("tie_word_embeddings"):
        inner["tie_word_embeddings"] = hf["tie_word_embeddings"]
    return inner


_LLAVA_ONLY = (
    "use_mm_proj",
    "image_aspect_ratio",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "tune_mm_mlp_adapter",
    "freeze_mm_mlp_adapter",
    "architectures",
)


def _llava_config(hf: Json, config: LlavaConfig, dtype: FloatName | None) -> Json:
    base = language_keys(hf)
    kind = {key: hf[key] for key in ("torch_dtype", "dtype") if key in hf}
    result = base | kind
    if not base or text_from_hf(base) != config.text:
        result |= text_to_hf(config.text)
    own = config.system.model_type
    if base.get("model_type") not in ("llava", own):
        named = [name for name, make in PUBLISHED.items() if make() == config.vision]
        result |= {
            "architectures": [config.system.architecture],
            "model_type": own,
            "mm_vision_tower": named[0] if named else "vision_tower",
            "mm_hidden_size": config.vision.width,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_feature": "patch",
            "mm_patch_merge_type": "flat",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
            "tokenizer_model_max_length": min(2048, config.text.max_positions),
            "tokenizer_padding_side": "right",
            "use_mm_proj": True,
            **system_keys(config),
        }
    else:
        result["model_type"] = base["model_type"]
    shapes = {name: e.shape for e in own_entries(config) for name in e.tensors}
    if infer_system(shapes, result, config.vision, config.text) != config.system:
        for key in SYSTEM_KEYS:
            result.pop(key, None)
        result |= system_keys(config)
    return _with_dtype(result, dtype)


def _with_dtype(hf: Json, dtype: FloatName | None) -> Json:
    if dtype is None:
        return hf
    return {**hf, "dtype" if "dtype" in hf else "torch_dtype": dtype}


def _vision_config(stored: epath.Path, vision: VisionConfig) -> Json:
    """The tower's config.json as it came, if it still describes the tower."""
    candidates = [stored / "vision_tower" / "config.json", stored / "config.json"]
    for path in candidates:
        hf = read_json(path) if path.exists() else {}
        try:
            hf = section(hf, "vision_config") or (hf if path is candidates[0] else {})
            if hf and vision_from_hf(hf) == vision:
                return dict(hf)
        except ValueError:
            continue
    return vision_to_hf(vision)


def generation_file(
    files: Mapping[str, bytes], config: LlavaConfig, stops: Collection[int]
) -> dict[str, bytes]:
    """generation_config.json with every token that ends a reply, where the model's own are not all.

    A base model's end of text need not be that of a chat template; other code stops only at what
    this file or config.json names.
    """
    own = config.text.eos_ids
    if {*stops} <= {*own}:
        return {}
    name = "generation_config.json"
    before = json.loads(files[name]) if name in files else {}
    ids = [*own, *sorted({*stops} - {*own})]
    return {name: encode_json({**before, "eos_token_id": ids})}


def _dtype_name(folder: epath.Path) -> Json:
    path = folder / "config.json"
    return read_json(path) if path.exists() else {}


def _copy_keys(folder: epath.Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    files.pop("config.json", None)
    if "generation_config.json" in files:
        generation = read_json(folder / "generation_config.json")
        # Null is as good as absent.
        sampling = any(generation.get(key) not in (None, 1) for key in ("temperature", "top_p"))
        if sampling and not generation.get("do_sample", False):
            # Vicuna's file: newer loaders refuse sampling settings beside greedy decoding.
            files["generation_config.json"] = encode_json({**generation, "do_sample": True})
    return files
