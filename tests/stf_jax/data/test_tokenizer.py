"""Ids against sentencepiece itself and against the reference; streaming against transformers."""

import json
import pickle
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from stf_jax.data.detokenizer import StreamDecoder
from stf_jax.data.tokenizer import (
    IMAGE_TOKEN_ID,
    Tokenizer,
    encode_prompt,
    expand_images,
    load_tokenizer,
)
from tests.stf_jax.data.byte_level import write_byte_level

SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2}
SPLIT_SPECIALS = re.compile("(<unk>|<s>|</s>)")

# Text in which what matters (spaces, marks, special tokens, bytes) turns up often.
texts = st.lists(
    st.one_of(
        st.sampled_from([" ", "  ", "▁", "\n", "<s>", "</s>", "<unk>", "<image>", "the dog", "?"]),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    ),
    max_size=12,
).map("".join)


@cache
def loaded(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


@cache
def model(directory: Path) -> sentencepiece.SentencePieceProcessor:
    # The file's own add_dummy_prefix is off, so that every mark below is one that the test puts.
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


@pytest.fixture
def directory(reference: Path) -> Path:
    return reference / "llava-stf"


def with_config(directory: Path, target: Path, **changes: object) -> Path:
    """A copy of the tokenizer with other settings."""
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    target.mkdir(exist_ok=True)
    (target / "tokenizer_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    shutil.copy(directory / "tokenizer.model", target)
    return target


def expected_ids(directory: Path, text: str, *, legacy: bool) -> list[int]:
    """What sentencepiece gives, with marks and special tokens as the slow LLaMA tokenizer has."""
    ids: list[int] = []
    marked = text if legacy or not text else "▁" + text.replace("▁", " ")
    for part in SPLIT_SPECIALS.split(marked):
        if part in SPECIALS:
            ids.append(SPECIALS[part])
        elif part:
            ids.extend(model(directory).encode("▁" + part if legacy else part))
    mark = model(directory).piece_to_id("▁")
    if not legacy and len(ids) > 1 and ids[0] == mark and ids[1] in SPECIALS.values():
        return ids[1:]
    return ids


def test_what_it_says_of_itself(directory: Path) -> None:
    tokenizer = loaded(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert (tokenizer.vocab_size, tokenizer.model_max_length) == (600, 2048)
    assert len(repr(tokenizer)) < 300


@settings(deadline=None)
@given(text=texts)
def test_ids_are_those_of_sentencepiece(reference: Path, text: str) -> None:
    directory = reference / "llava-stf"
    assert loaded(directory).encode(text) == expected_ids(directory, text, legacy=False)


@settings(deadline=None)
@given(text=texts)
def test_legacy_ids_are_those_of_sentencepiece(
    reference: Path, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    directory = reference / "llava-stf"
    legacy = tmp_path_factory.getbasetemp() / "legacy"
    if not legacy.exists():
        with_config(directory, legacy, legacy=True)
    assert loaded(legacy).encode(text) == expected_ids(directory, text, legacy=True)


def test_legacy_is_assumed_where_nothing_is_said(directory: Path, tmp_path: Path) -> None:
    shutil.copy(directory / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.marks_start
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)


def test_a_directory_saved_by_transformers_5_still_tells(directory: Path, tmp_path: Path) -> None:
    transformers.LlamaTokenizer.from_pretrained(directory).save_pretrained(tmp_path)
    shutil.copy(directory / "tokenizer.model", tmp_path)
    assert "legacy" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.marks_start
    assert tokenizer.encode(" a </s>b") == expected_ids(directory, " a </s>b", legacy=False)


def test_no_bos_where_the_config_says_so(directory: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(with_config(directory, tmp_path, add_bos_token=False))
    assert tokenizer.bos_id is None
    assert 1 not in encode_prompt(tokenizer, "a<image>b").tolist()


@settings(deadline=None)
@given(text=texts)
def test_a_tokenizer_json_gives_the_same(
    reference: Path, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    directory = reference / "llava-stf"
    saved = tmp_path_factory.getbasetemp() / "json_only"
    if not saved.exists():
        transformers.LlamaTokenizer.from_pretrained(directory).save_pretrained(saved)
        assert not (saved / "tokenizer.model").exists()
    assert loaded(saved).encode(text) == expected_ids(directory, text, legacy=False)


@settings(deadline=None)
@given(text=texts)
def test_spans_name_the_characters(reference: Path, text: str) -> None:
    tokenizer = loaded(reference / "llava-stf")
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == tokenizer.encode(text)
    assert len(spans) == len(ids)
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert {at for start, end in spans for at in range(start, end)} == set(range(len(text)))
    assert spans == sorted(spans)


@settings(deadline=None)
@given(text=texts)
def test_decoding_gives_the_text_back(reference: Path, text: str) -> None:
    tokenizer = loaded(reference / "llava-stf")
    plain = SPLIT_SPECIALS.sub("", text).replace("▁", " ")
    plain = SPLIT_SPECIALS.sub("", plain)
    assert tokenizer.decode([1, IMAGE_TOKEN_ID, *tokenizer.encode(plain), 2]) == plain


def test_prompts_match_the_reference(reference: Path) -> None:
    golden = json.loads((reference / "tokenization.json").read_text(encoding="utf-8"))
    assert golden["image_token_index"] == IMAGE_TOKEN_ID
    for name, expected in golden["prompts"].items():
        ids = encode_prompt(loaded(reference / "llava-stf"), expected["prompt"])
        assert ids.dtype == np.int32
        assert ids.tolist() == expected["input_ids"], name


@settings(deadline=None)
@given(before=texts, typed=texts, after=texts)
def test_special_tokens_that_are_typed_are_text(
    reference: Path, before: str, typed: str, after: str
) -> None:
    directory = reference / "llava-stf"
    start, end = len(before), len(before) + len(typed)
    found = loaded(directory).encode(f"{before}{typed}{after}", typed=[(start, end)])
    # Sentencepiece itself has no text for a special token: it takes its characters.
    parts = [*SPLIT_SPECIALS.split(before), *SPLIT_SPECIALS.split(after)]
    middle = len(SPLIT_SPECIALS.split(before)) - 1
    parts[middle : middle + 2] = [f"{parts[middle]}{typed}{parts[middle + 1]}"]
    expected: list[int] = []
    for number, part in enumerate(parts):
        if number != middle and part in SPECIALS:
            expected.append(SPECIALS[part])
        elif part:
            mark = "" if expected or any(parts[:number]) else "▁"
            expected += model(directory).encode(mark + part.replace("▁", " "))
    assert found == expected


@pytest.mark.parametrize(
    ("text", "images"), [("<image>", 1), ("<image><image>a", 2), ("a<image>", 1), ("", 0)]
)
def test_one_bos_whatever_the_images(directory: Path, text: str, images: int) -> None:
    ids = encode_prompt(loaded(directory), text).tolist()
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert ids.count(IMAGE_TOKEN_ID) == images


def test_expand_images() -> None:
    ids = np.array([1, IMAGE_TOKEN_ID, 7, IMAGE_TOKEN_ID], np.int32)
    expanded = expand_images(ids, tokens_per_image=3)
    assert expanded.dtype == np.int32
    assert expanded.tolist() == [1, -200, -200, -200, 7, -200, -200, -200]


def test_half_a_surrogate_pair_is_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"half a surrogate pair.*clean it with"):
        loaded(directory).encode("a \ud83d")


def test_it_can_be_sent_to_another_process(directory: Path) -> None:
    text = "<image>\n What is this?</s>"
    tokenizer = loaded(directory)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)


def test_missing_and_damaged_tokenizers_are_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer.model .*; copy them from"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"unreadable tokenizer .*; copy it again"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x08\x01 not a model")
    with pytest.raises(ValueError, match=r"unreadable tokenizer .*; copy it again"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: holds a list"):
        load_tokenizer(tmp_path)


def test_a_byte_level_tokenizer_is_read_as_it_stands(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    text = " né 停"
    assert (tokenizer.bos_id, tokenizer.marks_start) == (None, False)
    assert tokenizer.model_max_length is None
    assert tokenizer.pad_id == tokenizer.eos_id == 256
    ids = encode_prompt(tokenizer, f"{text}<image>").tolist()
    assert len(ids) == len(text.encode()) + 1
    assert ids[-1] == IMAGE_TOKEN_ID
    assert tokenizer.decode(ids) == text
    assert stream(tokenizer, ids)[1:] == ["n", "", "é", " ", "", "", "停", "", ""]


def test_a_tokenizer_without_end_is_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="names no eos_token; add it"):
        load_tokenizer(tmp_path)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


@cache
def transformers_tokenizer(directory: Path) -> transformers.LlamaTokenizer:
    return transformers.LlamaTokenizer.from_pretrained(directory)


@settings(deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 599), st.integers(0, 270)), max_size=30))
def test_streamed_text_is_the_whole_text(reference: Path, ids: list[int]) -> None:
    directory = reference / "llava-stf"
    expected = transformers_tokenizer(directory).decode(ids, skip_special_tokens=True)
    assert "".join(stream(loaded(directory), ids)) == expected
    assert loaded(directory).decode(ids) == expected


@settings(deadline=None)
@given(text=texts)
def test_streamed_text_never_breaks_a_character(reference: Path, text: str) -> None:
    tokenizer = loaded(reference / "llava-stf")
    plain = text.replace("▁", " ").replace("\N{REPLACEMENT CHARACTER}", "")
    for special in SPLIT_SPECIALS.findall(plain):
        plain = plain.replace(special, "")
    pieces = stream(tokenizer, tokenizer.encode(plain))
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert SPLIT_SPECIALS.search(plain) or "".join(pieces) == plain


def test_words_come_at_once(directory: Path) -> None:
    tokenizer = loaded(directory)
    pieces = stream(tokenizer, tokenizer.encode("the dog 停 is"))
    assert pieces[:2] == ["the", " dog"]
    assert pieces[-1] == ""


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=12))
def test_streamed_bytes_are_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int]
) -> None:
    directory = tmp_path_factory.getbasetemp() / "byte_level"
    if not directory.exists():
        write_byte_level(directory)
    assert "".join(stream(loaded(directory), ids)) == loaded(directory).backend.decode(ids)
