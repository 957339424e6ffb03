"""The scores that the reference's scripts give, exactly, and every string of its processor."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stf_jax.eval.evalai import normalize_answer
from stf_jax.eval.pope import says_yes
from stf_jax.eval.registry import get_benchmark
from stf_jax.eval.runner import score_file


@pytest.fixture(scope="module")
def files(reference: Path) -> Path:
    return reference / "eval"


@pytest.fixture(scope="module")
def expected(files: Path) -> Any:
    return json.loads((files / "expected.json").read_text())


def score(name: str, answers: Path, **paths: Path) -> Any:
    return score_file(get_benchmark(name), answers, data=None, paths=paths).score


def test_textvqa(files: Path, expected: Any) -> None:
    truth = files / "textvqa_annotations.json"
    result = score("textvqa", files / "textvqa_answers.jsonl", annotations=truth)
    assert result.figures == expected["textvqa"]
    questions = json.loads(truth.read_text())["data"]
    assert (result.questions, result.missing) == (len(questions), ())


def test_pope(files: Path, expected: Any) -> None:
    questions = files / "pope_questions.jsonl"
    answers = files / "pope_answers.jsonl"
    result = score("pope", answers, questions=questions, annotations=files)
    mean = sum(one["f1_score"] for one in expected["pope"].values()) / len(expected["pope"])
    assert result.figures == expected["pope"] | {"mean_f1_score": mean}
    assert result.headline == 100 * mean
    assert result.missing == ()


def test_scienceqa(files: Path, expected: Any) -> None:
    folder = files / "scienceqa"
    paths = {"problems": folder / "problems.json", "splits": folder / "pid_splits.json"}
    result = score("scienceqa", folder / "answers.jsonl", **paths)
    # The reference prints two decimals.
    figures = {name: round(result.figures[name], 2) for name in expected["scienceqa"]}
    assert figures == expected["scienceqa"]
    lines = (folder / "answers.jsonl").read_text().splitlines()
    answered = {json.loads(line)["question_id"] for line in lines}
    asked = json.loads((folder / "pid_splits.json").read_text())["test"]
    assert result.missing == tuple(number for number in asked if number not in answered)


def test_every_string_of_the_processor(files: Path) -> None:
    pairs = json.loads((files / "evalai_answer_processor.json").read_text())
    assert pairs
    wrong = [(text, normalize_answer(text), true) for text, true in pairs]
    assert [one for one in wrong if one[1] != one[2]] == []


def test_only_the_first_32_periods_go() -> None:
    assert normalize_answer("a." * 40 + "b") == "a" * 32 + "a." * 8 + "b"


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_processor_leaves_no_outer_space_and_no_article(text: str) -> None:
    words = normalize_answer(text).split(" ")
    assert words == [""] or all(words)
    assert not {"a", "an", "the"} & set(words)
    assert normalize_answer(text) == normalize_answer(text.upper())


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No.", False),
        ("no, there is not", False),
        ("There is not one. Yes", False),
        ("Yes. No", True),
        ("NO", True),
        ("nothing", True),
        ("", True),
        ("Nope", True),
        ("yes,no", True),
    ],
)
def test_pope_words(text: str, yes: bool) -> None:
    assert says_yes(text) is yes
