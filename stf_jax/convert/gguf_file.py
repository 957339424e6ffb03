"""A GGUF file of the LLaMA family, opened as a directory of Hugging Face would be.

llama.cpp turns by pairs of neighbors where transformers turns by halves, so it permutes the rows
of the query and key projections; here they are put back. Quantized weights become float32.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from stf_jax.config.text import RopeScaling, TextConfig
from stf_jax.convert.bundle import Bundle
from stf_jax.convert.dtypes import FLOATS, Array, DType
from stf_jax.convert.gguf_header import Header, StoredTensor, read_header
from stf_jax.convert.gguf_tokenizer import make_tokenizer_files
from stf_jax.convert.processor import Json, encode_json
from stf_jax.convert.safetensors_file import TensorInfo
from stf_jax.models.llama import rope_frequencies
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import name_some

_FORMAT = "GGUF, the format of llama.cpp and Ollama"
_INSTEAD = "take the checkpoint that it was made from"

# The dtypes that need no package, by the number of their ggml type.
_PLAIN = {0: FLOATS["float32"], 1: FLOATS["float16"], 30: FLOATS["bfloat16"]}

# llama.cpp's names of layers, and transformers'.
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

# By how much each rotary frequency is slowed, from Llama 3.1 on. The settings behind it, which the
# file does not hold, are the same in all of them but for the factor: `RopeScaling`'s defaults.
ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(path: epath.Path) -> Bundle:
    """Opens a GGUF file; its tensors are read and dequantized one at a time.

    Raises:
        CheckpointError: not whole, of another family, or of a quantization that is not read.
    """
    header = read_header(path)
    family = header.metadata.get("general.architecture")
    if family != "llama":
        raise CheckpointError(
            f"{path} is {_FORMAT}, of the family {family!r}, which stf_jax does not read; "
            "take a LLaMA, such as Vicuna, Llama 2 or 3, or SmolLM2"
        )
    if header.metadata.get("llama.expert_count"):
        raise CheckpointError(
            f"{path} is {_FORMAT}, with a mixture of experts, which stf_jax does not compute; "
            "take a LLaMA without one"
        )
    formats = _find_formats(path, header)
    tensors = {n: t for n, t in header.tensors.items() if n != ROPE_FACTORS}
    infos = {
        _hf_name(name): TensorInfo(tensor.shape, formats[tensor.kind].dtype)
        for name, tensor in tensors.items()
    }
    try:
        config = _config(path, header, formats)
        files = {
            "config.json": encode_json(config),
            "generation_config.json": encode_json(
                {key: config[key] for key in _TOKENS if config.get(key) is not None}
            ),
            **make_tokenizer_files(header.metadata),
        }
    except ValueError as error:
        raise CheckpointError(f"{path} is {_FORMAT}; {error}: {_INSTEAD}") from error
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    readers = {}
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        readers[_hf_name(name)] = functools.partial(
            _read, path, tensor, formats[tensor.kind], heads.get(block[2]) if block else None
        )
    return Bundle(infos, readers, files)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Format:
    """How the values of a ggml type are stored."""

    dtype: DType  # as which they are read
    values: int  # in a block
    size: int  # bytes of a block
    kind: Any  # the package's name of a quantization; None for floats

    def nbytes(self, tensor: StoredTensor) -> int:
        return math.prod(tensor.shape) // self.values * self.size

    def read(self, data: bytes, shape: tuple[int, ...]) -> Array:
        if self.kind is None:
            return np.frombuffer(data, self.dtype).reshape(shape)
        from gguf import quants

        blocks = np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1)
        result: Array = quants.dequantize(blocks, self.kind).reshape(shape)
        return result


def _find_formats(path: epath.Path, header: Header) -> dict[int, _Format]:
    """The types of all tensors, each of which is known to fit its rows and to lie in the file."""
    users: dict[int, str] = {}
    for name, tensor in header.tensors.items():
        users.setdefault(tensor.kind, name)
    formats = {kind: _find_format(path, kind, name) for kind, name in users.items()}
    broken = [
        name
        for name, tensor in header.tensors.items()
        if not tensor.shape or tensor.shape[-1] % formats[tensor.kind].values
    ]
    if broken:
        raise CheckpointError(
            f"{path} is damaged: rows of {name_some(broken)} are no whole blocks; "
            "download or copy it again"
        )
    end = max((t.offset + formats[t.kind].nbytes(t) for t in header.tensors.values()), default=0)
    if end > header.size:
        raise CheckpointError(
            f"{path} is truncated: {header.size} bytes of {end}; download or copy it again"
        )
    return formats


def _find_format(path: epath.Path, kind: int, name: str) -> _Format:
    if kind in _PLAIN:
        dtype = _PLAIN[kind]
        return _Format(dtype=dtype, values=1, size=dtype.itemsize, kind=None)
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
    except ImportError as error:
        raise CheckpointError(
            f"{path} is {_FORMAT}, with quantized weights; install what reads them: "
            "pip install 'stf-jax[gguf]'"
        ) from error
    try:
        known = GGMLQuantizationType(kind)
        values, size = GGML_QUANT_SIZES[known]
        # Some types are known, but nothing computes their values.
        quants.dequantize(np.zeros((1, size), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is {_FORMAT}; {name} has the quantization type {kind}, which the package gguf "
            f"does not read: {_INSTEAD}, or update the package"
        ) from error
    return _Format(dtype=FLOATS["float32"], values=values, size=size, kind=known)


def _hf_name(name: str) -> str:
    """The name that transformers gives a tensor; of one that a LLaMA does not have, its own."""
    if block := _BLOCK.fullmatch(name):
        return f"model.layers.{block[1]}.{GGUF_NAMES.get(block[2], block[2])}.{block[3]}"
    layer, _, kind = name.rpartition(".")
    return f"{GGUF_NAMES.get(layer, layer)}.{kind}"


def _read(path: epath.Path, tensor: StoredTensor, form: _Format, heads: int | None) -> Array:
    with path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(form.nbytes(tensor))
    array = form.read(data, tensor.shape)
    return array if heads is None else _by_halves(array, heads)


def _by_halves(array: Array, heads: int) -> Array:
    """Rows of a projection with rotary positions, from pairs of neighbors to pairs of halves."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def by_neighbors(array: Array, heads: int) -> Array:
    """The way back: such rows from pairs of halves to pairs of neighbors."""
    pairs = array.reshape(heads, 2, -1, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _config(path: epath.Path, header: Header, formats: Mapping[int, _Format]) -> Json:
    """The config.json of the model."""
    metadata = header.metadata

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if type(value) not in (int, float):
            raise ValueError(f"llama.{key} is {value!r:.60} where one number is expected")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    if heads < 1 or width < 1:
        raise ValueError(f"it has {heads} heads and a width of {width}")
    head_dim = get("attention.key_length", width // heads)
    if (turned := get("rope.dimension_count", head_dim)) != head_dim:
        raise ValueError(
            f"it turns {turned} of {head_dim} dimensions of a head, which stf_jax does not compute"
        )
    embedding = header.tensors.get("token_embd.weight")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    turn_end = metadata.get("tokenizer.ggml.eot_token_id", eos)
    dtypes = [formats[tensor.kind].dtype.name for tensor in header.tensors.values()]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding.shape[0] if embedding else get("vocab_size"),
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(path, header, formats, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "torch_dtype": max(sorted(set(dtypes)), key=dtypes.count),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos if turn_end == eos else [eos, turn_end],
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _rope_scaling(
    path: epath.Path, header: Header, formats: Mapping[int, _Format], head_dim: int
) -> Json | None:
    metadata = header.metadata
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind != "none":
        # Another kind than "linear" is refused by who reads the config.
        return {"rope_type": kind, "factor": metadata.get("llama.rope.scaling.factor")}
    stored = header.tensors.get(ROPE_FACTORS)
    if stored is None:
        return None
    factors = _read(path, stored, formats[stored.kind], None).astype(np.float64)
    theta = float(metadata.get("llama.rope.freq_base", 10000.0))
    scaling = RopeScaling(kind="llama3", factor=float(factors.max()))
    text = TextConfig(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    plain = rope_frequencies(dataclasses.replace(text, rope_scaling=None))
    expected = np.asarray(plain / rope_frequencies(text))
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"{ROPE_FACTORS} scales positions otherwise than Llama 3, which stf_jax does not "
            "compute"
        )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_positions,
    }
