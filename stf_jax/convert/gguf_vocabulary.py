"""A tokenizer as the metadata of a GGUF file; the way back is `stf_jax.convert.gguf_tokenizer`."""

import json
from collections.abc import Mapping
from typing import Any

from stf_jax.config.text import TextConfig
from stf_jax.convert.gguf_tokenizer import LLAMA_3_WORDS
from stf_jax.data.tokenizer import Tokenizer
from stf_jax.util.errors import CheckpointError

# Kinds of tokens, which are sentencepiece's.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# The conversation of LLaVA-1.5; an image is a piece of the user's text there.
_VICUNA = (
    "{% set system = 'A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user\\'s questions.' %}"
    "{% set turns = messages %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}{% endif %}"
    "{{ system + ' ' }}"
    "{% for turn in turns %}"
    "{% if turn['role'] == 'user' %}{{ 'USER: ' + turn['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + turn['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def gguf_vocabulary(
    tokenizer: Tokenizer,
    *,
    rows: int,
    text: TextConfig,
    model: bytes | None,
    chat_template: str | None,
) -> dict[str, Any]:
    """The keys `tokenizer.*`.

    Args:
        tokenizer: of the language model.
        rows: of its embedding; rows without a token become unused ones.
        text: names the tokens with which texts begin, and answers end.
        model: the bytes of tokenizer.model, where there is one: it holds the pieces' scores.
        chat_template: Jinja, as it came; None is LLaVA-1.5's conversation.

    Raises:
        CheckpointError: it cuts text in a way that has no name in GGUF.
    """
    content = json.loads(tokenizer.backend.to_str())
    if content["model"]["type"] != "BPE":
        raise CheckpointError(
            f"layout gguf writes BPE tokenizers, and this is {content['model']['type']}; use "
            "another --layout"
        )
    ids: dict[str, int] = tokenizer.backend.get_vocab(with_added_tokens=True)
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [_UNUSED] * rows
    for token, number in ids.items():
        if number < rows:
            tokens[number], kinds[number] = token, _NORMAL
    for added in content["added_tokens"]:
        if added["id"] < rows:
            kinds[added["id"]] = _CONTROL if added["special"] else _USER
    result: dict[str, Any] = {}
    if content["model"].get("byte_fallback"):
        result |= _sentencepiece(content["model"], tokens, kinds, model)
    else:
        result |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _find_cut(content["pre_tokenizer"]),
            "tokenizer.ggml.merges": [" ".join(merge) for merge in _merges(content["model"])],
        }
    result |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    special: tuple[tuple[str, int | None], ...] = (
        ("bos", text.bos_id),
        ("eos", tokenizer.eos_id),
        # Where a reply ends otherwise than a text.
        ("eot", next((other for other in text.eos_ids if other != tokenizer.eos_id), None)),
        ("unknown", ids.get(content["model"].get("unk_token") or "")),
        ("padding", text.pad_id),
    )
    for name, its_id in special:
        if its_id is not None and its_id < rows:
            result[f"tokenizer.ggml.{name}_token_id"] = its_id
    return result | {
        "tokenizer.ggml.add_bos_token": tokenizer.bos_id is not None,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": chat_template or _VICUNA,
    }


def _sentencepiece(
    model: Mapping[str, Any], tokens: list[str], kinds: list[int], stored: bytes | None
) -> dict[str, Any]:
    """Scores of the pieces: the pair with the highest is joined first. Completes `kinds`."""
    if stored is None:
        for number, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x"):
                kinds[number] = _BYTE
            elif token == model.get("unk_token"):
                kinds[number] = _UNKNOWN
        # Of a piece that several pairs make, the first counts.
        merges = [*enumerate(_merges(model))]
        known = {"".join(merge): -float(rank) for rank, merge in reversed(merges)}
    else:
        from sentencepiece import sentencepiece_model_pb2

        parsed: Any = sentencepiece_model_pb2.ModelProto.FromString(stored)  # type: ignore[attr-defined]
        known = {piece.piece: piece.score for piece in parsed.pieces}
        kinds[: len(parsed.pieces)] = [piece.type for piece in parsed.pieces][: len(tokens)]
    scores = [float(known.get(token, 0.0)) for token in tokens]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def _find_cut(pre_tokenizer: Any) -> str:
    """The name that GGUF has for how a byte-level tokenizer cuts text into words."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [part.get("type") for part in parts if part]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") == LLAMA_3_WORDS:
        return "llama-bpe"
    raise CheckpointError(
        f"this tokenizer cuts text by {', '.join(map(str, kinds)) or 'nothing'}, which has no name "
        "in GGUF that stf_jax knows; use another --layout"
    )
