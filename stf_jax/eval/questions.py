"""A question of a benchmark, and LLaVA's question files."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from stf_jax.data.templates import IMAGE_MARKER
from stf_jax.eval.files import check_kinds, read_jsonl
from stf_jax.util.files import name_some

# What the reference appends to a question with lettered options.
OPTION_LETTER = "Answer with the option's letter from the given choices directly."

_LETTERS = "ABCDE"
# The last dot is the reference's: any character but a newline.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark.

    Attributes:
      number: its place among the benchmark's questions, from 0; the only unique name it has, since
        TextVQA and MME use an image's name as the id of every question about it.
      question_id: as the official file has it.
      text: what the reference stores as `prompt` beside the answer.
      prompt: the user's turn, `<image>` and a newline in front where there is an image, `<video>`
        where there is a clip.
      images: paths, or an image file's bytes; at most one in these benchmarks.
      clips: video files; likewise.
      extra: further fields of the answer's line.
    """

    number: int
    question_id: int | str
    text: str
    prompt: str
    images: tuple[Path | bytes, ...]
    clips: tuple[Path, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """A model's answer to the question of this `number`."""

    number: int
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """The reference's prompt form and answer length for a benchmark; it is always greedy."""

    template: str = "v1"
    max_new_tokens: int = 128


class Answerer(Protocol):
    """Anything that answers questions.

    Attributes:
      model_id: goes into every answer's line.
    """

    model_id: str

    def describe(self) -> dict[str, Any]:
        """What of the model belongs to the protocol, for JSON: image mode, vision tokens, dtype."""

    def answer(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[Reply]:
        """Replies as they come, in any order.

        Raises:
          ValueError: naming every question that is longer than the context, before the first reply.
        """


def image_prompt(text: str) -> str:
    """A user's turn about one image."""
    return f"{IMAGE_MARKER}\n{text}"


def read_llava_questions(paths: Mapping[str, Path]) -> list[Question]:
    """LLaVA's jsonl `paths["questions"]` (`question_id, image, text`) about `paths["images"]`.

    Raises:
      ValueError: unreadable, empty, a line without one of these fields, or with something else than
        text in one.
    """
    path = paths["questions"]
    lines = read_jsonl(path, ("question_id", "image", "text"))
    named = [(f"question {line['question_id']}", line) for line in lines]
    check_kinds(path, named, {"image": str, "text": str})
    return [
        Question(
            number=number,
            question_id=line["question_id"],
            text=line["text"],
            prompt=image_prompt(line["text"]),
            images=(paths["images"] / line["image"],),
        )
        for number, line in enumerate(lines)
    ]


def check_markers(path: Path, questions: Sequence[Question]) -> None:
    """Raises ValueError naming the questions of `path` that ask for images they have not."""
    names = [
        str(question.question_id)
        for question in questions
        if question.prompt.count(IMAGE_MARKER) != len(question.images)
    ]
    if names:
        raise ValueError(
            f"{path}: {len(names)} questions have {IMAGE_MARKER} in their text "
            f"({name_some(names)}), which is put before each of them anyway; take it out"
        )


def read_choice(text: str, choices: int) -> int | None:
    """Which lettered option an answer names, from 0; None if none, or one that is not offered."""
    if text in tuple(_LETTERS):
        letter = text
    elif text[:1] in tuple(_LETTERS) and text[1:3] == ". ":
        letter = text[0]
    else:
        letters = _SENTENCE.findall(text)
        letter = letters[0] if len(letters) == 1 else ""
    index = _LETTERS.find(letter) if letter else -1
    return index if 0 <= index < choices else None


def missing_files(questions: Sequence[Question]) -> list[Path]:
    """Files of images and clips that are not there, each once, in the order asked."""
    paths = {
        path: None
        for question in questions
        for path in (*question.images, *question.clips)
        if isinstance(path, Path)
    }
    return [path for path in paths if not path.is_file()]
