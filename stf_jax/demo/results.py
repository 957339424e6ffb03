"""The results of a run: every number of the report, as `results.json` stores it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stf_jax.demo.evaluation import Cost, Score
from stf_jax.util.files import write_json

BASELINE, CLAIM = "average", "stf_mbtf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantResult:
    """The results of one variant.

    Attributes:
        name: of its folder.
        title: in tables and plots.
        scores: by kind of question, and "all".
        cost: of a question before the first token of its answer.
        stages: of each stage, the records of its `metrics.jsonl`.
        answers: to the held-out questions, in their order.
    """

    name: str
    title: str
    scores: Mapping[str, Score]
    cost: Cost
    stages: Sequence[Sequence[Mapping[str, Any]]]
    answers: Sequence[str]

    @property
    def training_seconds(self) -> float:
        """Seconds of all steps of both stages."""
        return sum(record["seconds"] for stage in self.stages for record in stage)

    def to_json(self) -> dict[str, Any]:
        """The results as JSON, without the content of `metrics.jsonl` and `answers.json`."""
        return {
            "title": self.title,
            "scores": {kind: score.to_json() for kind, score in self.scores.items()},
            "cost": dataclasses.asdict(self.cost),
            "training_seconds": self.training_seconds,
            "last_losses": [stage[-1]["loss"] for stage in self.stages],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """All variants of a run."""

    settings: Mapping[str, Any]
    variants: Sequence[VariantResult]

    @property
    def best(self) -> VariantResult:
        """The variant with the most right answers."""
        return max(self.variants, key=lambda variant: variant.scores["all"].right)

    def variant(self, name: str) -> VariantResult:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def verdict(self) -> str:
        """A sentence that compares the variant of the claim with its baseline."""
        claim, baseline = self.variant(CLAIM), self.variant(BASELINE)
        ours, theirs = claim.scores["all"], baseline.scores["all"]
        gap = 100 * (ours.accuracy - theirs.accuracy)
        if ours.interval[0] > theirs.interval[1]:
            judged = f"{gap:.1f} points more, and the intervals lie apart"
        elif ours.interval[1] < theirs.interval[0]:
            judged = f"{-gap:.1f} points fewer, and the intervals lie apart"
        else:
            judged = f"a difference of {gap:+.1f} points, within the intervals: nothing is shown"
        return (
            f"With {claim.cost.vision_tokens} tokens an image each, {claim.title} answers "
            f"{100 * ours.accuracy:.1f} % and {baseline.title} {100 * theirs.accuracy:.1f} % of "
            f"{ours.questions:,} held-out questions: {judged}."
        )

    def save(self, path: Path) -> None:
        """Writes `results.json`."""
        content = {
            "verdict": self.verdict,
            "settings": dict(self.settings),
            "variants": {variant.name: variant.to_json() for variant in self.variants},
        }
        write_json(path, content, indent=1)
