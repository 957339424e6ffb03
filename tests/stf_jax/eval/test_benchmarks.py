"""Each benchmark's questions, scores worked out by hand, and submission files, in miniature."""

import base64
import json
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from stf_jax.eval.mmbench import parse_letter
from stf_jax.eval.mme import says
from stf_jax.eval.registry import BENCHMARKS, CLIP_BENCHMARKS, get_benchmark
from stf_jax.eval.runner import Result, ask, prepare, score_file
from stf_jax.systems import SYSTEMS
from tests.stf_jax.eval.miniature import (
    SHORT,
    TSV_COLUMNS,
    Echo,
    mmbench_rows,
    png,
    write_jsonl,
    write_tsv,
)

LETTER = "Answer with the option's letter from the given choices directly."


def run(name: str, data: Path, answers: dict[Any, str] | None = None) -> Result:
    prepared = prepare(get_benchmark(name), data=data)
    return ask(prepared, Echo(answers), out=data / "out" / name)


def questions(name: str, data: Path) -> Any:
    return prepare(get_benchmark(name), data=data).questions


def submitted(result: Result) -> Any:
    assert result.submission is not None
    return json.loads(result.submission.read_text())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_and_decoding(data: Path, name: str) -> None:
    echo = Echo()
    result = ask(prepare(get_benchmark(name), data=data), echo, out=data / "out")
    assert [one.number for one in echo.asked] == list(range(len(echo.asked)))
    for one in echo.asked:
        assert one.prompt.startswith("<image>\n") == (len(one.images) == 1)
        assert one.prompt.count("<image>") == len(one.images)
    many = name in ("scienceqa", "mmbench", "mmbench-cn")
    (decoding,) = echo.decodings
    assert (decoding.template, decoding.max_new_tokens) == ("v1", 1024 if many else 128)
    fields = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    lines = [json.loads(line) for line in result.answers.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [one.question_id for one in echo.asked]
    for line in lines:
        assert [field for field in line if field in fields] == fields
    assert len({line["answer_id"] for line in lines}) == len(lines)
    # The official columns, as papers quote them.
    published = [system for system in SYSTEMS.values() if system.published]
    titles = [system.title for system in published]
    assert titles[:3] == ["LLaVA-1.5", "AvgPool", "LLaVA-STF"]
    named = {name for system in published for name in system.published}
    assert named == {*BENCHMARKS, *CLIP_BENCHMARKS}


def test_vqav2(data: Path) -> None:
    assert questions("vqav2", data)[0].prompt == f"<image>\nHow many in 20?\n{SHORT}"
    result = run("vqav2", data, {20: "Two dogs.", 10: "The cat"})
    assert result.score.headline is None
    # Every question of test2015 in its order, with "" where test-dev does not ask.
    assert submitted(result) == [
        {"question_id": 10, "answer": "cat"},
        {"question_id": 20, "answer": "2 dogs"},
        {"question_id": 30, "answer": ""},
        {"question_id": 40, "answer": "yes"},
        {"question_id": 50, "answer": ""},
    ]


def test_vqav2_test_questions_must_hold_those_asked(data: Path) -> None:
    path = data / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl"
    write_jsonl(path, [{"question_id": 20}, {"question_id": 40}])
    with pytest.raises(ValueError, match=r"lacks 1 questions that are answered \(10\)"):
        run("vqav2", data)


def test_gqa(data: Path) -> None:
    result = run("gqa", data, {"201": "Yes...", "202": "yes, it is", "203": "NO."})
    assert result.score.figures == {"accuracy": 200 / 3, "correct": 2}
    assert result.submission is not None
    assert result.submission.name == "testdev_balanced_predictions.json"
    assert submitted(result) == [
        {"questionId": "201", "prediction": "yes"},
        {"questionId": "202", "prediction": "yes, it is"},
        {"questionId": "203", "prediction": "no"},
    ]


def test_vizwiz(data: Path) -> None:
    result = run("vizwiz", data, {"VizWiz_test_0.jpg": "The Unanswerable."})
    assert submitted(result) == [
        {"image": "VizWiz_test_1.jpg", "answer": "yes"},
        {"image": "VizWiz_test_0.jpg", "answer": "unanswerable"},
    ]


def test_scienceqa(data: Path) -> None:
    about_image, text_only = questions("scienceqa", data)
    assert about_image.prompt == f"<image>\nWhich?\nA. x\nB. y\n{LETTER}"
    assert about_image.text == about_image.prompt
    assert text_only.prompt == f"Why?\nA. x\nB. y\nC. z\n{LETTER}"
    assert about_image.images == (data / "scienceqa" / "images" / "test" / "4" / "image.png",)
    assert text_only.images == ()
    result = run("scienceqa", data, {"4": "The answer is B!", "7": "A"})
    assert result.score.figures == {
        "accuracy": 50.0,
        "correct": 1,
        "total": 2,
        "image_accuracy": 100.0,
        "image_total": 1,
    }


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", True),
        ("B. y", True),
        ("B.", False),
        ("b", False),
        ("B y", False),
        ("The answer is B.", True),
        ("The answer is B", False),
        ("The answer is B. The answer is B.", False),
        ("The answer is B\n", False),
        ("AB", False),
        ("", False),
        ("C", False),
    ],
)
def test_scienceqa_letters(data: Path, text: str, right: bool) -> None:
    assert run("scienceqa", data, {"4": text}).score.figures["image_accuracy"] == 100 * right


