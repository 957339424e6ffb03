"""The CLIP and LLaMA parts of a model from and to the `config.json` of `transformers`.

An absent key takes the default of `transformers.CLIPVisionConfig` or `LlamaConfig`, as it does
there. What the LLaVA keys of a PyTorch checkpoint mean is decided by its tensors, in `convert/`.
"""

from collections.abc import Mapping
from typing import Any

from stf_jax.config.text import RopeScaling, TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.systems import SYSTEMS

# The sizes that `transformers.CLIPVisionConfig` and `LlamaConfig` have where a file is silent.
VISION_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
TEXT_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def vision_from_hf(hf: Mapping[str, Any]) -> VisionConfig:
    """Reads a CLIP `config.json`, that of the vision model alone or of the whole CLIP.

    Raises:
        ValueError: another model family, or a variant that the tower does not compute.
    """
    if hf.get("vision_config") is not None:
        hf = section(hf, "vision_config")
    _check_value(hf, "model_type", "clip_vision_model")
    _check_value(hf, "num_channels", 3)
    _check_value(hf, "hidden_act", "quick_gelu", "gelu")
    return VisionConfig(
        image_size=_size(hf, "image_size", VISION_DEFAULTS),
        patch_size=_size(hf, "patch_size", VISION_DEFAULTS),
        width=_size(hf, "hidden_size", VISION_DEFAULTS),
        mlp_width=_size(hf, "intermediate_size", VISION_DEFAULTS),
        layers=_size(hf, "num_hidden_layers", VISION_DEFAULTS),
        heads=_size(hf, "num_attention_heads", VISION_DEFAULTS),
        norm_eps=_number(hf, "layer_norm_eps", 1e-5),
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
    kinds = {system.model_type for system in SYSTEMS.values()}
    _check_value(hf, "model_type", "llama", "llava", *sorted(kinds))
    _check_value(hf, "hidden_act", "silu")
    _check_value(hf, "attention_bias", False)
    _check_value(hf, "mlp_bias", False)
    rope = section(hf, "rope_parameters") or section(hf, "rope_scaling") or {}
    heads = _size(hf, "num_attention_heads", TEXT_DEFAULTS)
    width = _size(hf, "hidden_size", TEXT_DEFAULTS)
    # Unlike the other keys, these may be null.
    optional = {
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    hf = {**hf, **{key: _or(hf.get(key), default) for key, default in optional.items()}}
    eos = hf["eos_token_id"]
    return TextConfig(
        vocab_size=_size(hf, "vocab_size", TEXT_DEFAULTS),
        width=width,
        mlp_width=_size(hf, "intermediate_size", TEXT_DEFAULTS),
        layers=_size(hf, "num_hidden_layers", TEXT_DEFAULTS),
        heads=heads,
        kv_heads=_size(hf, "num_key_value_heads", optional),
        head_dim=_size(hf, "head_dim", optional),
        norm_eps=_number(hf, "rms_norm_eps", 1e-6),
        rope_theta=float(_number(rope, "rope_theta", _number(hf, "rope_theta", 10000.0))),
        rope_scaling=_rope_scaling_from_hf(rope),
        max_positions=_size(hf, "max_position_embeddings", {"max_position_embeddings": 2048}),
        tie_embeddings=_get(hf, "tie_word_embeddings", False, (bool,), "true or false"),
        bos_id=_token(hf, "bos_token_id"),
        eos_ids=tuple(_token({"eos_token_id": id_}, "eos_token_id") for id_ in eos)
        if isinstance(eos, list) and eos
        else (_token(hf, "eos_token_id"),),
        pad_id=_token(hf, "pad_token_id"),
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
        return RopeScaling(kind="linear", factor=_number(rope, "factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=_number(rope, "factor"),
            low_frequency_factor=_number(rope, "low_freq_factor"),
            high_frequency_factor=_number(rope, "high_freq_factor"),
            original_positions=_size(rope, "original_max_position_embeddings", {}),
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


def _check_value(hf: Mapping[str, Any], key: str, *allowed: object) -> None:
    """Refuses a value that would be computed wrongly; an absent key means the first one."""
    value = hf.get(key, allowed[0])
    if value not in allowed:
        names = " or ".join(map(repr, allowed))
        raise ValueError(f"{key} is {value!r} in this config.json; supported: {names}")


def section(hf: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under a key of `config.json`; empty where it is absent or null.

    Raises:
        ValueError: it is something else.
    """
    value = hf.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key} is {value!r} in this config.json; give an object, {{...}}")
    return dict(value or {})


def _size(hf: Mapping[str, Any], key: str, defaults: Mapping[str, int]) -> int:
    size = _get(hf, key, defaults.get(key), (int,), "a whole number, 1 or more")
    if size < 1:
        raise ValueError(f"{key} is {size} in this config.json; give 1 or more")
    return int(size)


def _token(hf: Mapping[str, Any], key: str) -> int:
    return int(_get(hf, key, None, (int,), "the id of a token"))


def _number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    number: float = _get(hf, key, default, (int, float), "a number")
    return number


def _get(
    hf: Mapping[str, Any], key: str, default: Any, kinds: tuple[type, ...], wanted: str
) -> Any:
    """The value of a key, refused if it is of another kind, or absent and without default."""
    value = hf.get(key, default)
    if key not in hf and default is None:
        raise ValueError(f"{key} is missing in this config.json; give {wanted}")
    # In Python, True is an int.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{key} is {value!r} in this config.json; give {wanted}")
    return value


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
