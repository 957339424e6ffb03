"""Tokenizers, and text with `<image>` as ids with placeholders.

Ids are those of LLaVA-1.5, whose tokenizer is sentencepiece with `legacy: false`: a text gets one
word-start mark `▁` in front, text after a special token gets none, and the stretches of text
between two `<image>` are tokenized each on its own. transformers 5 is close but not equal (its
pre-tokenizer leaves out the mark where a text starts with a space), so the mark is put here.
"""

import copy
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from stf_jax.data.conversation import PromptText
from stf_jax.data.templates import IMAGE_MARKER, ImagesFirst
from stf_jax.util.files import read_json

IMAGE_TOKEN_ID = -200
# LLaVA's tokens in front of an image and behind it, and one that no text has.
IMAGE_START, IMAGE_END, IMAGE_PATCH = "<im_start>", "<im_end>", "<im_patch>"
IGNORED_LABEL = -100  # of a position that is not supervised

_WORD_START = "▁"
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A loaded tokenizer; make one with `load_tokenizer`.

    Attributes:
      backend: turns text into ids, adding neither BOS nor word-start mark.
      bos_id: put once in front of every sequence; None if this tokenizer puts none.
      eos_id: the end of a reply.
      pad_id: `<unk>` for LLaMA, which has no padding token of its own.
      vocab_size: ids are below it.
      model_max_length: longest sequence that the model is meant for; None if not stated.
      marks_start: whether a word-start mark goes in front of each text and of nothing else, as
        sentencepiece tokenizers with `legacy: false` have it.
      special_ids: tokens that are no text, and are left out of decoded text.
      image_marker: what stands in a text for an image; see `surround_images`.
      images_first: how images come in front of a conversation; see `put_images_first`.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    bos_id: int | None
    eos_id: int
    pad_id: int
    vocab_size: int
    model_max_length: int | None
    marks_start: bool
    special_ids: frozenset[int]
    image_marker: str = IMAGE_MARKER
    images_first: ImagesFirst | None = None

    def encode(self, text: str, *, typed: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Ids of `text` without BOS, special tokens in it recognized. `<image>` means nothing.

        Args:
          text: to be encoded.
          typed: stretches of characters [start, end) in which special tokens are text.
        """
        ids, spans = self.encode_with_spans(text)
        pairs = zip(spans, ids, strict=True)
        special = [(span, token) for span, token in pairs if token in self.special_ids]
        written = [
            (span, token)
            for span, token in special
            if not any(start < span[1] and span[0] < end for start, end in typed)
        ]
        if len(written) == len(special):
            return ids
        # Between the template's own special tokens none is recognized.
        ids, at = [], 0
        for (start, end), token in [*written, ((len(text), len(text)), None)]:
            if stretch := text[at:start]:
                mark = self.marks_start and not at
                marked = _mark(stretch, begins=mark) if self.marks_start else stretch
                ids += self._text_backend.encode(marked, add_special_tokens=False).ids
            ids += [] if token is None else [token]
            at = end
        return ids

    def is_special(self, token: str) -> bool:
        """Whether a text is one special token."""
        return self.backend.token_to_id(token) in self.special_ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text` without BOS, and for each the characters [start, end) it comes from.

        Raises:
          ValueError: `text` has half a surrogate pair, which no UTF-8 can hold.
        """
        if not text:
            return [], []
        marked = _mark(text, begins=True) if self.marks_start else text
        try:
            encoding = self.backend.encode(marked, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise ValueError(
                "the text holds half a surrogate pair and is no valid unicode; clean it with "
                "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
            ) from None
        ids, spans = encoding.ids, encoding.offsets
        if not self.marks_start:
            return ids, spans
        spans = [(max(start - 1, 0), max(end - 1, 1)) for start, end in spans]
        # A mark alone before a special token marks nothing.
        if len(ids) > 1 and ids[1] in self.special_ids and ids[0] == self._mark_id:
            return ids[1:], spans[1:]
        return ids, spans

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens and image placeholders left out."""
        text_ids = [int(i) for i in ids if i >= 0]
        return self.backend.decode(text_ids, skip_special_tokens=True)

    @functools.cached_property
    def special_tokens(self) -> frozenset[str]:
        """The texts of `special_ids`."""
        texts = (self.backend.id_to_token(token_id) for token_id in self.special_ids)
        return frozenset(text for text in texts if text)

    @property
    def _mark_id(self) -> int | None:
        return self.backend.token_to_id(_WORD_START)

    @functools.cached_property
    def _text_backend(self) -> tokenizers.Tokenizer:
        """Recognizes no special token."""
        backend = copy.deepcopy(self.backend)
        backend.encode_special_tokens = True
        return backend


def _mark(text: str, *, begins: bool) -> str:
    """A stretch of text with a word-start mark where a text begins; typed marks are spaces."""
    return (_WORD_START if begins else "") + text.replace(_WORD_START, " ")


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint directory.

    `tokenizer.model` (sentencepiece) is preferred to `tokenizer.json`, as in the LLaVA code, which
    always takes the slow tokenizer; the second is read as it stands.

    Raises:
      ValueError: the directory holds neither file, or one that cannot be read.
    """
    # Importing transformers takes a second, which encoding need not wait for.
    # It says at length that it does not find PyTorch, which nobody needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    path = Path(directory)
    config = _read_some(path / "tokenizer_config.json")
    from_model = (path / "tokenizer.model").is_file() and (
        config.get("tokenizer_class") in _LLAMA_CLASSES
    )
    if not from_model and not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"{path}: no tokenizer.model of a LLaMA tokenizer and no tokenizer.json here; "
            "copy them from the language model's checkpoint"
        )
    try:
        loaded: Any = (LlamaTokenizer if from_model else PreTrainedTokenizerFast).from_pretrained(
            path, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds for a damaged file
        # Their texts mislead: of a damaged tokenizer.model, they say that tiktoken is required.
        name = "tokenizer.model" if from_model else "tokenizer.json"
        raise ValueError(
            f"{path}: unreadable tokenizer ({name} is damaged or of another kind); copy it again"
        ) from error

    backend = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    if from_model:
        # transformers 5 drops this key when it saves; the tokenizer.json beside it still tells.
        beside = _read_some(path / "tokenizer.json").get("pre_tokenizer") or {}
        marks_start = not config.get("legacy", beside.get("prepend_scheme") != "first")
        # Without a config transformers 5 leaves BOS out, which LLaMA needs.
        puts_bos = bool(config.get("add_bos_token", True))
    else:
        pre_tokenizer: Any = backend.pre_tokenizer
        marks_start = (
            isinstance(pre_tokenizer, pre_tokenizers.Metaspace)
            and pre_tokenizer.prepend_scheme == "first"
        )
        puts_bos = loaded("").input_ids[:1] == [loaded.bos_token_id]
    if from_model or marks_start:
        _normalize_like_sentencepiece(backend, marks_start=marks_start)
    if loaded.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer names no eos_token; add it to its config")
    pad_id = loaded.pad_token_id if loaded.pad_token_id is not None else loaded.unk_token_id
    longest = int(loaded.model_max_length)
    return Tokenizer(
        backend=backend,
        bos_id=loaded.bos_token_id if puts_bos else None,
        eos_id=loaded.eos_token_id,
        pad_id=pad_id if pad_id is not None else loaded.eos_token_id,
        vocab_size=backend.get_vocab_size(with_added_tokens=True),
        # transformers writes a huge number where no length is stated.
        model_max_length=longest if longest < 10**9 else None,
        marks_start=marks_start,
        special_ids=frozenset(loaded.all_special_ids).union(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        ),
    )


def surround_images(tokenizer: Tokenizer, *, patch: bool) -> Tokenizer:
    """The tokenizer of a LLaVA that has `<im_start>` in front of each image and `<im_end>` behind.

    Where the tokenizer's files lack these tokens, they are added behind all others, as LLaVA adds
    them to a model that it loads.

    Args:
      tokenizer: of the model.
      patch: whether `<im_patch>`, which no text has, was added in front of them.
    """
    names = [IMAGE_PATCH, IMAGE_START, IMAGE_END] if patch else [IMAGE_START, IMAGE_END]
    return replace(
        _add_tokens(tokenizer, names), image_marker=f"{IMAGE_START}{IMAGE_MARKER}{IMAGE_END}"
    )


def put_images_first(tokenizer: Tokenizer, first: ImagesFirst) -> Tokenizer:
    """The tokenizer of a model that has images in front, and a token that stands for them.

    Where the tokenizer's files lack this token, it is added behind all others.

    Raises:
      ValueError: it has another id than in the model.
    """
    result = _add_tokens(tokenizer, [first.token])
    number = result.backend.token_to_id(first.token)
    if number != first.token_id:
        raise ValueError(
            f"the tokenizer numbers {first.token!r} {number}, and the model {first.token_id}; copy "
            "the tokenizer that belongs to these weights"
        )
    return replace(result, images_first=first)


def _add_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """With special tokens, behind all others where it lacks them."""
    backend = copy.deepcopy(tokenizer.backend)
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False, special=True) for name in names]
    )
    ids = [token for name in names if (token := backend.token_to_id(name)) is not None]
    return replace(
        tokenizer,
        backend=backend,
        vocab_size=backend.get_vocab_size(with_added_tokens=True),
        special_ids=tokenizer.special_ids.union(ids),
    )


