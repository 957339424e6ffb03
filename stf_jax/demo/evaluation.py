"""The answers of a trained variant about held-out scenes, and the cost of an answer."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stf_jax.demo.corpus import IMAGES, HeldOut
from stf_jax.demo.scenes import KINDS
from stf_jax.eval.intervals import wilson
from stf_jax.infer.load import load
from stf_jax.infer.model import Model, Request
from stf_jax.models import flops
from stf_jax.util.files import read_json, write_json

BATCH = 100
LONGEST_ANSWER = 6  # tokens: two colors, two digits, a comma and the end of sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Exact matches among questions, with Wilson's 95 % interval (Wilson 1927)."""

    right: int
    questions: int

    @property
    def accuracy(self) -> float:
        """The share of right answers, from 0 to 1."""
        return self.right / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the interval."""
        return wilson(self.right, self.questions)

    def to_json(self) -> dict[str, Any]:
        """With the share and its interval."""
        return dataclasses.asdict(self) | {"accuracy": self.accuracy, "interval": self.interval}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one image and one question, up to the first token of the answer.

    Attributes:
        vision_tokens: of the image.
        prompt_tokens: of the longest question, image included.
        language_flops: of the language model alone, which is where fewer tokens save.
        total_flops: with tower, connector and projector.
        seconds: of all of it, a question: of a batch, the median of several times.
    """

    vision_tokens: int
    prompt_tokens: int
    language_flops: float
    total_flops: float
    seconds: float


def answer_all(
    model: Path,
    questions: Sequence[HeldOut],
    corpus: Path,
    out: Path,
    progress: Callable[[int, int], None],
) -> list[str]:
    """The greedy answer to each question; `out` keeps them, so that they are generated once."""
    if not out.is_file():
        loaded = load(model, dtype="float32")
        answers: list[str] = []
        for start in range(0, len(questions), BATCH):
            answers += [
                answer.text
                for answer in loaded.generate(
                    requests(questions[start : start + BATCH], corpus),
                    max_new_tokens=LONGEST_ANSWER,
                )
            ]
            progress(len(answers), len(questions))
        content = {"answers": answers, "cost": dataclasses.asdict(_cost(loaded, questions, corpus))}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, content, indent=1)
    return list(read_json(out)["answers"])


def read_cost(out: Path) -> Cost:
    """The cost that `answer_all` measured."""
    return Cost(**read_json(out)["cost"])


def requests(questions: Sequence[HeldOut], corpus: Path) -> list[Request]:
    """The questions as requests to a model."""
    return [
        Request(prompt=item.question.text, images=[corpus / IMAGES / item.image])
        for item in questions
    ]


def scores(questions: Sequence[HeldOut], answers: Sequence[str]) -> dict[str, Score]:
    """The score of each kind of question, and of "all" questions."""
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for item, answer in zip(questions, answers, strict=True):
        right[item.question.kind].append(answer == item.question.answer)
    right["all"] = [hit for hits in right.values() for hit in hits]
    return {kind: Score(right=sum(hits), questions=len(hits)) for kind, hits in right.items()}


def _cost(model: Model, questions: Sequence[HeldOut], corpus: Path) -> Cost:
    batch = requests(questions[:BATCH], corpus)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        answers = model.generate(batch, max_new_tokens=1)
        seconds.append(time.perf_counter() - start)
    length = max(answer.prompt_tokens for answer in answers)
    work = flops.forward(model.config, rows=1, length=length, images=1)
    return Cost(
        vision_tokens=model.config.tokens_per_image,
        prompt_tokens=length,
        language_flops=work.text,
        total_flops=work.total,
        # The first one compiles.
        seconds=float(np.median(seconds[1:])) / len(batch),
    )
