"""Ids, labels and expansions against the reference's."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from stf_jax.convert import Source
from stf_jax.data.encoding import EncodedConversation, encode_conversation, expand_conversation
from stf_jax.data.templates import TEMPLATES, get_template
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID, Tokenizer, load_tokenizer


def right_text(template: str, turns: list[dict[str, str]]) -> str | None:
    """The text to supervise where the reference's labels are wrong, and None where they are not."""
    spoken = [turn["value"] for turn in turns if turn["from"] == "gpt"]
    # An opening reply answers nothing, and an empty one teaches nothing.
    replies = [reply for reply in spoken[turns[0]["from"] == "gpt" :] if reply]
    match template:
        case "mpt" | "chatml_direct":
            # It counts <|im_end|> as one token, which it is not for LLaMA: all is masked, save one
            # newline of the prompt where the reply is empty. Here replies and end markers count.
            return "".join(f"{reply}<|im_end|>" for reply in replies)
        case "v0":
            # It counts a BOS and a word-start mark too many for each turn, so that from the second
            # turn on its masks lie beside the questions, and it always supervises the role names.
            # Here: the replies up to the "###" that ends them, an opening and an empty one too.
            return "".join(f" {reply}\n###" for reply in spoken)
        case "mistral_instruct" if sum(turn["from"] == "human" for turn in turns) > 1:
            # Rounds are joined without <s>: the count is one short from the second on, and all is
            # masked.
            return "".join(f" {reply} </s>" for reply in replies)
    return None


@cache
def tokenizer_of(reference: Path) -> Tokenizer:
    return load_tokenizer(reference / "llava-stf")