def _read_some(path: Path) -> Mapping[str, Any]:
    """What a JSON file holds: nothing where there is no file."""
    return read_json(path) if path.is_file() else {}


def _normalize_like_sentencepiece(backend: tokenizers.Tokenizer, *, marks_start: bool) -> None:
    """Spaces become marks; unless `encode` puts one, each stretch between specials gets its own."""
    steps: list[Any] = [] if marks_start else [normalizers.Prepend(_WORD_START)]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _WORD_START)])
    backend.pre_tokenizer = None


def encode_prompt(tokenizer: Tokenizer, prompt: PromptText | str) -> np.ndarray:
    """Ids int32 [T] of a prompt: BOS, then the text, each `<image>` as `IMAGE_TOKEN_ID`.

    A LLaMA 2 prompt's own leading `<s>` is none: templates give text without it. Special tokens in
    what was typed are text; a plain string counts as all the template's.
    """
    if isinstance(prompt, str):
        prompt = PromptText(text=prompt)
    return np.array(ids_with_images(tokenizer, prompt.text, typed=prompt.typed), np.int32)


def expand_images(ids: np.ndarray, *, tokens_per_image: int | Sequence[int]) -> np.ndarray:
    """Repeats each `IMAGE_TOKEN_ID` of int32 [T] so many times, or each as often as it says."""
    repeats = np.ones(len(ids), int)
    repeats[ids == IMAGE_TOKEN_ID] = tokens_per_image
    return np.repeat(ids, repeats)


def chunks(text: str, *, with_images: bool = True) -> Iterator[tuple[int, str]]:
    """The stretches of text between image markers, with the character each starts at."""
    start = 0
    for chunk in text.split(IMAGE_MARKER) if with_images else [text]:
        yield start, chunk
        start += len(chunk) + len(IMAGE_MARKER)


def ids_with_images(
    tokenizer: Tokenizer,
    text: str,
    *,
    typed: Sequence[tuple[int, int]] = (),
    with_images: bool = True,
) -> list[int]:
    """`encode_prompt` as a list; without images `<image>` is ordinary text."""
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for start, chunk in chunks(text, with_images=with_images):
        if start:
            ids.append(IMAGE_TOKEN_ID)
        spans = [(first - start, last - start) for first, last in typed]
        ids.extend(tokenizer.encode(chunk, typed=spans))
    return ids
