"""Small GGUF files of the LLaMA family, written by the `gguf` package as llama.cpp converts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000.0,
    "tie_word_embeddings": True,
}
# llama.cpp's names, in the order of transformers'.
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers.": "blk.",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def draw_tensors(sizes: Mapping[str, Any] = SIZES) -> dict[str, np.ndarray]:
    """Weights of a LLaMA by the names of transformers, float32."""
    rng = np.random.default_rng(0)
    width, mlp, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (heads * head, width),
        "self_attn.k_proj": (kv_heads * head, width),
        "self_attn.v_proj": (kv_heads * head, width),
        "self_attn.o_proj": (width, heads * head),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    names = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(sizes["num_hidden_layers"])
        for name, shape in shapes.items()
    }
    names["model.embed_tokens.weight"] = (sizes["vocab_size"], width)
    names["model.norm.weight"] = (width,)
    if not sizes["tie_word_embeddings"]:
        names["lm_head.weight"] = (sizes["vocab_size"], width)
    return {name: 0.2 * rng.standard_normal(s, np.float32) for name, s in names.items()}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to query and key: d, d + D/2 become neighbors."""
    split = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    sizes: Mapping[str, Any] = SIZES,
    kind: str = "F32",
    family: str = "llama",
    extra: Mapping[str, Any] | None = None,
    factors: np.ndarray | None = None,
) -> Path:
    """A GGUF file of weights by the names of transformers; matrices are quantized as `kind`."""
    import gguf

    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_rope_freq_base(sizes["rope_theta"])
    writer.add_layer_norm_rms_eps(sizes["rms_norm_eps"])
    for key, value in (extra or {}).items():
        add = {
            str: writer.add_string,
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }[type(value)]
        add(key, value)
    heads = {"q_proj": sizes["num_attention_heads"], "k_proj": sizes["num_key_value_heads"]}
    for name, array in tensors.items():
        for part, count in heads.items():
            if part in name:
                array = permute(array, count)
        its_kind = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, gguf.quantize(array, its_kind), raw_dtype=its_kind)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
