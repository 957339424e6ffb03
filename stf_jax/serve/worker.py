"""The thread in which the devices work, and the answers that come out of it.

Requests come from an event loop; tokens go back to it. Nothing else touches the scheduler.
"""

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Literal, TypeAlias

from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.answers import AnswerBuilder
from stf_jax.infer.engine import Engine
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.room import Room, Ticket
from stf_jax.infer.sampling import Sampling
from stf_jax.infer.scheduler import Scheduler
from stf_jax.serve.metrics import Metrics
from stf_jax.serve.schema import ApiError

_LOG = logging.getLogger("stf_jax.serve")
Ending: TypeAlias = Literal["stop", "length"]
# Steps between looks at the tokens: text flows, and a new request waits no longer than this. Where
# requests wait anyway, fewer looks answer more of them.
_EVERY = 4
_EVERY_FULL = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """The tokens of a request.

    Attributes:
        prompt: before the answer, images included.
        image: those of images.
        cached: those whose cache was there already.
        new: of the answer.
    """

    prompt: int
    image: int
    cached: int
    new: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new of an answer.

    Attributes:
        text: may be empty.
        finish_reason: why nothing more comes; None if more does.
        usage: so far.
    """

    text: str
    finish_reason: Ending | None
    usage: Usage


class Worker:
    """Answers requests one beside the other.

    Args:
        engine: of the model.
        room: what the devices hold.
        queue: requests that may wait; more are refused.
        metrics: to be kept up to date.
        context: positions of a request and its answer; by default all that there is room for.
        new: tokens of an answer; likewise.
    """

    def __init__(
        self,
        engine: Engine,
        room: Room,
        *,
        queue: int,
        metrics: Metrics,
        context: int | None = None,
        new: int | None = None,
    ):
        self.room, self._queue, self._metrics = room, queue, metrics
        self.context = min(
            min(room.contexts) if context is None else context, engine.config.text.max_positions
        )
        self._new = room.new if new is None else new
        self._config = engine.config
        self._scheduler: Scheduler = engine.open(room)
        self._listeners: dict[Ticket, Callable[[Ticket], None]] = {}
        self._work = threading.Condition()
        self._stopping = False
        self._deadline: float | None = None
        self.broken: str | None = None
        self._thread = threading.Thread(target=self._run, name="devices", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Requests without their whole answer."""
        return len(self._listeners)

    @property
    def busy(self) -> bool:
        """Whether the devices have work."""
        return self._scheduler.busy

    def warm_up(self, prompts: Iterable[Prompt], *, longest: int) -> int:
        """Compiles for all requests like these; to be called before the first one."""
        return self._scheduler.warm_up(prompts, longest=longest)

    def fits(self, prompt: Prompt) -> int:
        """The tokens that an answer to a prompt can have.

        Raises:
            ApiError: none, and which limit is too low.
        """
        config, room = self._config, self.room
        prefilled = self._scheduler.split(prompt).prefilled
        prefix = config.system.held(prompt.ids[:prefilled], config.vision)
        if any(size > most for size, most in zip(prefix, room.prefixes, strict=True)):
            raise ApiError(
                400,
                f"up to its last image the prompt has {prefilled} positions, and this server has "
                f"room for {min(room.prefixes)} (--prefix-context); show images earlier, or fewer",
                param="messages",
                code="context_length_exceeded",
            )
        held = config.system.held(prompt.ids, config.vision)
        left = [most - size for size, most in zip(held, room.contexts, strict=True)]
        most = min(*left, self.context - len(prompt.ids), self._new)
        if most < 1:
            raise ApiError(
                400,
                f"the prompt has {len(prompt.ids)} tokens, images included, which leaves no room "
                f"for an answer in {self.context}; shorten it or give fewer images",
                param="messages",
                code="context_length_exceeded",
            )
        return most

    def check_queue(self) -> None:
        """Refuses what would have to wait too long, before it is decoded.

        Raises:
            ApiError: the queue is full, the server stops, or the devices have failed.
        """
        if self._stopping or self._deadline is not None:
            raise self._stopped()
        if self.broken is not None:
            raise ApiError(500, self.broken)
        if self._scheduler.queued >= self._queue:
            raise ApiError(
                429,
                f"{self._queue} requests wait already; try again in a second",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    async def answer(
        self,
        prompt: Prompt,
        builder: AnswerBuilder,
        *,
        sampling: Sampling,
        most: int,
        came: float,
    ) -> AsyncIterator[Piece]:
        """The pieces of an answer as they come; who stops listening frees its slot.

        Args:
            prompt: what is asked.
            builder: makes text of tokens.
            sampling: how these are chosen.
            most: tokens of the answer.
            came: when the request came, by `time.monotonic`.

        Raises:
            ApiError: the queue is full, the server stops, or the devices fail.
        """
        events: asyncio.Queue[tuple[int, bool, str | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def heard(ticket: Ticket) -> None:
            reason = self.broken or (None if ticket.error is None else str(ticket.error))
            event = len(ticket.ids), ticket.finished, reason
            # The loop may have ended meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self._submit(prompt, sampling=sampling, most=most, heard=heard)
        seen, first = 0, None
        try:
            while True:
                try:
                    count, ended, reason = await asyncio.wait_for(events.get(), 1.0)
                except TimeoutError:
                    if self._is_late():
                        raise ApiError(
                            503, "the server is shutting down; ask another one"
                        ) from None
                    continue
                if reason is not None:
                    raise ApiError(500 if self.broken else 400, reason)
                if not ended and self._is_late():
                    raise self._stopped()
                now = time.monotonic()
                if count and first is None:
                    first = now
                    self._metrics.first_token.observe(now - came)
                text = builder.push(ticket.ids[seen:count])
                seen = count
                done = ended or builder.finished
                if done:
                    text += builder.finish()
                usage = Usage(
                    prompt=len(prompt.ids),
                    image=int((prompt.ids == IMAGE_TOKEN_ID).sum()),
                    cached=ticket.reused,
                    new=len(builder.token_ids),
                )
                end: Ending = "stop" if builder.finished else "length"
                if done:
                    # Nobody may ask for more.
                    self._count(usage, first or now, now)
                yield Piece(text=text, finish_reason=end if done else None, usage=usage)
                if done:
                    return
        finally:
            self._forget(ticket)

    def shut(self, *, within: float) -> None:
        """Refuses new requests; answers that are not complete in so many seconds end in an error.

        It may be called by a signal's handler.
        """
        if self._deadline is None:
            self._deadline = time.monotonic() + within

    def close(self) -> None:
        """Ends the thread."""
        with self._work:
            self._stopping = True
            self._work.notify()
        self._thread.join()
        self._scheduler.close()

    def _stopped(self) -> ApiError:
        return ApiError(503, "the server is shutting down; ask another one")

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _count(self, usage: Usage, first: float, last: float) -> None:
        self._metrics.prompt_tokens.inc(usage.prompt)
        self._metrics.cached_tokens.inc(usage.cached)
        self._metrics.new_tokens.inc(usage.new)
        if usage.new > 1:
            self._metrics.per_token.observe((last - first) / (usage.new - 1))

    def _submit(
        self, prompt: Prompt, *, sampling: Sampling, most: int, heard: Callable[[Ticket], None]
    ) -> Ticket:
        with self._work:
            self.check_queue()
            ticket = self._scheduler.submit(prompt, sampling=sampling, most=most)
            self._listeners[ticket] = heard
            self._work.notify()
            return ticket

    def _forget(self, ticket: Ticket) -> None:
        with self._work:
            self._listeners.pop(ticket, None)
            if not ticket.finished:
                self._scheduler.cancel(ticket)
            self._work.notify()

    def _run(self) -> None:
        while True:
            with self._work:
                self._measure()
                self._work.wait_for(lambda: self._stopping or self._scheduler.busy, timeout=1.0)
                if self._stopping:
                    return
            try:
                every = _EVERY_FULL if self._scheduler.queued else _EVERY
                progress = self._scheduler.step(every=every) if self._scheduler.busy else []
            except Exception as error:  # noqa: BLE001
                # Whatever it is, every client is told, and the server counts as unhealthy.
                _LOG.exception("the devices failed")
                self.broken = f"the devices failed: {str(error).partition(chr(10))[0]}"
                with self._work:
                    listeners, self._listeners = self._listeners, {}
                for ticket, heard in listeners.items():
                    heard(ticket)
                return
            with self._work:
                told = [(one.ticket, self._listeners.get(one.ticket)) for one in progress]
            for ticket, listener in told:
                if listener is not None:
                    listener(ticket)

    def _measure(self) -> None:
        self._metrics.running.set(self._scheduler.running)
        self._metrics.waiting.set(self._scheduler.queued)
        self._metrics.prefixes.set(self._scheduler.held / self.room.kept)
