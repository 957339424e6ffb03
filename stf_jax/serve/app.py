"""The server's paths: chat and text completions, models, health, metrics, and the page."""

import asyncio
import dataclasses
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from stf_jax.infer.answers import AnswerBuilder
from stf_jax.infer.model import Model
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import Sampling
from stf_jax.serve.form import Form
from stf_jax.serve.limits import BodyLimit
from stf_jax.serve.metrics import Metrics
from stf_jax.serve.prompts import Prompts
from stf_jax.serve.schema import ApiError, ChatRequest, CompletionRequest
from stf_jax.serve.worker import Piece, Worker

_DECODERS = 4
_PAGE = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
# Nothing but the page's own files runs or is loaded; images are those that a user drops.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(kw_only=True)
class Ready:
    """A model that answers."""

    model: Model
    prompts: Prompts
    worker: Worker


@dataclasses.dataclass(kw_only=True)
class Service:
    """What the paths know: the model when it is there, and until then what it waits for.

    Attributes:
        name: of the model, for clients.
        metrics: of the server.
        api_key: that clients must send; None asks for none.
        most_body: bytes of a request.
        status: what is done until the model is ready.
        ready: the model.
    """

    name: str
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    api_key: str | None = None
    most_body: int = 64 * 2**20
    status: str = "loading"
    ready: Ready | None = None

    @property
    def names(self) -> dict[str, int | None]:
        """What clients may call the model, and the tokens of an image under that name."""
        budgets = [] if self.ready is None else self.ready.prompts.budgets
        each = {f"{self.name}@{budget}": budget for budget in budgets} if budgets[1:] else {}
        return {self.name: None, **each}

    def get(self) -> Ready:
        """The model.

        Raises:
            ApiError: it is not there yet.
        """
        if self.ready is None:
            raise ApiError(
                503, f"the model is {self.status}; try again soon", headers={"Retry-After": "5"}
            )
        return self.ready


