"""A server that is stopped under load, and clients that send too much."""

import concurrent.futures
import io
import signal
import socket
import threading
import time
import zlib

import httpx
import pytest
from PIL import Image, PngImagePlugin

from stf_jax.infer.room import Progress
from tests.stf_jax.serve.conftest import Running, asks, png, run

RED = png((200, 30, 30))


@pytest.mark.parametrize("grace", [60, 0])
def test_a_signal_under_load_cuts_nobody_off_without_a_word(
    serving: Running, grace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two for each slot, half of them streams: whole answers, or an error that says why."""
    server, thread, url = run(serving.service, grace=grace)

    def body(number: int) -> dict[str, object]:
        message = asks(f"Question {number % 2}?", RED)
        return {"messages": [message], "temperature": 0, "max_tokens": 100}

    def ask(number: int) -> httpx.Response:
        sent = {**body(number), "stream": number % 4 > 1}
        return httpx.post(f"{url}/v1/chat/completions", json=sent, timeout=60)

    whole = [serving.post(body(number)).json() for number in range(2)]
    expected = [answer["choices"][0]["message"]["content"] for answer in whole]
    assert min(answer["usage"]["completion_tokens"] for answer in whole) > 2
    scheduler, signaled = serving.worker._scheduler, threading.Event()
    step = scheduler.step

    def wait_and_step(*, every: int) -> list[Progress]:
        assert signaled.wait(timeout=30)
        return step(every=min(every, 1))

    monkeypatch.setattr(scheduler, "step", wait_and_step)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(ask, number) for number in range(8)]
            deadline = time.monotonic() + 30
            # All have come as far as the queue.
            while serving.worker.active < 8:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            server.handle_exit(signal.SIGTERM, None)
            signaled.set()
            answers = [one.result() for one in asked]
        thread.join(timeout=60)
        assert not thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            ask(0)
    finally:
        server.should_exit = True
        thread.join()
        serving.worker._deadline = None
    for number, answer in enumerate(answers):
        if grace == 0:
            assert answer.status_code == 503
            assert "shutting down" in answer.json()["error"]["message"]
        elif number % 4 > 1:
            assert answer.text.endswith("data: [DONE]\n\n")
        else:
            assert answer.json()["choices"][0]["message"]["content"] == expected[number % 2]


def _connect(serving: Running) -> socket.socket:
    host, _, port = serving.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def _reply(connection: socket.socket) -> bytes:
    got = b""
    while block := connection.recv(2**16):
        got += block
        if b"\r\n\r\n" in got:
            break
    return got


@pytest.mark.parametrize("header", ["X-A: " + "a" * 200_000, "X: y\r\n" * 200_000])
def test_a_flood_of_headers_is_refused(serving: Running, header: str) -> None:
    with _connect(serving) as connection:
        try:
            connection.sendall(f"GET /health HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n".encode())
            assert b" 400 " in _reply(connection).partition(b"\r\n")[0]
        except ConnectionError:
            pass  # It hung up before all had been sent.
    assert httpx.get(f"{serving.url}/health").status_code == 200


def test_a_gigabyte_is_refused_before_it_comes(serving: Running) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {2**30}\r\n\r\n"
    with _connect(serving) as connection:
        connection.sendall(head.encode())
        assert b" 413 " in _reply(connection).partition(b"\r\n")[0]
    # In pieces that have no length in front, all but the first of which find nobody.
    sent = 0
    with _connect(serving) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        piece = b"40000\r\n" + b" " * 2**18 + b"\r\n"
        try:
            while sent < 2**30:
                connection.sendall(piece)
                sent += 2**18
        except OSError:
            pass
    assert sent < 2**26
    assert httpx.get(f"{serving.url}/health").status_code == 200


def test_files_that_grow_when_they_are_opened(serving: Running) -> None:
    """A compressed text of 100 MB inside an image, and a compressed body."""
    told, out = PngImagePlugin.PngInfo(), io.BytesIO()
    told.add(b"zTXt", b"a\0\0" + zlib.compress(b" " * 10**8))
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=told)
    answer = serving.post({"messages": [asks("What is this?", out.getvalue())]})
    assert answer.status_code == 400
    assert "image" in answer.json()["error"]["message"]
    body = zlib.compress(b" " * 10**7)
    headers = {"Content-Encoding": "deflate"}
    path = f"{serving.url}/v1/chat/completions"
    assert httpx.post(path, content=body, headers=headers).status_code == 400


@pytest.mark.parametrize(
    "path", ["/../page.html", "/static/page.html", "/%2e%2e/app.py", "/page.js/..", "//etc/passwd"]
)
def test_no_path_leads_out(serving: Running, path: str) -> None:
    with _connect(serving) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert b" 404 " in _reply(connection).partition(b"\r\n")[0]
