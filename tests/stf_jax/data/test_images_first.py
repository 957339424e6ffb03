"""Prompts and training texts of a model that has images in front of the conversation."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from stf_jax.config.text import TextConfig
from stf_jax.data.builder import build
from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.conversation import render_conversation, render_prompt
from stf_jax.data.encoding import encode_conversation, expand_conversation
from stf_jax.data.fit import fit_template
from stf_jax.data.images import ImageProcessor
from stf_jax.data.index import index_name
from stf_jax.data.pipeline import TrainingData
from stf_jax.data.templates import ImagesFirst, Template
from stf_jax.data.tokenizer import (
    IGNORED_LABEL,
    IMAGE_TOKEN_ID,
    Tokenizer,
    encode_prompt,
    put_images_first,
)
from stf_jax.models.layers import Init
from stf_jax.models.llava import marks_of
from stf_jax.models.marks import ANSWER
from stf_jax.systems.voco import BEFORE, VOCO, VoCo, VoCoLlama
from tests.corpus import Corpus
from tests.stf_jax.data.steps import K
from tests.stf_jax.data.test_conversation import talk

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant of the image. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer


@pytest.fixture(scope="module")
def first(plain: Tokenizer) -> ImagesFirst:
    """VoCo's, with three tokens an image."""
    return VoCo(count=3, token_id=plain.vocab_size).images_first


@pytest.fixture(scope="module")
def voco(plain: Tokenizer, first: ImagesFirst) -> Tokenizer:
    return put_images_first(plain, first)


@pytest.fixture(scope="module")
def template(voco: Tokenizer) -> Template:
    return fit_template("v1", voco)


def training_text(template: Template, *values: str, images: int) -> str:
    pieces = render_conversation(talk(*values), template=template, num_images=images)
    return "".join(piece.text for piece in pieces)


def test_training_text_is_written_by_hand(template: Template) -> None:
    """As the released code: images, vocos, then the conversation in one line."""
    text = training_text(template, "How\nmany?\n<image>", "Two\n\nor 3.", "Sure?", "Yes", images=1)
    assert text == (
        f"<image>\n<voco><voco><voco>\n{SYSTEM} USER: Howmany? ASSISTANT: Twoor 3.</s>"
        "USER: Sure? ASSISTANT: Yes</s>"
    )


def test_several_images_come_before_all_vocos(template: Template) -> None:
    text = training_text(template, "<image>\nand <image>?", "Two.", images=2)
    vocos = "<voco>" * 6
    assert text == f"<image>\n<image>\n{vocos}\n{SYSTEM} USER: and ? ASSISTANT: Two.</s>"


def test_text_alone_keeps_its_lines(template: Template) -> None:
    """It has the same system text, and no voco; `<image>` is ordinary text there."""
    text = training_text(template, "A\nB <image>?", "C\nD", images=0)
    assert text == f"{SYSTEM} USER: A\nB <image>? ASSISTANT: C\nD</s>"
    assert "<voco>" not in training_text(template, "Type <voco>", "<vo<voco>co>", images=0)


def test_prompts_are_training_texts(template: Template) -> None:
    """A later turn's images come in front, too; with history and without."""
    prompt = render_prompt(
        "And\nthis?<image>", template=template, history=[("<image>\nHow many?", "Two.")]
    )
    text = training_text(template, "<image>\nHow many?", "Two.", "And\nthis?<image>", "", images=2)
    assert prompt.text == text
    assert prompt.text.startswith("<image>\n<image>\n" + "<voco>" * 6 + f"\n{SYSTEM} USER: How")
    typed = [prompt.text[start:end] for start, end in prompt.typed]
    assert typed == ["How many?", "Two.", "Andthis?"]
    assert render_prompt("Hi\nyou", template=template).text == f"{SYSTEM} USER: Hi\nyou ASSISTANT:"


