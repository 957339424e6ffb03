"""One conversation whose cache is kept between turns: a turn costs what is new in it."""

import dataclasses
from collections.abc import Generator

import jax
import numpy as np
from jaxtyping import Int

from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.engine import room_for
from stf_jax.infer.program import Program
from stf_jax.infer.prompts import LEAST_QUESTION, Prompt, bucket, pad_prompts
from stf_jax.infer.sampling import Sampling
from stf_jax.infer.slots import Choice, Draws, Slots, Suffixes, choice_of


class Session:
    """Answers prompts one after another, each of which mostly repeats the one before.

    The first tokens that a prompt shares with the cache are not computed again. A new image
    makes the session compute all of them. Where layers hold a part of an image, a later turn sees
    that part.

    Args:
        program: of the model.
    """

    def __init__(self, program: Program):
        self._program = program
        self._slots: Slots | None = None
        self._held = np.zeros(0, np.int32)
        self._image_key: object = None
        self._decided = 0
        #: Tokens of the last prompt that were computed for it.
        self.computed = 0

    def stream(
        self, prompt: Prompt, *, sampling: Sampling, max_new_tokens: int, every: int
    ) -> Generator[Int[np.ndarray, "new"], None, None]:
        """New ids, `every` at a time; whoever stops listening ends the answer.

        Raises:
            ValueError: a prompt that leaves no room for an answer.
        """
        room, length = self._program.config.text.max_positions, len(prompt.ids)
        if length >= room:
            raise ValueError(
                f"the conversation is {length} tokens long, images included, and the model's "
                f"context is {room}; start again"
            )
        needed, new = length + max_new_tokens, bucket(max_new_tokens)
        contexts = room_for(self._program.config, [prompt.ids], max_new_tokens)
        start = self._common(prompt, contexts=contexts, new=new)
        slots = self._slots
        # Until the devices have answered, nothing is known of what they hold.
        self._slots = None
        rows, choice = self._program.row_multiple, choice_of([sampling])
        draws = Draws.of([(sampling, max_new_tokens)] * rows)
        if start and slots is not None:
            question = _question(prompt, start, rows, draws)
            slots = self._program.resume(slots, question, choice=choice)
        else:
            # With room for as much again, so that few turns outgrow it.
            contexts = room_for(self._program.config, [prompt.ids], 2 * needed - length)
            slots = self._begin(prompt, draws, contexts=contexts, new=new, choice=choice)
        self.computed = length - start
        seen, finished = 0, False
        while not finished:
            self._slots = None
            slots = self._program.decode(
                slots, stopped=np.arange(rows) > 0, every=every, enough=rows, choice=choice
            )
            # Rows are split over a mesh: only the host takes one.
            held = jax.device_get((slots.tokens, slots.counts, slots.finished))
            tokens, count, ended = (array[0] for array in held)
            # The newest token is in no cache yet.
            self._held = np.concatenate([prompt.ids, tokens[: count - 1]])
            self._slots, self._image_key = slots, prompt.prefix_key
            said, seen, finished = tokens[seen:count], int(count), bool(ended)
            yield said

    def _common(self, prompt: Prompt, *, contexts: tuple[int, ...], new: int) -> int:
        """How many positions of a prompt need not be computed; one always is."""
        slots = self._slots
        if slots is None or slots.tokens.shape[1] != new:
            return 0
        if any(size < wanted for size, wanted in zip(slots.cache.sizes, contexts, strict=True)):
            return 0
        if prompt.prefix_key != self._image_key or len(prompt.ids) < 2:
            return 0
        if prompt.image_key is None and IMAGE_TOKEN_ID in prompt.ids:
            # Its images equal no others.
            return 0
        most = min(len(prompt.ids) - 1, len(self._held))
        differs = np.flatnonzero(prompt.ids[:most] != self._held[:most])
        common = int(differs[0]) if len(differs) else most
        # What decided which tokens of images the cache holds, is as it was; what is asked anew is
        # text.
        return 0 if common < self._decided or IMAGE_TOKEN_ID in prompt.ids[common:] else common

    def _begin(
        self,
        prompt: Prompt,
        draws: Draws,
        *,
        contexts: tuple[int, ...],
        new: int,
        choice: Choice,
    ) -> Slots:
        rows, config = self._program.row_multiple, self._program.config
        split = config.system.split(prompt.ids)
        batch = pad_prompts(
            [prompt.until(split.prefilled)],
            rows=rows,
            image_size=config.image_size,
            uniform=config.system.compacts,
        )
        prefixes = self._program.prefill(batch)
        # Positions that only the prefill computes, since they decide what layers hold.
        self._decided = split.prefilled if split.start < split.prefilled else 0
        empty = self._program.start(slots=rows, contexts=contexts, new=new)
        question = _question(prompt, split.start, rows, draws)
        return self._program.insert(empty, prefixes, question, choice=choice)


def _question(prompt: Prompt, start: int, rows: int, draws: Draws) -> Suffixes:
    rest = prompt.ids[start:]
    empty = Suffixes.empty(rows, bucket(len(rest), least=LEAST_QUESTION), slots=rows)
    question = dataclasses.replace(empty, draws=draws)
    question.ids[0, : len(rest)] = rest
    question.lengths[0], question.starts[0], question.slots[0] = len(rest), start, 0
    return question
