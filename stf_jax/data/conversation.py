"""The rendering of a LLaVA conversation, and of a prompt, into text by a template."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from stf_jax.data.templates import IMAGE_MARKER, Template


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation: `text` from the human (`is_reply` False) or from the model."""

    text: str
    is_reply: bool


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """A stretch of rendered text, all of which is supervised or none of which is."""

    text: str
    supervised: bool


@dataclass(frozen=True, kw_only=True)
class PromptText:
    """A prompt in a template's form.

    Attributes:
      text: all of it.
      typed: what of it a person or the model wrote: characters [start, end), ascending. Special
        tokens are text there.
    """

    text: str
    typed: tuple[tuple[int, int], ...] = ()


def take_system(
    conversation: Sequence[Mapping[str, str]], template: Template
) -> tuple[Sequence[Mapping[str, str]], Template]:
    """The turns without one from "system" in front, and the template with that turn's text.

    Raises:
      ValueError: the template has no place for it, or it has no text.
    """
    if not conversation or conversation[0].get("from") != "system":
        return conversation, template
    text = conversation[0].get("value")
    if not isinstance(text, str):
        raise ValueError(f"turn 1: 'value' is {text!r}; it must be a string")
    rest = conversation[1:]
    if not text.strip() or text.strip() == template.system:
        return rest, template
    if not template.system:
        raise ValueError(
            f"turn 1: template {template.name!r} has no place for a turn from 'system'; drop it, "
            "or put its text in front of the first question"
        )
    lead = template.opening_to_reply
    return rest, replace(
        template,
        system=text.strip(),
        opening=template.opening.replace(template.system, text.strip()),
        opening_to_reply=lead and lead.replace(template.system, text.strip()),
    )


def read_turns(conversation: Sequence[Mapping[str, str]], template: Template) -> tuple[Turn, ...]:
    """Checks a LLaVA conversation and drops an opening reply that answers nothing.

    Args:
      conversation: `{"from": "human" | "gpt", "value": text}` in the order spoken.
      template: decides whether an opening reply can be kept (only v0's form has a place for it).

    Raises:
      ValueError: another sender, a missing or non-text value, two turns running from the same
        side, no question, or a last question without a reply.
    """
    turns: list[Turn] = []
    previous = None
    for number, raw in enumerate(conversation, start=1):
        sender, text = raw.get("from"), raw.get("value")
        if sender not in ("human", "gpt"):
            raise ValueError(f"turn {number}: 'from' is {sender!r}; it must be 'human' or 'gpt'")
        if not isinstance(text, str):
            raise ValueError(f"turn {number}: 'value' is {text!r}; it must be a string")
        if sender == previous:
            raise ValueError(
                f"turn {number}: two turns running from {sender!r}; merge them or drop one, "
                "since 'human' and 'gpt' must alternate"
            )
        previous = sender
        if number > 1 or sender == "human" or template.opening_to_reply is not None:
            turns.append(Turn(text=text, is_reply=sender == "gpt"))
    if all(turn.is_reply for turn in turns):
        raise ValueError("the conversation has no turn from 'human'; give it one, then a reply")
    if not turns[-1].is_reply:
        raise ValueError("the last turn is from 'human'; add the reply to learn, or drop the turn")
    return tuple(turns)


def place_images(turns: Sequence[Turn], template: Template, *, num_images: int) -> tuple[Turn, ...]:
    """Puts `<image>` where training wants it, and checks it against the images at hand.

    With one image, each turn that has `<image>` gets exactly one, in front of its stripped text
    and followed by a newline (the LLaVA-1.5 recipe). With several images the markers stay where
    they are, since moving them would lose which is which. With none, `<image>` is ordinary text
    (web pages and SVG contain it).

    Raises:
      ValueError: the markers are more or fewer than the images, or the template is for captions
        and the conversation is not one image with one caption.
    """
    if template.question_is_image:
        if len(turns) != 2 or num_images != 1 or IMAGE_MARKER not in turns[0].text:
            raise ValueError(
                f"template {template.name!r} takes one question with {IMAGE_MARKER} and one "
                f"caption, not {len(turns)} turns with {num_images} images; use 'v1' for this"
            )
        return (Turn(text=IMAGE_MARKER, is_reply=False), turns[1])
    if num_images == 0:
        return tuple(turns)
    if num_images == 1:
        turns = [_image_first(turn) for turn in turns]
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers != num_images:
        raise ValueError(
            f"{markers} {IMAGE_MARKER} in the conversation but {num_images} images; "
            "make the two agree"
        )
    if template.image_marker == IMAGE_MARKER:
        return tuple(turns)
    return tuple(
        Turn(
            text=turn.text.replace(IMAGE_MARKER, template.image_marker),
            is_reply=turn.is_reply,
        )
        for turn in turns
    )


