"""The layout "gguf": the files from which llama.cpp runs a model.

`model.gguf` is the language model with its tokenizer; `mmproj.gguf` is the tower and the projector.
llama.cpp has a fixed set of projectors, so it computes few systems; each names what it needs
(`System.llama_cpp`).
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from stf_jax.config.text import TextConfig
from stf_jax.convert.dtypes import FLOATS, Array, DType, cast, check_finite
from stf_jax.convert.gguf_file import GGUF_NAMES, ROPE_FACTORS, by_neighbors
from stf_jax.convert.gguf_vocabulary import gguf_vocabulary
from stf_jax.convert.mapping import table
from stf_jax.convert.readers import read_json
from stf_jax.convert.remote_code import has_code
from stf_jax.data.images import ImageProcessor
from stf_jax.data.processors import read_image_processor, read_tokenizer
from stf_jax.models.llama import rope_frequencies
from stf_jax.models.weights import Entry
from stf_jax.store.checkpoint import NativeCheckpoint, extra_files
from stf_jax.systems.base import LlamaCppProjector, LlavaConfig
from stf_jax.util.errors import CheckpointError
from stf_jax.util.progress import byte_progress

_TEXT = {theirs: ours for ours, theirs in GGUF_NAMES.items()}
_TOWER = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
# The layers of each projector by those of LLaVA-1.5's.
_PROJECTORS: Mapping[LlamaCppProjector, str] = {"mlp": "mm.", "ldpv2": "mm.model.mlp."}
_LAYER = re.compile(r"(?:model|vision_model\.encoder)\.layers\.(\d+)\.(.*)\.(weight|bias)")

# llama.cpp computes with these in float32, whatever the rest is.
_FLOAT32 = ("v.position_embd.", "v.class_embd")
# GGUF's names of dtypes, and its numbers for that of most weights.
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}


def check_llama_cpp(config: LlavaConfig) -> Mapping[int, LlamaCppProjector]:
    """The projector of llama.cpp by tokens an image.

    Raises:
        CheckpointError: it has none that computes this system, or not this tower or decoder.
    """
    system = config.system
    projectors = system.llama_cpp(config.vision)
    if not projectors:
        raise CheckpointError(
            f"llama.cpp has no projector that computes this system ({system.describe()}); "
            "docs/converting.md says what one would have to; use --layout "
            f"{'hf-code' if has_code(config) else system.layout}"
        )
    return projectors


def write_gguf(
    checkpoint: NativeCheckpoint,
    hf: epath.Path,
    directory: epath.Path,
    *,
    rows: int,
    dtype: DType | None,
) -> None:
    """Writes `model.gguf` and, for each projector, `mmproj.gguf` or `mmproj-144.gguf`.

    Args:
        checkpoint: the model.
        hf: the folder of its tokenizer and its image processor.
        directory: there already, local.
        rows: of the exported embedding.
        dtype: of the matrices; None is that in which the language model is stored. Vectors are
            float32.

    Raises:
        CheckpointError: llama.cpp does not compute this model, or does not know its tokenizer; or
            the package `gguf` is missing.
    """
    import_gguf()
    config = checkpoint.config
    projectors = check_llama_cpp(config)
    dtype = dtype or checkpoint.shapes["text/norm/scale"].dtype
    entries = table(config, vocabulary=rows)
    text = [entry for entry in entries if entry.native.startswith("text/")]
    vision = [entry for entry in entries if not entry.native.startswith("text/")]
    files = extra_files(checkpoint.extras)
    images = read_image_processor(hf, files)
    metadata = {**_text_metadata(config.text), **_vocabulary(config, hf, files, rows)}
    extra = _rope_factors(config.text)
    _write(directory / "model.gguf", "llama", metadata, checkpoint, text, dtype, extra=extra)
    for tokens, projector in projectors.items():
        whole = tokens == config.tokens_per_image
        metadata = _vision_metadata(config, images, projector)
        name = "mmproj.gguf" if whole else f"mmproj-{tokens}.gguf"
        extra = {} if projector == "mlp" else _no_convolution(config.text.width)
        _write(
            directory / name,
            "clip",
            metadata,
            checkpoint,
            vision,
            dtype,
            extra=extra,
            projector=projector,
        )


def _vocabulary(
    config: LlavaConfig, hf: epath.Path, files: Mapping[str, epath.Path], rows: int
) -> dict[str, Any]:
    model, jinja = files.get("tokenizer.model"), files.get("chat_template.jinja")
    own = read_json(hf / "tokenizer_config.json").get("chat_template")
    if isinstance(own, list):
        # As older releases of transformers wrote several.
        own = next((one.get("template") for one in own if one.get("name") == "default"), None)
    return gguf_vocabulary(
        read_tokenizer(hf, files),
        rows=rows,
        text=config.text,
        model=None if model is None else model.read_bytes(),
        chat_template=own if jinja is None else jinja.read_text(),
    )


def import_gguf() -> Any:
    """The package `gguf`.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "layout gguf needs the package that writes it: pip install 'stf-jax[gguf]'"
        ) from error
    return gguf


