"""A miniature of each benchmark, in its official files where LLaVA's instructions put them."""

import base64
import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stf_jax.eval.questions import Decoding, Question, Reply

SHORT = "Answer the question using a single word or phrase."
TSV_COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"),
    *("source", "l2-category", "comment", "split"),
)


class Echo:
    """Answers from a table by (id, prompt), "Yes." elsewhere; remembers what it was asked."""

    model_id = "echo"

    def __init__(self, answers: dict[Any, str] | None = None, *, stop_after: int | None = None):
        self.answers, self.stop_after = answers or {}, stop_after
        self.asked: list[Question] = []
        self.decodings: list[Decoding] = []

    def describe(self) -> dict[str, Any]:
        return {"image_mode": "pad"}

    def answer(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[Reply]:
        self.decodings.append(decoding)
        for one in questions:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(one)
            yield Reply(number=one.number, text=self.answers.get(one.question_id, "Yes."))


def write_jsonl(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_tsv(
    path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str] = TSV_COLUMNS
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, dialect="excel-tab", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def png(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed))


def short(question_id: Any, image: str, text: str, **more: Any) -> dict[str, Any]:
    return {"question_id": question_id, "image": image, "text": f"{text}\n{SHORT}", **more}


def make_all(root: Path) -> None:
    """The folder that `--data` names."""
    for make in (_vqav2, _gqa, _vizwiz, _scienceqa, _textvqa, _pope, _mme, _mmbench):
        make(root)


def _vqav2(root: Path) -> None:
    folder = root / "vqav2"
    dev = [short(n, f"{n % 2}.jpg", f"How many in {n}?") for n in (20, 10, 40)]
    test = [short(n, f"{n % 2}.jpg", "?") for n in (10, 20, 30, 40, 50)]
    write_jsonl(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", dev)
    write_jsonl(folder / "llava_vqav2_mscoco_test2015.jsonl", test)
    write_image(folder / "test2015" / "0.jpg")


def _gqa(root: Path) -> None:
    folder = root / "gqa"
    ids = ("201", "202", "203")
    lines = [short(id_, "n1.jpg", "Is it red?") for id_ in ids]
    write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", lines)
    truth = {id_: {"answer": "yes", "imageId": "n1"} for id_ in ids} | {"203": {"answer": "no"}}
    write_json(folder / "data" / "testdev_balanced_questions.json", truth)
    write_image(folder / "data" / "images" / "n1.jpg")


def _vizwiz(root: Path) -> None:
    folder = root / "vizwiz"
    names = ("VizWiz_test_1.jpg", "VizWiz_test_0.jpg")
    write_jsonl(folder / "llava_test.jsonl", [short(name, name, "What?") for name in names])
    for name in names:
        write_image(folder / "test" / name)


def _scienceqa(root: Path) -> None:
    folder = root / "scienceqa"

    def asked(text: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}]

    questions = [
        {"id": "4", "image": "4/image.png", "conversations": asked("<image>\nWhich?\nA. x\nB. y")},
        {"id": "7", "conversations": asked("Why?\nA. x\nB. y\nC. z\n")},
    ]
    write_json(folder / "llava_test_CQM-A.json", questions)
    problems = {
        "4": {"choices": ["x", "y"], "answer": 1, "image": "image.png"},
        "7": {"choices": ["x", "y", "z"], "answer": 2, "image": None},
        "9": {"choices": ["x", "y"], "answer": 0, "image": None},
    }
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": ["9"], "test": ["4", "7"]})
    write_image(folder / "images" / "test" / "4" / "image.png")


def _textvqa(root: Path) -> None:
    folder = root / "textvqa"
    # Two questions about one image: the id names only the image.
    questions = (
        ("a", "What brand?", "nike"),
        ("a", "Which year?", "1999"),
        ("b", "What word?", "no"),
    )
    lines = [
        {
            "question_id": image,
            "image": f"{image}.jpg",
            "text": f"{question}\nReference OCR token: {answer}, x\n{SHORT}",
        }
        for image, question, answer in questions
    ]
    write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)
    truth = [
        {"image_id": image, "question": question.upper(), "answers": [answer] * 2 + ["else"] * 8}
        for image, question, answer in questions
    ]
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": truth})
    for image in "ab":
        write_image(folder / "train_images" / f"{image}.jpg")


def _pope(root: Path) -> None:
    folder, number, lines = root / "pope", 0, []
    for category in ("adversarial", "popular", "random"):
        truth = []
        for thing, label in (("dog", "yes"), ("cat", "no")):
            text = f"Is there a {thing} in the image?"
            lines.append(short(number, "v.jpg", text, category=category))
            truth.append({"question_id": 1, "image": "v.jpg", "text": text, "label": label})
            number += 1
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", truth)
    write_jsonl(folder / "llava_pope_test.jsonl", lines)
    write_image(folder / "val2014" / "v.jpg")


def _mme(root: Path) -> None:
    folder, lines = root / "MME" / "MME_Benchmark_release_version", []
    # Flat, and with images and texts apart, as the release has both.
    layouts = {"existence": ("", ""), "artwork": ("images", "questions_answers_YN")}
    for task, (images, texts) in layouts.items():
        for name in ("1", "2"):
            image = "/".join(filter(None, (task, images, f"{name}.png")))
            write_image(folder / image)
            # One annotation has two spaces, as some of the release have.
            pair = [("Is it a cat?", " ", "Yes"), ("Is it a dog?", "  ", "No")]
            file = folder / task / texts / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(
                "".join(f"{q}{gap}Please answer yes or no.\t{a}\n" for q, gap, a in pair)
            )
            lines += [short(f"{task}/{name}.png", image, question) for question, _, _ in pair]
    write_jsonl(root / "MME" / "llava_mme.jsonl", lines)


def mmbench_rows() -> list[dict[str, str]]:
    """Two questions; the first in both rotations, the second with a hint and three options."""
    first = {"question": 'What "is" it?', "hint": "nan", "C": "", "D": "", "l2-category": "x"}
    second = {"question": "Where?", "hint": "Look left.", "C": "=sea", "D": "", "comment": "c"}
    rows = [
        first | {"index": "5", "A": "cat", "B": "dog", "answer": "A"},
        second | {"index": "8", "A": "hill", "B": "town", "answer": "C"},
        first | {"index": "1000005", "A": "dog", "B": "cat", "answer": "B"},
    ]
    common = {"category": "k", "source": "s", "split": "dev"}
    # Longer than csv's default limit for a cell.
    image = base64.b64encode(png(3) + bytes(120_000)).decode()
    return [common | row | {"image": image} for row in rows]


def _mmbench(root: Path) -> None:
    for split in ("mmbench_dev_20230712", "mmbench_dev_cn_20231003"):
        write_tsv(root / "mmbench" / f"{split}.tsv", mmbench_rows())
