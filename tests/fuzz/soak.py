"""Thousands of mixed requests to a server: right answers, hang-ups, broken images, hostile bodies.

    python -m tests.fuzz.soak --requests 10000

Every answer is compared with what the model says when it is asked alone. At the end nothing may be
at work, and memory, threads and descriptors are what they were after the first requests.
"""

import argparse
import collections
import concurrent.futures
import os
import random
import sys
import threading
import time
from pathlib import Path

import httpx
import uvicorn

import stf_jax
from stf_jax.serve.app import Ready, Service, make_app
from stf_jax.serve.prompts import Prompts
from stf_jax.serve.server import ServeConfig
from stf_jax.serve.worker import Worker
from tests.stf_jax.serve.conftest import asks, png

CLIENTS = 8
CONFIG = ServeConfig(name="tiny", slots=4, context=320, max_new_tokens=64, prefixes=4)
COLORS = [(200, 30, 30), (20, 40, 220), (30, 180, 60), (240, 240, 240), (5, 5, 5), (250, 200, 10)]
KINDS = {"answer": 55, "stream": 15, "hang up": 10, "image": 6, "json": 6, "large": 4, "limit": 4}


class Soak:
    """A server, its clients, and what became of their requests."""

    def __init__(self, model: stf_jax.Model, seed: int):
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._rng, self._lock = random.Random(seed), threading.Lock()
        self._images = [png(color) for color in COLORS]
        self._expected: dict[tuple[int, int], str] = {}
        self._model = model
        service = Service(name=CONFIG.name, most_body=2**20)
        self.worker = Worker(
            model.engine, CONFIG.room(model.engine), queue=16, metrics=service.metrics
        )
        service.ready = Ready(
            model=model, prompts=Prompts(model, template="v1"), worker=self.worker
        )
        self._server = uvicorn.Server(
            uvicorn.Config(make_app(service), host="127.0.0.1", port=0, log_level="error")
        )
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"

    def learn(self) -> None:
        """What each question about each image is answered, one at a time."""
        for image in range(len(COLORS)):
            for question in range(3):
                request = stf_jax.Request(
                    prompt=f"Question {question}?", images=[self._images[image]]
                )
                (answer,) = self._model.generate([request], max_new_tokens=8)
                self._expected[image, question] = answer.text

    def ask(self, _: int) -> None:
        """One request of a random kind."""
        with self._lock:
            kind = self._rng.choices([*KINDS], [*KINDS.values()])[0]
            image, question = self._rng.randrange(len(COLORS)), self._rng.randrange(3)
            wait = self._rng.uniform(0.001, 0.05)
        message = asks(f"Question {question}?", self._images[image])
        body = {"messages": [message], "temperature": 0, "max_tokens": 8}
        try:
            outcome = self._send(kind, body, wait, self._expected[image, question])
        except (httpx.HTTPError, OSError) as error:
            outcome = f"{kind}: {type(error).__name__}"
        with self._lock:
            self.outcomes[outcome] += 1
            if "WRONG" in outcome:
                self.wrong.append(outcome)

    def close(self) -> None:
        """Ends the server."""
        self._server.should_exit = True
        self._thread.join()
        self.worker.close()

    def _send(self, kind: str, body: dict[str, object], wait: float, expected: str) -> str:
        if kind == "hang up":
            try:
                timeout = httpx.Timeout(10, read=wait)
                httpx.post(self._url, json={**body, "max_tokens": 64}, timeout=timeout)
            except httpx.ReadTimeout:
                return "hang up"
            return "hang up: too late"
        wants = {"image": 400, "json": 400, "large": 413, "limit": 400}
        if kind in wants:
            content: dict[str, object] = {
                "image": {"json": {**body, "messages": [asks("What?", b"no image")]}},
                "json": {"content": b'{"messages": [' + b"[" * 2000},
                "large": {"content": b" " * (2**20 + 1)},
                "limit": {"json": {**body, "max_tokens": 10**9}},
            }[kind]
            answer = httpx.post(self._url, timeout=60, **content)  # type: ignore[arg-type]
            right = answer.status_code == wants[kind]
            return kind if right else f"{kind}: WRONG {answer.status_code}"
        while True:
            answer = httpx.post(self._url, json={**body, "stream": kind == "stream"}, timeout=60)
            if answer.status_code != 429:
                break
            time.sleep(wait)
        if answer.status_code != 200:
            return f"{kind}: WRONG {answer.status_code} {answer.text[:200]}"
        if kind == "stream":
            if not answer.text.endswith("data: [DONE]\n\n"):
                return "stream: WRONG end"
            return kind
        said = answer.json()["choices"][0]["message"]["content"]
        return kind if said == expected else f"answer: WRONG {said!r}, not {expected!r}"


def footprint() -> tuple[int, int, int]:
    """Resident MiB, threads, open descriptors."""
    status = Path("/proc/self/status").read_text()
    resident = int(status.partition("VmRSS:")[2].split()[0]) // 1024
    return resident, threading.active_count(), len(os.listdir("/proc/self/fd"))


def main(arguments: list[str] | None = None) -> int:
    """Asks, compares, prints a table; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--model", default="tests/data/reference/llava-stf")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    soak = Soak(stf_jax.load(options.model), options.seed)
    soak.learn()
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
        first = max(options.requests // 5, 50)
        list(clients.map(soak.ask, range(first)))
        before = footprint()
        list(clients.map(soak.ask, range(options.requests - first)))
    seconds = time.perf_counter() - start
    deadline = time.monotonic() + 30
    while (soak.worker.active or soak.worker.busy) and time.monotonic() < deadline:
        time.sleep(0.05)
    stuck = soak.worker.active or soak.worker.busy
    after = footprint()
    soak.close()
    lines = [f"{count:7}  {outcome}" for outcome, count in sorted(soak.outcomes.items())]
    lines.append(f"{options.requests} requests in {seconds:.0f} s")
    for name, was, now in zip(("MiB", "threads", "descriptors"), before, after, strict=True):
        lines.append(f"{name}: {was} after the first {first}, {now} at the end")
    sys.stdout.write("\n".join(lines) + "\n")
    grown = after[0] > before[0] + 200 or after[1] > before[1] + 4 or after[2] > before[2] + 16
    return int(bool(soak.wrong or stuck or grown))


if __name__ == "__main__":
    raise SystemExit(main())