def test_textvqa_pairs_by_question(data: Path) -> None:
    """Two of ten people agree: 8 times 2/3 and twice 1/3."""
    assert questions("textvqa", data)[1].question_id == "a"
    result = run("textvqa", data, {"a": "Nike", "b": "Else."})
    nike, else_ = (8 * (2 / 3) + 2 * (1 / 3)) / 10, 1.0
    assert result.score.figures["accuracy"] == pytest.approx((nike + 0 + else_) / 3, abs=1e-12)


def test_textvqa_an_answer_that_is_a_number(data: Path) -> None:
    path = data / "textvqa" / "TextVQA_0.5.1_val.json"
    path.write_text(path.read_text().replace('"1999"', "1999"))
    with pytest.raises(ValueError, match="an answer of entry 2 is no text; fetch it again"):
        run("textvqa", data, {"a": "Nike", "b": "Else."})


def test_textvqa_other_order_of_lines(data: Path, tmp_path: Path) -> None:
    """The question stands second where the OCR tokens come first."""
    path = tmp_path / "answers.jsonl"
    prompts = (
        ("a", f"Reference OCR token: x\nWhat brand?\n{SHORT}"),
        ("a", f"Which year?\n{SHORT}"),
        ("b", f"What word?\nReference OCR token: x\n{SHORT}"),
    )
    write_jsonl(path, [{"question_id": i, "prompt": p, "text": "else"} for i, p in prompts])
    result = score_file(get_benchmark("textvqa"), path, data=data)
    assert result.score.figures == {"accuracy": 1.0}


def test_mme(data: Path) -> None:
    artwork = [
        str(one.images[0].relative_to(data)) for one in questions("mme", data) if one.number >= 4
    ]
    assert artwork[0] == "MME/MME_Benchmark_release_version/artwork/images/1.png"
    # "Yes" to everything: one of the two right for each image.
    result = run("mme", data, {"artwork/2.png": "It is yes"})
    half = {"accuracy": 0.5, "accuracy_plus": 0.0, "score": 50.0}
    assert result.score.figures["tasks"] == {
        "existence": half,
        "artwork": {"accuracy": 0.25, "accuracy_plus": 0.0, "score": 25.0},
    }
    assert result.score.headline == result.score.figures["perception"] == 75.0
    assert result.score.figures["cognition"] == 0
    assert result.submission is not None
    assert sorted(file.name for file in result.submission.iterdir()) == [
        "artwork.txt",
        "existence.txt",
    ]
    # The annotation's own question, with its two spaces.
    assert (result.submission / "existence.txt").read_text() == (
        "1.txt\tIs it a cat? Please answer yes or no.\tYes\tYes.\n"
        "1.txt\tIs it a dog?  Please answer yes or no.\tNo\tYes.\n"
        "2.txt\tIs it a cat? Please answer yes or no.\tYes\tYes.\n"
        "2.txt\tIs it a dog?  Please answer yes or no.\tNo\tYes.\n"
    )


def test_mme_both_questions(data: Path, tmp_path: Path) -> None:
    """Right answers everywhere are worth 200 a task."""
    path = tmp_path / "answers.jsonl"
    lines = [
        {
            "question_id": one.question_id,
            "prompt": one.text,
            "text": "Yes" if "cat" in one.text else "no",
        }
        for one in questions("mme", data)
    ]
    write_jsonl(path, lines)
    assert score_file(get_benchmark("mme"), path, data=data).score.headline == 400.0
    write_jsonl(path, lines[:-1])
    missing = score_file(get_benchmark("mme"), path, data=data).score
    assert missing.missing == ("artwork/2.txt: Is it a dog?",)
    assert missing.headline == 200 + 75 + 50


@pytest.mark.parametrize(
    ("text", "word"),
    [("YES", "yes"), ("No.", "no"), ("a no", "no"), ("now", "no"), ("It is yes", "other")],
)
def test_mme_words(text: str, word: str) -> None:
    assert says(text) == word


def test_mmbench_questions(data: Path) -> None:
    first, second, third = questions("mmbench", data)
    assert first.text == 'What "is" it?\nA. cat\nB. dog'
    assert first.prompt == f'<image>\nWhat "is" it?\nA. cat\nB. dog\n{LETTER}'
    assert second.text == "Look left.\nWhere?\nA. hill\nB. town\nC. =sea"
    assert (third.question_id, third.extra["option_char"]) == (1000005, ["A", "B"])
    assert first.images[0].startswith(png(3))
    assert questions("mmbench-cn", data)[0].prompt.endswith("\nB. dog\n请直接回答选项字母。")


