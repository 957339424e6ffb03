"""Replies on their way into the answer file: they come in any order and on any host."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from stf_jax.eval.answers import answer_line, count_answers
from stf_jax.eval.hosts import Hosts
from stf_jax.eval.questions import Question, Reply
from stf_jax.util.files import MOST_TEXT, check_file, explain_file, read_bytes, read_jsonl

_PART = re.compile(r"answers\.part-(\d+)\.jsonl")


class AnswerLog:
    """The answer file, in the order of the questions, and beside it what came too early for it.

    Host 0 writes the file. A reply that is not yet due there, and every reply of another host, goes
    to that host's own `answers.part-N.jsonl`, until all are answered. Nothing is lost with a kill.

    Args:
      path: the answer file.
      questions: all of the benchmark's.
      model_id: goes into every line.
      hosts: each has a log; opening and finishing wait for all of them.
      mark: host 0's, of the protocol. It goes with every early reply: a host's own folder has no
        other sign of what its replies were given under.

    Raises:
      ValueError: the file holds answers to other questions, a host early replies under another
        protocol, or another run is writing.
    """

    def __init__(
        self,
        path: Path,
        questions: Sequence[Question],
        *,
        model_id: str,
        hosts: Hosts,
        mark: str,
    ):
        self._path, self._questions = path, questions
        self._model_id, self._hosts = model_id, hosts
        with contextlib.ExitStack() as files:
            # Before anything there is fixed or taken for left behind.
            self._file = files.enter_context(_lock(path)) if hosts.number == 0 else None
            self._written = count_answers(path, questions) if hosts.number == 0 else 0
            own = [(str(part), *line) for part in self._parts() for line in _read(part)]
            said = hosts.gather([self._written, mark, own])
            self._mark = said[0][1]
            for _, _, lines in said:
                strange = [part for part, *line in lines if line[2:] != [self._mark]]
                if strange:
                    raise ValueError(
                        f"{strange[0]}: the replies there were given under another protocol; give "
                        "another --out, or delete that file on its host"
                    )
            self._files = files.pop_all()
        self._written = said[0][0]
        self._early = {number: text for _, _, lines in said for _, number, text, _ in lines}

    def __enter__(self) -> Self:
        part = self._path.with_name(f"answers.part-{self._hosts.number}.jsonl")
        self._part = self._files.enter_context(part.open("a", encoding="utf-8"))
        self._write_due()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._files.close()
        for part in self._parts():
            if not part.stat().st_size:
                part.unlink()

    def is_answered(self, question: Question) -> bool:
        """Whether a question has an answer already."""
        return question.number < self._written or question.number in self._early

    def add(self, reply: Reply) -> None:
        """Keeps a reply, safe from a kill when this returns.

        Raises:
          ValueError: that question has an answer, or there is none of this number.
        """
        if not 0 <= reply.number < len(self._questions) or self.is_answered(
            self._questions[reply.number]
        ):
            raise ValueError(f"a reply came to question {reply.number}, which was not asked")
        self._early[reply.number] = reply.text
        if self._file is None or reply.number > self._written:
            self._part.write(json.dumps([reply.number, reply.text, self._mark]) + "\n")
            self._part.flush()
        self._write_due()

    def finish(self) -> None:
        """Brings the replies of all hosts into the file and removes what they lay in."""
        for replies in self._hosts.gather(list(self._early.items())):
            self._early |= dict(replies)
        self._write_due()
        # No reply is deleted before host 0 has it in the file; and none that is still not due, as
        # when a run with a limit follows one that was killed.
        written = self._hosts.gather(self._written)[0]
        if any(number >= written for number in self._early):
            return
        self._part.truncate(0)
        for part in self._parts():
            os.truncate(part, 0)

    def _write_due(self) -> None:
        if self._file is None:
            return
        while self._written in self._early:
            question = self._questions[self._written]
            text = self._early.pop(self._written)
            self._file.write(answer_line(question, text, model_id=self._model_id))
            self._written += 1
        self._file.flush()

    def _parts(self) -> list[Path]:
        """This host's part files; they may be of a run with more hosts."""
        matches = [(_PART.fullmatch(file.name), file) for file in self._path.parent.iterdir()]
        hosts = self._hosts
        return [
            file
            for match, file in matches
            if match is not None and int(match[1]) % hosts.count == hosts.number
        ]


def _lock(path: Path) -> IO[str]:
    """Opens a file to append to it, and keeps other processes out."""
    with explain_file(path, fix="give another --out"):
        check_file(path)
        file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"{path}: another run is writing it; wait for that run, or give another --out"
        ) from None
    except OSError:
        # A file system without locks, as some on a network are.
        pass
    return file


def _read(part: Path) -> list[list[Any]]:
    """[number, text, mark] of a part's replies; a kill may have cut its last line short."""
    fix = "give another --out, or delete that file"
    with explain_file(part, fix=fix):
        os.truncate(part, read_bytes(part, most=MOST_TEXT).rfind(b"\n") + 1)
    lines = read_jsonl(part, fix=fix)
    for number, line in lines.items():
        if not isinstance(line, list) or list(map(type, line)) != [int, str, str]:
            raise ValueError(f"{part}: line {number} is no reply; {fix}")
    return list(lines.values())


def share(questions: Sequence[Question], hosts: Hosts) -> list[Question]:
    """This host's questions; those about the same images stay together."""
    groups: dict[tuple[Path | bytes, ...] | int, int] = {}
    own = []
    for question in questions:
        shown = (*question.images, *question.clips) or question.number
        if groups.setdefault(shown, len(groups)) % hosts.count == hosts.number:
            own.append(question)
    return own
