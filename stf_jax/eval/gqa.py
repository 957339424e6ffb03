"""GQA testdev-balanced: exact match, without the scene graphs that the official script asks for."""

from collections.abc import Sequence
from pathlib import Path

from stf_jax.eval.answers import AnswerRecord, by_id, pair
from stf_jax.eval.benchmark import Benchmark, Credit, Paths, Score
from stf_jax.eval.files import check_fields, check_kinds
from stf_jax.eval.questions import read_llava_questions
from stf_jax.util.files import read_json, write_json


def _prediction(answer: AnswerRecord) -> str:
    return answer.text.rstrip(".").lower()


def _score(paths: Paths, answers: Sequence[AnswerRecord], answered_only: bool) -> Score:
    path = paths["annotations"]
    truth = read_json(path)
    check_fields(path, list(truth.items()), ("answer",))
    check_kinds(path, list(truth.items()), {"answer": str})
    paired = pair(list(truth), answers, key=by_id, answered_only=answered_only)
    right = sum(
        _prediction(answer) == truth[question_id]["answer"]
        for question_id, answer in paired.answers
    )
    questions = len(paired.answers) + len(paired.missing)
    accuracy = 100 * right / questions
    return Score(
        figures={"accuracy": accuracy, "correct": right},
        headline=accuracy,
        questions=questions,
        missing=paired.missing,
    )


def _credit(paths: Paths, answers: Sequence[AnswerRecord]) -> list[Credit]:
    truth = read_json(paths["annotations"])
    return [
        Credit(right=_prediction(answer) == truth[by_id(answer)]["answer"]) for answer in answers
    ]


def _submit(paths: Paths, answers: Sequence[AnswerRecord], folder: Path) -> Path:
    """What GQA's own script takes: a JSON list of {questionId, prediction}."""
    out = folder / "testdev_balanced_predictions.json"
    write_json(
        out,
        [
            {"questionId": answer.question_id, "prediction": _prediction(answer)}
            for answer in answers
        ],
    )
    return out


GQA = Benchmark(
    name="gqa",
    title="GQA",
    paths={
        "questions": "gqa/llava_gqa_testdev_balanced.jsonl",
        "images": "gqa/data/images",
        "annotations": "gqa/data/testdev_balanced_questions.json",
    },
    to_ask=("questions", "images"),
    to_score=("annotations",),
    read=read_llava_questions,
    score=_score,
    submit=_submit,
    credit=_credit,
)
