"""VQAv2 test-dev, scored by EvalAI's server."""

from collections.abc import Sequence
from pathlib import Path

from stf_jax.eval.answers import AnswerRecord, by_id
from stf_jax.eval.benchmark import Benchmark, Paths, Score, score_on_server
from stf_jax.eval.evalai import normalize_answer
from stf_jax.eval.files import read_jsonl
from stf_jax.eval.questions import read_llava_questions
from stf_jax.util.files import name_some, write_json


def _every(paths: Paths, answers: Sequence[AnswerRecord]) -> list[int | str]:
    """The ids of all test questions, among which are those answered."""
    every = [line["question_id"] for line in read_jsonl(paths["test_questions"], ("question_id",))]
    known = set(map(str, every))
    if unknown := [id_ for id_ in map(by_id, answers) if id_ not in known]:
        raise ValueError(
            f"{paths['test_questions']}: lacks {len(unknown)} questions that are answered "
            f"({name_some(unknown)}); it must be the whole of test2015"
        )
    return every


def _score(paths: Paths, answers: Sequence[AnswerRecord], answered_only: bool) -> Score:
    score = score_on_server(paths, answers, answered_only)
    # Before hours of asking, too.
    _every(paths, answers)
    return score


def _submit(paths: Paths, answers: Sequence[AnswerRecord], folder: Path) -> Path:
    """A JSON list of {question_id, answer} for every test question, "" where it is not asked."""
    texts = {by_id(answer): normalize_answer(answer.text) for answer in answers}
    out = folder / "vqav2_upload.json"
    write_json(
        out,
        [{"question_id": id_, "answer": texts.get(str(id_), "")} for id_ in _every(paths, answers)],
    )
    return out


VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    paths={
        "questions": "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
        "test_questions": "vqav2/llava_vqav2_mscoco_test2015.jsonl",
        "images": "vqav2/test2015",
    },
    to_ask=("questions", "images"),
    to_score=("questions", "test_questions"),
    read=read_llava_questions,
    score=_score,
    submit=_submit,
)
