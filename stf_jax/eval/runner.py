"""A benchmark from its official files to a score: ask, record, submit, score."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stf_jax.eval import protocol
from stf_jax.eval.answers import AnswerRecord, read_answers
from stf_jax.eval.benchmark import Benchmark, Score
from stf_jax.eval.files import check_there
from stf_jax.eval.hosts import Alone, Hosts
from stf_jax.eval.journal import AnswerLog, share
from stf_jax.eval.questions import Answerer, Question, check_markers, missing_files
from stf_jax.util.files import name_some, write_json

ANSWERS = "answers.jsonl"
SCORES = "scores.json"
TRY_OUT_SCORES = "scores.first-{}.json"

# Of `stf-jax eval`, which gives what lies elsewhere.
PATH_OPTION = "--path"

_NAMED = 20

# Called with (questions answered, of how many).
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A benchmark's outcome.

    Attributes:
      benchmark: its name.
      score: figures, and what has no answer.
      limit: only so many questions were asked; None for all.
      answers: the answer file.
      submission: for a server or an official script; None where there is none to write, or an
        answer is missing, or only some questions were asked.
      protocol: of the answers; None for an answer file that came without.
      files: name and SHA-256 of the answer file and of the files scored against.
    """

    benchmark: str
    score: Score
    limit: int | None
    answers: Path
    submission: Path | None
    protocol: Mapping[str, Any] | None
    files: Mapping[str, Mapping[str, str]]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "benchmark": self.benchmark,
            "headline": self.score.headline,
            "figures": dict(self.score.figures),
            "note": self.score.note,
            "questions": self.score.questions,
            "missing": {"count": len(self.score.missing), "questions": list(self.score.missing)},
            "limit": self.limit,
            "answers": str(self.answers),
            "submission": None if self.submission is None else str(self.submission),
            "protocol": self.protocol,
            "files": self.files,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A benchmark whose files have all been found, ready to be asked."""

    benchmark: Benchmark
    paths: Mapping[str, Path]
    questions: Sequence[Question]
    limit: int | None


def prepare(
    benchmark: Benchmark,
    *,
    data: Path | None,
    paths: Mapping[str, Path] | None = None,
    limit: int | None = None,
    option: str | None = PATH_OPTION,
) -> Prepared:
    """Reads the questions and looks for every file that asking and scoring will need.

    Args:
      benchmark: of `registry.BENCHMARKS`.
      data: the folder in which LLaVA's instructions lay out the benchmarks.
      paths: by role, what lies elsewhere.
      limit: ask only the first so many.
      option: with which the caller's user gives `paths`; None where nobody can.

    Raises:
      ValueError: files or images that are not there, lack fields, or do not fit one another.
    """
    _check_limit(limit)
    roles = (*benchmark.to_ask, *benchmark.to_score)
    located = _locate(benchmark, roles, data, paths, option=option)
    questions = benchmark.read(located)
    check_markers(located["questions"], questions)
    if lost := missing_files(questions[:limit]):
        kind = "images" if "images" in benchmark.paths else "videos"
        elsewhere = f", or give their folder with {option} {kind}=DIR" if option else ""
        raise ValueError(
            f"{benchmark.name}: {len(lost)} {kind} are not there "
            f"({name_some(lost, most=_NAMED)}); fetch them{elsewhere}"
        )
    _check_truth(benchmark, located, questions)
    return Prepared(benchmark=benchmark, paths=located, questions=questions, limit=limit)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"the limit is {limit}; give 1 or more, or none")


def _check_truth(
    benchmark: Benchmark, paths: Mapping[str, Path], questions: Sequence[Question]
) -> None:
    """Scores empty answers, so that files that do not fit are found before hours of asking."""
    empty = [
        AnswerRecord(question_id=question.question_id, prompt=question.text, text="")
        for question in questions
    ]
    try:
        benchmark.score(paths, empty, True)
    except ValueError as error:
        raise ValueError(f"{benchmark.name} cannot be scored with these files: {error}") from error


def _locate(
    benchmark: Benchmark,
    roles: Sequence[str],
    data: Path | None,
    given: Mapping[str, Path] | None,
    *,
    option: str | None = PATH_OPTION,
) -> dict[str, Path]:
    paths = benchmark.locate(data, given)
    if lost := [role for role in dict.fromkeys(roles) if role not in paths]:
        raise ValueError(
            f"{benchmark.name}: where are {', '.join(lost)}? give the data folder with --data, or "
            f"each with {PATH_OPTION} {lost[0]}=PATH"
        )
    needed = {role: paths[role] for role in dict.fromkeys(roles)}
    check_there(needed, option=option)
    return needed


def ask(
    prepared: Prepared, answerer: Answerer, *, out: Path, progress: Progress | None = None
) -> Result:
    """Asks what `out` does not answer yet, then scores.

    Answers are kept as they come and end up in the order of the questions; after a kill, the same
    call continues where it stopped, and the answer file ends up the same.

    Args:
      prepared: by `prepare`.
      answerer: the model.
      out: a folder for `answers.jsonl`, `protocol.json`, `scores.json` (of a limit of N
        `scores.first-N.json`) and the submission.
      progress: called after each answer.

    Raises:
      ValueError: `out` holds answers to other questions or under another protocol; a question
        longer than the context; an image that cannot be read.
    """
    result = ask_together(prepared, answerer, out=out, progress=progress, hosts=Alone())
    assert result is not None
    return result


def ask_together(
    prepared: Prepared,
    answerer: Answerer,
    *,
    out: Path,
    progress: Progress | None = None,
    hosts: Hosts,
) -> Result | None:
    """`ask` with several hosts, each of which calls this and takes its share of the images.

    `out` may be one folder for all or one on each host. Progress is that of the host's share. Only
    host 0 has a result in the end.
    """
    benchmark, path = prepared.benchmark, out / ANSWERS
    out.mkdir(parents=True, exist_ok=True)
    mark = ""
    if hosts.number == 0:
        first = prepared.questions[0]
        described = protocol.describe(benchmark, prepared.paths, first, answerer)
        protocol.settle(out, described)
        mark = protocol.mark(described)
    own = share(prepared.questions[: prepared.limit], hosts)
    questions, model_id = prepared.questions, answerer.model_id
    with AnswerLog(path, questions, model_id=model_id, hosts=hosts, mark=mark) as log:
        rest = [question for question in own if not log.is_answered(question)]
        done = len(own) - len(rest)
        if progress:
            progress(done, len(own))
        if rest:
            for reply in answerer.answer(rest, benchmark.decoding):
                log.add(reply)
                done += 1
                if progress:
                    progress(done, len(own))
        log.finish()
    if hosts.number:
        return None
    return _finish(benchmark, prepared.paths, path, out=out, limit=prepared.limit)


def score_file(
    benchmark: Benchmark,
    answers: Path,
    *,
    data: Path | None,
    paths: Mapping[str, Path] | None = None,
    out: Path | None = None,
    limit: int | None = None,
) -> Result:
    """Scores an existing answer file, ours or the reference's, without a model.

    Args:
      benchmark: of `registry.BENCHMARKS`.
      answers: the jsonl.
      data: as for `prepare`; images are not needed.
      paths: by role, what lies elsewhere.
      out: a folder for the scores, named as by `ask`, and the submission; none are written by
        default.
      limit: take only the first so many answers, and call nothing missing.

    Raises:
      ValueError: files that are not there or not official, answers to other questions.
    """
    _check_limit(limit)
    located = _locate(benchmark, benchmark.to_score, data, paths)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    return _finish(benchmark, located, answers, out=out, limit=limit)


def _finish(
    benchmark: Benchmark,
    paths: Mapping[str, Path],
    path: Path,
    *,
    out: Path | None,
    limit: int | None,
) -> Result:
    answers = read_answers(path)[:limit]
    score = benchmark.score(paths, answers, limit is not None)
    submission = None
    if out is not None and benchmark.submit and limit is None and not score.missing:
        submission = benchmark.submit(paths, answers, out)
    scored = {role: paths[role] for role in benchmark.to_score}
    result = Result(
        benchmark=benchmark.name,
        score=score,
        limit=limit,
        answers=path,
        submission=submission,
        protocol=protocol.read_protocol(path),
        files=protocol.hashes({"answers": path, **scored}),
    )
    if out is not None:
        # A try-out leaves the scores of all questions alone.
        name = SCORES if limit is None else TRY_OUT_SCORES.format(limit)
        write_json(out / name, result.to_json(), indent=2)
    return result