def make_app(service: Service) -> FastAPI:
    """The application; it does not own the worker."""
    app = FastAPI(title="stf-jax", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, most=service.most_body)
    _add_errors(app, service)
    _add_answers(app, service)

    # None of these waits for anything, so none needs a thread.
    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _check_key(service, request)
        return {"object": "list", "data": [_describe(service, name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        _check_key(service, request)
        _check_name(service, name)
        return _describe(service, name)

    @app.get("/health")
    async def health() -> JSONResponse:
        broken = service.ready and service.ready.worker.broken
        status = broken or ("ok" if service.ready else service.status)
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    @app.get("/{name}")
    async def page(name: str = "page.html") -> Response:
        if name not in _PAGE:
            raise HTTPException(404)
        body = files("stf_jax.serve").joinpath("static", name).read_bytes()
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(body, media_type=_PAGE[name], headers=headers)

    return app


def _add_errors(app: FastAPI, service: Service) -> None:
    def answer(error: ApiError) -> JSONResponse:
        service.metrics.requests.labels(status=str(error.status)).inc()
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    def refused(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(HTTPException)
    def http(_: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, error.detail or "not found"))


def _add_answers(app: FastAPI, service: Service) -> None:
    # Images are large once they are decoded.
    decoding = asyncio.Semaphore(_DECODERS)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        came = time.monotonic()
        _check_key(service, request)
        asked: ChatRequest = await _read(request, ChatRequest)
        ready, builder_of = service.get(), service.get().model.make_builder
        budget = _check_name(service, asked.model)
        if budget and asked.image_tokens not in (None, budget):
            raise ApiError(
                400,
                f"image_tokens is {asked.image_tokens} and the model {asked.model!r}; make the two "
                "agree",
                param="image_tokens",
            )
        ready.worker.check_queue()
        async with decoding:
            prompt, template = await run_in_threadpool(
                ready.prompts.chat, asked.messages, tokens=budget or asked.image_tokens
            )
        builder = _checked(lambda: builder_of(template, asked.stops))
        form = Form(asked.model or service.name, chat=True)
        return await _respond(service, request, asked, prompt, builder, form, came=came)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        came = time.monotonic()
        _check_key(service, request)
        asked: CompletionRequest = await _read(request, CompletionRequest)
        ready = service.get()
        _check_name(service, asked.model)
        ready.worker.check_queue()
        async with decoding:
            prompt = await run_in_threadpool(ready.prompts.plain, asked.prompt)
        model = ready.model
        builder = _checked(
            lambda: AnswerBuilder(
                model.tokenizer, stop_ids=model.config.text.eos_ids, stops=asked.stops
            )
        )
        form = Form(asked.model or service.name, chat=False)
        return await _respond(service, request, asked, prompt, builder, form, came=came)


async def _read(request: Request, kind: type[Any]) -> Any:
    """The request's JSON, checked.

    Raises:
        ApiError: no JSON, or not of this form.
    """
    try:
        return await run_in_threadpool(kind.model_validate_json, await request.body())
    except ValidationError as error:
        raise _explain(error.errors()[0]) from error


def _explain(error: Any) -> ApiError:
    """The first thing that is wrong, in one line."""
    place = ".".join(str(part) for part in error["loc"] if part != "body")
    message = str(error["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{place}: {message}" if place else message, param=place or None)


def _checked(make: Callable[[], Any]) -> Any:
    """What `make` gives.

    Raises:
        ApiError: where that raises ValueError.
    """
    try:
        return make()
    except ValueError as error:
        raise ApiError(400, str(error)) from error


def _check_key(service: Service, request: Request) -> None:
    if service.api_key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    if not hmac.compare_digest(given, service.api_key.encode()):
        raise ApiError(401, "wrong API key; send Authorization: Bearer KEY", code="invalid_api_key")


def _check_name(service: Service, name: str | None) -> int | None:
    """The tokens of an image that a name stands for, where it stands for any.

    Raises:
        ApiError: there is no such model.
    """
    if not name:
        return None
    if name not in service.names:
        raise ApiError(
            404,
            f"there is no model {name!r}; this server has {' and '.join(map(repr, service.names))}",
            param="model",
            code="model_not_found",
        )
    return service.names[name]


def _describe(service: Service, name: str) -> dict[str, Any]:
    described = {"id": name, "object": "model", "created": 0, "owned_by": "stf-jax"}
    if service.ready is None:
        return described
    config, budgets = service.ready.model.config, service.ready.prompts.budgets
    return described | {
        "max_model_len": service.ready.worker.context,
        # Ours: the tokens of an image, for the page.
        "image_tokens": budgets if service.names[name] is None else [service.names[name]],
        "image_size": config.image_size,
    }


async def _respond(
    service: Service,
    request: Request,
    asked: ChatRequest | CompletionRequest,
    prompt: Prompt,
    builder: AnswerBuilder,
    form: Form,
    *,
    came: float,
) -> Response:
    ready = service.get()
    sampling: Sampling = _checked(lambda: asked.sampling)
    most = _limit(ready.worker, prompt, asked.most)
    pieces = ready.worker.answer(prompt, builder, sampling=sampling, most=most, came=came)
    if asked.stream:
        # What is refused is refused before the stream begins, with its own status.
        first = await _first(request, pieces)
        if first is None:
            return _hung_up(service)
        wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = _stream(service, first, pieces, form, wants_usage=wants_usage)
        return StreamingResponse(events, media_type="text/event-stream")
    text, last = "", None
    async for last in _while_connected(request, pieces):
        text += last.text
    if last is None or last.finish_reason is None:
        return _hung_up(service)
    service.metrics.requests.labels(status="200").inc()
    return JSONResponse(form.whole(text.strip(), last.finish_reason, last.usage))


def _limit(worker: Worker, prompt: Prompt, wanted: int | None) -> int:
    """The tokens of an answer.

    Raises:
        ApiError: none wanted, or the prompt leaves no room.
    """
    if wanted is not None and wanted < 1:
        raise ApiError(400, f"max_tokens is {wanted}; give 1 or more", param="max_tokens")
    room = worker.fits(prompt)
    if wanted is not None and wanted > room:
        # Cut in silence, an answer would look like the model's own.
        raise ApiError(
            400,
            f"max_tokens is {wanted}; behind a prompt of {len(prompt.ids)} tokens, images "
            f"included, this server has room for {room}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return room if wanted is None else wanted


async def _stream(
    service: Service,
    first: Piece,
    pieces: AsyncIterator[Piece],
    form: Form,
    *,
    wants_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events; whoever hangs up closes `pieces`."""

    def event(body: object) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"

    status, begun = "499", False
    try:
        yield event(form.piece(None, None, first=True))
        piece = first
        while True:
            text = piece.text if begun else piece.text.lstrip()
            begun |= bool(text)
            if text or piece.finish_reason:
                yield event(form.piece(text, piece.finish_reason))
            if piece.finish_reason is not None:
                break
            piece = await anext(pieces)
        if wants_usage:
            yield event(form.last(piece.usage))
        yield "data: [DONE]\n\n"
        status = "200"
    except ApiError as error:
        # The status line has gone out; the client reads this instead.
        yield event(error.body())
        status = str(error.status)
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]
        service.metrics.requests.labels(status=status).inc()


def _hung_up(service: Service) -> Response:
    """Nobody reads this."""
    service.metrics.requests.labels(status="499").inc()
    return Response(status_code=499)


async def _first(request: Request, pieces: AsyncIterator[Piece]) -> Piece | None:
    """The first piece; None where the client hangs up before it."""
    gone = asyncio.ensure_future(_disconnection(request))
    coming = asyncio.ensure_future(anext(pieces))
    try:
        await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
        if coming.done():
            return coming.result()
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        return None
    finally:
        gone.cancel()


async def _while_connected(request: Request, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """The pieces, until the client hangs up."""
    gone = asyncio.ensure_future(_disconnection(request))
    try:
        while True:
            coming = asyncio.ensure_future(anext(pieces))
            await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
                return
            try:
                yield coming.result()
            except StopAsyncIteration:
                return
    finally:
        gone.cancel()
        await pieces.aclose()  # type: ignore[attr-defined]


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
