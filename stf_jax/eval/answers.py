"""Answer files: the reference's jsonl, written line by line and taken up again after a kill."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from stf_jax.eval.files import read_jsonl
from stf_jax.eval.questions import Question
from stf_jax.util.files import MOST_TEXT, explain_file, name_some, read_bytes

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """One line of an answer file.

    Attributes:
      question_id: of its question.
      prompt: the question's text; empty where the file has none.
      text: the answer.
    """

    question_id: int | str
    prompt: str
    text: str


def read_answers(path: Path) -> list[AnswerRecord]:
    """An answer file, ours or the reference's, whole.

    Raises:
      ValueError: unreadable, empty, a line that is no JSON or lacks `question_id` or `text`.
    """
    lines = read_jsonl(path, ("question_id", "text"))
    if odd := [str(line["question_id"]) for line in lines if not isinstance(line["text"], str)]:
        raise ValueError(f"{path}: the 'text' of {name_some(odd)} is no string; answer them again")
    odd = [
        str(line["question_id"]) for line in lines if not isinstance(line.get("prompt", ""), str)
    ]
    if odd:
        raise ValueError(
            f"{path}: the 'prompt' of {name_some(odd)} is no string; put the question there, or "
            "leave the field out"
        )
    return [
        AnswerRecord(
            question_id=line["question_id"], prompt=line.get("prompt", ""), text=line["text"]
        )
        for line in lines
    ]


def answer_line(question: Question, text: str, *, model_id: str) -> str:
    """The line that records an answer, in the reference's fields and order.

    `answer_id` is drawn from what it names rather than at random, so that a run that was stopped
    and taken up again writes the same file as one left alone.
    """
    name = f"{model_id}\n{question.number}\n{question.question_id}\n{question.prompt}"
    extra = dict(question.extra)
    line = {
        "question_id": question.question_id,
        **({"round_id": extra.pop("round_id")} if "round_id" in extra else {}),
        "prompt": question.text,
        "text": text,
        **extra,
        "answer_id": hashlib.sha256(name.encode()).hexdigest()[:22],
        "model_id": model_id,
        "metadata": {},
    }
    return json.dumps(line) + "\n"


def count_answers(path: Path, questions: Sequence[Question]) -> int:
    """How many questions, counted from the first, `path` answers; 0 if it is not there.

    A last line that a kill cut short is removed from the file.

    Raises:
      ValueError: a line that is no answer to the question at its place.
    """
    if not path.exists():
        return 0
    with explain_file(path, fix="give another --out"):
        whole = read_bytes(path, most=MOST_TEXT).rfind(b"\n") + 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    if not whole:
        return 0
    answers = read_answers(path)
    for number, answer in enumerate(answers):
        question = questions[number] if number < len(questions) else None
        if question is None or (answer.question_id, answer.prompt) != (
            question.question_id,
            question.text,
        ):
            raise ValueError(
                f"{path}: line {number + 1} (question {answer.question_id}) does not answer "
                f"question {number + 1} of this benchmark; give another --out"
            )
    return len(answers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired(Generic[Key]):
    """Answers beside what was expected.

    Attributes:
      answers: (key, answer) in the order of the answer file.
      missing: expected keys that nothing answers, in the order expected.
    """

    answers: tuple[tuple[Key, AnswerRecord], ...]
    missing: tuple[Key, ...]


def pair(
    expected: Sequence[Key],
    answers: Sequence[AnswerRecord],
    *,
    key: Callable[[AnswerRecord], Key],
    answered_only: bool = False,
) -> Paired[Key]:
    """Finds each expected question's answer.

    Args:
      expected: a key for each question that must be answered; one that stands here twice may be
        answered twice.
      answers: of an answer file.
      key: of an answer.
      answered_only: after a try-out with a limit: what is not answered is not missing.

    Raises:
      ValueError: answers to none of the questions, or too many to the same.
    """
    keys = [key(answer) for answer in answers]
    wanted, given = Counter(expected), Counter(keys)
    strange = [str(name) for name in given if name not in wanted]
    if strange:
        raise ValueError(
            f"{len(strange)} of {len(keys)} answers are to no question of this benchmark "
            f"({name_some(strange)}); check that the answer file is this benchmark's"
        )
    excess = [str(name) for name in given if given[name] > wanted[name]]
    if excess:
        raise ValueError(
            f"{len(excess)} questions are answered more often than asked ({name_some(excess)}); "
            "leave one line for each in the answer file"
        )
    missing = [] if answered_only else (wanted - given).elements()
    return Paired(answers=tuple(zip(keys, answers, strict=True)), missing=tuple(missing))


def by_id(answer: AnswerRecord) -> str:
    """The key of an answer in a benchmark whose question ids are unique."""
    return str(answer.question_id)
