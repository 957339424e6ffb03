"""What every benchmark is made of: files, questions, a score, a submission."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stf_jax.eval.answers import AnswerRecord, by_id, pair
from stf_jax.eval.files import read_jsonl
from stf_jax.eval.questions import Decoding, Question
from stf_jax.util.files import name_some

# By role ("questions", "images", "annotations", ...).
Paths = Mapping[str, Path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a benchmark's answers.

    Attributes:
      figures: everything that the reference's script prints, by name.
      headline: the figure that papers quote, in their unit (per cent, points); None where only a
        server knows it.
      questions: how many answers the figures stand on; a missing one counts as wrong and is here.
      missing: names of the questions that have no answer.
      note: what a reader of the headline must know; empty if nothing.
    """

    figures: Mapping[str, Any]
    headline: float | None
    questions: int
    missing: tuple[str, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credit:
    """What one answer counts.

    Attributes:
      kind: of its question; empty where the benchmark has none.
      right: from 0 to 1.
    """

    right: float
    kind: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark: its files, questions, score and submission.

    Attributes:
      follows: whose prompts and figures these are.
      name: on the command line, and of its folder of results.
      title: as papers write it, with the figure that they quote.
      paths: by role, where LLaVA's instructions put each official file or folder, under the data
        folder.
      to_ask: roles needed to put the questions.
      to_score: roles needed to score or submit existing answers.
      decoding: how the reference puts and answers its questions.
      read: the questions.
      score: (paths, answers, answered_only) to a score.
      submit: (paths, answers, folder) writes what the server or the official script takes and
        returns it; None where they take the answer file itself. Every question has an answer.
      credit: (paths, answers) to what each answer counts, in their order; None where an answer
        counts nothing by itself, or only a server knows.
    """

    name: str
    title: str
    follows: str = "LLaVA-1.5's own evaluation scripts, as LLaVA-STF runs them"
    paths: Mapping[str, str]
    to_ask: tuple[str, ...]
    to_score: tuple[str, ...]
    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    read: Callable[[Paths], list[Question]]
    score: Callable[[Paths, Sequence[AnswerRecord], bool], Score]
    submit: Callable[[Paths, Sequence[AnswerRecord], Path], Path] | None = None
    credit: Callable[[Paths, Sequence[AnswerRecord]], list[Credit]] | None = None

    def locate(self, data: Path | None, given: Mapping[str, Path] | None = None) -> dict[str, Path]:
        """Every role's path: as given, else under `data`.

        Raises:
          ValueError: a role that this benchmark has not, or one without any path.
        """
        given = given or {}
        if strange := [role for role in given if role not in self.paths]:
            raise ValueError(
                f"{self.name} has no file {', '.join(map(repr, strange))}; it has "
                f"{', '.join(map(repr, self.paths))}"
            )
        if data is None:
            return dict(given)
        return {role: given.get(role, data / place) for role, place in self.paths.items()}


def score_on_server(paths: Paths, answers: Sequence[AnswerRecord], answered_only: bool) -> Score:
    """A score without figures, since only the server knows the truth; lists what has no answer."""
    path = paths["questions"]
    ids = [str(line["question_id"]) for line in read_jsonl(path, ("question_id",))]
    # The server takes an answer for each id.
    if twice := [id_ for id_, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"{path}: has {name_some(twice)} more than once; fetch it again")
    paired = pair(ids, answers, key=by_id, answered_only=answered_only)
    return Score(
        figures={},
        headline=None,
        questions=len(paired.answers) + len(paired.missing),
        missing=paired.missing,
    )
