"""What a client may send: so many bytes of a body, and not too slowly."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from stf_jax.serve.schema import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Seconds that a body may take.
_PATIENCE = 120.0
# A body that is too large is read up to so many times the limit, so that its sender, who may still
# be writing, sees the answer.
_DRAINED = 4


class BodyLimit:
    """Middleware that ends a request whose body is too large or comes too slowly.

    Args:
        app: what it protects.
        most: bytes of a body, whatever its headers say.
        patience: seconds for all of it.
    """

    def __init__(self, app: App, *, most: int, patience: float = _PATIENCE):
        self._app, self._most, self._patience = app, most, patience

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")
        has_body = declared != b"0" and (declared or b"transfer-encoding" in headers)
        if declared.isdigit() and int(declared) > self._most:
            await _refuse(send, self._too_large())
            return
        seen, complete, begun = 0, False, False
        deadline = time.monotonic() + self._patience

        async def limited() -> Message:
            nonlocal seen, complete
            while not complete:
                try:
                    message = await asyncio.wait_for(receive(), deadline - time.monotonic())
                except TimeoutError:
                    raise ApiError(
                        408, "the request's body comes too slowly; send it again"
                    ) from None
                if message["type"] != "http.request":
                    return message
                seen += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if seen <= self._most:
                    return message
                if complete or seen > _DRAINED * self._most:
                    raise self._too_large()
            return await receive()

        async def noted(message: Message) -> None:
            nonlocal begun
            if not begun and has_body and not complete:
                # Nobody reads the rest of the body.
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            begun = True
            await send(message)

        try:
            await self._app(scope, limited, noted)
        except ApiError as error:
            if begun:
                raise
            await _refuse(send, error)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._most // 2**20} MiB; send fewer or smaller images"
        )


async def _refuse(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
