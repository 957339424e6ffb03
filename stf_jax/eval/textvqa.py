"""TextVQA val with OCR tokens in the question: the mean agreement with ten people."""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from stf_jax.eval.answers import AnswerRecord, pair
from stf_jax.eval.benchmark import Benchmark, Credit, Paths, Score
from stf_jax.eval.evalai import normalize_answer
from stf_jax.eval.files import check_fields, check_kinds
from stf_jax.eval.questions import read_llava_questions
from stf_jax.util.files import read_json

_PEOPLE = 10
_ENOUGH = 3
_OCR = "Reference OCR token:"


def _key(answer: AnswerRecord) -> tuple[str, str]:
    """(image, question): the answer's id names only the image."""
    lines = answer.prompt.split("\n")
    if len(lines) not in (2, 3):
        raise ValueError(
            f"the answer about image {answer.question_id} has no 'prompt' of two or three lines; "
            "TextVQA's answer files need it, since it holds the question"
        )
    question = lines[1] if len(lines) == 3 and lines[0].startswith(_OCR) else lines[0]
    return str(answer.question_id), question.lower()


def _agreement(text: str, people: Sequence[str]) -> float:
    """The mean, over each person left out, of min(1, others who agree / 3)."""
    said = normalize_answer(text)
    agrees = [normalize_answer(item) == said for item in people]
    total = sum(agrees)
    # An answer that nobody gave is 0 either way.
    return _sum(min(1, (total - item) / _ENOUGH) for item in agrees) / _PEOPLE


def _sum(values: Iterable[float]) -> float:
    """One after the other, as the reference adds; Python's own compensates from 3.12 on."""
    return functools.reduce(operator.add, values, 0.0)


def _truth(paths: Paths) -> list[dict[str, Any]]:
    path = paths["annotations"]
    content = read_json(path)
    check_fields(path, [("it", content)], ("data",))
    check_kinds(path, [("it", content)], {"data": list})
    entries = content["data"]
    named = [(f"entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    check_fields(path, named, ("image_id", "question", "answers"))
    check_kinds(path, named, {"question": str, "answers": list})
    if short := [name for name, entry in named if len(entry["answers"]) != _PEOPLE]:
        raise ValueError(
            f"{path}: {short[0]} has not {_PEOPLE} answers; fetch TextVQA_0.5.1_val.json again"
        )
    if odd := [name for name, entry in named if {*map(type, entry["answers"])} != {str}]:
        raise ValueError(f"{path}: an answer of {odd[0]} is no text; fetch it again")
    return entries


def _score(paths: Paths, answers: Sequence[AnswerRecord], answered_only: bool) -> Score:
    entries = _truth(paths)
    keys = [(str(entry["image_id"]), entry["question"].lower()) for entry in entries]
    people = {key: entry["answers"] for key, entry in zip(keys, entries, strict=True)}
    paired = pair(keys, answers, key=_key, answered_only=answered_only)
    questions = len(paired.answers) + len(paired.missing)
    total = _sum(_agreement(answer.text, people[key]) for key, answer in paired.answers)
    accuracy = total / questions
    return Score(
        figures={"accuracy": accuracy},
        headline=100 * accuracy,
        questions=questions,
        missing=tuple(f"{image}: {question}" for image, question in paired.missing),
    )


def _credit(paths: Paths, answers: Sequence[AnswerRecord]) -> list[Credit]:
    people = {
        (str(entry["image_id"]), entry["question"].lower()): entry["answers"]
        for entry in _truth(paths)
    }
    return [Credit(right=_agreement(answer.text, people[_key(answer)])) for answer in answers]


TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA",
    paths={
        "questions": "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        "images": "textvqa/train_images",
        "annotations": "textvqa/TextVQA_0.5.1_val.json",
    },
    to_ask=("questions", "images"),
    to_score=("annotations",),
    read=read_llava_questions,
    score=_score,
    credit=_credit,
)
