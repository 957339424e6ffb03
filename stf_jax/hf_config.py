"""The CLIP and LLaMA parts of a model from and to the `config.json` of `transformers`.

An absent key takes the default of `transformers.CLIPVisionConfig` or `LlamaConfig`, as it does
there. What the LLaVA keys of a PyTorch checkpoint mean is decided by its tensors, in `convert/`.
"""

from collections.abc import Mapping
from typing import Any

from stf_jax.config import RopeScaling, TextConfig, VisionConfig


def vision_from_hf(hf: Mapping[str, Any]) -> VisionConfig:
    """Reads a CLIP `config.json`, that of the vision model alone or of the whole CLIP.

    Raises:
        ValueError: another model family, or a variant that the tower does not compute.
    """
    if "vision_config" in hf:
        hf = hf["vision_config"]
    _supported(hf, "model_type", "clip_vision_model")
    _supported(hf, "num_channels", 3)
    _supported(hf, "hidden_act", "quick_gelu", "gelu")
    return VisionConfig(
        image_size=hf.get("image_size", 224),
        patch_size=hf.get("patch_size", 32),
        width=hf.get("hidden_size", 768),
        mlp_width=hf.get("intermediate_size", 3072),
        layers=hf.get("num_hidden_layers", 12),
        heads=hf.get("num_attention_heads", 12),
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        activation=hf.get("hidden_act", "quick_gelu"),
    )


def vision_to_hf(config: VisionConfig) -> dict[str, Any]:
    """The dictionary that `transformers.CLIPVisionConfig` reads."""
    return {
        "model_type": "clip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
    }


def text_from_hf(hf: Mapping[str, Any]) -> TextConfig:
    """Reads the LLaMA keys of a `config.json`, in the spellings of transformers 4 and 5.

    Raises:
        ValueError: another model family, or a LLaMA variant that the decoder does not compute.
    """
    _supported(hf, "model_type", "llama", "llava_llama", "llava")
    _supported(hf, "hidden_act", "silu")
    _supported(hf, "attention_bias", False)
    _supported(hf, "mlp_bias", False)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    heads = hf.get("num_attention_heads", 32)
    width = hf.get("hidden_size", 4096)
    eos = _or(hf.get("eos_token_id"), 2)
    return TextConfig(
        vocab_size=hf.get("vocab_size", 32000),
        width=width,
        mlp_width=hf.get("intermediate_size", 11008),
        layers=hf.get("num_hidden_layers", 32),
        heads=heads,
        kv_heads=_or(hf.get("num_key_value_heads"), heads),
        head_dim=_or(hf.get("head_dim"), width // heads),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        rope_scaling=_rope_scaling_from_hf(rope),
        max_positions=hf.get("max_position_embeddings", 2048),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        bos_id=_or(hf.get("bos_token_id"), 1),
        eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        pad_id=_or(hf.get("pad_token_id"), 0),
    )


def text_to_hf(config: TextConfig) -> dict[str, Any]:
    """The keys that `transformers.LlamaConfig` reads, in versions 4 and 5."""
    scaling = _rope_scaling_to_hf(config.rope_scaling) if config.rope_scaling else {}
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm_eps,
        # transformers 4 reads the first two keys, transformers 5 the third.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "pad_token_id": config.pad_id,
    }


def _rope_scaling_from_hf(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=rope["factor"],
            low_frequency_factor=rope["low_freq_factor"],
            high_frequency_factor=rope["high_freq_factor"],
            original_positions=rope["original_max_position_embeddings"],
        )
    raise ValueError(f"rope scaling {kind!r} is not supported; supported: 'linear', 'llama3'")


def _rope_scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    # Readers before transformers 4.43 look for "type".
    hf = {"type": scaling.kind, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        hf |= {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    return hf


def _supported(hf: Mapping[str, Any], key: str, *allowed: object) -> None:
    """Refuses a value that would be computed wrongly; an absent key means the first one."""
    found = hf.get(key, allowed[0])
    if found not in allowed:
        names = " or ".join(map(repr, allowed))
        raise ValueError(f"{key} is {found!r} in this config.json; supported: {names}")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
