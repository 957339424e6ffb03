"""Asking once, in order, whatever kills the run, and under one protocol."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stf_jax.eval.answers import AnswerRecord, pair
from stf_jax.eval.questions import Decoding, Question, Reply
from stf_jax.eval.registry import BENCHMARKS, get_benchmark
from stf_jax.eval.report import render
from stf_jax.eval.runner import ask, ask_together, prepare, score_file
from tests.stf_jax.eval.miniature import SHORT, Echo

GQA = get_benchmark("gqa")
POPE = get_benchmark("pope")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_interrupted_anywhere(data: Path, tmp_path: Path, name: str) -> None:
    """Nothing is asked twice, and the files are those of a run left alone."""
    prepared = prepare(BENCHMARKS[name], data=data)
    whole = ask(prepared, Echo(), out=tmp_path / "whole")
    for stop in range(len(prepared.questions)):
        out = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            ask(prepared, Echo(stop_after=stop), out=out)
        path = out / "answers.jsonl"
        assert len(path.read_text().splitlines()) == stop
        # As if the kill had come in the middle of a line.
        with path.open("a") as file:
            file.write('{"question_id": 1, "pro')
        rest = Echo()
        result = ask(prepared, rest, out=out)
        assert [one.number for one in rest.asked] == list(range(stop, len(prepared.questions)))
        assert path.read_bytes() == whole.answers.read_bytes()
        assert result.score == whole.score
    again = Echo()
    ask(prepared, again, out=tmp_path / "whole")
    assert again.asked == []


KILLED = """
import os, signal, sys
from pathlib import Path
from stf_jax.eval.registry import get_benchmark
from stf_jax.eval.runner import ask, prepare
from tests.stf_jax.eval.miniature import SHORT, Echo

