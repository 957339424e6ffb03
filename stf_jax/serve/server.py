"""Loading, warming up, listening and shutting down: one process, one model."""

import dataclasses
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import numpy as np
import uvicorn

from stf_jax.infer.engine import Engine, batch_sizes
from stf_jax.infer.model import Model
from stf_jax.infer.prompts import Prompt, bucket
from stf_jax.infer.sampling import GREEDY, Sampling
from stf_jax.infer.scheduler import Room
from stf_jax.serve.app import Ready, Service, make_app
from stf_jax.serve.prompts import Prompts
from stf_jax.serve.schema import Message
from stf_jax.serve.worker import Worker

_LOG = logging.getLogger("stf_jax.serve")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a server listens, and what it holds.

    Attributes:
        name: of the model, for clients.
        host: address to listen on.
        port: likewise; 0 is any free one.
        template: the form of the conversations.
        slots: answers in the making at a time.
        context: positions of a request, its answer included; None is 2048, or the model's own.
        max_new_tokens: of an answer.
        prefixes: that stay in the cache, with their images.
        prefix_context: positions of a prefix: the system text and all images.
        queue: requests that may wait.
        domains: from which images may be fetched.
        api_key: that clients must send.
        warm_question: the longest question that is compiled for before the first request.
        grace: seconds that answers have to end in when the server stops.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    template: str = "v1"
    slots: int = 16
    context: int | None = None
    max_new_tokens: int = 512
    prefixes: int = 32
    prefix_context: int | None = None
    queue: int = 256
    domains: tuple[str, ...] = ()
    api_key: str | None = None
    warm_question: int = 128
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name in ("slots", "max_new_tokens", "prefixes", "queue", "warm_question"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; give 0 (any free one) to {2**16 - 1}")
        if self.grace < 0:
            raise ValueError(f"grace is {self.grace}; give seconds, 0 or more")

    def room(self, engine: Engine) -> Room:
        """What the devices hold.

        Raises:
            ValueError: more than the model's context.
        """
        config = engine.config
        most, tokens = config.text.max_positions, config.tokens_per_image
        context = min(2048, most) if self.context is None else self.context
        if not 1 < context <= most:
            raise ValueError(f"context is {context}; the model has {most} positions")
        new = min(self.max_new_tokens, context - 1)
        prefix = self.prefix_context
        prefix = min(context, max(2 * tokens + 128, 512)) if prefix is None else prefix
        if not 1 <= prefix <= context:
            raise ValueError(f"prefix_context is {prefix}; give 1 to {context}, the context")
        slots, rows = batch_sizes(self.slots, multiple=engine.program.row_multiple)
        groups = len(config.system.held(np.zeros(2, np.int32), config.vision))
        kept = -(-max(self.prefixes, rows) // rows) * rows
        return Room(
            slots=slots,
            rows=rows,
            contexts=(bucket(context),) * groups,
            new=bucket(new),
            kept=kept,
            prefixes=(bucket(prefix),) * groups,
        )


def serve(load: Callable[[], Model], config: ServeConfig) -> None:
    """Listens until a signal comes; the model is loaded meanwhile.

    Raises:
        OSError: the address cannot be had.
        ValueError: the model or the config is wrong.
    """
    service = Service(name=config.name, api_key=config.api_key)
    server = _Server(
        uvicorn.Config(
            make_app(service),
            host=config.host,
            port=config.port,
            log_level="warning",
            timeout_graceful_shutdown=int(config.grace) + 5,
            h11_max_incomplete_event_size=64 * 2**10,
        ),
        service,
        grace=config.grace,
    )
    failure: list[Exception] = []

    def prepare() -> None:
        try:
            service.ready = make_ready(load(), config, service)
        except (OSError, ValueError) as error:
            failure.append(error)
            server.should_exit = True
            return
        _say(f"ready: http://{config.host}:{server.bound_port}/v1, model {config.name!r}")

    loader = threading.Thread(target=prepare, name="loader", daemon=True)
    server.on_start = loader.start
    server.run()
    if failure:
        raise failure[0]
    if not server.started:
        raise OSError(f"{config.host}:{config.port} cannot be listened on; choose another --port")
    if service.ready is not None:
        service.ready.worker.close()


def make_ready(model: Model, config: ServeConfig, service: Service) -> Ready:
    """The model with its worker, after everything that is common has been compiled.

    Raises:
        ValueError: a template that does not fit, or more positions than the model has.
    """
    prompts = Prompts(model, template=config.template, domains=config.domains)
    room = config.room(model.engine)
    service.status = "warming up"
    start = time.perf_counter()
    programs = warm_up(model, prompts, room, longest=config.warm_question)
    _say(f"warm after {time.perf_counter() - start:.1f} s: {programs} shapes of requests")
    worker = Worker(model.engine, room, queue=config.queue, metrics=service.metrics)
    return Ready(model=model, prompts=prompts, worker=worker)


def warm_up(model: Model, prompts: Prompts, room: Room, *, longest: int) -> int:
    """Answers a request of each common shape; how many there were.

    Those are: no image or one, every budget, questions up to `longest` tokens, greedy and drawn.
    """
    scheduler, count = model.engine.open(room), 0
    for prompt in _shapes(model, prompts, longest=longest):
        for sampling in (GREEDY, Sampling(temperature=1.0)):
            count += 1
            scheduler.submit(prompt, sampling=sampling, most=2)
            while scheduler.busy:
                scheduler.step(every=1)
    scheduler.close()
    return count


def _shapes(model: Model, prompts: Prompts, *, longest: int) -> Iterator[Prompt]:
    config = model.config
    size = config.image_size
    lengths = sorted({bucket(n, least=16) for n in range(1, longest + 1)})
    asked = [Message(role="user", content="What is this?")]
    text = prompts.chat(asked)[0]
    # A prompt without images shares nothing: all of it is prefilled.
    for length in sorted({bucket(len(text.ids) + n) for n in (0, *lengths)}):
        yield dataclasses.replace(text, ids=np.resize(text.ids, length))
    for budget in config.system.budgets(config.vision):
        seen = prompts.show(np.zeros((1, size, size, 3), np.float32), budget)
        start = config.system.split(seen.ids).start
        for length in lengths:
            rest = np.resize(seen.ids[start:], length)
            yield dataclasses.replace(seen, ids=np.concatenate([seen.ids[:start], rest]))


class _Server(uvicorn.Server):
    """Tells the worker when a signal comes, so that every client is told."""

    def __init__(self, config: uvicorn.Config, service: Service, *, grace: float):
        super().__init__(config)
        self._service, self._grace = service, grace
        self.on_start: Callable[[], None] = lambda: None

    @property
    def bound_port(self) -> int:
        """Where it listens."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listens, and begins to load."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            self.on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets answers end, the second does not."""
        if self._service.ready is not None:
            self._service.ready.worker.shut(within=self._grace)
        if sig in (signal.SIGTERM, signal.SIGINT) and not self.should_exit:
            _say("stopping: answers in the making are completed")
        super().handle_exit(sig, frame)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
