"""Prompt templates: the text that is laid between questions and replies.

    opening  question  before_reply  reply_start  reply  reply_end  before_question  question ...
                                     ^------- supervised -------^

Under `v1`, for instance (the template of LLaVA-1.5's second stage and of its benchmarks):

    A chat between ... questions. USER: <image>
    How many cats? ASSISTANT: Two.</s>USER: ...
                             ^-------^

A template is written for LLaMA's tokenizer; `stf_jax.data.fit` fits it to another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

IMAGE_MARKER = "<image>"
# Where a clip stands; its frames become images.
VIDEO_MARKER = "<video>"

# LLaMA's tokens. In a template they stand for the tokenizer's own beginning and end of text.
BEGIN, END = "<s>", "</s>"


class LabelRule(Enum):
    """How the PyTorch reference computes labels for a template (only `strict` mode uses it)."""

    V1 = "v1"
    LLAMA_2 = "llama_2"
    CHATML = "chatml"
    PLAIN = "plain"
    V0 = "v0"


@dataclass(frozen=True, kw_only=True)
class ImagesFirst:
    """How images come in front of a conversation, and then tokens that stand for them.

        <image>
        <voco><voco>
        A chat ... assistant of the image. ... USER: How many cats? ASSISTANT: Two.</s>

    Attributes:
      token: that stands for an image; a special token.
      token_id: of it.
      count: how many for each image. Those of all images come behind the last image.
      behind: what of a system text is followed by `inserted`, with an image and without.
      inserted: see there.
    """

    token: str
    token_id: int
    count: int
    behind: str
    inserted: str

    def tokens(self, images: int) -> list[int]:
        """The ids behind so many images."""
        return [self.token_id] * (self.count * images)


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
      markers: special tokens that the text holds, without which a tokenizer cannot serve it.
      stop_strings: texts at which a reply ends that no token ends.
      label_rule: the reference's way to labels; None where it has no such template.
      training: the template to train with, where that is another one.
      images_first: how images come in front of all that; None leaves them in their questions.
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
    markers: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    label_rule: LabelRule | None = None
    training: "Template | None" = None
    images_first: ImagesFirst | None = None


def _vicuna(name: str, system: str, image_marker: str = IMAGE_MARKER) -> Template:
    return Template(
        name=name,
        system=system,
        opening=f"{system} USER: ",
        before_question="USER: ",
        before_reply=" ASSISTANT:",
        reply_start=" ",
        reply_end=END,
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
        reply_end=f" {END}",
        label_rule=LabelRule.LLAMA_2,
    )


def _chatml(name: str, system: str, *, between: str, label_rule: LabelRule | None) -> Template:
    """Each turn in `<|im_start|>` and `<|im_end|>`; `between` is a newline after it, or nothing."""
    return Template(
        name=name,
        system=system,
        opening=f"<|im_start|>system\n{system}<|im_end|>{between}<|im_start|>user\n",
        before_question=f"{between}<|im_start|>user\n",
        before_reply=f"<|im_end|>{between}<|im_start|>assistant\n",
        reply_end="<|im_end|>",
        closing=between,
        markers=("<|im_start|>", "<|im_end|>"),
        label_rule=label_rule,
    )


def _llama_3(name: str, system: str) -> Template:
    def head(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return Template(
        name=name,
        system=system,
        opening=f"{head('system')}{system}<|eot_id|>{head('user')}",
        before_question=head("user"),
        before_reply=f"<|eot_id|>{head('assistant')}",
        reply_end="<|eot_id|>",
        markers=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
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
_LLAVA_SYSTEM = f"You are a helpful language and vision assistant. You are {_VISUAL_CONTENT}"

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
        _LLAVA_SYSTEM,
        before_question=f"{BEGIN}[INST] ",
    ),
    _llama_2("mistral_instruct", "", before_question="[INST] "),
    _chatml(
        "mpt",
        "A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers.",
        between="",
        label_rule=LabelRule.CHATML,
    ),
    _chatml("chatml_direct", "Answer the questions.", between="", label_rule=LabelRule.CHATML),
    # What follows is not in LLaVA-1.5: the chat templates that tokenizers bring themselves.
    _chatml("chatml", "You are a helpful assistant.", between="\n", label_rule=None),
    _chatml(
        "smollm2",
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        between="\n",
        label_rule=None,
    ),
    _llama_3("llama_3", _LLAVA_SYSTEM),
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
            f"unknown template {name!r:.60}: choose one of {', '.join(sorted(TEMPLATES))}"
        ) from None
