"""The tokenizer of a GGUF file, as the files that transformers reads."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from stf_jax.convert.processor import Json, encode_json

# Kinds of tokens, which are sentencepiece's.
_UNKNOWN, _CONTROL, _USER = 2, 3, 4

# How Llama 3 cuts a text into words; published in its tokenizer.json.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Files of the tokenizer by name; none where the metadata hold none.

    Byte-level BPE becomes a tokenizer.json, sentencepiece a tokenizer.model.

    Raises:
        ValueError: a tokenizer of another kind, in a few words.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "no_vocab", "none"):
        return {}
    tokens = _read_list(metadata, "tokens", str)
    kinds = _read_list(metadata, "token_type", int, length=len(tokens))
    if kind == "gpt2":
        files = {"tokenizer.json": _byte_level(metadata, tokens, kinds)}
        kind_name, puts_bos = "PreTrainedTokenizerFast", _is_llama_3(metadata)
    elif kind == "llama":
        files = {"tokenizer.model": _sentencepiece(metadata, tokens, kinds)}
        kind_name, puts_bos = "LlamaTokenizer", True
    else:
        raise ValueError(f"its tokenizer is of the kind {kind!r}; 'gpt2' and 'llama' are read")
    config: Json = {
        "tokenizer_class": kind_name,
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", puts_bos),
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(number) is int and number < len(tokens):
            config[f"{name}_token"] = tokens[number]
    if length := metadata.get("llama.context_length"):
        config["model_max_length"] = length
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return {**files, "tokenizer_config.json": encode_json(config)}


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> bytes:
    merges = _read_list(metadata, "merges", str)
    try:
        result = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: number for number, token in enumerate(tokens)},
                merges=[(left, right) for left, _, right in (m.partition(" ") for m in merges)],
                # Llama 3 takes a word that is a token as it is.
                ignore_merges=_is_llama_3(metadata),
            )
        )
    except Exception as error:  # the library raises nothing narrower for a merge of no token
        raise ValueError(f"its tokenizer is damaged: {error}") from error
    result.pre_tokenizer = _pre_tokenizer(metadata)
    result.decoder = decoders.ByteLevel()
    for kind, special in ((_UNKNOWN, True), (_CONTROL, True), (_USER, False)):
        result.add_tokens(
            [
                tokenizers.AddedToken(token, special=special, normalized=False)
                for token, its_kind in zip(tokens, kinds, strict=True)
                if its_kind == kind
            ]
        )
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token", _is_llama_3(metadata)) and bos is not None:
        result.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return result.to_str().encode()


def _pre_tokenizer(metadata: Mapping[str, Any]) -> Any:
    kind = metadata.get("tokenizer.ggml.pre")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    if kind == "gpt-2":
        return whole
    if _is_llama_3(metadata):
        words = pre_tokenizers.Split(tokenizers.Regex(LLAMA_3_WORDS), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, rest])
    raise ValueError(
        f"its tokenizer cuts text as {kind!r}; 'gpt-2', 'llama-bpe' and 'smollm' are read"
    )


def _is_llama_3(metadata: Mapping[str, Any]) -> bool:
    return metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    scores = _read_list(metadata, "scores", float, length=len(tokens))
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.vocab_size = len(tokens)
    model.trainer_spec.byte_fallback = True
    for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos")):
        if (number := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            setattr(model.trainer_spec, f"{name}_id", number)
    spaces = model.normalizer_spec
    spaces.name = "identity"
    spaces.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces.remove_extra_whitespaces = False
    result: bytes = model.SerializeToString()
    return result


def _read_list(
    metadata: Mapping[str, Any], key: str, kind: type, length: int | None = None
) -> list[Any]:
    """A list of the tokenizer; ValueError if it is none, of another kind, or too short or long."""
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"its tokenizer has no {key}, or others than {kind.__name__}")
    if length not in (None, len(values)):
        raise ValueError(f"its tokenizer has {len(values)} {key} for {length} tokens")
    return values
