"""NExT-QA, multiple choice: why, how and when in videos; five options.

Files and figures are those of the benchmark's own repository (doc-doc/NExT-QA, `eval_mc.py`). It
prescribes no prompt; the options stand with letters, as lmms-eval shows them. An answer that names
no option counts as wrong here; lmms-eval draws one at random.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stf_jax.data.templates import VIDEO_MARKER
from stf_jax.eval.answers import AnswerRecord, by_id, pair
from stf_jax.eval.benchmark import Benchmark, Paths, Score
from stf_jax.eval.files import check_fields
from stf_jax.eval.questions import OPTION_LETTER, Decoding, Question, read_choice
from stf_jax.util.files import name_some, read_json, read_text, write_json

_OPTIONS = ("a0", "a1", "a2", "a3", "a4")
_FIELDS = ("video", "question", "answer", "qid", "type", *_OPTIONS)
# Before and after are one type in the repository's figures.
_TYPES = {"CW": "CW", "CH": "CH", "TN": "TN", "TP": "TN", "TC": "TC", "DC": "DC", "DL": "DL"} | {
    "DO": "DO"
}
_GROUPS = {"C": "causal", "T": "temporal", "D": "descriptive"}


def _rows(path: Path) -> list[dict[str, str]]:
    """The lines of the CSV, each of a known type and with an answer."""
    rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), restval=""))
    if not rows:
        raise ValueError(f"{path}: empty; fetch it again")
    check_fields(path, [("the header", rows[0])], _FIELDS)
    wrong = [
        f"row {number}"
        for number, row in enumerate(rows, start=1)
        if row["answer"] not in tuple("01234") or row["type"] not in _TYPES or None in row
    ]
    if wrong:
        raise ValueError(
            f"{path}: {name_some(wrong)} lack an answer from 0 to 4 or a known type; check that it "
            "is the official file"
        )
    return rows


def _id(row: dict[str, str]) -> str:
    return f"{row['video']}_{row['qid']}"


def _read(paths: Paths) -> list[Question]:
    rows, places = _rows(paths["questions"]), read_json(paths["map"])
    if lost := [row["video"] for row in rows if not isinstance(places.get(row["video"]), str)]:
        raise ValueError(
            f"{paths['map']}: lacks {name_some(list(dict.fromkeys(lost)))} of the questions; take "
            "both files from the same release"
        )
    return [
        _question(number, row, paths["videos"] / f"{places[row['video']]}.mp4")
        for number, row in enumerate(rows)
    ]


def _question(number: int, row: dict[str, str], video: Path) -> Question:
    options = [
        f"{letter}. {row[name].strip()}" for letter, name in zip("ABCDE", _OPTIONS, strict=True)
    ]
    text = "\n".join([row["question"].strip(), *options, OPTION_LETTER])
    return Question(
        number=number,
        question_id=_id(row),
        text=text,
        prompt=f"{VIDEO_MARKER}\n{text}",
        images=(),
        clips=(video,),
    )


def _choice(answer: AnswerRecord) -> int | None:
    """Which option, from 0: a letter alone, in brackets, or in front of its text."""
    return read_choice(answer.text.strip().strip("().,:;!?'\""), len(_OPTIONS))


def _score(paths: Paths, answers: Sequence[AnswerRecord], answered_only: bool) -> Score:
    rows = {_id(row): row for row in _rows(paths["questions"])}
    paired = pair(list(rows), answers, key=by_id, answered_only=answered_only)
    right, asked = Counter[str](), Counter[str]()
    given = {key: _choice(answer) for key, answer in paired.answers}
    for key in [*given, *paired.missing]:
        kind = _TYPES[rows[key]["type"]]
        for name in ("all", _GROUPS[kind[0]], kind):
            asked[name] += 1
            right[name] += given.get(key) == int(rows[key]["answer"])
    accuracy = {name: 100 * right[name] / count for name, count in sorted(asked.items())}
    return Score(
        figures={
            "accuracy": accuracy.pop("all"),
            "correct": right["all"],
            "total": asked["all"],
            **accuracy,
        },
        headline=100 * right["all"] / asked["all"],
        questions=asked["all"],
        missing=paired.missing,
    )


def _submit(paths: Paths, answers: Sequence[AnswerRecord], folder: Path) -> Path:
    """What `eval_mc.py` reads; -1 where an answer names no option."""
    rows = {_id(row): row for row in _rows(paths["questions"])}
    content: dict[str, Any] = {}
    for answer in answers:
        choice = _choice(answer)
        content[str(answer.question_id)] = {
            "prediction": -1 if choice is None else choice,
            "answer": int(rows[str(answer.question_id)]["answer"]),
        }
    path = folder / "nextqa_mc.json"
    write_json(path, content)
    return path


NEXTQA = Benchmark(
    name="nextqa",
    title="NExT-QA",
    follows="NExT-QA's eval_mc.py, with lmms-eval's prompt",
    paths={
        "questions": "nextqa/test.csv",
        "map": "nextqa/map_vid_vidorID.json",
        "videos": "nextqa/NExTVideo",
    },
    to_ask=("questions", "map", "videos"),
    to_score=("questions",),
    decoding=Decoding(max_new_tokens=16),
    read=_read,
    score=_score,
    submit=_submit,
)