@cache
def golden(reference: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((reference / "tokenization.json").read_text(encoding="utf-8"))["training"]
    return {name: {row["id"]: row for row in samples} for name, samples in rows.items()}


@cache
def conversations(reference: Path) -> dict[str, Any]:
    rows = json.loads((reference / "conversations.json").read_text(encoding="utf-8"))
    return {row["id"]: row for row in rows}


def encode(
    reference: Path, name: str, sample: str, *, strict: bool = False, max_length: int | None = None
) -> EncodedConversation:
    row = conversations(reference)[sample]
    return encode_conversation(
        tokenizer_of(reference),
        row["conversations"],
        template=get_template(name),
        num_images=int("image" in row),
        strict=strict,
        max_length=max_length,
    )


def supervised_text(reference: Path, encoded: EncodedConversation) -> str:
    ids = [label for label in encoded.labels.tolist() if label != IGNORED_LABEL]
    tokenizer = tokenizer_of(reference)
    tokens = [tokenizer.backend.id_to_token(i) for i in ids]
    # Decoding would take a leading space away.
    return tokenizer.backend.decoder.decode(["▁", *tokens])


def test_every_template_is_compared(reference: Path) -> None:
    ours = {name for name, template in TEMPLATES.items() if template.label_rule is None}
    assert golden(reference).keys() == set(TEMPLATES) - ours - {"vicuna_v1"}


def test_strict_labels_match_the_reference(reference: Path, reference_template: str) -> None:
    for sample, expected in golden(reference)[reference_template].items():
        encoded = encode(reference, reference_template, sample, strict=True)
        assert encoded.ids.dtype == encoded.labels.dtype == np.int32
        assert encoded.ids.tolist() == expected["input_ids"], sample
        assert encoded.labels.tolist() == expected["labels"], sample


def test_span_labels_match_the_reference_where_it_is_right(
    reference: Path, reference_template: str
) -> None:
    for sample, expected in golden(reference)[reference_template].items():
        encoded = encode(reference, reference_template, sample)
        turns = conversations(reference)[sample]["conversations"]
        text = right_text(reference_template, turns)
        assert encoded.ids.tolist() == expected["input_ids"], sample
        assert not encoded.mismatch
        if text is None:
            assert encoded.labels.tolist() == expected["labels"], sample
            continue
        assert encoded.labels.tolist() != expected["labels"], sample
        assert supervised_text(reference, encoded) == text
        kept = encoded.labels != IGNORED_LABEL
        assert np.array_equal(encoded.labels[kept], encoded.ids[kept])


def test_where_the_reference_raises(reference: Path) -> None:
    spoken = {
        sample: [(turn["from"], turn["value"]) for turn in row["conversations"]]
        for sample, row in conversations(reference).items()
    }
    longer = {sample for sample, turns in spoken.items() if len(turns) != 2}
    assert spoken.keys() - golden(reference)["plain"].keys() == longer
    for sample in longer:
        match spoken[sample]:
            case [("gpt", _), ("human", _), ("gpt", reply)]:
                # An opening reply is dropped under `plain` as elsewhere, which leaves one caption.
                encoded = encode(reference, "plain", sample)
                assert supervised_text(reference, encoded) == f" {reply}\n"
            case _:
                with pytest.raises(ValueError, match=r"one caption.*use 'v1'"):
                    encode(reference, "plain", sample)


def test_strict_says_which_samples_the_reference_masks(
    reference: Path, reference_template: str
) -> None:
    rows = golden(reference)[reference_template]
    masked = {
        sample
        for sample in rows
        if encode(reference, reference_template, sample, strict=True).mismatch
    }
    assert masked == {
        sample for sample, row in rows.items() if set(row["labels"]) == {IGNORED_LABEL}
    }
    for sample in rows:
        turns = conversations(reference)[sample]["conversations"]
        empty = any(turn["value"] == "" for turn in turns)
        rounds = sum(turn["from"] == "human" for turn in turns)
        match reference_template:
            case "plain" | "v0":
                expected = False
            case "mpt" | "chatml_direct":
                expected = not empty
            case "mistral_instruct":
                expected = empty or rounds > 1
            case _:
                # "ASSISTANT:" with no reply after it is a round that the reference cannot cut.
                expected = empty
        assert (sample in masked) == expected, sample


def test_strict_masks_a_reply_that_holds_the_separator(reference: Path) -> None:
    conversation = [
        {"from": "human", "value": "Say it."},
        {"from": "gpt", "value": "USER: a ASSISTANT: b"},
    ]
    template = get_template("v1")
    tokenizer = tokenizer_of(reference)
    strict = encode_conversation(
        tokenizer, conversation, template=template, num_images=0, strict=True
    )
    assert strict.mismatch
    assert strict.num_supervised == 0
    ours = encode_conversation(tokenizer, conversation, template=template, num_images=0)
    assert supervised_text(reference, ours) == " USER: a ASSISTANT: b</s>"


words = st.text(st.sampled_from("the dog is?\n停é▁"), min_size=1, max_size=20)


@pytest.mark.parametrize("name", ["v1", "llava_v1", "v1_mmtag", "llava_llama_2"])
@settings(deadline=None)
@given(spoken=st.lists(st.tuples(words, words), min_size=1, max_size=3), image=st.booleans())
def test_spans_and_counting_agree_on_ordinary_conversations(
    reference: Path, name: str, spoken: list[tuple[str, str]], image: bool
) -> None:
    conversation = []
    for index, (question, reply) in enumerate(spoken):
        marker = "<image>\n" if image and index == 0 else ""
        conversation.append({"from": "human", "value": f"{marker}x{question}"})
        conversation.append({"from": "gpt", "value": f"x{reply}"})
    strict, spans = (
        encode_conversation(
            tokenizer_of(reference),
            conversation,
            template=get_template(name),
            num_images=int(image),
            strict=strict,
        )
        for strict in (True, False)
    )
    assert not strict.mismatch
    assert strict.labels.tolist() == spans.labels.tolist()


def test_expansion_matches_the_spliced_reference(reference: Path, source: Source) -> None:
    tokens = source.config.tokens_per_image
    tensors = load_file(reference / "tensors.safetensors")
    rows = [row["id"] for row in conversations(reference).values() if row.get("train")]
    for index, sample in enumerate(rows):
        encoded = encode(reference, "v1", sample)
        length = int(tensors["batch.attention_mask"][index].sum())
        assert encoded.ids.tolist() == tensors["batch.input_ids"][index, :length].tolist()
        expanded = expand_conversation(encoded, tokens_per_image=tokens)
        length = int(tensors["spliced.attention_mask"][index].sum())
        assert len(expanded.ids) == len(expanded.labels) == length
        assert expanded.labels.tolist() == tensors["spliced.labels"][index, :length].tolist()
        assert int((expanded.ids == IMAGE_TOKEN_ID).sum()) == tokens * encoded.num_images


def sample_with(ids: list[int]) -> EncodedConversation:
    array = np.array(ids, np.int32)
    labels = np.where(array == IMAGE_TOKEN_ID, IGNORED_LABEL, array).astype(np.int32)
    return EncodedConversation(
        ids=array, labels=labels, num_images=int((array == IMAGE_TOKEN_ID).sum())
    )


@settings(deadline=None)
@given(
    ids=st.lists(st.sampled_from([IMAGE_TOKEN_ID, 5, 6, 7]), max_size=12),
    tokens=st.integers(1, 4),
    longest=st.integers(0, 30),
)
def test_no_cut_leaves_part_of_an_image(ids: list[int], tokens: int, longest: int) -> None:
    cut = expand_conversation(sample_with(ids), tokens_per_image=tokens, max_length=longest)
    whole = [part for i in ids for part in [i] * (tokens if i == IMAGE_TOKEN_ID else 1)]
    assert cut.ids.tolist() == whole[: len(cut.ids)]
    assert len(cut.ids) == len(cut.labels) <= longest
    assert (cut.ids == IMAGE_TOKEN_ID).sum() == tokens * cut.num_images
    assert cut.truncated == (len(whole) > longest)
    # No more is lost than the image that the limit falls into.
    assert len(cut.ids) == min(longest, len(whole)) or (
        whole[len(cut.ids)] == IMAGE_TOKEN_ID and longest - len(cut.ids) < tokens
    )


def test_truncation_before_expansion_counts_an_image_as_one(reference: Path) -> None:
    whole = encode(reference, "v1", "vqa")
    at = int(np.flatnonzero(whole.ids == IMAGE_TOKEN_ID)[0])
    for longest, images in ((at, 0), (at + 1, 1)):
        cut = encode(reference, "v1", "vqa", max_length=longest)
        assert (len(cut.ids), cut.num_images, cut.truncated) == (longest, images, True)
        assert cut.num_supervised == 0
    assert not encode(reference, "v1", "vqa", max_length=len(whole.ids)).truncated
    assert encode(reference, "v1", "vqa").num_supervised == 5
