"""The layout "hf-code": a directory that transformers loads with `trust_remote_code=True`.

It holds code of ours in plain PyTorch (`hf_code/`), so that it needs nothing of this project.
"""

from collections.abc import Mapping
from importlib.resources import files as package_files
from typing import Any

from stf_jax.convert.processor import Json, encode_json
from stf_jax.systems.base import LlavaConfig
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import decode_json

_CODE = ("configuration", "modeling", "processing")
_CLASSES = {
    "AutoConfig": "configuration_compact_llava.CompactLlavaConfig",
    "AutoModel": "modeling_compact_llava.CompactLlavaModel",
    "AutoModelForImageTextToText": "modeling_compact_llava.CompactLlavaForConditionalGeneration",
}
_PROCESSOR = "processing_compact_llava.CompactLlavaProcessor"


def compact(config: LlavaConfig) -> dict[str, Any]:
    """What the code is told of the system.

    Raises:
        CheckpointError: it does not compute this one.
    """
    system = config.system
    fields = system.hf_code(config.vision)
    if fields is None:
        raise CheckpointError(
            f"layout hf-code has no code for this system ({system.describe()}); use --layout "
            f"{system.layout}"
        )
    return {
        **fields,
        "taps": list(system.taps),
        "projector_width": system.projector_width,
        "projector_inputs": system.token_width(config.vision),
    }


def code_sidecars(
    hf: Mapping[str, bytes], config: LlavaConfig, *, aspect_ratio: str | None
) -> dict[str, bytes]:
    """The files of the layout "hf" as those of "hf-code", and the code itself.

    Args:
        hf: from `hf_sidecars`.
        config: the native model.
        aspect_ratio: LLaVA's `image_aspect_ratio`: whether images are padded to a square.
    """
    tokens = config.tokens_per_image
    contents: dict[str, Json] = {
        name: decode_json(content) for name, content in hf.items() if name.endswith(".json")
    }
    contents["config.json"] |= {
        "architectures": ["CompactLlavaForConditionalGeneration"],
        "model_type": "compact_llava",
        "auto_map": _CLASSES,
        "image_seq_length": tokens,
        "image_aspect_ratio": aspect_ratio,
        "compact": compact(config),
        "mm_system": config.system.to_dict(),
    }
    contents["processor_config.json"] |= {
        "processor_class": "CompactLlavaProcessor",
        "auto_map": {"AutoProcessor": _PROCESSOR},
        "tokens_per_image": tokens,
    }
    contents["preprocessor_config.json"]["processor_class"] = "CompactLlavaProcessor"
    if aspect_ratio == "pad":
        # To a square of the mean color, as in training.
        contents["preprocessor_config.json"] |= {
            "image_processor_type": "LlavaImageProcessor",
            "do_pad": True,
        }
    if "tokenizer_config.json" in contents:
        contents["tokenizer_config.json"] |= {
            "processor_class": "CompactLlavaProcessor",
            "auto_map": {"AutoProcessor": _PROCESSOR},
        }
    if "tokenizer_config.json" in contents and "tokenizer.model" in hf:
        # Each piece of text between images begins as a text of its own, as in LLaVA's training.
        contents["tokenizer_config.json"]["legacy"] = True
    code = package_files("stf_jax.convert").joinpath("hf_code")
    names = [f"{part}_compact_llava.py" for part in _CODE]
    return {
        **hf,
        **{name: encode_json(content) for name, content in contents.items()},
        **{name: code.joinpath(name).read_bytes() for name in names},
    }