class Killed(Echo):
    def answer(self, questions, decoding):
        for number, reply in enumerate(super().answer(questions, decoding)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield reply

data, out = map(Path, sys.argv[1:])
ask(prepare(get_benchmark("pope"), data=data), Killed(), out=out)
"""


def test_sigkill(data: Path, tmp_path: Path) -> None:
    whole = ask(prepare(POPE, data=data), Echo(), out=tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(data), str(out)]
    codes = [subprocess.run(command, check=False, cwd=os.getcwd()).returncode for _ in range(2)]
    assert codes == [-signal.SIGKILL] * 2
    assert not (out / "scores.json").exists()
    rest = Echo()
    result = ask(prepare(POPE, data=data), rest, out=out)
    assert [one.number for one in rest.asked] == [4, 5]
    assert result.answers.read_bytes() == whole.answers.read_bytes()


def test_two_runs_at_once(data: Path, tmp_path: Path) -> None:
    """The second is refused, and does the first no harm."""
    prepared = prepare(POPE, data=data)
    whole = ask(prepared, Echo(), out=tmp_path / "whole")
    out, second = tmp_path / "out", Echo()

    class First(Echo):
        def answer(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[Reply]:
            for number, reply in enumerate(super().answer(questions, decoding)):
                if number == 2:
                    with pytest.raises(ValueError, match="another run is writing it; wait"):
                        ask(prepared, second, out=out)
                yield reply

    assert ask(prepared, First(), out=out).answers.read_bytes() == whole.answers.read_bytes()
    assert second.asked == []


def test_limit_then_all(data: Path, tmp_path: Path) -> None:
    tried = ask(prepare(POPE, data=data, limit=2), Echo(), out=tmp_path)
    assert (tried.limit, tried.score.questions, tried.score.missing) == (2, 2, ())
    assert list(tried.score.figures) == ["adversarial", "mean_f1_score"]
    assert "a try-out over 2 questions, no score to quote" in render([tried])
    rest = Echo()
    done = ask(prepare(POPE, data=data), rest, out=tmp_path)
    assert len(rest.asked) == 4
    # Yes to everything: a precision of a half and a recall of one.
    assert done.score.headline == pytest.approx(200 / 3)
    assert ask(prepare(POPE, data=data, limit=2), Echo(), out=tmp_path).score == tried.score
    with pytest.raises(ValueError, match="the limit is 0"):
        prepare(POPE, data=data, limit=0)
    with pytest.raises(ValueError, match="the limit is -1"):
        score_file(POPE, done.answers, data=data, limit=-1)


def test_no_submission_of_a_part(data: Path, tmp_path: Path) -> None:
    result = ask(prepare(get_benchmark("vizwiz"), data=data, limit=1), Echo(), out=tmp_path)
    assert result.submission is None
    names = ["answers.jsonl", "eval", "protocol.json", "scores.first-1.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_a_try_out_leaves_the_scores_of_all_alone(data: Path, tmp_path: Path) -> None:
    """Asked or scored from a file, its own are beside them, a file for each limit."""
    whole = ask(prepare(POPE, data=data), Echo(), out=tmp_path)
    scores = (tmp_path / "scores.json").read_bytes()
    tried = ask(prepare(POPE, data=data, limit=2), Echo(), out=tmp_path)
    again = score_file(POPE, whole.answers, data=data, out=tmp_path, limit=4)
    assert (tmp_path / "scores.json").read_bytes() == scores
    for result in (tried, again):
        stored = json.loads((tmp_path / f"scores.first-{result.limit}.json").read_text())
        assert stored == json.loads(json.dumps(result.to_json()))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_answers_are_named_and_wrong(data: Path, tmp_path: Path, name: str) -> None:
    benchmark = BENCHMARKS[name]
    whole = ask(prepare(benchmark, data=data), Echo(), out=tmp_path / "whole")
    kept = whole.answers.read_text().splitlines(keepends=True)[:-1]
    path = tmp_path / "part.jsonl"
    path.write_text("".join(kept))
    result = score_file(benchmark, path, data=data, out=tmp_path / "part")
    (missing,) = result.score.missing
    assert result.score.questions == whole.score.questions
    assert result.submission is None
    assert f"{name}: 1 of {whole.score.questions} questions have no answer" in render([result])
    assert missing in render([result])
    stored = json.loads((tmp_path / "part" / "scores.json").read_text())
    assert stored["missing"] == {"count": 1, "questions": [missing]}


def test_protocol_is_stored_beside_the_score(data: Path, tmp_path: Path) -> None:
    result = ask(prepare(POPE, data=data), Echo(), out=tmp_path)
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert stored == json.loads(json.dumps(result.to_json()))
    protocol = stored["protocol"]
    assert protocol == json.loads((tmp_path / "protocol.json").read_text())
    assert protocol["template"] == "v1"
    prompt = f"USER: <image>\nIs there a dog in the image?\n{SHORT} ASSISTANT:"
    assert protocol["first_prompt"].endswith(prompt)
    assert protocol["decoding"] == {"method": "greedy", "max_new_tokens": 128}
    assert protocol["model"] == {"model_id": "echo", "image_mode": "pad"}
    assert len(protocol["files"]["questions"]["sha256"]) == 64
    assert {"stf-jax", "jax", "transformers", "python"} <= set(protocol["versions"])
    assert set(stored["files"]) == {"answers", "questions", "annotations"}


def test_an_answer_file_that_came_without_protocol(data: Path, tmp_path: Path) -> None:
    whole = ask(prepare(POPE, data=data), Echo(), out=tmp_path / "whole")
    bare = tmp_path / "merge.jsonl"
    bare.write_bytes(whole.answers.read_bytes())
    result = score_file(POPE, bare, data=data)
    assert result.protocol is None
    assert result.score == whole.score
    assert score_file(POPE, whole.answers, data=data).protocol == whole.protocol


def test_another_protocol(data: Path, tmp_path: Path) -> None:
    ask(prepare(POPE, data=data, limit=1), Echo(), out=tmp_path)
    other = Echo()
    other.model_id = "other"
    with pytest.raises(ValueError, match=r"model\.model_id 'echo', now 'other'.*another --out"):
        ask(prepare(POPE, data=data), other, out=tmp_path)
    path = data / "pope" / "llava_pope_test.jsonl"
    path.write_text(path.read_text().replace("single word", "word"))
    with pytest.raises(ValueError, match=r"files\.questions\.sha256"):
        ask(prepare(POPE, data=data), Echo(), out=tmp_path)


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.part-0.jsonl"])
def test_answers_without_protocol(data: Path, tmp_path: Path, name: str) -> None:
    """Nobody's answers are gone on with as this model's."""
    done = ask(prepare(POPE, data=data, limit=1), Echo(), out=tmp_path / "done")
    (tmp_path / name).write_bytes(done.answers.read_bytes())
    with pytest.raises(ValueError, match=f"{name}: there is no protocol.json .* --answers"):
        ask(prepare(POPE, data=data), Echo(), out=tmp_path)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [name]


def test_answers_of_another_benchmark(data: Path, tmp_path: Path) -> None:
    other = ask(prepare(get_benchmark("vqav2"), data=data), Echo(), out=tmp_path / "vqav2")
    with pytest.raises(ValueError, match=r"3 of 3 answers are to no question .*20, 10, 40"):
        score_file(GQA, other.answers, data=data)
    out = tmp_path / "gqa"
    ask(prepare(GQA, data=data, limit=1), Echo(), out=out)
    (out / "answers.jsonl").write_bytes(other.answers.read_bytes())
    with pytest.raises(ValueError, match=r"line 1 \(question 20\) does not answer question 1"):
        ask(prepare(GQA, data=data), Echo(), out=out)


class Backwards(Echo):
    """Replies from the last question to the first."""

    def answer(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[Reply]:
        return super().answer(questions[::-1], decoding)


@pytest.mark.parametrize("name", ["gqa", "mme"])
def test_replies_in_another_order(data: Path, tmp_path: Path, name: str) -> None:
    """Killed anywhere, in the middle of a line: nothing is asked twice, the file is the same."""
    prepared = prepare(BENCHMARKS[name], data=data)
    whole = ask(prepared, Echo(), out=tmp_path / "whole")
    for stop in range(1, len(prepared.questions)):
        out = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            ask(prepared, Backwards(stop_after=stop), out=out)
        with (out / "answers.part-0.jsonl").open("a") as file:
            file.write("[0, ")
        rest = Echo()
        result = ask(prepared, rest, out=out)
        assert [one.number for one in rest.asked] == list(range(len(prepared.questions) - stop))
        assert result.answers.read_bytes() == whole.answers.read_bytes()
        assert {file.name for file in out.iterdir()} == {
            file.name for file in (tmp_path / "whole").iterdir()
        }


def test_a_try_out_keeps_what_came_early(data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(prepare(POPE, data=data), Backwards(stop_after=4), out=tmp_path)
    ask(prepare(POPE, data=data, limit=1), Echo(), out=tmp_path)
    rest = Echo()
    ask(prepare(POPE, data=data), rest, out=tmp_path)
    assert [one.number for one in rest.asked] == [1]
    assert not list(tmp_path.glob("answers.part-*"))


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_reply_that_nobody_asked_for(data: Path, tmp_path: Path, number: int) -> None:
    class Wrong(Echo):
        def answer(self, questions: Any, decoding: Any) -> Any:
            yield Reply(number=0, text="Yes")
            yield Reply(number=number, text="Yes")

    with pytest.raises(ValueError, match=f"to question {number}, which was not asked"):
        ask(prepare(GQA, data=data), Wrong(), out=tmp_path)


class Together:
    """One of several hosts, each in a thread."""

    def __init__(self, number: int, said: list[Any], barrier: threading.Barrier):
        self.number, self.count = number, len(said)
        self._said, self._barrier = said, barrier

    def gather(self, message: Any) -> list[Any]:
        self._said[self.number] = json.loads(json.dumps(message))
        self._barrier.wait()
        said = list(self._said)
        self._barrier.wait()
        return said


@pytest.mark.parametrize("shared", [True, False])
def test_several_hosts(data: Path, tmp_path: Path, shared: bool) -> None:
    """Each image's questions on one host; stopped, they continue, with fewer hosts if need be."""
    prepared = prepare(get_benchmark("mme"), data=data)
    whole = ask(prepared, Echo(), out=tmp_path / "whole")

    def run(hosts: int, stop_after: int | None) -> tuple[list[Echo], list[Any]]:
        said, barrier = [None] * hosts, threading.Barrier(hosts, timeout=20)
        echoes = [Backwards(stop_after=stop_after) for _ in range(hosts)]

        def one(number: int) -> Any:
            out = tmp_path / ("out" if shared else f"out{number}")
            together = Together(number, said, barrier)
            try:
                return ask_together(prepared, echoes[number], out=out, hosts=together)
            except KeyboardInterrupt:
                return None

        with ThreadPoolExecutor(hosts) as threads:
            return echoes, list(threads.map(one, range(hosts)))

    asked = [one.number for echo in run(3, 1)[0] for one in echo.asked[:1]]
    assert len(set(asked)) == 3
    echoes, results = run(2 if shared else 3, None)
    numbers = [one.number for echo in echoes for one in echo.asked]
    assert sorted(numbers + asked) == list(range(len(prepared.questions)))
    assert results[0].score == whole.score
    assert results[1:] == [None] * (len(results) - 1)
    assert results[0].answers.read_bytes() == whole.answers.read_bytes()
    assert not list(tmp_path.rglob("answers.part-*"))


def test_another_model_s_replies_on_a_host(data: Path, tmp_path: Path) -> None:
    """Its folder has no protocol beside them; all hosts hear of it, none waits for another."""
    prepared = prepare(get_benchmark("mme"), data=data)
    said, barrier = [None] * 2, threading.Barrier(2, timeout=20)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "answers.part-1.jsonl").write_text('[2, "Yes", "other"]\n')

    def one(number: int) -> str:
        hosts = Together(number, said, barrier)
        with pytest.raises(ValueError, match="were given under another protocol") as caught:
            ask_together(prepared, Echo(), out=tmp_path / str(number), hosts=hosts)
        return str(caught.value)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(one, range(2))
    assert first == second
    assert str(tmp_path / "1" / "answers.part-1.jsonl") in first


def test_unknown_benchmark() -> None:
    with pytest.raises(ValueError, match="unknown benchmark 'vqa': choose one of vqav2, gqa"):
        get_benchmark("vqa")


@given(st.lists(st.integers(0, 5)), st.data())
def test_pairing_loses_nothing(expected: list[int], draw: Any) -> None:
    """Answers and missing together are what was expected, however often each was."""
    chosen = draw.draw(st.permutations(expected))[: draw.draw(st.integers(0, len(expected)))]
    answers = [AnswerRecord(question_id=one, prompt="", text="") for one in chosen]
    paired = pair(expected, answers, key=lambda answer: answer.question_id)
    assert sorted([*chosen, *paired.missing]) == sorted(expected)
    assert [key for key, _ in paired.answers] == chosen