def _image_first(turn: Turn) -> Turn:
    if IMAGE_MARKER not in turn.text:
        return turn
    words = turn.text.replace(IMAGE_MARKER, "").strip()
    return Turn(text=f"{IMAGE_MARKER}\n{words}".strip(), is_reply=turn.is_reply)


def lay_out(
    turns: Sequence[Turn], template: Template, *, num_images: int
) -> tuple[tuple[Turn, ...], Template]:
    """What `place_images` gave as `render_turns` takes it: images where the template has them.

    Where it has them in front of the conversation, its opening begins with them, and the turns are
    one line each, without `<image>`.
    """
    template, flatten = _put_images_first(template, num_images)
    return tuple(replace(turn, text=flatten(turn.text)) for turn in turns), template


def _put_images_first(template: Template, images: int) -> tuple[Template, Callable[[str], str]]:
    """The template whose opening begins with the images, and what becomes of a turn's text."""
    first = template.images_first
    if first is None:
        return template, lambda text: text
    gone = [first.token]
    if images:
        gone += ["\n", template.image_marker, IMAGE_MARKER]
        lead = f"{template.image_marker}\n" * images + first.token * (first.count * images) + "\n"
        reply = template.opening_to_reply
        template = replace(
            template,
            opening=lead + template.opening,
            opening_to_reply=None if reply is None else lead + reply,
        )

    def flatten(text: str) -> str:
        # What is taken out may leave a marker behind.
        while any(part in text for part in gone):
            for part in gone:
                text = text.replace(part, "")
        return text

    return template, flatten


def render_turns(turns: Sequence[Turn], template: Template) -> list[TextPiece]:
    """Text of a training conversation whose turns alternate, in the template's training form.

    Each reply is supervised with its end marker. An empty reply is not (there is nothing to
    learn), save under the templates whose `open_when_empty` is False.
    """
    pieces: list[TextPiece] = []
    for index, turn in enumerate(turns):
        if turn.is_reply:
            lead = template.before_reply if index else (template.opening_to_reply or "")
            pieces.append(TextPiece(text=lead, supervised=False))
            if turn.text or not template.open_when_empty:
                text = f"{template.reply_start}{turn.text}{template.reply_end}"
                pieces.append(TextPiece(text=text, supervised=True))
            elif index < len(turns) - 1:
                pieces.append(TextPiece(text=template.reply_end, supervised=False))
        else:
            lead = template.before_question if index else template.opening
            pieces.append(TextPiece(text=lead + turn.text, supervised=False))
    if template.closing:
        pieces.append(TextPiece(text=template.closing, supervised=False))
    return pieces


def render_conversation(
    conversation: Sequence[Mapping[str, str]], *, template: Template, num_images: int
) -> list[TextPiece]:
    """Text of a LLaVA training conversation; joined, the pieces are what is tokenized.

    Args:
      conversation: `{"from": "human" | "gpt", "value": text}` in the order spoken; one from
        "system" in front of them takes the place of the template's own system text.
      template: as named by the caller; its training form is used where it has one.
      num_images: images that go with it; see `place_images`.

    Raises:
      ValueError: one line that names what is wrong and the fix; see `read_turns`, `place_images`.
    """
    conversation, template = take_system(conversation, template.training or template)
    turns = place_images(read_turns(conversation, template), template, num_images=num_images)
    return render_turns(*lay_out(turns, template, num_images=num_images))


def render_prompt(
    question: str, *, template: Template, history: Sequence[tuple[str, str]] = ()
) -> PromptText:
    """A prompt that ends where the model's reply begins.

    `<image>` stays where the caller put it (benchmarks and chats put it first, with a newline),
    unless the template has images in front of the conversation.

    Args:
      question: the new question.
      template: the prompt form is used, which for `v0` and `plain` is not the training form.
      history: earlier (question, reply) pairs, oldest first.

    Raises:
      ValueError: an empty question.
    """
    images = sum(words.count(IMAGE_MARKER) for words in [question, *(q for q, _ in history)])
    template, flatten = _put_images_first(template, images)
    text, typed = template.opening, []

    def add(words: str) -> None:
        nonlocal text
        for number, part in enumerate(flatten(words).split(IMAGE_MARKER)):
            text += template.image_marker if number else ""
            typed.append((len(text), len(text) + len(part)))
            text += part

    for earlier, reply in history:
        _check_question(earlier)
        add(earlier)
        text += template.before_reply + template.reply_start
        add(reply)
        text += template.reply_end + template.before_question
    _check_question(question)
    add(question)
    return PromptText(text=text + template.before_reply, typed=tuple(typed))


def _check_question(question: str) -> None:
    if not question.strip():
        raise ValueError("the question is empty; ask something")
