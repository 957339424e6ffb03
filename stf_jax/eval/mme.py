"""MME: two yes-or-no questions about each image, fourteen tasks."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stf_jax.eval.answers import AnswerRecord, pair
from stf_jax.eval.benchmark import Benchmark, Paths, Score
from stf_jax.eval.questions import read_llava_questions
from stf_jax.util.files import read_text, write_text

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
# What LLaVA's question file and the annotations end a question with, each in its own way.
_ENDINGS = re.compile(
    r"Answer the question using a single word or phrase\.|Please answer yes or no\."
)


class _Key(NamedTuple):
    task: str
    file: str
    question: str

    def __str__(self) -> str:
        return f"{self.task}/{self.file}: {self.question}"


class _Truth(NamedTuple):
    question: str
    answer: str


def _bare(question: str) -> str:
    return " ".join(_ENDINGS.sub("", question).split())


def _key(answer: AnswerRecord) -> _Key:
    parts = str(answer.question_id).split("/")
    return _Key(parts[0], parts[-1].split(".")[0] + ".txt", _bare(answer.prompt))


def _truth(paths: Paths) -> dict[_Key, list[_Truth]]:
    """Every annotated question, in the order of the files; several if one is asked repeatedly."""
    folder, truth = paths["images"], defaultdict(list)
    for task in (*PERCEPTION, *COGNITION):
        texts = folder / task / "questions_answers_YN"
        for file in sorted((texts if texts.is_dir() else folder / task).glob("*.txt")):
            for number, line in enumerate(read_text(file).strip().split("\n"), start=1):
                question, tab, answer = line.strip().partition("\t")
                if not tab or answer.lower() not in ("yes", "no"):
                    raise ValueError(
                        f"{file}: line {number} is not a question, a tab, and Yes or No; fetch "
                        "MME_Benchmark_release_version again"
                    )
                key = _Key(task, file.name, _bare(question))
                truth[key].append(_Truth(question, answer))
    if not truth:
        raise ValueError(
            f"{folder}: holds no tasks with question texts; give MME_Benchmark_release_version "
            "with --path images=DIR"
        )
    return truth


def says(text: str) -> str:
    """What the first four characters hold: "yes", "no" or "other"."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def _score(paths: Paths, answers: Sequence[AnswerRecord], answered_only: bool) -> Score:
    truth = _truth(paths)
    expected = [key for key, several in truth.items() for _ in several]
    paired = pair(expected, answers, key=_key, answered_only=answered_only)
    # For each task and image, whether each of its questions is answered rightly.
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for key in paired.missing:
        right[key.task][key.file].append(False)
    for key, answer in paired.answers:
        correct = says(answer.text) == truth[key][0].answer.lower()
        right[key.task][key.file].append(correct)
    tasks = {}
    for task in filter(right.get, (*PERCEPTION, *COGNITION)):
        images = list(right[task].values())
        single = [answer for image in images for answer in image]
        accuracy = sum(single) / len(single)
        # Both questions; in a try-out the second may not have been asked.
        accuracy_plus = sum(len(hits) > 1 and all(hits) for hits in images) / len(images)
        tasks[task] = {
            "accuracy": accuracy,
            "accuracy_plus": accuracy_plus,
            "score": 100 * accuracy + 100 * accuracy_plus,
        }
    perception, cognition = (
        sum(tasks[task]["score"] for task in group if task in tasks)
        for group in (PERCEPTION, COGNITION)
    )
    return Score(
        figures={"perception": perception, "cognition": cognition, "tasks": tasks},
        headline=perception,
        questions=len(paired.answers) + len(paired.missing),
        missing=tuple(map(str, paired.missing)),
    )


def _submit(paths: Paths, answers: Sequence[AnswerRecord], folder: Path) -> Path:
    """What MME's own script takes: a text a task, each line image, question, truth, answer."""
    truth, lines = _truth(paths), defaultdict(list)
    for answer in answers:
        key = _key(answer)
        # A tab or a newline of the model's would make the script see other columns.
        said = " ".join(answer.text.split())
        lines[key.task].append("\t".join((key.file, *truth[key][0], said)) + "\n")
    out = folder / "mme_results"
    out.mkdir(exist_ok=True)
    for task, content in lines.items():
        write_text(out / f"{task}.txt", "".join(content))
    return out


MME = Benchmark(
    name="mme",
    title="MME-P",
    paths={
        "questions": "MME/llava_mme.jsonl",
        "images": "MME/MME_Benchmark_release_version",
    },
    to_ask=("questions", "images"),
    to_score=("images",),
    read=read_llava_questions,
    score=_score,
    submit=_submit,
)
