"""Prompt templates, and the rendering of a LLaVA conversation into text.

A template is a handful of strings laid between questions and replies:

    opening  question  before_reply  reply_start  reply  reply_end  before_question  question ...
                                     ^------- supervised -------^

Under `v1`, for instance (the template of LLaVA-1.5's second stage and of its benchmarks):

    A chat between ... questions. USER: <image>
    How many cats? ASSISTANT: Two.</s>USER: ...
                             ^-------^
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

IMAGE_MARKER = "<image>"


class LabelRule(Enum):
    """How the PyTorch reference computes labels for a template (only `strict` mode uses it)."""

    V1 = "v1"
    LLAMA_2 = "llama_2"
    CHATML = "chatml"
    PLAIN = "plain"
    V0 = "v0"


@dataclass(frozen=True, kw_only=True)
class Template:
    """The text round questions and replies.

    Attributes:
      name: the key in `TEMPLATES`.
      system: the system text, which `opening` contains.
      opening: all text before the first question.
      before_question: text before each later question.
      before_reply: text between a question and the supervised part of its reply.
      reply_start: start of the supervised part, before the reply's own text.
      reply_end: end of the supervised part, after the reply's own text.
      closing: unsupervised text after the last turn of a training conversation.
      opening_to_reply: replaces `opening` where a reply comes first; None drops such a reply.
      image_marker: what `<image>` becomes.
      question_is_image: training drops a question's words and keeps its `<image>` (captioning).
      open_when_empty: an empty last reply is left open, without `reply_end`.
      stop_strings: texts other than the tokenizer's EOS at which a reply ends.
      label_rule: the reference's way to labels.
      training: the template to train with, where that is another one.
    """

    name: str
    system: str = ""
    opening: str = ""
    before_question: str = ""
    before_reply: str
    reply_start: str = ""
    reply_end: str
    closing: str = ""
    opening_to_reply: str | None = None
    image_marker: str = IMAGE_MARKER
    question_is_image: bool = False
    open_when_empty: bool = True
    stop_strings: tuple[str, ...] = ()
    label_rule: LabelRule
    training: "Template | None" = None


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


def _vicuna(name: str, system: str, image_marker: str = IMAGE_MARKER) -> Template:
    return Template(
        name=name,
        system=system,
        opening=f"{system} USER: ",
        before_question="USER: ",
        before_reply=" ASSISTANT:",
        reply_start=" ",
        reply_end="</s>",
        image_marker=image_marker,
        label_rule=LabelRule.V1,
    )


def _llama_2(name: str, system: str, before_question: str) -> Template:
    return Template(
        name=name,
        system=system,
        opening=f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n" if system else "[INST] ",
        before_question=before_question,
        before_reply=" [/INST]",
        reply_start=" ",
        reply_end=" </s>",
        label_rule=LabelRule.LLAMA_2,
    )


def _chatml(name: str, system: str) -> Template:
    return Template(
        name=name,
        system=system,
        opening=f"<|im_start|>system\n{system}<|im_end|><|im_start|>user\n",
        before_question="<|im_start|>user\n",
        before_reply="<|im_end|><|im_start|>assistant\n",
        reply_end="<|im_end|>",
        stop_strings=("<|im_end|>",),
        label_rule=LabelRule.CHATML,
    )


_POLITE = "The assistant gives helpful, detailed, and polite answers to the"
_USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    f"{_POLITE} user's questions."
)
_HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    f"{_POLITE} human's questions."
)
_VISUAL_CONTENT = (
    "able to understand the visual content that the user provides, and assist the user "
    "with a variety of tasks using natural language."
)

# The worked example that Vicuna v0 puts before the first question of every prompt.
_V0_EXAMPLE = (
    "Human: What are the key differences between renewable and non-renewable energy sources?"
    "###Assistant: "
    "Renewable energy sources are those that can be replenished naturally in a relatively short "
    "amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy "
    "sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, "
    "and natural gas. Here are some key differences between renewable and non-renewable energy "
    "sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n###"
)

_V0_TRAINING = Template(
    name="v0",
    system=_HUMAN_SYSTEM,
    opening=f"{_HUMAN_SYSTEM}\n\n### Human: ",
    opening_to_reply=f"{_HUMAN_SYSTEM}\n\n### Assistant:",
    before_question=" Human: ",
    before_reply="\n### Assistant:",
    reply_start=" ",
    reply_end="\n###",
    closing=" ",
    open_when_empty=False,
    label_rule=LabelRule.V0,
)

_ALL = (
    _vicuna("v1", _USER_SYSTEM),
    _vicuna("llava_v1", _HUMAN_SYSTEM),
    _vicuna(
        "v1_mmtag",
        "A chat between a curious user and an artificial intelligence assistant. "
        f"The assistant is {_VISUAL_CONTENT}"
        "The visual content will be provided with the following format: "
        "<Image>visual content</Image>.",
        image_marker=f"<Image>{IMAGE_MARKER}</Image>",
    ),
    Template(
        name="v0",
        system=_HUMAN_SYSTEM,
        opening=f"{_HUMAN_SYSTEM}###{_V0_EXAMPLE}Human: ",
        before_question="Human: ",
        before_reply="###Assistant:",
        reply_start=" ",
        reply_end="###",
        stop_strings=("###",),
        label_rule=LabelRule.V0,
        training=_V0_TRAINING,
    ),
    Template(
        name="plain",
        before_reply="\n",
        reply_end="\n",
        stop_strings=("\n",),
        label_rule=LabelRule.PLAIN,
        training=Template(
            name="plain",
            before_reply="",
            reply_end="\n",
            question_is_image=True,
            open_when_empty=False,
            label_rule=LabelRule.PLAIN,
        ),
    ),
    _llama_2(
        "llava_llama_2",
        f"You are a helpful language and vision assistant. You are {_VISUAL_CONTENT}",
        before_question="<s>[INST] ",
    ),
    _llama_2("mistral_instruct", "", before_question="[INST] "),
    _chatml(
        "mpt",
        "A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers.",
    ),
    _chatml("chatml_direct", "Answer the questions."),
)

TEMPLATES: Mapping[str, Template] = {template.name: template for template in _ALL} | {
    "vicuna_v1": _ALL[0]
}


def get_template(name: str) -> Template:
    """The template called `name`; ValueError listing the names if there is none."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise ValueError(
            f"unknown template {name!r}: choose one of {', '.join(sorted(TEMPLATES))}"
        ) from None


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
    return render_turns(turns, template)


def render_prompt(
    question: str, *, template: Template, history: Sequence[tuple[str, str]] = ()
) -> str:
    """Text of a prompt that ends where the model's reply begins.

    `<image>` stays where the caller put it (benchmarks and chats put it first, with a newline).

    Args:
      question: the new question.
      template: the prompt form is used, which for `v0` and `plain` is not the training form.
      history: earlier (question, reply) pairs, oldest first.

    Raises:
      ValueError: an empty question.
    """
    text = template.opening
    for earlier, reply in history:
        _check_question(earlier)
        text += earlier + template.before_reply + template.reply_start + reply
        text += template.reply_end + template.before_question
    _check_question(question)
    text += question + template.before_reply
    return text.replace(IMAGE_MARKER, template.image_marker)


def _check_question(question: str) -> None:
    if not question.strip():
        raise ValueError("the question is empty; ask something")
