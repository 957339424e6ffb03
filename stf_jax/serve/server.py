"""Loading, warming up, listening and shutting down: one process, one model."""

import dataclasses
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import numpy as np
import uvicorn

from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.engine import Engine, batch_sizes, room_for
from stf_jax.infer.model import Model
from stf_jax.infer.prompts import bucket
from stf_jax.infer.room import Room
from stf_jax.models.connector import Architecture
from stf_jax.serve.app import Ready, Service, make_app
from stf_jax.serve.prompts import Prompts
from stf_jax.serve.warm import every_length
from stf_jax.serve.worker import Worker
from stf_jax.util.errors import explain_memory

# Connections at a time; more get 503.
_CONNECTIONS = 1024
# Bytes of a request before its body.
_MOST_HEADERS = 64 * 2**10


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
        images: of a request, at most.
        tokens: of an image, that may be asked for; none is all that the system has.
        warm_question: the most tokens behind the last image that the warm-up compiles for; None is
            all that there is room for.
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
    images: int = 16
    tokens: tuple[int, ...] = ()
    warm_question: int | None = None
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name in ("slots", "max_new_tokens", "prefixes", "queue", "images", "warm_question"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; give 0 (any free one) to {2**16 - 1}")
        if self.grace < 0:
            raise ValueError(f"grace is {self.grace}; give seconds, 0 or more")

    def positions(self, engine: Engine) -> int:
        """Of a request and its answer.

        Raises:
            ValueError: more than the model has.
        """
        most = engine.config.text.max_positions
        context = min(2048, most) if self.context is None else self.context
        if not 1 < context <= most:
            raise ValueError(f"context is {context}; the model has {most} positions")
        return context

    def room(self, engine: Engine) -> Room:
        """What the devices hold.

        Raises:
            ValueError: more than the model's context.
        """
        config, context = engine.config, self.positions(engine)
        tokens = config.tokens_per_image
        new = min(self.max_new_tokens, context - 1)
        prefix = self.prefix_context
        prefix = min(context, max(2 * tokens + 128, 512)) if prefix is None else prefix
        if not 1 <= prefix <= context:
            raise ValueError(f"prefix_context is {prefix}; give 1 to {context}, the context")
        slots, rows = batch_sizes(self.slots, multiple=engine.program.row_multiple)
        kept = -(-max(self.prefixes, rows) // rows) * rows
        # Text alone takes a slot of every layer for each of its tokens.
        contexts = room_for(config, [np.zeros(context, np.int32)], 0)
        return Room(
            slots=slots,
            rows=rows,
            contexts=contexts,
            new=bucket(new),
            kept=kept,
            prefixes=_prefixes(config, prefix, contexts),
            is_coarse=True,
        )


def _prefixes(config: Architecture, length: int, contexts: tuple[int, ...]) -> tuple[int, ...]:
    """Slots of a prefix of so many positions, by group of layers.

    A prefix has as many images as fit, or one and text. A system that reads the whole prompt has
    no shorter prefix than that.
    """
    first, prompts = config.images_first, []
    for images in {1, max((length - 64) // config.tokens_per_image, 1)}:
        behind = [] if first is None else first.tokens(images)
        text = max(length - images * config.tokens_per_image - len(behind), 1)
        image = np.full(images * config.tokens_per_image, IMAGE_TOKEN_ID)
        ids = np.concatenate([np.zeros(text), image, behind]).astype(np.int32)
        if config.system.split(np.append(ids, np.int32(0))).prefilled > len(ids):
            return contexts
        prompts.append(ids)
    return room_for(config, prompts, 0)


def serve(load: Callable[[], Model], config: ServeConfig) -> None:
    """Listens until a signal comes; the model is loaded meanwhile.

    Raises:
        OSError: the address cannot be had.
        ValueError: the model or the config is wrong.
    """
    service = Service(name=config.name, api_key=config.api_key)
    server = make_server(service, config)
    failure: list[Exception] = []

    def prepare() -> None:
        try:
            service.ready = make_ready(load(), config, service)
        except Exception as error:  # noqa: BLE001
            # Whatever it is: without a model there is nothing to serve.
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


def make_server(service: Service, config: ServeConfig) -> "Server":
    """What listens, with limits on what a client may send and hold."""
    return Server(
        uvicorn.Config(
            make_app(service),
            host=config.host,
            port=config.port,
            log_level="warning",
            http="h11",
            timeout_graceful_shutdown=int(config.grace) + 5,
            h11_max_incomplete_event_size=_MOST_HEADERS,
            limit_concurrency=_CONNECTIONS,
        ),
        service,
        grace=config.grace,
    )


def make_ready(model: Model, config: ServeConfig, service: Service) -> Ready:
    """The model with its worker, after everything that can come has been compiled.

    Raises:
        ValueError: a template that does not fit, or more positions than the model has.
    """
    room, context = config.room(model.engine), config.positions(model.engine)
    prompts = Prompts(
        model,
        template=config.template,
        domains=config.domains,
        most_images=config.images,
        context=context,
        budgets=config.tokens,
    )
    service.status = "warming up"
    start = time.perf_counter()
    shortage = (
        f"{room.slots} slots of {max(room.contexts)} positions and {room.kept} prefixes of "
        f"{max(room.prefixes)} do not fit into the memory of a device; give fewer, or "
        "--cache-dtype int8"
    )
    with explain_memory(shortage):
        worker = Worker(
            model.engine,
            room,
            queue=config.queue,
            metrics=service.metrics,
            context=context,
            new=config.max_new_tokens,
        )
        shapes = every_length(model.config, prompts, budgets=prompts.budgets, context=context)
        programs = worker.warm_up(shapes, longest=config.warm_question or context)
    _say(f"warm after {time.perf_counter() - start:.1f} s: {programs} programs")
    return Ready(model=model, prompts=prompts, worker=worker)


class Server(uvicorn.Server):
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
        if self.should_exit:
            self.force_exit = True
        else:
            _say("stopping: answers in the making are completed")
        super().handle_exit(sig, frame)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
