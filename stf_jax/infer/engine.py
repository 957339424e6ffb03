"""Many questions through few slots: shared prefixes are computed once, no slot waits for another.

A list of prompts is ordered by what they share and goes through a scheduler.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.program import Program, limit_new_tokens
from stf_jax.infer.prompts import Prompt, bucket
from stf_jax.infer.room import Room
from stf_jax.infer.sampling import Sampling
from stf_jax.infer.scheduler import Scheduler, shape_of, vision_tokens
from stf_jax.models.cache import CacheDType
from stf_jax.models.connector import Architecture
from stf_jax.models.llava import Llava
from stf_jax.util.errors import explain_memory
from stf_jax.util.files import name_some

# Takes a prompt's number and its new ids; returns whether the answer is to continue.
Take = Callable[[int, Int[np.ndarray, "new"]], bool]

# Slots are refilled when this part of them is free: a question alone costs as much as several.
_REFILL = 4
# Slots are numbered in int32.
_MOST_SLOTS = np.iinfo(np.int32).max


class Engine:
    """Answers prompts. An answer depends neither on slots nor on neighbors nor on sharing.

    Args:
        model: taken over: its stacked layers are taken apart.
        mesh: that the model lies on; one device by default.
        cache_dtype: how keys and values are kept; by default as they are computed.
    """

    def __init__(
        self, model: Llava, *, mesh: Mesh | None = None, cache_dtype: CacheDType | None = None
    ):
        self.config = model.config
        self.program = Program(model, mesh=mesh, cache_dtype=cache_dtype)

    def run(
        self,
        prompts: Sequence[Prompt],
        *,
        slots: int,
        max_new_tokens: int,
        sampling: Sampling,
        every: int,
        take: Take,
        share: bool = True,
    ) -> Iterator[int]:
        """Yields the number of each prompt when its answer is complete, in that order.

        Args:
            prompts: their pixels may be made when they are needed, in other threads.
            slots: answers in the making at a time, on a mesh rounded up to what divides.
            max_new_tokens: where an answer is cut.
            sampling: the same for all.
            every: steps between looks at the tokens, at most.
            take: called with what is new of an answer; False ends it.
            share: whether prompts about the same images share the cache of their prefix.

        Raises:
            ValueError: no tokens or no slots wanted, more slots than there is memory for, a prompt
                that leaves no room for any token, or one that ends in an image.
        """
        most = self._check(prompts, max_new_tokens)
        if not 1 <= slots <= _MOST_SLOTS:
            raise ValueError(f"slots is {slots}; give 1 to {_MOST_SLOTS}")
        if not prompts:
            return
        room = fit_room(
            self.config, prompts, slots=slots, new=most, multiple=self.program.row_multiple
        )
        shortage = (
            f"{room.slots} slots of {max(room.contexts)} positions do not fit into the memory of a "
            "device; give fewer slots, a cache of int8 or a larger mesh"
        )
        with explain_memory(shortage), contextlib.closing(self.open(room)) as scheduler:
            numbers = {
                scheduler.submit(prompts[number], sampling=sampling, most=most, share=share): number
                for number in self._order(prompts)
            }
            while scheduler.busy:
                for progress in scheduler.step(every=min(every, most)):
                    number = numbers[progress.ticket]
                    if progress.ticket.error is not None:
                        raise progress.ticket.error
                    is_wanted = take(number, progress.ids)
                    if progress.ticket.finished:
                        yield number
                    elif not is_wanted:
                        scheduler.cancel(progress.ticket)
                        yield number

    def open(self, room: Room) -> Scheduler:
        """A scheduler that takes requests one by one, as they come."""
        return Scheduler(self.program, room)

    def _order(self, prompts: Sequence[Prompt]) -> list[int]:
        """Those of like images and length one after the other."""
        system = self.config.system

        def size(number: int) -> tuple[object, ...]:
            prompt = prompts[number]
            shape = shape_of(prompt, system.split(prompt.ids), uniform=system.compacts)
            return *shape[:2], vision_tokens(prompt), *shape[3:]

        return sorted(range(len(prompts)), key=size)

    def _check(self, prompts: Sequence[Prompt], max_new_tokens: int) -> int:
        """Checks every prompt; returns the limit, no higher than the context."""
        room = self.config.text.max_positions
        most = limit_new_tokens(max_new_tokens, room=room)
        too_long = [n for n, prompt in enumerate(prompts) if len(prompt.ids) >= room]
        if too_long:
            lengths = [len(prompts[number].ids) for number in too_long]
            raise ValueError(
                f"{_name_prompts(too_long, prompts)} of {name_some(lengths)} tokens, images "
                f"included, leaves no room for an answer in the model's context of {room}; shorten "
                "it or give fewer images"
            )
        open_ended = [n for n, prompt in enumerate(prompts) if prompt.ids[-1] == IMAGE_TOKEN_ID]
        if open_ended:
            raise ValueError(
                f"{_name_prompts(open_ended, prompts)} ends in an image; put text behind it"
            )
        return most


def _name_prompts(numbers: Sequence[int], prompts: Sequence[Prompt]) -> str:
    """Which of the prompts are meant, counted from 1."""
    if len(prompts) == 1:
        return "the prompt"
    return f"prompt {name_some([number + 1 for number in numbers])} of {len(prompts)},"


def fit_room(
    config: Architecture, prompts: Sequence[Prompt], *, slots: int, new: int, multiple: int
) -> Room:
    """What these prompts need, and no more.

    Args:
        config: of the model.
        prompts: one or more.
        slots: answers in the making at a time, rounded up.
        new: tokens of an answer.
        multiple: of the rows, which a mesh splits.
    """
    slots, rows = batch_sizes(slots, multiple=multiple)
    prefixes = [prompt.ids[: config.system.split(prompt.ids).prefilled] for prompt in prompts]
    return Room(
        slots=slots,
        rows=rows,
        contexts=room_for(config, [prompt.ids for prompt in prompts], new),
        new=bucket(new),
        kept=rows,
        prefixes=room_for(config, prefixes, 0),
    )


def room_for(
    config: Architecture, prompts: Sequence[Int[np.ndarray, "T"]], new: int
) -> tuple[int, ...]:
    """Positions of a slot with room for any of the prompts and its answer, by group of layers.

    Args:
        config: of the model.
        prompts: ids of one or more.
        new: tokens of an answer.
    """
    held = [config.system.held(ids, config.vision) for ids in prompts]
    most = config.text.max_positions
    return tuple(bucket(min(max(sizes) + new, most)) for sizes in zip(*held, strict=True))


def batch_sizes(slots: int, *, multiple: int) -> tuple[int, int]:
    """Slots rounded up to what divides, and how many prefixes or questions go into one call."""
    slots = -(-slots // multiple) * multiple
    return slots, max(slots // _REFILL // multiple, 1) * multiple
