"""ScienceQA test: lettered options, with and without an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stf_jax.data.templates import IMAGE_MARKER
from stf_jax.eval.answers import AnswerRecord, by_id, pair
from stf_jax.eval.benchmark import Benchmark, Paths, Score
from stf_jax.eval.files import check_fields, check_kinds
from stf_jax.eval.questions import (
    OPTION_LETTER,
    Decoding,
    Question,
    image_prompt,
    read_choice,
)
from stf_jax.util.files import name_some, read_json

_NO_IMAGES = f"no SQA-I, since no answer's prompt has {IMAGE_MARKER}, by which it knows the images"
_MISSING_IMAGES = "SQA-I leaves out what has no answer, as the reference's script does"


def _read(paths: Paths) -> list[Question]:
    path = paths["questions"]
    entries = read_json(path, list)
    if not entries:
        raise ValueError(f"{path}: empty; fetch it again")
    named = _name(entries)
    check_fields(path, named, ("id", "conversations"))
    check_kinds(path, named, {"conversations": list})
    check_kinds(path, [entry for entry in named if "image" in entry[1]], {"image": str})
    first_turns = [(place, next(iter(entry["conversations"]), None)) for place, entry in named]
    check_fields(path, first_turns, ("value",))
    check_kinds(path, first_turns, {"value": str})
    return [_question(number, entry, paths["images"]) for number, entry in enumerate(entries)]


def _name(entries: Sequence[Any]) -> list[tuple[str, Any]]:
    return [(f"entry {number}", entry) for number, entry in enumerate(entries, start=1)]


def _question(number: int, entry: dict[str, Any], images: Path) -> Question:
    turn = entry["conversations"][0]["value"].replace(IMAGE_MARKER, "").strip()
    text = f"{turn}\n{OPTION_LETTER}"
    if "image" not in entry:
        return Question(number=number, question_id=entry["id"], text=text, prompt=text, images=())
    # The reference stores the marker too, and knows by it which answers are about an image.
    text = image_prompt(text)
    return Question(
        number=number,
        question_id=entry["id"],
        text=text,
        prompt=text,
        images=(images / entry["image"],),
    )


def _score(paths: Paths, answers: Sequence[AnswerRecord], answered_only: bool) -> Score:
    split = read_json(paths["splits"])
    problems = read_json(paths["problems"])
    test = split.get("test")
    if not isinstance(test, list) or not all(isinstance(id_, str) for id_ in test):
        raise ValueError(f"{paths['splits']}: has no split 'test'; fetch the official file again")
    if lost := [id_ for id_ in split["test"] if id_ not in problems]:
        raise ValueError(
            f"{paths['problems']}: lacks {name_some(lost)} of the test split; take both files from "
            "the same release"
        )
    named = [(id_, problems[id_]) for id_ in split["test"]]
    check_fields(paths["problems"], named, ("choices", "answer"))
    check_kinds(paths["problems"], named, {"choices": list, "answer": int})
    paired = pair(split["test"], answers, key=by_id, answered_only=answered_only)
    right, right_images, images = 0, 0, 0
    for id_, answer in paired.answers:
        problem = problems[id_]
        correct = read_choice(answer.text, len(problem["choices"])) == problem["answer"]
        about_image = IMAGE_MARKER in answer.prompt
        right += correct
        images += about_image
        right_images += correct and about_image
    questions = len(paired.answers) + len(paired.missing)
    accuracy = 100 * right / questions
    image_accuracy = 100 * right_images / images if images else None
    return Score(
        figures={
            "accuracy": accuracy,
            "correct": right,
            "total": questions,
            "image_accuracy": image_accuracy,
            "image_total": images,
        },
        headline=image_accuracy,
        questions=questions,
        missing=paired.missing,
        note=_NO_IMAGES if not images else _MISSING_IMAGES if paired.missing else "",
    )


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="SQA-I",
    paths={
        "questions": "scienceqa/llava_test_CQM-A.json",
        "images": "scienceqa/images/test",
        "problems": "scienceqa/problems.json",
        "splits": "scienceqa/pid_splits.json",
    },
    to_ask=("questions", "images"),
    to_score=("problems", "splits"),
    decoding=Decoding(max_new_tokens=1024),
    read=_read,
    score=_score,
)
