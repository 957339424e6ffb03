"""Labels by the rule of the PyTorch reference, with its faults, for runs that must repeat it.

The reference does not know where in the token sequence a reply lies. It cuts the text at the
separators, tokenizes the parts again, and counts. Where its count and the sequence's length
disagree, it masks the whole sample ("tokenization mismatch"). Span-based labels need none of this
and agree wherever the count is right; this file is for comparison and for repeating old runs.
"""

from collections.abc import Callable, Sequence

import numpy as np

from stf_jax.data.conversation import Turn
from stf_jax.data.templates import LabelRule, Template
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID

Encode = Callable[[str], list[int]]


def reference_labels(
    ids: np.ndarray,
    *,
    turns: Sequence[Turn],
    text: str,
    template: Template,
    marks_start: bool,
    pad_id: int,
    max_length: int | None,
    encode: Encode,
) -> tuple[np.ndarray, bool]:
    """The reference's labels int32 [T] for `ids` int32 [T], and whether it masked the sample.

    Args:
      ids: the whole, uncut sequence.
      turns: with images placed.
      text: what `ids` was made from.
      template: training form.
      marks_start: whether the tokenizer marks a word start only where a text begins.
      pad_id: the reference does not count tokens with this id.
      max_length: a count that reaches it is not checked.
      encode: text to ids with BOS and image placeholders.
    """
    labels = np.where(ids == IMAGE_TOKEN_ID, IGNORED_LABEL, ids).astype(np.int32)
    if template.label_rule is LabelRule.PLAIN:
        labels[: len(encode(turns[0].text))] = IGNORED_LABEL
        return labels, False
    if template.label_rule is LabelRule.V0:
        _mask_v0(labels, turns, template, encode)
        return labels, False
    if template.label_rule is LabelRule.CHATML:
        counted = _mask_chatml(labels, text, template, encode)
    else:
        counted = _mask_rounds(labels, text, template, marks_start, encode)
    labels[counted:] = IGNORED_LABEL
    total = int(np.count_nonzero(ids != pad_id))
    # An empty turn anywhere but at the end makes the reference's own text one it cannot cut.
    uncuttable = any(not turn.text for turn in turns[:-1])
    checked = max_length is None or counted < max_length
    mismatch = uncuttable or (checked and counted != total)
    if mismatch:
        labels[:] = IGNORED_LABEL
    return labels, mismatch


def _mask_rounds(
    labels: np.ndarray, text: str, template: Template, marks_start: bool, encode: Encode
) -> int:
    """Vicuna v1 and LLaMA 2: rounds end in `</s>`; returns the tokens counted."""
    separator = template.before_reply + template.reply_start
    if template.label_rule is LabelRule.LLAMA_2:
        separator = separator.lstrip()
    labels[:1] = IGNORED_LABEL
    position = 1
    for index, part in enumerate(text.split(template.reply_end.strip())):
        halves = part.split(separator)
        if len(halves) != 2:
            break
        # The BOS of a part tokenized alone stands for the </s> that the cut took away.
        length = len(encode(part))
        # BOS and the space before the reply are not the instruction's.
        instruction = len(encode(halves[0] + separator)) - 2
        if template.label_rule is LabelRule.V1 and index and marks_start:
            # Alone a later round starts with a word-start mark, after </s> it does not.
            length -= 1
            instruction -= 1
        labels[position : position + instruction] = IGNORED_LABEL
        position += length
    return position


def _mask_chatml(labels: np.ndarray, text: str, template: Template, encode: Encode) -> int:
    """MPT's rule, made for a tokenizer without BOS whose markers are one token each."""
    end = template.reply_end
    parts = text.split(end)
    rounds = [end.join(parts[:3])]
    rounds += [end.join(parts[first : first + 2]) for first in range(3, len(parts), 2)]
    position = 0
    for part in rounds:
        halves = part.split(template.before_reply)
        if len(halves) != 2:
            break
        instruction = len(encode(halves[0] + template.before_reply)) - 1
        labels[position : position + instruction] = IGNORED_LABEL
        position += len(encode(part))
    return position


def _mask_v0(labels: np.ndarray, turns: Sequence[Turn], template: Template, encode: Encode) -> None:
    """Each turn is counted with a BOS and a mark of its own, so the masks run ahead of the text."""
    position = len(encode(f"{template.system}\n\n"))
    labels[:position] = IGNORED_LABEL
    for turn in turns:
        role = "Assistant" if turn.is_reply else "Human"
        length = len(encode(f"### {role}: {turn.text}\n"))
        if not turn.is_reply:
            labels[position + 2 : position + length] = IGNORED_LABEL
        position += length