def test_mmbench_rows_may_name_the_row_that_has_their_image(data: Path) -> None:
    expected = questions("mmbench", data)
    rows = mmbench_rows()
    path = data / "mmbench" / "mmbench_dev_20230712.tsv"
    rows[2]["image"] = "5"
    write_tsv(path, rows)
    assert questions("mmbench", data) == expected
    for pointer in ("9", "1000005"):
        rows[2]["image"] = pointer
        write_tsv(path, rows)
        message = f"image of index 1000005 is that of index {pointer}, which has none itself"
        with pytest.raises(ValueError, match=message):
            questions("mmbench", data)


def test_mmbench_scores(data: Path) -> None:
    result = run("mmbench", data, {5: "A", 8: "C. =sea", 1000005: "A. dog"})
    assert result.score.figures == {
        "answers_without_letter": 0,
        "accuracy": 100 * 2 / 3,
        "circular_accuracy": 50.0,
        "circular_questions": 2,
    }
    line = json.loads(result.answers.read_text().splitlines()[1])
    assert list(line)[:6] == ["question_id", "round_id", "prompt", "text", "options", "option_char"]
    assert line["options"] == ["hill", "town", "=sea"]


def test_mmbench_spreadsheet(data: Path) -> None:
    result = run("mmbench", data, {5: "=A", 8: "C\x07", 1000005: "B"})
    assert result.submission == data / "out" / "mmbench" / "mmbench_dev_20230712.xlsx"
    table = list(openpyxl.load_workbook(result.submission).active.iter_rows())
    header = ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert [cell.value for cell in table[0]] == header
    assert [[cell.value for cell in row] for row in table[1:]] == [
        [5, 'What "is" it?', "cat", "dog", None, None, "=A", "A", "dev"],
        [8, "Where?", "hill", "town", "=sea", None, "C", "C", "dev"],
        [1000005, 'What "is" it?', "dog", "cat", None, None, "B", "B", "dev"],
    ]
    # "=sea" is no formula.
    assert {cell.data_type for row in table for cell in row} == {"s", "n"}


@pytest.mark.parametrize("column", [True, False])
def test_mmbench_without_truth(data: Path, column: bool) -> None:
    """The test split: no answers, so no figures, and a table to submit."""
    columns = [one for one in TSV_COLUMNS if column or one != "answer"]
    rows = [{one: row.get(one, "") for one in columns} for row in mmbench_rows()]
    rows = [row | {"answer": ""} if column else row for row in rows]
    write_tsv(data / "mmbench" / "mmbench_dev_20230712.tsv", rows, columns)
    result = run("mmbench", data)
    assert result.score.headline is None
    assert result.submission is not None


def test_mmbench_with_a_misspelled_truth(data: Path) -> None:
    """It is not taken for the test split, whose scores only the server knows."""
    path = data / "mmbench" / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\tanswer\t", "\tAnswer\t", 1))
    with pytest.raises(
        ValueError, match=r"no answer and an unknown 'Answer'; write answer if .*known are index"
    ):
        questions("mmbench", data)


def test_mmbench_with_a_column_of_its_own(data: Path) -> None:
    path = data / "mmbench" / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\tsource\t", "\torigin\t", 1))
    assert run("mmbench", data).score.headline is not None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" B ", "B"),
        ("(C)", "C"),
        ("D. town", "D"),
        ("A dog", None),
        ("Apple", None),
        ("E", None),
        ("a", None),
        ("", None),
    ],
)
def test_mmbench_letters(text: str, letter: str | None) -> None:
    assert parse_letter(text) == letter


@pytest.mark.parametrize("answer", ["", "a"])
def test_mmbench_with_an_odd_truth(data: Path, answer: str) -> None:
    """One blank does not hide the score, nor does a letter that nobody can name lower it."""
    first, *rest = mmbench_rows()
    write_tsv(data / "mmbench" / "mmbench_dev_20230712.tsv", [first | {"answer": answer}, *rest])
    with pytest.raises(
        ValueError, match=r"no letter of ABCD is the answer of index 5 \((None|a)\)"
    ):
        run("mmbench", data)


def test_mmbench_damaged(data: Path) -> None:
    path = data / "mmbench" / "mmbench_dev_20230712.tsv"
    rows = mmbench_rows()
    write_tsv(path, [rows[0] | {"image": "no base64!"}])
    with pytest.raises(ValueError, match="image of index 5 is no base64"):
        questions("mmbench", data)
    write_tsv(path, [rows[0] | {"index": "five"}])
    with pytest.raises(ValueError, match=r"row 1 .*no number \('five'\)"):
        questions("mmbench", data)
    path.write_text("index\tquestion\n5\tWhat?\n")
    with pytest.raises(ValueError, match="the header has no hint, image, A, B, C, D"):
        questions("mmbench", data)
    assert base64.b64decode(rows[0]["image"]).startswith(png(3))
