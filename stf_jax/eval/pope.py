"""POPE: is there such a thing in the image? Three ways to choose what to ask for."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stf_jax.eval.answers import AnswerRecord, by_id, pair
from stf_jax.eval.benchmark import Benchmark, Credit, Paths, Score
from stf_jax.eval.files import check_kinds, read_jsonl
from stf_jax.eval.questions import read_llava_questions

CATEGORIES = ("random", "popular", "adversarial")
_NO = frozenset(("No", "not", "no"))


def says_yes(text: str) -> bool:
    """Whether the first sentence has no word of denial; every other answer is a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return _NO.isdisjoint(words)


@dataclasses.dataclass(kw_only=True)
class _Counts:
    tp: int = 0
    fp: int = 0
    tn: int = 0
    fn: int = 0

    def add(self, label: bool, said: bool) -> None:
        name = ("t" if said == label else "f") + ("p" if said else "n")
        setattr(self, name, getattr(self, name) + 1)

    def figures(self) -> dict[str, float]:
        tp, fp, tn, fn = self.tp, self.fp, self.tn, self.fn
        # Where nothing is said or asked to be yes, the reference divides by zero.
        precision = tp / (tp + fp) if tp + fp else 0.0
        recall = tp / (tp + fn) if tp + fn else 0.0
        both = precision + recall
        return {
            "tp": tp,
            "fp": fp,
            "tn": tn,
            "fn": fn,
            "accuracy": (tp + tn) / (tp + tn + fp + fn),
            "precision": precision,
            "recall": recall,
            "f1_score": 2 * precision * recall / both if both else 0.0,
            "yes_ratio": (tp + fp) / (tp + tn + fp + fn),
        }


def _labels(paths: Paths) -> dict[str, tuple[str, bool]]:
    """By question id, the category and whether yes is right.

    The question file numbers through all categories and the annotations each on their own, so that
    the two belong together by their order.
    """
    by_category: dict[str, list[dict[str, Any]]] = {category: [] for category in CATEGORIES}
    for line in read_jsonl(paths["questions"], ("question_id", "image", "text", "category")):
        if line["category"] not in by_category:
            raise ValueError(
                f"{paths['questions']}: question {line['question_id']} is of category "
                f"{line['category']!r}; POPE has {', '.join(CATEGORIES)}"
            )
        by_category[line["category"]].append(line)
    labels = {}
    for category, questions in by_category.items():
        path = paths["annotations"] / f"coco_pope_{category}.json"
        truth = read_jsonl(path, ("image", "text", "label"))
        named = [(f"line {number}", truth_line) for number, truth_line in enumerate(truth, start=1)]
        check_kinds(path, named, {"text": str, "label": str})
        _check_same(path, questions, truth)
        for question, truth_line in zip(questions, truth, strict=True):
            labels[str(question["question_id"])] = category, truth_line["label"] != "no"
    return labels


def _check_same(
    path: Path, questions: Sequence[dict[str, Any]], truth: Sequence[dict[str, Any]]
) -> None:
    fix = "take the annotations of POPE's commit e3e39262, which LLaVA's question file belongs to"
    if len(questions) != len(truth):
        raise ValueError(f"{path}: {len(truth)} annotations for {len(questions)} questions; {fix}")
    for number, (question, truth_line) in enumerate(zip(questions, truth, strict=True), start=1):
        if question["image"] != truth_line["image"] or not question["text"].startswith(
            truth_line["text"]
        ):
            raise ValueError(
                f"{path}: annotation {number} is not about question {question['question_id']}; "
                f"{fix}"
            )


def _score(paths: Paths, answers: Sequence[AnswerRecord], answered_only: bool) -> Score:
    labels = _labels(paths)
    paired = pair(list(labels), answers, key=by_id, answered_only=answered_only)
    counts = {category: _Counts() for category in CATEGORIES}
    for key, answer in paired.answers:
        category, label = labels[key]
        counts[category].add(label, says_yes(answer.text))
    for key in paired.missing:
        category, label = labels[key]
        counts[category].add(label, not label)
    # A try-out may not come to every category.
    figures = {name: count.figures() for name, count in counts.items() if count != _Counts()}
    mean = sum(figure["f1_score"] for figure in figures.values()) / len(figures)
    return Score(
        figures={**figures, "mean_f1_score": mean},
        headline=100 * mean,
        questions=len(paired.answers) + len(paired.missing),
        missing=paired.missing,
    )


def _credit(paths: Paths, answers: Sequence[AnswerRecord]) -> list[Credit]:
    labels = _labels(paths)
    found = [(labels[by_id(answer)], says_yes(answer.text)) for answer in answers]
    return [Credit(kind=kind, right=said == label) for (kind, label), said in found]


POPE = Benchmark(
    name="pope",
    title="POPE",
    paths={
        "questions": "pope/llava_pope_test.jsonl",
        "images": "pope/val2014",
        "annotations": "pope/coco",
    },
    to_ask=("questions", "images"),
    to_score=("questions", "annotations"),
    read=read_llava_questions,
    score=_score,
    credit=_credit,
)
