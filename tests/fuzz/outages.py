"""A server killed and restarted, and stopped under load, as a process of its own.

    python -m tests.fuzz.outages --kills 3

After each kill it is started again on the same port, and answers as before. At the end it gets
SIGTERM while every client waits: each has its whole answer, or an error that says why.
"""

import argparse
import collections
import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx

from tests.stf_jax.serve.conftest import asks, png

CLIENTS = 8
IMAGES = [png(color) for color in ((200, 30, 30), (20, 40, 220))]
SHOULD_END = "data: [DONE]\n\n"


class Outages:
    """A server's process, and what became of requests to it."""

    def __init__(self, model: str, port: int):
        self._model, self._port = model, port
        self.url = f"http://127.0.0.1:{port}"
        self.outcomes: collections.Counter[str] = collections.Counter()
        self._expected: dict[int, str] = {}
        self._stop = threading.Event()

    def start(self) -> subprocess.Popen[bytes]:
        """Starts it; gives it when it is ready."""
        given = ["--port", str(self._port), "--slots", "4", "--context", "128", "--images", "1"]
        given += ["--max-new-tokens", "32", "--queue", "32", "--warm-question", "32"]
        process = subprocess.Popen([sys.executable, "-m", "stf_jax", "serve", self._model, *given])
        while process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return process
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise RuntimeError("the server ended before it was ready")

    def learn(self) -> None:
        """What each question is answered, one at a time."""
        for number in range(2):
            answer = httpx.post(f"{self.url}/v1/chat/completions", json=body(number), timeout=60)
            self._expected[number] = answer.json()["choices"][0]["message"]["content"]

    def ask_on(self, client: int) -> None:
        """Asks until it is stopped."""
        number = client
        while not self._stop.is_set():
            number += 1
            self.outcomes[self._ask(number)] += 1

    def _ask(self, number: int) -> str:
        stream = number % 3 == 0
        sent = {**body(number), "stream": stream}
        try:
            answer = httpx.post(f"{self.url}/v1/chat/completions", json=sent, timeout=60)
        except httpx.ConnectError:
            time.sleep(0.05)
            return "refused: nobody listens"
        except httpx.HTTPError as error:
            return f"cut: {type(error).__name__}"
        if answer.status_code != 200:
            return f"status {answer.status_code}"
        if stream:
            if answer.text.endswith(SHOULD_END):
                return "stream"
            last = answer.text.rstrip().rpartition("\n\n")[2]
            return "stream: error event" if '"error"' in last else "cut: stream without a word"
        said = answer.json()["choices"][0]["message"]["content"]
        return "answer" if said == self._expected[number % 2] else f"WRONG {said!r}"

    def play(self, seconds: float, process: subprocess.Popen[bytes], sent: int) -> int:
        """Sends a signal while all clients ask; the exit status."""
        self._stop.clear()
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
            asking = [clients.submit(self.ask_on, client) for client in range(CLIENTS)]
            time.sleep(seconds)
            process.send_signal(sent)
            status = process.wait(timeout=60)
            self._stop.set()
            for one in asking:
                one.result()
        return status


def body(number: int) -> dict[str, object]:
    """A request; those with even and odd numbers are alike."""
    message = asks(f"Question {number % 2}?", IMAGES[number % 2])
    return {"messages": [message], "temperature": 0, "max_tokens": 24}


def main(arguments: list[str] | None = None) -> int:
    """Kills, restarts, stops, prints what came of it; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="of load before each signal")
    parser.add_argument("--model", default="tests/data/reference/llava-stf")
    options = parser.parse_args(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    outages = Outages(options.model, port)
    process = outages.start()
    outages.learn()
    for _ in range(options.kills):
        outages.play(options.seconds, process, signal.SIGKILL)
        process = outages.start()
    killed, outages.outcomes = outages.outcomes, collections.Counter()
    status = outages.play(options.seconds, process, signal.SIGTERM)
    for title, counts in (("killed", killed), ("stopped", outages.outcomes)):
        for outcome, count in sorted(counts.items()):
            sys.stdout.write(f"{title}: {count:6}  {outcome}\n")
    sys.stdout.write(f"exit status after SIGTERM: {status}\n")
    wrong = [name for name in killed | outages.outcomes if name.startswith("WRONG")]
    cut = [name for name in outages.outcomes if name.startswith("cut")]
    return int(bool(wrong or cut or status not in (0, -signal.SIGTERM)))


if __name__ == "__main__":
    raise SystemExit(main())
