"""The layout "hf-code": a directory that transformers loads with `trust_remote_code=True`.

It holds code of ours in plain PyTorch (`hf_code/`), so that it needs nothing of this project.
"""

from collections.abc import Mapping
from importlib.resources import files as package_files
from typing import Any

from stf_jax.convert.processor import Json, encode_json
from stf_jax.data.images import ImageProcessor
from stf_jax.systems.base import LlavaConfig
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import decode_json

_CODE = ("configuration", "base", "modeling", "processing")
_CLASSES = {
    "AutoConfig": "configuration_compact_llava.CompactLlavaConfig",
    "AutoModel": "modeling_compact_llava.CompactLlavaModel",
    "AutoModelForImageTextToText": "modeling_compact_llava.CompactLlavaForConditionalGeneration",
}
# Systems whose connector is in the file of another one.
_CONNECTORS = {"average": "stf", "downsample": "llava"}


def compact(config: LlavaConfig) -> dict[str, Any]:
    """What the code is told of the system.

    Raises:
        CheckpointError: it does not compute this one.
    """
    system = config.system
    try:
        fields = system.hf_code(config.vision)
    except ValueError as error:
        raise CheckpointError(
            f"layout hf-code has no code for this system ({system.describe()}): {error}"
        ) from error
    return {
        **fields,
        "taps": list(system.taps),
        "image_size": config.image_size,
        "projector_width": system.projector_width,
        "projector_inputs": system.token_width(config.vision),
    }


def has_code(config: LlavaConfig) -> bool:
    """Whether the code computes this system."""
    try:
        compact(config)
    except CheckpointError:
        return False
    return True


def code_files(config: LlavaConfig) -> dict[str, bytes]:
    """The code that a model needs, by the name of its file."""
    folder, kind = package_files("stf_jax.convert").joinpath("hf_code"), config.system.name
    parts = [*_CODE, *(["processing_question"] if config.question_length else [])]
    names = [f"{part}_compact_llava.py" for part in parts]
    connector = folder.joinpath("connectors", f"{_CONNECTORS.get(kind, kind)}.py")
    return {
        **{name: folder.joinpath(name).read_bytes() for name in names},
        "connector_compact_llava.py": connector.read_bytes(),
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
    name, file = "CompactLlavaProcessor", "processing_compact_llava"
    if config.question_length:
        name, file = "QuestionCompactLlavaProcessor", "processing_question_compact_llava"
    processor = {"processor_class": name, "auto_map": {"AutoProcessor": f"{file}.{name}"}}
    contents["processor_config.json"] |= {
        **processor,
        "tokens_per_image": tokens,
        "question_length": config.question_length,
    }
    contents["preprocessor_config.json"] |= {
        "processor_class": name,
        **_sizes(contents["preprocessor_config.json"], config),
    }
    if aspect_ratio == "pad":
        # To a square of the mean color, as in training.
        contents["preprocessor_config.json"] |= {
            "image_processor_type": "LlavaImageProcessor",
            "do_pad": True,
        }
    if "tokenizer_config.json" in contents:
        contents["tokenizer_config.json"] |= processor
    if "tokenizer_config.json" in contents and "tokenizer.model" in hf:
        # Each piece of text between images begins as a text of its own, as in LLaVA's training.
        contents["tokenizer_config.json"]["legacy"] = True
    return {
        **hf,
        **{name: encode_json(content) for name, content in contents.items()},
        **code_files(config),
    }


def _sizes(settings: Json, config: LlavaConfig) -> Json:
    """The sides in pixels of an image processor, where the tower sees smaller images."""
    if config.image_size == config.vision.image_size:
        return {}
    images = ImageProcessor.from_hf(settings, mode="pad").for_size(config.image_size).to_hf()
    return {key: images[key] for key in ("size", "crop_size")}
