"""Who is answered next: requests come and go at any time, shared prefixes are computed once.

Prompts about the same images share their first positions (system text and images). The caches of
such prefixes lie in the rows of a pool, where the one that was used longest ago makes room. A step
is: fill free slots, decode on the devices until enough slots are free again, hand out the tokens.
"""

import itertools
import threading
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.pool import PoolRows
from stf_jax.infer.program import Program
from stf_jax.infer.prompts import LEAST_QUESTION, Prompt, bucket, pad_prompts
from stf_jax.infer.room import Progress, Room, Ticket
from stf_jax.infer.sampling import Sampling
from stf_jax.infer.slots import CHOICES, Choice, Draws, Suffixes, choice_of
from stf_jax.models.cache import Split
from stf_jax.models.connector import Architecture

_READERS = 4


class Scheduler:
    """Answers requests as they come; `submit` and `cancel` may be called by any thread.

    An answer depends neither on slots nor on neighbors nor on sharing.

    Args:
        program: of the model.
        room: what it holds.
    """

    def __init__(self, program: Program, room: Room):
        self.room, self._program = room, program
        self._config: Architecture = program.config
        self._state = program.start(slots=room.slots, contexts=room.contexts, new=room.new)
        self._pool = program.pool(rows=room.kept, contexts=room.prefixes)
        self._rows = PoolRows(room.kept)
        # Requests whose prefix is not in the pool, and those whose is, with its row.
        self._waiting: deque[Ticket] = deque()
        self._ready: deque[tuple[Ticket, int]] = deque()
        self._free, self._taken = deque(range(room.slots)), dict[int, Ticket]()
        # Slots in which something is not finite.
        self._spoiled = set[int]()
        self._numbers = itertools.count()
        self._readers = ThreadPoolExecutor(_READERS)
        self._lock = threading.Lock()
        self._canceled: set[Ticket] = set()

    def close(self) -> None:
        """Gives the reading threads back; to be called once."""
        self._readers.shutdown(cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Whether a request has no answer yet."""
        return bool(self._taken or self._ready or self._waiting)

    @property
    def running(self) -> int:
        """Answers in the making."""
        return len(self._taken)

    @property
    def queued(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting) + len(self._ready)

    @property
    def held(self) -> int:
        """Prefixes in the pool."""
        return self._rows.held

    def submit(
        self, prompt: Prompt, *, sampling: Sampling, most: int, share: bool = True
    ) -> Ticket:
        """Puts a request in the queue, which has to fit the room.

        Args:
            prompt: its pixels may be made when they are needed, in another thread.
            sampling: how its tokens are chosen.
            most: tokens of its answer.
            share: whether it may use the cache of others' prefix.
        """
        split = self.split(prompt)
        shared = share and prompt.image_key is not None
        # A number equals no other.
        key = (
            (prompt.prefix_key, prompt.budget, prompt.ids[: split.prefilled].tobytes())
            if shared
            else next(self._numbers)
        )
        ticket = Ticket(prompt, split, sampling=sampling, most=most, key=key)
        with self._lock:
            self._waiting.append(ticket)
        return ticket

    def split(self, prompt: Prompt) -> Split:
        """What of a prompt is prefilled: of text alone, no more than a row of the pool holds."""
        split, most = self._config.system.split(prompt.ids), min(self.room.prefixes)
        if vision_tokens(prompt) or split.prefilled <= most:
            return split
        return Split(prefilled=most, start=most)

    def cancel(self, ticket: Ticket) -> None:
        """Nothing more of this answer is wanted; its slot is free from the next step on."""
        with self._lock:
            self._canceled.add(ticket)

    def warm_up(self, prompts: Iterable[Prompt], *, longest: int) -> int:
        """Compiles for all requests like these before they come; how many programs there are.

        Args:
            prompts: of every length and number of images.
            longest: tokens behind a prefix.
        """
        room, system, vision = self.room, self._config.system, self._config.vision
        nowhere, seen = np.full(room.rows, room.kept, np.int32), set[object]()
        lengths, sizes = set[tuple[int, ...]](), set[int]()
        for prompt in prompts:
            split = self.split(prompt)
            held = system.held(prompt.ids[: split.prefilled], vision)
            if any(size > most for size, most in zip(held, room.prefixes, strict=True)):
                continue
            lengths.add(self._rounded(held))
            images = self._images(len(prompt.load()))
            asked = None if prompt.question is None else len(prompt.question)
            shape = shape_of(prompt, split, uniform=system.compacts), images, asked
            if shape not in seen:
                seen.add(shape)
                prefixes = self._program.prefill(self._batch([prompt.until(split.prefilled)]))
                self._pool = self._program.keep(self._pool, prefixes, nowhere)
        for length in range(1, longest + 1):
            sizes.add(_next_power(length, least=LEAST_QUESTION))
        inserts = [
            (of_prefix, size, choice)
            for of_prefix in _largest(lengths)
            for size in sorted(sizes)
            for choice in sorted({_first_choice(choice) for choice in CHOICES})
        ]
        for of_prefix, size, choice in inserts:
            none = Suffixes.empty(room.rows, size, slots=room.slots)
            self._state = self._program.insert(
                self._state, self._pool, none, lengths=of_prefix, choice=choice
            )
        for choice in CHOICES:
            self._state = self._program.decode(
                self._state, stopped=np.ones(room.slots, bool), every=1, enough=1, choice=choice
            )
        self.clear([])
        jax.block_until_ready(self._state.finished)
        return len(seen) + len(inserts) + len(CHOICES)

    def step(self, *, every: int) -> list[Progress]:
        """Fills free slots and decodes `every` steps at most; what is new, by answer."""
        self._drop_canceled()
        progress, room = self._admit(), self.room
        if not self._taken:
            return progress
        # Decode until enough slots are finished for a full insert; if no question waits, until all
        # are finished.
        enough = min(room.rows, len(self._ready) or room.rows) if self.queued else room.slots
        self._state = self._program.decode(
            self._state,
            stopped=np.isin(np.arange(room.slots), self._free),
            every=every,
            enough=enough,
            choice=self._choice(self._taken.values()),
        )
        # The host reads the next images while the devices decode.
        progress += self._prefill()
        state = self._state
        tokens, counts, finished, finite = jax.device_get(
            (state.tokens, state.counts, state.finished, state.finite)
        )
        self._spoiled = set(np.flatnonzero(~finite).tolist())
        for slot, ticket in list(self._taken.items()):
            new = tokens[slot, len(ticket.ids) : counts[slot]]
            ticket.ids += new.tolist()
            ticket.finished = bool(finished[slot])
            progress.append(Progress(ticket, new))
            if ticket.finished:
                self._release(slot)
        return progress

    def clear(self, slots: Collection[int]) -> None:
        """Zeroes free slots; for those whose last answer was not finite."""
        which = np.isin(np.arange(self.room.slots), [*slots])
        self._state = self._program.clear(self._state, which)

    def _release(self, slot: int) -> None:
        del self._taken[slot]
        self._free.append(slot)

    def _drop_canceled(self) -> None:
        with self._lock:
            gone, self._canceled = self._canceled, set()
            if not gone:
                return
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in gone)
        for ticket, row in self._ready:
            if ticket in gone:
                self._rows.unpin(row)
        self._ready = deque(pair for pair in self._ready if pair[0] not in gone)
        for slot, ticket in list(self._taken.items()):
            if ticket in gone:
                self._release(slot)

    def _admit(self) -> list[Progress]:
        """Puts questions into free slots; gives those that cannot be answered.

        An insert costs the same for one question as for `rows`. So it waits until there are slots
        for all that are ready, up to `rows`.
        """
        rows, failed = self.room.rows, list[Progress]()
        while self._free and self.queued:
            failed += self._prefill()
            count = min(rows, len(self._ready))
            if not count or len(self._free) < count:
                break
            chosen = [(*self._ready.popleft(), self._free.popleft()) for _ in range(count)]
            tickets = [ticket for ticket, _, _ in chosen]
            if spoiled := self._spoiled & {slot for _, _, slot in chosen}:
                self.clear(spoiled)
            self._state = self._program.insert(
                self._state,
                self._pool,
                self._questions(chosen),
                lengths=self._lengths(tickets),
                choice=_first_choice(self._choice([*self._taken.values(), *tickets])),
            )
            for ticket, row, slot in chosen:
                self._taken[slot] = ticket
                self._rows.unpin(row)
        return failed

    def _prefill(self) -> list[Progress]:
        """Continues with the next prefixes if no question is ready.

        The request that has waited longest decides which: those of its shape go with it. Gives
        those that cannot be answered, since an image cannot be used.
        """
        if self._ready:
            return []
        with self._lock:
            waiting = list(self._waiting)
        chunk, failed = self._next(waiting), list[Progress]()
        firsts = {row: ticket for ticket, row in reversed(chunk) if not self._rows.filled(row)}
        loaded = dict[int, Prompt]()
        for row, ticket in firsts.items():
            try:
                loaded[row] = ticket.load(self._readers).result()
            except (OSError, ValueError) as error:
                # Others about this image find out by themselves.
                ticket.error, ticket.finished = error, True
                self._rows.forget(row)
                chunk = [pair for pair in chunk if pair[1] != row]
                failed.append(Progress(ticket, np.zeros(0, np.int32)))
        if loaded:
            self._compute(loaded)
        for ticket, row in chunk:
            ticket.reused = 0 if firsts.get(row) is ticket else ticket.split.prefilled
            ticket.loading = None
            self._rows.pin(row)
            self._ready.append((ticket, row))
        gone = {ticket for ticket, _ in chunk} | {progress.ticket for progress in failed}
        with self._lock:
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in gone)
        self._read_ahead()
        return failed

    def _next(self, waiting: list[Ticket]) -> list[tuple[Ticket, int]]:
        """Requests that can be made ready at once, and the row of each one's prefix."""
        if not waiting:
            return []
        shape = self._shape(waiting[0])
        rows, chunk, new = dict[object, int](), list[tuple[Ticket, int]](), 0
        for ticket in waiting:
            row = rows.get(ticket.key)
            if row is None:
                row = self._rows.find(ticket.key)
            if row is None:
                if new == self.room.rows or self._shape(ticket) != shape:
                    continue
                row = self._rows.take(ticket.key, besides=rows.values())
                if row is None:
                    continue
                new += 1
            rows[ticket.key] = row
            chunk.append((ticket, row))
        return chunk

    def _compute(self, prompts: Mapping[int, Prompt]) -> None:
        """Computes prefixes, by row, or takes those that were, and puts them into the pool."""
        rows = self.room.rows
        cached = [prompt.cached for prompt in prompts.values() if prompt.cached is not None]
        if cached:
            prefixes = self._program.join(cached, rows=rows)
        else:
            prefixes = self._program.prefill(self._batch(list(prompts.values())))
        at = np.full(rows, self.room.kept, np.int32)
        at[: len(prompts)] = list(prompts)
        self._pool = self._program.keep(self._pool, prefixes, at)
        for row in prompts:
            self._rows.fill(row)

    def _batch(self, prompts: Sequence[Prompt]) -> Batch:
        images = max(len(prompt.load()) for prompt in prompts)
        return pad_prompts(
            prompts,
            rows=self.room.rows,
            image_size=self._config.image_size,
            uniform=self._config.system.compacts,
            images=self._images(images),
        )

    def _images(self, count: int) -> int:
        """Images of a batch: where each row has as many, these, and else rounded up as lengths."""
        coarse = self.room.is_coarse and not self._config.system.compacts
        return _next_power(count, least=1) if coarse and count else count

    def _read_ahead(self) -> None:
        """Begins to read the images that come next."""
        with self._lock:
            ahead = list(itertools.islice(self._waiting, 4 * self.room.rows))
        known = set[object]()
        for ticket in ahead:
            if len(known) == self.room.rows:
                return
            if ticket.key not in known and self._rows.find(ticket.key) is None:
                known.add(ticket.key)
                ticket.load(self._readers)

    def _shape(self, ticket: Ticket) -> object:
        return shape_of(ticket.prompt, ticket.split, uniform=self._config.system.compacts)

    def _lengths(self, tickets: Iterable[Ticket]) -> tuple[int, ...]:
        """Slots of the longest prefix, by group of layers, in buckets."""
        system, vision = self._config.system, self._config.vision
        held = [
            system.held(ticket.prompt.ids[: ticket.split.prefilled], vision) for ticket in tickets
        ]
        longest = [max(sizes) for sizes in zip(*held, strict=True)]
        return self._rounded(longest)

    def _rounded(self, sizes: Sequence[int]) -> tuple[int, ...]:
        size_of = _next_power if self.room.is_coarse else bucket
        most = self._pool.sizes
        return tuple(min(size_of(size), limit) for size, limit in zip(sizes, most, strict=True))

    def _questions(self, chosen: list[tuple[Ticket, int, int]]) -> Suffixes:
        """(request, row of its prefix, slot) as arrays, padded to a bucket and to `rows`."""
        rest = [ticket.prompt.ids[ticket.split.start :] for ticket, _, _ in chosen]
        size_of = _next_power if self.room.is_coarse else bucket
        length = size_of(max(map(len, rest)), least=LEAST_QUESTION)
        questions = Suffixes.empty(self.room.rows, length, slots=self.room.slots)
        draws = Draws.of([(ticket.sampling, ticket.most) for ticket, _, _ in chosen])
        for row, (ids, (ticket, prefix, slot)) in enumerate(zip(rest, chosen, strict=True)):
            questions.ids[row, : len(ids)] = ids
            questions.lengths[row], questions.starts[row] = len(ids), ticket.split.start
            questions.prefixes[row], questions.slots[row] = prefix, slot
        arrays = zip(jax.tree.leaves(questions.draws), jax.tree.leaves(draws), strict=True)
        for into, values in arrays:
            into[: len(chosen)] = values
        return questions

    def _choice(self, tickets: Iterable[Ticket]) -> Choice:
        return choice_of(ticket.sampling for ticket in tickets)


def shape_of(prompt: Prompt, split: Split, *, uniform: bool) -> tuple[object, ...]:
    """What is the same for all prompts of a batch; where layers drop tokens, as many images."""
    images = vision_tokens(prompt) if uniform else 0
    cached = prompt.cached is not None
    return prompt.budget or 0, prompt.clip_shape, images, bucket(split.prefilled), cached


def vision_tokens(prompt: Prompt) -> int:
    """How many positions of a prompt images take, which orders prompts as their images do."""
    return int((prompt.ids == IMAGE_TOKEN_ID).sum())


def _next_power(length: int, *, least: int = 64) -> int:
    """The next of 64, 128, 256, ...; `least`, a power of two, is where the sizes begin."""
    return max(least, 1 << (length - 1).bit_length())


def _first_choice(choice: Choice) -> Choice:
    """How the first token is chosen: what serves all that are not greedy costs little once."""
    return "greedy" if choice == "greedy" else "likely"


def _largest(sizes: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """These, and the largest by place of any of them together."""
    closed, new = set[tuple[int, ...]](), {*sizes}
    while new:
        closed |= new
        pairs = itertools.product(closed, new)
        new = {tuple(map(max, zip(*pair, strict=True))) for pair in pairs} - closed
    return sorted(closed)
