"""A server in this process, over the reference's model."""

import base64
import dataclasses
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

import stf_jax
from stf_jax.infer.room import Room
from stf_jax.serve.app import Ready, Service
from stf_jax.serve.prompts import Prompts
from stf_jax.serve.server import ServeConfig, Server, make_server
from stf_jax.serve.worker import Worker

CONFIG = ServeConfig(name="tiny", slots=4, context=320, max_new_tokens=128, prefixes=4)


@dataclasses.dataclass
class Running:
    """A server that answers."""

    url: str
    service: Service
    model: stf_jax.Model
    room: Room

    @property
    def worker(self) -> Worker:
        assert self.service.ready is not None
        return self.service.ready.worker

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, **options)

    def post(self, body: Any, *, path: str = "/v1/chat/completions", **options: Any) -> Any:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **options)


def run(service: Service, *, grace: float = 30) -> tuple[Server, threading.Thread, str]:
    config = ServeConfig(name=service.name, port=0, grace=grace)
    server = make_server(service, config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    return server, thread, f"http://127.0.0.1:{server.bound_port}"


@pytest.fixture(scope="session")
def serving(model: stf_jax.Model) -> Iterator[Running]:
    service = Service(name=CONFIG.name, most_body=2**20)
    room = CONFIG.room(model.engine)
    worker = Worker(model.engine, room, queue=8, metrics=service.metrics)
    service.ready = Ready(
        model=model,
        prompts=Prompts(model, template="v1", most_images=4, context=CONFIG.context),
        worker=worker,
    )
    server, thread, url = run(service)
    yield Running(url=url, service=service, model=model, room=room)
    server.should_exit = True
    thread.join()
    worker.close()


def png(color: tuple[int, int, int], size: tuple[int, int] = (60, 40)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def asks(text: str, *images: bytes) -> dict[str, Any]:
    """A user's message."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": parts}
