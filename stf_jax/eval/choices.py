"""Closed choice: which of the given answers a model finds most likely.

It needs no luck with wording: a model that knows the answer, and would say it in other words, can
still choose. The likelihood is that of the whole reply with its end, so that "dog" is no part of
"dog house".
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from stf_jax.data.fit import fit_template
from stf_jax.data.templates import Template
from stf_jax.data.tokenizer import Tokenizer
from stf_jax.infer.likelihood import Continuations, Likelihood
from stf_jax.infer.model import Model, Request
from stf_jax.infer.prompts import LEAST_QUESTION, Prompt, bucket, pad_prompts

Item = TypeVar("Item")

_LEAST_REPLY = 4  # tokens; replies are padded to a bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A question, and the answers of which one is to be chosen."""

    request: Request
    answers: Sequence[str]


class ChoiceScorer:
    """Scores closed choices; programs are compiled once for all calls.

    Questions about the same images share their prefill, and answers share their question.

    Args:
        model: from `stf_jax.load`.
        template: the form of the prompt and of the reply's end.
        rows: images or questions that are computed at a time, on a mesh rounded up to what
            divides; answers go four times as many at a time.
        tokens: an image, where the system has several budgets; by default its most.

    Raises:
        ValueError: a template that is unknown or does not fit the tokenizer, or rows below 1.
    """

    def __init__(
        self, model: Model, *, template: str = "v1", rows: int = 8, tokens: int | None = None
    ):
        if rows < 1:
            raise ValueError(f"rows is {rows}; give 1 or more")
        multiple = model.engine.program.row_multiple
        self._model, self._rows = model, -(-rows // multiple) * multiple
        self._tokens, self._template = tokens, fit_template(template, model.tokenizer)
        self._likelihood = Likelihood(model.engine.program)

    def score(
        self,
        choices: Sequence[Choice],
        *,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> list[Float[np.ndarray, "answers"]]:
        """The log-likelihood of every answer, in nats, in the order of the choices.

        Args:
            choices: questions about any number of images.
            progress: is told how many are scored, of how many.

        Raises:
            ImageError: an image that cannot be used.
            ValueError: a choice without answers, an answer that is empty or has space round it, a
                likelihood that is no number, or what `Model.generate` refuses.
        """
        replies = [self._encode(choice) for choice in choices]
        prompts = self._model.make_prompts(
            [choice.request for choice in choices], template=self._template, tokens=self._tokens
        )
        self._check_lengths(prompts, replies)
        scores: dict[int, Float[np.ndarray, answers]] = {}
        for group in self._group(prompts):
            for number, score in self._score_group(group, prompts, replies):
                if np.isnan(score).any():
                    raise ValueError(
                        f"an answer to choice {number + 1} has a likelihood that is no number; "
                        "take dtype float32, or check the model's weights"
                    )
                scores[number] = score
            progress(len(scores), len(choices))
        return [scores[number] for number in range(len(choices))]

    def choose(self, choices: Sequence[Choice]) -> list[int]:
        """The number of each choice's most likely answer; the first of equals."""
        return [int(np.argmax(score)) for score in self.score(choices)]

    def _encode(self, choice: Choice) -> list[Int[np.ndarray, "_"]]:
        if not choice.answers:
            raise ValueError(f"{choice.request.prompt!r} has no answers to choose from; give some")
        return [
            encode_reply(self._model.tokenizer, self._template, answer) for answer in choice.answers
        ]

    def _check_lengths(
        self, prompts: Sequence[Prompt], replies: Sequence[Sequence[Int[np.ndarray, "_"]]]
    ) -> None:
        room = self._model.config.text.max_positions
        for number, (prompt, answers) in enumerate(zip(prompts, replies, strict=True), 1):
            length = len(prompt.ids) + max(map(len, answers))
            if length > room:
                raise ValueError(
                    f"choice {number} has {length} tokens, images included, and the model's "
                    f"context {room}; shorten it or give fewer images"
                )

    def _group(self, prompts: Sequence[Prompt]) -> Iterator[Sequence[list[int]]]:
        """Numbers of prompts by what they share, as many shared prefixes as go into one call."""
        system = self._model.config.system
        shared: dict[object, list[int]] = {}
        for number, prompt in enumerate(prompts):
            end = system.split(prompt.ids).prefilled
            # What has no key shares with nothing.
            images = number if prompt.image_key is None else prompt.prefix_key
            shared.setdefault((images, prompt.ids[:end].tobytes()), []).append(number)

        def shape(numbers: list[int]) -> tuple[int, ...]:
            prompt = prompts[numbers[0]]
            length = bucket(system.split(prompt.ids).prefilled)
            return length, len(prompt.load()), *prompt.clip_shape

        alike = sorted(shared.values(), key=shape)
        for _, prefixes in itertools.groupby(alike, key=shape):
            yield from _batches([*prefixes], self._rows)

    def _score_group(
        self,
        group: Sequence[list[int]],
        prompts: Sequence[Prompt],
        replies: Sequence[Sequence[Int[np.ndarray, "_"]]],
    ) -> Iterator[tuple[int, Float[np.ndarray, "answers"]]]:
        """The scores of questions that share these prefixes, by their number."""
        config, rows = self._model.config, self._rows
        ends = [config.system.split(prompts[numbers[0]].ids).prefilled for numbers in group]
        prefixes = [
            prompts[numbers[0]].until(end) for numbers, end in zip(group, ends, strict=True)
        ]
        cache = self._model.engine.program.prefill(
            pad_prompts(
                prefixes, rows=rows, image_size=config.image_size, uniform=config.system.compacts
            )
        )
        questions = [(row, number) for row, numbers in enumerate(group) for number in numbers]
        for chunk in _batches(questions, rows):
            starts = [config.system.split(prompts[number].ids).start for _, number in chunk]
            first, behind = self._likelihood.ask(
                cache,
                _pad(
                    [prompts[n].ids[start:] for (_, n), start in zip(chunk, starts, strict=True)],
                    [row for row, _ in chunk],
                    starts,
                    rows=rows,
                    least=LEAST_QUESTION,
                ),
            )
            scored: dict[int, list[float]] = {number: [] for _, number in chunk}
            each = [
                (row, number, ids)
                for row, (_, number) in enumerate(chunk)
                for ids in replies[number]
            ]
            for part in _batches(each, 4 * rows):
                values = self._likelihood.score(
                    first,
                    behind,
                    _pad(
                        [ids for _, _, ids in part],
                        [row for row, _, _ in part],
                        [len(prompts[number].ids) for _, number, _ in part],
                        rows=4 * rows,
                        least=_LEAST_REPLY,
                    ),
                )
                for (_, number, _), value in zip(part, values, strict=False):
                    scored[number].append(float(value))
            for number, scores in scored.items():
                yield number, np.array(scores)


def encode_reply(tokenizer: Tokenizer, template: Template, reply: str) -> Int[np.ndarray, "_"]:
    """The ids of a reply with its end, as training supervises them.

    Args:
        tokenizer: of the model.
        template: from `fit_template`.
        reply: special tokens in it are text.

    Raises:
        ValueError: it is empty, or has space round it.
    """
    if not reply or reply != reply.strip():
        raise ValueError(f"the answer {reply!r} is empty or has space round it; strip it")
    lead = template.before_reply
    begin = len(lead) + len(template.reply_start)
    text = f"{lead}{template.reply_start}{reply}{template.reply_end}"
    before = tokenizer.encode(lead)
    whole = tokenizer.encode(text, typed=[(begin, begin + len(reply))])
    return np.array(whole[len(before) :], np.int32)


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _pad(
    ids: Sequence[Int[np.ndarray, "_"]],
    rows_of: Sequence[int],
    starts: Sequence[int],
    *,
    rows: int,
    least: int,
) -> Continuations:
    """As many rows as a call takes; those beyond the ids hold one token."""
    length = bucket(max(map(len, ids)), least=least)
    padded: Any = np.zeros((rows, length), np.int32)
    lengths: Any = np.ones(rows, np.int32)
    which: Any = np.zeros(rows, np.int32)
    begins: Any = np.zeros(rows, np.int32)
    for row, tokens in enumerate(ids):
        padded[row, : len(tokens)] = tokens
        lengths[row] = len(tokens)
    which[: len(rows_of)] = rows_of
    begins[: len(starts)] = starts
    return Continuations(ids=padded, lengths=lengths, rows=which, starts=begins)
