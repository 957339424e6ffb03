"""Files that are missing, damaged or not official: one clear line for what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from stf_jax.eval.registry import BENCHMARKS, get_benchmark
from stf_jax.eval.report import render
from stf_jax.eval.runner import prepare, score_file
from tests.stf_jax.eval.miniature import write_jsonl

GQA = get_benchmark("gqa")
POPE = get_benchmark("pope")


def test_missing_images_are_listed_before_the_first_question(data: Path) -> None:
    (data / "vizwiz" / "test" / "VizWiz_test_1.jpg").unlink()
    (data / "vizwiz" / "test" / "VizWiz_test_0.jpg").unlink()
    with pytest.raises(ValueError, match=r"2 images are not there .*_1.jpg, .*_0.jpg.*--path"):
        prepare(get_benchmark("vizwiz"), data=data)


def test_every_missing_file_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--path questions=PATH") as caught:
        prepare(get_benchmark("scienceqa"), data=tmp_path / "nowhere")
    assert len(str(caught.value).splitlines()) == 4
    with pytest.raises(ValueError, match="where are questions, images, annotations"):
        prepare(POPE, data=None)
    with pytest.raises(ValueError, match="pope has no file 'picture'; it has 'questions', 'ima"):
        prepare(POPE, data=data, paths={"picture": tmp_path})


def test_a_file_that_lies_elsewhere(data: Path, tmp_path: Path) -> None:
    moved = (data / "gqa" / "llava_gqa_testdev_balanced.jsonl").rename(tmp_path / "q.jsonl")
    assert len(prepare(GQA, data=data, paths={"questions": moved}).questions) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ('{"question_id": 1, "text": "?"}\n{"text": "?"}', "line 1 has no image, line 2 has no q"),
        ('{"question_id": 1, "text"\n', "line 1 is not valid JSON"),
        ("[1]\n", "line 1 is no object"),
        ('{"question_id": 1, "image": null, "text": 2}', "the image of question 1 is no text, "),
        ('{"question_id": 1, "image": "n1.jpg", "text": "<image>?"}', "have <image> in their text"),
        (b"\xff\xfe", "not UTF-8"),
        (
            r'{"question_id": 1, "image": "n1.jpg", "text": "A \ud83d\ude00 or a \ud83d?"}',
            "half a surrogate pair, which is no valid unicode, stands in line 1, text; fix it",
        ),
    ],
)
def test_unofficial_question_files(data: Path, content: Any, message: str) -> None:
    path = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        prepare(GQA, data=data)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "place", "content", "message"),
    [
        ("gqa", "gqa/data/testdev_balanced_questions.json", {"201": {}}, "201 has no answer"),
        ("gqa", "gqa/data/testdev_balanced_questions.json", [], "a list where a dict is expected"),
        (
            "vqav2",
            "vqav2/llava_vqav2_mscoco_test2015.jsonl",
            {"question_id": 10},
            r"lacks 2 questions that are answered \(20, 40\)",
        ),
        ("gqa", "gqa/data/testdev_balanced_questions.json", {"1": {"answer": 1}}, "is no text"),
        ("scienceqa", "scienceqa/llava_test_CQM-A.json", [], "empty; fetch"),
        (
            "scienceqa",
            "scienceqa/llava_test_CQM-A.json",
            [{"id": 1, "image": None, "conversations": None}],
            "the conversations of entry 1 is no list",
        ),
        (
            "scienceqa",
            "scienceqa/llava_test_CQM-A.json",
            [{"id": 1, "conversations": [{"value": "Why?"}, {"value": "A \ud800"}]}],
            "stands in entry 1, conversations, entry 2, value; fix it",
        ),
        (
            "scienceqa",
            "scienceqa/problems.json",
            {one: {"choices": ["x"], "answer": "0"} for one in "47"},
            "the answer of 4 is no whole number",
        ),
        (
            "textvqa",
            "textvqa/TextVQA_0.5.1_val.json",
            {"data": [{"image_id": "a", "question": None, "answers": None}]},
            "the question of entry 1 is no text, the answers of entry 1 is no list",
        ),
        (
            "pope",
            "pope/coco/coco_pope_random.json",
            {"image": "v.jpg", "text": None, "label": "no"},
            "the text of line 1 is no text",
        ),
        ("scienceqa", "scienceqa/problems.json", {}, "lacks 4, 7 of the test split"),
        ("scienceqa", "scienceqa/pid_splits.json", {}, "has no split 'test'"),
        ("scienceqa", "scienceqa/llava_test_CQM-A.json", [{"id": 1}], "entry 1 has no conv"),
        (
            "scienceqa",
            "scienceqa/llava_test_CQM-A.json",
            [{"id": 1, "conversations": []}],
            "entry 1 is no object",
        ),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", {}, "has no data"),
        ("pope", "pope/coco/coco_pope_random.json", {"image": "v.jpg"}, "line 1 has no text, la"),
        (
            "pope",
            "pope/coco/coco_pope_random.json",
            {"image": "v.jpg", "text": "?", "label": "no"},
            "1 annotations for 2 questions",
        ),
    ],
)
def test_unofficial_annotations(
    data: Path, name: str, place: str, content: Any, message: str
) -> None:
    (data / place).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        prepare(BENCHMARKS[name], data=data)


def test_a_surrogate_pair_that_is_whole(data: Path) -> None:
    """As `json.dumps` writes what is beyond 16 bits."""
    path = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    path.write_text(path.read_text().replace("Is it red", r"Is \ud83d\ude00 red"))
    assert prepare(GQA, data=data).questions[0].text.startswith("Is \N{GRINNING FACE} red")


def test_a_question_id_twice_on_the_server(data: Path) -> None:
    """One answer would stand for two questions."""
    path = data / "vizwiz" / "llava_test.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write(json.dumps(first | {"text": "Another?"}) + "\n")
    with pytest.raises(ValueError, match=r"has VizWiz_test_1\.jpg more than once"):
        prepare(get_benchmark("vizwiz"), data=data)


def test_pope_annotations_of_other_questions(data: Path) -> None:
    path = data / "pope" / "coco" / "coco_pope_popular.json"
    path.write_text(path.read_text().replace("cat", "fox"))
    with pytest.raises(ValueError, match="annotation 2 is not about question 3"):
        prepare(POPE, data=data)


def test_questions_without_truth_are_found_before_asking(data: Path) -> None:
    path = data / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl"
    path.write_text(path.read_text().replace("Which year", "Which day"))
    with pytest.raises(ValueError, match=r"textvqa cannot be scored .*'which day\?'"):
        prepare(get_benchmark("textvqa"), data=data)


def test_an_answer_given_twice(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_jsonl(path, [{"question_id": "201", "text": "yes"}] * 2)
    with pytest.raises(ValueError, match=r"answered more often than asked \(201\)"):
        score_file(GQA, path, data=data)


def test_an_answer_that_is_no_text(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_jsonl(path, [{"question_id": "201", "text": None}])
    with pytest.raises(ValueError, match="the 'text' of 201 is no string"):
        score_file(GQA, path, data=data)


def test_no_server_has_what_no_answer_shows(data: Path, tmp_path: Path) -> None:
    """SQA-I of an answer file without prompts is not to be had, from a server either."""
    path = tmp_path / "answers.jsonl"
    write_jsonl(path, [{"question_id": "4", "text": "A"}, {"question_id": "7", "text": "A"}])
    table = render([score_file(get_benchmark("scienceqa"), path, data=data)])
    assert table.splitlines()[1].split()[:2] == ["SQA-I", "-"]
    assert "no SQA-I, since no answer's prompt has <image>" in table


def test_a_prompt_that_is_no_text(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_jsonl(path, [{"question_id": "4", "prompt": None, "text": "A"}])
    with pytest.raises(ValueError, match="the 'prompt' of 4 is no string"):
        score_file(get_benchmark("scienceqa"), path, data=data)


def test_textvqa_needs_the_prompt(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_jsonl(path, [{"question_id": "a", "text": "yes"}])
    with pytest.raises(ValueError, match="about image a has no 'prompt'"):
        score_file(get_benchmark("textvqa"), path, data=data)
