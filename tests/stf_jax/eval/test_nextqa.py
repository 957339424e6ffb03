"""NExT-QA in miniature: its files, prompts, a score worked out by hand, a model end to end."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import stf_jax
from stf_jax.data.clips import FrameSampling
from stf_jax.eval.nextqa import NEXTQA
from stf_jax.eval.report import render
from stf_jax.eval.runner import ask, prepare
from tests.stf_jax.data.test_clips import frames, write_video
from tests.stf_jax.eval.miniature import Echo, write_json

COLUMNS = ("video", "frame_count", "width", "height", "question", "answer", "qid", "type")
OPTIONS = {"a0": "run", "a1": "sit ", "a2": "jump", "a3": "eat", "a4": "sing"}
# (video, qid, type, right answer)
ROWS = [("7", 1, "CW", 2), ("7", 2, "TP", 0), ("7", 3, "TN", 1), ("8", 1, "DC", 4)]


def make(root: Path, rows: list[tuple[str, int, str, int]] = ROWS) -> Path:
    folder = root / "nextqa"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "test.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *OPTIONS])
        writer.writeheader()
        for video, qid, kind, answer in rows:
            size = {"frame_count": 6, "width": 64, "height": 48}
            asked = {"question": f"what is {qid}, then", "answer": answer, "qid": qid}
            writer.writerow({"video": video, "type": kind, **size, **asked, **OPTIONS})
    write_json(folder / "map_vid_vidorID.json", {"7": "11/7", "8": "12/8"})
    for place, count in (("11/7", 6), ("12/8", 2)):
        path = folder / "NExTVideo" / f"{place}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames(count))
    return root


def test_questions(tmp_path: Path) -> None:
    prepared = prepare(NEXTQA, data=make(tmp_path))
    first = prepared.questions[0]
    assert first.question_id == "7_1"
    assert first.prompt == (
        "<video>\nwhat is 1, then\nA. run\nB. sit\nC. jump\nD. eat\nE. sing\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert first.clips == (tmp_path / "nextqa" / "NExTVideo" / "11" / "7.mp4",)


def test_score_and_submission(tmp_path: Path) -> None:
    """Before and after are one type; what names no option is wrong."""
    answers = {"7_1": "C", "7_2": "A. run", "7_3": "(A)", "8_1": "Five babies."}
    prepared = prepare(NEXTQA, data=make(tmp_path))
    result = ask(prepared, Echo(answers), out=tmp_path / "out")
    assert result.score.figures == {
        "accuracy": 50, "correct": 2, "total": 4, "causal": 100, "temporal": 50,
        "descriptive": 0, "CW": 100, "TN": 50, "DC": 0,
    }  # fmt: skip
    assert result.score.headline == 50
    assert "57.5" in render([result])  # VQToken's, beside it.
    assert result.submission is not None
    submitted = json.loads(result.submission.read_text())
    assert submitted["7_2"] == {"prediction": 0, "answer": 0}
    assert submitted["8_1"] == {"prediction": -1, "answer": 4}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("9", 1, "CW", 0)], "map_vid_vidorID.json: lacks 9 of the questions"),
        ([("7", 1, "XX", 0)], "row 1 lack an answer from 0 to 4 or a known type"),
        ([("7", 1, "CW", 5)], "row 1 lack an answer from 0 to 4 or a known type"),
        ([], "test.csv: empty; fetch it again"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(NEXTQA, data=make(tmp_path, rows))


def test_missing_videos_are_named(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "nextqa" / "NExTVideo" / "12" / "8.mp4").unlink()
    with pytest.raises(ValueError, match=r"1 videos are not there .*8.mp4.* --path videos=DIR"):
        prepare(NEXTQA, data=tmp_path)


def test_a_model_end_to_end(model: stf_jax.Model, tmp_path: Path) -> None:
    """Its answers are those to requests about the clips; the protocol says which frames."""
    data, sampling = make(tmp_path / "data"), FrameSampling(frames=3)
    (result,) = stf_jax.evaluate(
        "nextqa", model, data=data, out=tmp_path / "out", sampling=sampling
    )
    assert result.protocol is not None
    assert result.protocol["model"]["clips"] == {"frames": 3, "rate": None}
    lines = [json.loads(one) for one in result.answers.read_text().splitlines()]
    requests = [
        stf_jax.Request(prompt=question.prompt, clips=question.clips, sampling=sampling)
        for question in prepare(NEXTQA, data=data).questions
    ]
    answers = model.generate(requests, max_new_tokens=16)
    assert [line["text"] for line in lines] == [answer.text for answer in answers]
