"""Tokenizer and image processor as `transformers.AutoProcessor` reads them for a Llava."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from stf_jax.config.vision import VisionConfig
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import decode_json

Json = dict[str, Any]

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"

# CLIP's own, for towers that came without a preprocessor_config.json.
_MEAN = [0.48145466, 0.4578275, 0.40821073]
_STD = [0.26862954, 0.26130258, 0.27577711]

# The conversation of LLaVA-1.5 and LLaVA-STF, for `apply_chat_template`.
_CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='A chat between a curious user and an artificial intelligence "
    "assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s "
    "questions.') -%}"
    "{%- macro flat(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for item in content if item['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for item in content if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set ns.system = flat(messages[0]['content']) -%}{%- endif -%}"
    "{{- ns.system + ' ' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' + flat(message['content']) + ' ' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ 'ASSISTANT: ' + flat(message['content']) + '</s>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """Ids of `<image>` and `<pad>` in an exported tokenizer."""

    image: int
    pad: int
    new: Mapping[str, int]  # those of them that the tokenizer does not have yet

    @classmethod
    def among(cls, known: Mapping[str, int], *, after: int) -> Self:
        """Those of a tokenizer where it has them, and the ids from `after` on where it has not."""
        wanted = [token for token in (IMAGE_TOKEN, PAD_TOKEN) if token not in known]
        new = {token: after + i for i, token in enumerate(wanted)}
        ids = {**known, **new}
        return cls(image=ids[IMAGE_TOKEN], pad=ids[PAD_TOKEN], new=new)


def processor_files(
    files: Mapping[str, bytes], vision: VisionConfig, tokens: Mapping[str, int]
) -> dict[str, bytes]:
    """What a LlavaProcessor is made from.

    Args:
        files: The checkpoint's own files, by name; what they say is kept.
        vision: The tower.
        tokens: Ids of the special tokens to add.
    """
    contents: dict[str, Json] = {
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_TOKEN,
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    }
    contents["preprocessor_config.json"] = {
        **clip_preprocessor(vision.image_size),
        **(
            _read(files, "processor_config.json").get("image_processor")
            or _read(files, "preprocessor_config.json")
        ),
        "processor_class": "LlavaProcessor",
    }
    contents |= _add_tokens(files, tokens)
    if "tokenizer_config.json" in files:
        contents["tokenizer_config.json"] |= {
            "pad_token": PAD_TOKEN,
            "extra_special_tokens": {"image_token": IMAGE_TOKEN},
            "processor_class": "LlavaProcessor",
        }
    if "special_tokens_map.json" in files:
        hf = _read(files, "special_tokens_map.json")
        contents["special_tokens_map.json"] = {**hf, "pad_token": PAD_TOKEN}
    encoded = {name: encode_json(content) for name, content in contents.items()}
    return encoded | {"chat_template.jinja": _CHAT_TEMPLATE.encode()}


def clip_preprocessor(size: int) -> Json:
    """The preprocessor_config.json with which CLIP was trained, for images of a side in pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _MEAN,
        "image_std": _STD,
    }


def tokenizer_files(files: Mapping[str, bytes], tokens: Mapping[str, int]) -> dict[str, bytes]:
    """Those of a tokenizer's files that change when it gets special tokens.

    Args:
        files: of the checkpoint, by name.
        tokens: their ids. Files that have them already do not change.
    """
    changed = _add_tokens(files, tokens)
    return {
        name: encode_json(content)
        for name, content in changed.items()
        if content != _read(files, name)
    }


def _add_tokens(files: Mapping[str, bytes], tokens: Mapping[str, int]) -> dict[str, Json]:
    """Every file that says which tokens were added; what it says of a token already is kept."""
    contents: dict[str, Json] = {}
    added = {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, number in tokens.items()
    }
    if "tokenizer_config.json" in files:
        hf = _read(files, "tokenizer_config.json")
        before = hf.get("added_tokens_decoder", {})
        new = {number: token for number, token in added.items() if number not in before}
        contents["tokenizer_config.json"] = {**hf, "added_tokens_decoder": {**before, **new}}
    if "tokenizer.json" in files:
        hf = _read(files, "tokenizer.json")
        listed = hf.get("added_tokens", [])
        known = {token.get("content") for token in listed}
        extra = [
            {"id": int(number), **token}
            for number, token in added.items()
            if token["content"] not in known
        ]
        contents["tokenizer.json"] = {**hf, "added_tokens": [*listed, *extra]}
    if "tokenizer.model" in files and tokens:
        contents["added_tokens.json"] = {**_read(files, "added_tokens.json"), **tokens}
    return contents


def _read(files: Mapping[str, bytes], name: str) -> Json:
    try:
        content: Json = decode_json(files.get(name, b"{}"))
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}; fix it and import again") from error
    return content


def encode_json(content: Mapping[str, Any]) -> bytes:
    """A JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