def test_ids_are_those_of_the_tokenizer(
    plain: Tokenizer, voco: Tokenizer, first: ImagesFirst, template: Template
) -> None:
    """The stretches between special tokens, each as sentencepiece has it."""
    ids = encode_prompt(voco, render_prompt("<image>\nHow many?", template=template)).tolist()
    newline = plain.encode("\n")
    # A stretch behind a special token has no word-start mark.
    rest = plain.encode(f"</s>\n{SYSTEM} USER: How many? ASSISTANT:")[1:]
    vocos = [first.token_id] * 3
    assert ids == [plain.bos_id, IMAGE_TOKEN_ID, *newline, *vocos, *rest]
    assert voco.decode(ids) == plain.decode([*newline, *rest])


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.text("ab \n<voco>image", max_size=9), min_size=2, max_size=6))
def test_labels_are_those_of_llava(
    voco: Tokenizer, first: ImagesFirst, template: Template, values: Sequence[str]
) -> None:
    """Every voco stands in front of the text, whatever is written there; replies are supervised."""
    values = [value.replace("<image>", "") + "." for value in values[: len(values) // 2 * 2]]
    values[0] = f"<image>{values[0]}"
    encoded = encode_conversation(voco, talk(*values), template=template, num_images=1)
    strict = encode_conversation(voco, talk(*values), template=template, num_images=1, strict=True)
    assert not strict.mismatch
    np.testing.assert_array_equal(encoded.labels, strict.labels)
    expanded = expand_conversation(encoded, tokens_per_image=4)
    vocos = np.flatnonzero(expanded.ids == first.token_id)
    images = np.flatnonzero(expanded.ids == IMAGE_TOKEN_ID)
    np.testing.assert_array_equal(np.diff(vocos), 1)
    assert (len(vocos), len(images)) == (3, 4)
    assert images[-1] < vocos[0]
    supervised = expanded.labels != IGNORED_LABEL
    assert not supervised[: vocos[-1] + 1].any()
    replies = values[1::2]
    assert (expanded.labels == voco.eos_id).sum() == len(replies)


def test_a_tokenizer_of_another_model_is_refused(plain: Tokenizer, first: ImagesFirst) -> None:
    other = dataclasses.replace(first, token_id=first.token_id + 1)
    with pytest.raises(
        ValueError, match=f"'<voco>' {first.token_id}, and the model {other.token_id}"
    ):
        put_images_first(plain, other)


def test_an_index_is_for_one_number_of_vocos(plain: Tokenizer, first: ImagesFirst) -> None:
    """Lengths of examples depend on it."""
    names = {
        index_name(tokenizer, fit_template("v1", tokenizer))
        for tokenizer in (
            plain,
            put_images_first(plain, first),
            put_images_first(plain, dataclasses.replace(first, count=1)),
        )
    }
    assert len(names) == 3


def test_packed_rows_have_vocos_by_segment(
    corpus: Corpus,
    voco: Tokenizer,
    first: ImagesFirst,
    image_processor: ImageProcessor,
    tmp_path: Path,
) -> None:
    """Every example of a row is laid out as it would be alone, and hides its own images alone."""
    path = tmp_path / "data"
    build([corpus.json], path, images=corpus.images, tokenizer=voco, workers=1)
    config = DataConfig(
        datasets=(DatasetSource(path=str(path)),),
        sequence_length=320,
        batch_size=4,
        images_per_row=4,
        workers=0,
    )
    data = TrainingData(config, tokenizer=voco, image_processor=image_processor, tokens_per_image=K)
    batch = next(iter(data.batches(start_step=0, stop_step=1, rows=range(4)))).batch
    text = dataclasses.replace(TextConfig.tiny(), vocab_size=first.token_id + 1)
    decoder = nnx.eval_shape(
        lambda: VoCoLlama(
            text, token_id=first.token_id, tokens_per_image=K, init=Init(rngs=nnx.Rngs(0))
        )
    )
    marks = decoder.mark(jnp.asarray(batch.ids), marks_of(batch, tokens_per_image=K))
    assert (np.asarray(batch.segments).max(axis=1) > 1).any()
    seen = set()
    for row in range(4):
        ids, segments = np.asarray(batch.ids)[row], np.asarray(batch.segments)[row]
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            vocos = np.flatnonzero(ids[at] == first.token_id)
            images = (np.asarray(batch.image_slots)[row][at] >= 0).sum() // K
            assert len(vocos) == images * first.count
            seen.add(int(images))
            kinds = np.asarray(marks.kind)[row][at]
            before = np.arange(len(at)) < (vocos[0] if images else 0)
            np.testing.assert_array_equal(kinds == BEFORE, before)
            np.testing.assert_array_equal(np.flatnonzero(kinds == VOCO), vocos)
            # The text is what the loss supervises, and nothing else.
            supervised = np.asarray(batch.labels)[row][at] != IGNORED_LABEL
            np.testing.assert_array_equal(kinds == ANSWER, supervised)
    assert seen == {0, 1, 2}