def _write(
    path: epath.Path,
    family: str,
    metadata: Mapping[str, Any],
    checkpoint: NativeCheckpoint,
    entries: list[Entry],
    dtype: DType,
    *,
    extra: Mapping[str, Array],
    projector: LlamaCppProjector = "mlp",
) -> None:
    """One file; a parameter at a time is in memory."""
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, family)
    _add_metadata(writer, {**metadata, "general.file_type": _FILE_TYPES[dtype.name]})
    total = 0
    for entry in entries:
        for name in entry.tensors:
            its_name = gguf_name(name, projector)
            kind = _dtype(its_name, entry.shape, dtype)
            size = int(np.prod(entry.shape)) * kind.itemsize
            number = _TYPES[kind.name]
            raw = gguf.GGMLQuantizationType[number]
            writer.add_tensor_info(its_name, entry.shape, kind, size, raw_dtype=raw)
            total += size
    for name, array in extra.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with byte_progress("Exporting", total=total) as advance:
        for name, array in _tensors(checkpoint, entries, projector):
            stored = cast(array, _dtype(name, array.shape, dtype), name=name)
            # The package writes no bfloat16 of ml_dtypes, but any bytes.
            writer.write_tensor_data(np.ascontiguousarray(stored).view(np.uint8))
            advance(stored.nbytes)
        for array in extra.values():
            writer.write_tensor_data(array)
    writer.close()


def _tensors(
    checkpoint: NativeCheckpoint, entries: list[Entry], projector: LlamaCppProjector
) -> Iterator[tuple[str, Array]]:
    heads = {
        "attn_q": checkpoint.config.text.heads,
        "attn_k": checkpoint.config.text.kv_heads,
    }
    arrays = checkpoint.read_each(entry.native for entry in entries)
    for entry, array in zip(entries, arrays, strict=True):
        for name, layer in zip(
            entry.tensors, [array] if entry.layers is None else array, strict=True
        ):
            theirs = gguf_name(name, projector)
            tensor = entry.transform.torch(layer)
            check_finite(tensor, name=theirs)
            part = theirs.split(".")[-2]
            if theirs.startswith("blk.") and part in heads:
                tensor = by_neighbors(tensor, heads[part])
            yield theirs, tensor


def gguf_name(name: str, projector: LlamaCppProjector = "mlp") -> str:
    """What llama.cpp calls a tensor, by its canonical name."""
    if name.startswith("mm_projector."):
        return name.replace("mm_projector.", _PROJECTORS[projector])
    names = _TOWER if name.startswith("vision_model.") else _TEXT
    if layer := _LAYER.fullmatch(name):
        prefix = "v.blk" if name.startswith("vision_model.") else "blk"
        return f"{prefix}.{layer[1]}.{names[layer[2]]}.{layer[3]}"
    name = name.removeprefix("vision_model.")
    if name in names:
        return names[name]
    part, _, kind = name.rpartition(".")
    return f"{names[part]}.{kind}"


def _dtype(name: str, shape: tuple[int, ...], dtype: DType) -> DType:
    if len(shape) == 1 or name.startswith(_FLOAT32):
        return FLOATS["float32"]
    # Its convolutions have kernels of float16 or float32.
    if len(shape) == 4 and dtype.name == "bfloat16":
        return FLOATS["float32"]
    return dtype


def _text_metadata(text: TextConfig) -> dict[str, Any]:
    scaling = text.rope_scaling
    linear = scaling is not None and scaling.kind == "linear"
    return {
        "llama.vocab_size": text.vocab_size,
        "llama.context_length": text.max_positions,
        "llama.embedding_length": text.width,
        "llama.block_count": text.layers,
        "llama.feed_forward_length": text.mlp_width,
        "llama.attention.head_count": text.heads,
        "llama.attention.head_count_kv": text.kv_heads,
        "llama.attention.key_length": text.head_dim,
        "llama.attention.value_length": text.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(text.norm_eps),
        "llama.rope.dimension_count": text.head_dim,
        "llama.rope.freq_base": float(text.rope_theta),
        **(
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": scaling.factor}
            if linear and scaling is not None
            else {}
        ),
    }


def _rope_factors(text: TextConfig) -> dict[str, Array]:
    """By how much Llama 3 slows each rotary frequency."""
    if text.rope_scaling is None or text.rope_scaling.kind != "llama3":
        return {}
    plain = rope_frequencies(dataclasses.replace(text, rope_scaling=None))
    return {ROPE_FACTORS: np.asarray(plain / rope_frequencies(text), np.float32)}


def _vision_metadata(
    config: LlavaConfig, images: ImageProcessor, projector: LlamaCppProjector
) -> dict[str, Any]:
    vision, (tap,) = config.vision, config.system.taps
    return {
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,  # older releases ask
        "clip.projector_type": projector,
        "clip.use_gelu": vision.activation == "gelu",  # else quick_gelu
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.width,
        "clip.vision.feed_forward_length": vision.mlp_width,
        "clip.vision.projection_dim": config.text.width,
        "clip.vision.attention.head_count": vision.heads,
        "clip.vision.attention.layer_norm_epsilon": float(vision.norm_eps),
        # Layers after the one that the projector reads are not there.
        "clip.vision.block_count": tap,
        "clip.vision.feature_layer": [tap],
        "clip.vision.image_mean": [float(value) for value in images.mean],
        "clip.vision.image_std": [float(value) for value in images.std],
    }


def _no_convolution(width: int) -> dict[str, Array]:
    """After the mean over 2x2, `ldpv2` adds a convolution of it; of zeros, it adds nothing."""
    return {
        "mm.model.peg.0.weight": np.zeros((width, 1, 3, 3), np.float16),
        "mm.model.peg.0.bias": np.zeros(width, np.float32),
    }


def _add_metadata(writer: Any, metadata: Mapping[str, Any]) -> None:
    adds = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        adds[type(value)](key, value)
