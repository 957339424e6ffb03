"""Many questions through few slots: shared prefixes are computed once, no slot waits for another.

Prompts are put in groups that share their first positions (system text and images). The cache of
several such prefixes is computed in one batch; then their questions go through the slots, each
taking over the cache of its prefix. A round is: insert requests into free slots, decode on the
devices until enough slots are free again, look at the tokens. The next images are read meanwhile.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.program import Limits, Program, Suffixes, limit_new_tokens
from stf_jax.infer.prompts import LEAST_QUESTION, Prompt, bucket, pad_prompts
from stf_jax.infer.sampling import Sampling
from stf_jax.models.cache import CacheDType, KVCache, Split
from stf_jax.models.connector import Architecture
from stf_jax.models.llava import Llava
from stf_jax.util.errors import explain_memory
from stf_jax.util.files import name_some

# Takes a prompt's number and its new ids; returns whether the answer is to continue.
Take = Callable[[int, Int[np.ndarray, "new"]], bool]

# Slots are refilled when this part of them is free: a question alone costs as much as several.
_REFILL = 4
_READERS = 4
# Slots are numbered in int32.
_MOST_SLOTS = np.iinfo(np.int32).max


@dataclasses.dataclass(kw_only=True)
class _Group:
    """Prompts that have in common what is prefilled."""

    split: Split
    prompts: list[int]


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
        limits = Limits(sampling=sampling, max_new_tokens=self._check(prompts, max_new_tokens))
        if not 1 <= slots <= _MOST_SLOTS:
            raise ValueError(f"slots is {slots}; give 1 to {_MOST_SLOTS}")
        if not prompts:
            return
        slots, rows = batch_sizes(slots, multiple=self.program.row_multiple)
        contexts = room_for(self.config, prompts, limits.max_new_tokens)
        shortage = (
            f"{slots} slots of {max(contexts)} positions do not fit into the memory of a device; "
            "give fewer slots, a cache of int8 or a larger mesh"
        )
        with explain_memory(shortage), ThreadPoolExecutor(_READERS) as readers:
            state = self.program.start(
                slots=slots, contexts=contexts, new=bucket(limits.max_new_tokens)
            )
            free, taken, seen = deque(range(slots)), dict[int, int](), np.zeros(slots, int)
            splits = [self.config.system.split(prompt.ids) for prompt in prompts]
            groups = _groups(prompts, splits, share=share)
            feed = _Feed(self.program, prompts, groups, rows, readers=readers)
            # Three steps, until every prompt has its answer: fill the free slots, decode, hand out
            # the new tokens. `taken` is the prompt of each slot at work, `seen` its tokens so far.
            while taken or feed.more:
                # An insert costs the same for one question as for `rows`. So it waits until there
                # are slots for all that wait, up to `rows`.
                while free and feed.more:
                    feed.refill()
                    if len(free) < (count := min(rows, len(feed.waiting))):
                        break
                    chosen = [(*feed.waiting.popleft(), free.popleft()) for _ in range(count)]
                    questions = _questions(prompts, splits, chosen, rows=rows, slots=slots)
                    state = self.program.insert(state, feed.prefixes, questions, limits)
                    for prompt, _, slot in chosen:
                        taken[slot], seen[slot] = prompt, 0
                # Decode until enough slots are finished for a full insert; if no question waits,
                # until all are finished.
                enough = min(rows, len(feed.waiting) or rows) if feed.more else slots
                state = self.program.decode(
                    state,
                    limits,
                    stopped=np.isin(np.arange(slots), free),
                    every=min(every, limits.max_new_tokens),
                    enough=enough,
                )
                # The host reads the next images while the devices decode.
                feed.refill()
                tokens, counts, finished = jax.device_get(
                    (state.tokens, state.counts, state.finished)
                )
                for slot, prompt in list(taken.items()):
                    is_wanted = take(prompt, tokens[slot, seen[slot] : counts[slot]])
                    seen[slot] = counts[slot]
                    if finished[slot] or not is_wanted:
                        del taken[slot]
                        free.append(slot)
                        yield prompt

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


def room_for(config: Architecture, prompts: Sequence[Prompt], new: int) -> tuple[int, ...]:
    """Positions of a slot with room for any of the prompts and its answer, by group of layers.

    Args:
        config: of the model.
        prompts: one or more.
        new: tokens of an answer.
    """
    held = [config.system.held(prompt.ids, config.vision) for prompt in prompts]
    most = config.text.max_positions
    return tuple(bucket(min(max(sizes) + new, most)) for sizes in zip(*held, strict=True))


def batch_sizes(slots: int, *, multiple: int) -> tuple[int, int]:
    """Slots rounded up to what divides, and how many prefixes or questions go into one call."""
    slots = -(-slots // multiple) * multiple
    return slots, max(slots // _REFILL // multiple, 1) * multiple


class _Feed:
    """Prefixes, `rows` of them at a time, and the questions that wait to be asked about them.

    While one batch of images is at work, those of the next are read.
    """

    def __init__(
        self,
        program: Program,
        prompts: Sequence[Prompt],
        groups: Sequence[_Group],
        rows: int,
        *,
        readers: ThreadPoolExecutor,
    ):
        self._program, self._prompts, self._rows = program, prompts, rows
        self._readers = readers
        self._uniform = program.config.system.compacts
        # A batch has one budget, and clips of one shape; where layers drop tokens, as many images.
        shapes = itertools.groupby(groups, key=lambda group: self._shape(group))
        alike = [list(same) for _, same in shapes]
        self._chunks = deque(
            same[at : at + rows] for same in alike for at in range(0, len(same), rows)
        )
        self._coming = self._read()
        # (prompt, row of its prefix)
        self.waiting = deque[tuple[int, int]]()
        self.prefixes: KVCache

    def _shape(self, group: _Group) -> object:
        prompt = self._prompts[group.prompts[0]]
        return _shape(prompt), _images(prompt) if self._uniform else 0

    @property
    def more(self) -> bool:
        """Whether a question waits that has no slot yet."""
        return bool(self.waiting or self._chunks)

    def refill(self) -> None:
        """Continues with the next prefixes if no question waits about the last ones."""
        if self.waiting or not self._chunks:
            return
        chunk, loaded = self._chunks.popleft(), [future.result() for future in self._coming]
        self._coming = self._read()
        size = self._program.config.image_size
        batch = pad_prompts(loaded, rows=self._rows, image_size=size, uniform=self._uniform)
        self.prefixes = self._program.prefill(batch)
        self.waiting.extend(
            (prompt, row) for row, group in enumerate(chunk) for prompt in group.prompts
        )

    def _read(self) -> list[Future[Prompt]]:
        """Begins to read the images of the next chunk."""
        return [
            self._readers.submit(self._prompts[group.prompts[0]].until, group.split.prefilled)
            for group in (self._chunks[0] if self._chunks else ())
        ]


def _groups(prompts: Sequence[Prompt], splits: Sequence[Split], *, share: bool) -> list[_Group]:
    """Prompts by what they share; those of like images and length are neighbors."""
    groups: dict[object, _Group] = {}
    for number, (prompt, split) in enumerate(zip(prompts, splits, strict=True)):
        shared = share and prompt.image_key is not None
        key = (prompt.prefix_key, prompt.ids[: split.prefilled].tobytes()) if shared else number
        groups.setdefault(key, _Group(split=split, prompts=[])).prompts.append(number)

    def size(group: _Group) -> tuple[object, int, int]:
        prompt = prompts[group.prompts[0]]
        return _shape(prompt), _images(prompt), bucket(group.split.prefilled)

    return sorted(groups.values(), key=size)


def _shape(prompt: Prompt) -> tuple[int, tuple[int, ...]]:
    """What is the same for all prompts of a batch."""
    return prompt.budget or 0, prompt.clip_shape


def _images(prompt: Prompt) -> int:
    """How many vision tokens a prompt has, which orders prompts as their images do."""
    return int((prompt.ids == IMAGE_TOKEN_ID).sum())


def _questions(
    prompts: Sequence[Prompt],
    splits: Sequence[Split],
    chosen: Sequence[tuple[int, int, int]],
    *,
    rows: int,
    slots: int,
) -> Suffixes:
    """(prompt, row of its prefix, slot) as arrays, padded to a bucket and to `rows`."""
    starts = [splits[prompt].start for prompt, _, _ in chosen]
    rest = [prompts[prompt].ids[at:] for (prompt, _, _), at in zip(chosen, starts, strict=True)]
    length = bucket(max(map(len, rest)), least=LEAST_QUESTION)
    questions = Suffixes.empty(rows, length, slots=slots)
    for row, (ids, start, (_, prefix, slot)) in enumerate(zip(rest, starts, chosen, strict=True)):
        questions.ids[row, : len(ids)] = ids
        questions.lengths[row], questions.starts[row] = len(ids), start
        questions.prefixes[row], questions.slots[row] = prefix, slot
    return questions
