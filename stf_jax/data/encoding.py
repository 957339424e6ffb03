"""Training conversations as ids and labels, and images as runs of placeholders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stf_jax.data.conversation import (
    TextPiece,
    lay_out,
    place_images,
    read_turns,
    render_turns,
    take_system,
)
from stf_jax.data.reference_labels import reference_labels
from stf_jax.data.templates import Template
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID, Tokenizer, chunks, ids_with_images


@dataclass(frozen=True, kw_only=True)
class EncodedConversation:
    """A training sample.

    Attributes:
      ids: int32 [T]; `IMAGE_TOKEN_ID` once for each image, or K times after `expand_images`.
      labels: int32 [T]; the id where supervised, else `IGNORED_LABEL`. Not shifted.
      num_images: images whose placeholders are in `ids` (a truncation drops the last ones).
      truncated: whether tokens were cut off.
      mismatch: the reference's rule miscounted and masked the whole sample (strict labels only).
    """

    ids: np.ndarray
    labels: np.ndarray
    num_images: int
    truncated: bool = False
    mismatch: bool = False

    @property
    def num_supervised(self) -> int:
        """Tokens that count in the loss; 0 means that the sample teaches nothing."""
        return int(np.count_nonzero(self.labels != IGNORED_LABEL))


def encode_conversation(
    tokenizer: Tokenizer,
    conversation: Sequence[Mapping[str, str]],
    *,
    template: Template,
    num_images: int,
    max_length: int | None = None,
    strict: bool = False,
) -> EncodedConversation:
    """Encodes one LLaVA training conversation.

    A token is supervised if any of its characters is part of a reply or of its end marker.

    Args:
      tokenizer: from `load_tokenizer`.
      conversation: `{"from": "human" | "gpt", "value": text}` in the order spoken; one from
        "system" in front of them takes the place of the template's own system text.
      template: from `fit_template`.
      num_images: images that go with it; 0 makes `<image>` ordinary text.
      max_length: cut after so many tokens, an image counting as one; None for no cut.
      strict: labels by the PyTorch reference's rule, with its faults; see `reference_labels`.

    Raises:
      ValueError: one line that names what is wrong with the conversation and the fix.
    """
    conversation, template = take_system(conversation, template.training or template)
    turns = place_images(read_turns(conversation, template), template, num_images=num_images)
    turns, template = lay_out(turns, template, num_images=num_images)
    pieces = render_turns(turns, template)
    ids, labels = _encode_pieces(tokenizer, pieces, with_images=num_images > 0)
    mismatch = False
    # The reference has no labels for templates that it does not have.
    if strict and template.label_rule is not None:
        labels, mismatch = reference_labels(
            ids,
            turns=turns,
            text="".join(piece.text for piece in pieces),
            template=template,
            marks_start=tokenizer.marks_start,
            pad_id=tokenizer.pad_id,
            max_length=max_length,
            encode=lambda text: ids_with_images(tokenizer, text, with_images=num_images > 0),
        )
    encoded = EncodedConversation(ids=ids, labels=labels, num_images=num_images, mismatch=mismatch)
    return _truncate(encoded, max_length, tokens_per_image=1)


def expand_conversation(
    encoded: EncodedConversation, *, tokens_per_image: int, max_length: int | None = None
) -> EncodedConversation:
    """Gives each image `tokens_per_image` placeholders, labels ignored there, then cuts.

    A cut that would fall inside an image drops that image whole, so the result may be up to
    `tokens_per_image - 1` shorter than `max_length`; `num_images` says how many images are left.
    (The reference keeps a part of the image.) A sample whose replies are all cut off has
    `num_supervised` 0.
    """
    repeats = np.where(encoded.ids == IMAGE_TOKEN_ID, tokens_per_image, 1)
    expanded = replace(
        encoded, ids=np.repeat(encoded.ids, repeats), labels=np.repeat(encoded.labels, repeats)
    )
    return _truncate(expanded, max_length, tokens_per_image=tokens_per_image)


def expand_visuals(
    encoded: EncodedConversation,
    *,
    visuals: Sequence[int],
    tokens: Sequence[int],
    max_length: int,
) -> tuple[EncodedConversation, tuple[int, ...]]:
    """`expand_conversation` where the frames of a clip are joined; and the visuals that are left.

    Args:
      encoded: uncut, with one placeholder for each image and each frame.
      visuals: frames of each clip, 0 for an image.
      tokens: of each of these.
      max_length: cut after so many tokens; what would be cut through is left out.
    """
    repeats = np.ones(len(encoded.ids), int)
    at = np.flatnonzero(encoded.ids == IMAGE_TOKEN_ID)
    first = np.cumsum([0, *(max(frames, 1) for frames in visuals)])[:-1]
    repeats[at] = 0
    repeats[at[first]] = tokens
    ends = np.cumsum(repeats)[at[first]]
    kept = int(np.sum(ends <= max_length))
    end = max_length
    if kept < len(visuals):
        end = min(end, int(ends[kept]) - tokens[kept])
    length = int(repeats.sum())
    return replace(
        encoded,
        ids=np.repeat(encoded.ids, repeats)[:end],
        labels=np.repeat(encoded.labels, repeats)[:end],
        num_images=sum(max(frames, 1) for frames in visuals[:kept]),
        truncated=length > max_length,
    ), tuple(visuals[:kept])


def _truncate(
    encoded: EncodedConversation, max_length: int | None, *, tokens_per_image: int
) -> EncodedConversation:
    if max_length is None or len(encoded.ids) <= max_length:
        return encoded
    placeholders = np.flatnonzero(encoded.ids == IMAGE_TOKEN_ID)
    kept_images, part = divmod(int(np.sum(placeholders < max_length)), tokens_per_image)
    end = int(placeholders[kept_images * tokens_per_image]) if part else max_length
    return replace(
        encoded,
        ids=encoded.ids[:end],
        labels=encoded.labels[:end],
        num_images=kept_images,
        truncated=True,
    )


def _encode_pieces(
    tokenizer: Tokenizer, pieces: Sequence[TextPiece], *, with_images: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and span-based labels, both int32 [T]."""
    text = "".join(piece.text for piece in pieces)
    # supervised_before[c] is the number of supervised characters in text[:c].
    flags = np.repeat([piece.supervised for piece in pieces], [len(p.text) for p in pieces])
    supervised_before = np.concatenate([[0], np.cumsum(flags)])
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    spans = [(0, 0)] * len(ids)
    for start, chunk in chunks(text, with_images=with_images):
        if start:
            ids.append(IMAGE_TOKEN_ID)
            spans.append((0, 0))
        chunk_ids, chunk_spans = tokenizer.encode_with_spans(chunk)
        ids.extend(chunk_ids)
        spans.extend((start + first, start + last) for first, last in chunk_spans)
    bounds = np.array(spans, np.int64).reshape(-1, 2)
    supervised = supervised_before[bounds[:, 1]] > supervised_before[bounds[:, 0]]
    ids_array = np.array(ids, np.int32)
    return ids_array, np.where(supervised, ids_array, IGNORED_LABEL).astype(np.int32)
