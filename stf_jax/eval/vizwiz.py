"""VizWiz test, scored by EvalAI's server."""

from collections.abc import Sequence
from pathlib import Path

from stf_jax.eval.answers import AnswerRecord, by_id
from stf_jax.eval.benchmark import Benchmark, Paths, score_on_server
from stf_jax.eval.evalai import normalize_answer
from stf_jax.eval.files import read_jsonl
from stf_jax.eval.questions import read_llava_questions
from stf_jax.util.files import write_json


def _submit(paths: Paths, answers: Sequence[AnswerRecord], folder: Path) -> Path:
    """A JSON list of {image, answer}, every question of the file in its order."""
    texts = {by_id(answer): normalize_answer(answer.text) for answer in answers}
    lines = read_jsonl(paths["questions"], ("question_id", "image"))
    out = folder / "vizwiz_upload.json"
    write_json(
        out, [{"image": line["image"], "answer": texts[str(line["question_id"])]} for line in lines]
    )
    return out


VIZWIZ = Benchmark(
    name="vizwiz",
    title="VizWiz",
    paths={"questions": "vizwiz/llava_test.jsonl", "images": "vizwiz/test"},
    to_ask=("questions", "images"),
    to_score=("questions",),
    read=read_llava_questions,
    score=score_on_server,
    submit=_submit,
)
