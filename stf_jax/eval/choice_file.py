"""A benchmark of closed choices from a file of one's own.

The file is a JSON list of {"image", "text", "choices", "answer"} and, if there are kinds, "kind".
Images lie in the folder `images` beside it. A model's answer is the choice that it finds most
likely.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stf_jax.eval.answers import AnswerRecord, by_id, pair
from stf_jax.eval.benchmark import Benchmark, Credit, Paths, Score
from stf_jax.eval.choices import Choice, ChoiceScorer
from stf_jax.eval.files import check_fields, check_kinds
from stf_jax.eval.generation import ModelAnswerer
from stf_jax.eval.questions import Decoding, Question, Reply, image_prompt
from stf_jax.infer.model import Model, Request
from stf_jax.util.files import read_json

# Questions that are scored before their answers are kept.
_AT_ONCE = 128


def choice_benchmark(name: str, *, template: str) -> Benchmark:
    """A benchmark of closed choices.

    Args:
        name: of its folder of results.
        template: the form of the prompts.
    """
    return Benchmark(
        name=name,
        title=name,
        follows="closed choice by the likelihood of each answer",
        paths={"questions": "questions.json", "images": "images"},
        to_ask=("questions", "images"),
        to_score=("questions",),
        decoding=Decoding(template=template),
        read=_read,
        score=_score,
        credit=_credit,
    )


class ChoiceAnswerer:
    """Answers with the choice that a model finds most likely.

    Args:
        model: from `stf_jax.load`.
        answerer: the same model as one that generates, which describes it.
        template: the form of the prompts.
        tokens: an image, where the system has several budgets; by default its most.
    """

    def __init__(
        self, model: Model, answerer: ModelAnswerer, *, template: str, tokens: int | None = None
    ):
        self.model_id, self._answerer = answerer.model_id, answerer
        self._scorer = ChoiceScorer(model, template=template, tokens=tokens)

    def describe(self) -> dict[str, Any]:
        """What `ModelAnswerer` says, and how it chooses."""
        return {**self._answerer.describe(), "answers_by": "likelihood"}

    def answer(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[Reply]:
        """Replies, some at a time."""
        del decoding
        for start in range(0, len(questions), _AT_ONCE):
            some = questions[start : start + _AT_ONCE]
            choices = [
                Choice(
                    request=Request(prompt=question.prompt, images=question.images),
                    answers=question.extra["choices"],
                )
                for question in some
            ]
            for question, number in zip(some, self._scorer.choose(choices), strict=True):
                yield Reply(number=question.number, text=question.extra["choices"][number])


def _entries(paths: Paths) -> list[dict[str, Any]]:
    path = paths["questions"]
    entries: list[dict[str, Any]] = read_json(path, list)
    if not entries:
        raise ValueError(f"{path}: empty; give at least one question")
    named = [(f"entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    check_fields(path, named, ("image", "text", "choices", "answer"))
    check_kinds(path, named, {"image": str, "text": str, "choices": list, "answer": str})
    if odd := [place for place, entry in named if {*map(type, entry["choices"])} != {str}]:
        raise ValueError(f"{path}: a choice of {odd[0]} is no text, or there is none; correct it")
    if odd := [place for place, entry in named if entry["answer"] not in entry["choices"]]:
        raise ValueError(f"{path}: the answer of {odd[0]} is not among its choices; add it")
    return entries


def _read(paths: Paths) -> list[Question]:
    return [
        Question(
            number=number,
            question_id=number,
            text=entry["text"],
            prompt=image_prompt(entry["text"]),
            images=(paths["images"] / entry["image"],),
            extra={"choices": entry["choices"]},
        )
        for number, entry in enumerate(_entries(paths))
    ]


def _credit(paths: Paths, answers: Sequence[AnswerRecord]) -> list[Credit]:
    entries = _entries(paths)
    pairs = [(entries[int(answer.question_id)], answer.text) for answer in answers]
    return [
        Credit(kind=str(entry.get("kind", "")), right=text == entry["answer"])
        for entry, text in pairs
    ]


def _score(paths: Paths, answers: Sequence[AnswerRecord], answered_only: bool) -> Score:
    ids = [str(number) for number in range(len(_entries(paths)))]
    paired = pair(ids, answers, key=by_id, answered_only=answered_only)
    right = sum(credit.right for credit in _credit(paths, [answer for _, answer in paired.answers]))
    questions = len(paired.answers) + len(paired.missing)
    return Score(
        figures={"accuracy": right / questions},
        headline=100 * right / questions,
        questions=questions,
        missing=paired.missing,
    )


def choice_paths(file: Path) -> dict[str, Path]:
    """The file and its images, by role."""
    return {"questions": file, "images": file.parent / "images"}
