"""The server through the client that most people use, and through hostile ones."""

import asyncio
import concurrent.futures
import contextlib
import io
import socket
import threading
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

import stf_jax
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.answers import AnswerBuilder
from stf_jax.infer.engine import Engine
from stf_jax.infer.model import Request
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import Sampling
from stf_jax.serve.app import Service
from stf_jax.serve.metrics import Metrics
from stf_jax.serve.prompts import Prompts
from stf_jax.serve.schema import ApiError
from stf_jax.serve.server import ServeConfig
from stf_jax.serve.worker import Worker
from tests.stf_jax.serve.conftest import Running, asks, data_url, png, run
from tests.stf_jax.systems.conftest import build, config_of, own_tokens

RED, BLUE = png((200, 30, 30)), png((20, 40, 220))
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 8}


def expected(serving: Running, prompt: str, *images: bytes, new: int = 8) -> str:
    request = Request(prompt=prompt, images=list(images))
    (answer,) = serving.model.generate([request], max_new_tokens=new)
    return answer.text


def wait_until_idle(serving: Running) -> None:
    deadline = time.monotonic() + 30
    while serving.worker.active or serving.worker.busy:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("images", [(), (RED,), (RED, BLUE)], ids=len)
def test_answers_are_those_of_generate(serving: Running, images: tuple[bytes, ...]) -> None:
    client = serving.client()
    answer = client.chat.completions.create(messages=[asks("What is this?", *images)], **GREEDY)
    assert answer.choices[0].message.content == expected(serving, "What is this?", *images)
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage is not None
    tokens = serving.model.config.tokens_per_image * len(images)
    assert usage.prompt_tokens_details.image_tokens == tokens  # type: ignore[union-attr]
    assert usage.prompt_tokens > tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_says_the_same(serving: Running) -> None:
    stream = serving.client().chat.completions.create(
        messages=[asks("What is this?", RED)],
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip() == expected(serving, "What is this?", RED)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_later_turn_finds_the_image_in_the_cache(serving: Running) -> None:
    green = png((20, 200, 40))
    client, first = serving.client(), asks("What is this?", green)
    answer = client.chat.completions.create(messages=[first], **GREEDY)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    said = {"role": "assistant", "content": answer.choices[0].message.content or "Yes."}
    turns = [first, said, {"role": "user", "content": "Why?"}]
    later = client.chat.completions.create(messages=turns, **GREEDY)
    assert later.usage.prompt_tokens_details.cached_tokens > serving.model.config.tokens_per_image
    # A system text of one's own is another prefix.
    turns = [{"role": "system", "content": "Be short."}, first]
    other = client.chat.completions.create(messages=turns, **GREEDY)
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_seeds_and_stops(serving: Running) -> None:
    client, ask = serving.client(), {"messages": [asks("Count.", RED)], "model": "tiny"}

    def say(**options: Any) -> str:
        answer = client.chat.completions.create(**ask, max_tokens=12, **options)
        return answer.choices[0].message.content or ""

    assert say(seed=3) == say(seed=3)
    assert len({say(seed=n) for n in range(4)}) > 1
    whole = say(temperature=0)
    part = whole[2:4]
    assert say(temperature=0, stop=[part]) == whole[: whole.index(part)].strip()


def test_many_at_once_answer_as_alone(serving: Running) -> None:
    questions = [(f"Number {n}?", (RED, BLUE)[n % 2]) for n in range(12)]

    def ask(question: tuple[str, bytes]) -> str:
        while True:
            try:
                answer = serving.client().chat.completions.create(
                    messages=[asks(question[0], question[1])], **GREEDY
                )
                return answer.choices[0].message.content or ""
            except openai.RateLimitError as error:
                time.sleep(float(error.response.headers["retry-after"]))

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, questions))
    assert answers == [expected(serving, text, image) for text, image in questions]


def test_text_completions(serving: Running) -> None:
    answer = serving.client().completions.create(prompt="The sky is", **GREEDY)
    assert answer.choices[0].text
    assert answer.usage.prompt_tokens_details.image_tokens == 0


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"messages": []}, 400, "messages: List should have at least 1 item"),
    ({"messages": [asks("Hi")], "n": 2}, 400, "n is not supported; leave it out"),
    ({"messages": [asks("Hi")], "tools": [{}]}, 400, "tools is not supported"),
    ({"messages": [asks("Hi")], "repetition_penalty": 1.2}, 400, "repetition_penalty is not"),
    ({"messages": [asks("Hi")], "stop": "x" * 300}, 400, "stop is longer than 256 characters"),
    ({"messages": [0] * 50_000}, 400, "messages.0: Input should be"),
    ({"messages": [asks("x" * 100_000)]}, 400, "characters, which leaves no room"),
    (
        {"messages": [{**asks("Be short.", RED), "role": "system"}, asks("Hi")]},
        400,
        "only a user's message can show images",
    ),
    ({"messages": [asks("Hi")], "temperature": -1}, 400, "temperature is -1.0; give 0"),
    ({"messages": [asks("Hi")], "max_tokens": 0}, 400, "max_tokens is 0; give 1 or more"),
    ({"messages": [asks("Hi")], "max_tokens": 500}, 400, "this server has room for 128"),
    ({"messages": [asks("Hi")], "model": "gpt-4o"}, 404, "there is no model 'gpt-4o'"),
    ({"messages": [asks("Hi")], "stop": list("abcde")}, 400, "stop has 5 strings"),
    ({"messages": [asks("  ", RED)]}, 400, "the last message has no text"),
    ({"messages": [asks("Hi"), asks("Ho")]}, 400, "message 2 is the user's; user and assistant"),
    ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, "the last message must be"),
    ({"messages": [{"role": "tool", "content": "Hi"}]}, 400, "messages.0.role: Input should be"),
    ({"messages": [asks("word " * 2000)]}, 400, "leaves no room for an answer"),
    ({"messages": [asks("Hi", *[RED] * 5)]}, 400, "5 images; give 4 at most"),
    ({"messages": [asks("Hi", b"GIF89a but no image")]}, 400, "no image in a format"),
    ({"messages": [asks("Hi")], "image_tokens": 5}, 400, "cannot show an image in 5 tokens"),
    ({"messages": [asks("Hi")], "stream_options": {}}, 400, "means nothing without stream"),
]


@pytest.mark.parametrize(("body", "status", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_mistakes_get_one_line(
    serving: Running, body: dict[str, Any], status: int, message: str
) -> None:
    answer = serving.post(body)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:22/",
        "http://169.254.169.254/latest/meta-data",
        "http://localhost/cat.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "https://example.com/cat.png",
        "data:image/png",
        "data:image/png;base64,@@@",
    ],
)
def test_images_from_elsewhere(serving: Running, url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    text = {"type": "text", "text": "What is this?"}
    answer = serving.post({"messages": [{"role": "user", "content": [text, part]}]})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert any(
        reason in message
        for reason in ("are not fetched from", "neither a data URL nor http(s)", "a data URL ")
    ), message


def test_a_data_url_need_not_be_padded(serving: Running) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(RED).rstrip("=")}}
    content = [part, {"type": "text", "text": "What is this?"}]
    answer = serving.post({"messages": [{"role": "user", "content": content}], **GREEDY}).json()
    said = answer["choices"][0]["message"]["content"]
    assert said == expected(serving, "What is this?", RED)


@pytest.mark.parametrize("text", ["<image>", "<ima<image>ge>", "What <image> is it? <video>"])
def test_a_typed_marker_is_no_image(serving: Running, text: str) -> None:
    """Nor does it harm who comes next."""
    body = {"prompt": f"See {text} there", **GREEDY}
    said = serving.post(body, path="/v1/completions").json()
    assert said["usage"]["prompt_tokens_details"]["image_tokens"] == 0
    chat = serving.post({"messages": [asks(f"What is this? {text}", RED)], **GREEDY}).json()
    tokens = serving.model.config.tokens_per_image
    assert chat["usage"]["prompt_tokens_details"]["image_tokens"] == tokens
    after = serving.post({"messages": [asks("What is this?", BLUE)], **GREEDY}).json()
    expects = expected(serving, "What is this?", BLUE)
    assert after["choices"][0]["message"]["content"] == expects


def test_more_pixels_than_a_server_decodes(serving: Running) -> None:
    out = io.BytesIO()
    Image.new("1", (8000, 6000)).save(out, "PNG")
    assert len(out.getvalue()) < 2**14
    answer = serving.post({"messages": [asks("What is this?", out.getvalue())]})
    assert answer.status_code == 400
    assert "48000000 pixels; give 40000000 at most" in answer.json()["error"]["message"]


def test_long_text_needs_no_long_prefix(model: stf_jax.Model) -> None:
    """A text alone is no prefix of anything: it may be as long as the context."""
    config = ServeConfig(name="tiny", slots=2, context=320, max_new_tokens=8, prefix_context=64)
    room = config.room(model.engine)
    worker = Worker(model.engine, room, queue=4, metrics=Metrics(), new=8)
    try:
        prompt = Prompts(model, template="v1").plain("word " * 200)
        assert len(prompt.ids) > 128
        assert worker.fits(prompt) == 8

        async def ask() -> list[int]:
            builder = AnswerBuilder(model.tokenizer, stop_ids=(), stops=())
            options = {"sampling": Sampling(), "most": 8, "came": time.monotonic()}
            async for _ in worker.answer(prompt, builder, **options):
                pass
            return builder.token_ids

        found = asyncio.run(ask())
    finally:
        worker.close()
    said: list[int] = []
    run = {"slots": 1, "max_new_tokens": 8, "sampling": Sampling(), "every": 8}
    list(model.engine.run([prompt], take=lambda _, ids: said.extend(ids) or True, **run))
    assert found == said


def test_bodies_that_are_too_large(serving: Running) -> None:
    large = b'{"messages": "' + b"x" * (2**20 + 1) + b'"}'
    url = f"{serving.url}/v1/chat/completions"
    assert httpx.post(url, content=large).status_code == 413

    def pieces() -> Any:
        yield from (large[at : at + 2**16] for at in range(0, len(large), 2**16))

    # Without a length in front.
    assert httpx.post(url, content=pieces()).status_code == 413
    assert httpx.post(url, content=b"{" * 100_000).status_code == 400
    assert httpx.post(url, content=b"\xff\xfe").status_code == 400


def test_who_hangs_up_frees_the_slot(serving: Running) -> None:
    wait_until_idle(serving)
    body = {"messages": [asks("Tell me all.", RED)], "max_tokens": 128, "temperature": 0}
    for stream in (True, False):
        threads = []
        for _ in range(7):

            def hang_up(stream: bool = stream) -> None:
                # A stream is left at its first event, however fast the others would come.
                with (
                    contextlib.suppress(httpx.ReadTimeout),
                    httpx.stream(
                        "POST",
                        f"{serving.url}/v1/chat/completions",
                        json={**body, "stream": stream},
                        timeout=httpx.Timeout(10, read=0.01),
                    ) as answer,
                ):
                    next(answer.iter_raw())

            threads.append(threading.Thread(target=hang_up))
            threads[-1].start()
        for thread in threads:
            thread.join()
        wait_until_idle(serving)
    assert serving.worker._scheduler.running == 0
    metrics = httpx.get(f"{serving.url}/metrics").text
    assert 'stf_jax_requests_total{status="499"}' in metrics
    said = serving.post({"messages": [asks("What is this?", RED)], **GREEDY}).json()
    assert said["choices"][0]["message"]["content"] == expected(serving, "What is this?", RED)


def test_health_models_metrics_and_the_page(serving: Running) -> None:
    def get(path: str) -> httpx.Response:
        return httpx.get(f"{serving.url}{path}")

    assert get("/health").json() == {"status": "ok"}
    (described,) = get("/v1/models").json()["data"]
    assert described["id"] == "tiny"
    assert described["image_tokens"] == [serving.model.config.tokens_per_image]
    assert get("/v1/models/tiny").json() == described
    assert get("/v1/models/other").status_code == 404
    metrics = get("/metrics").text
    for name in ("running", "waiting", "time_to_first_token_seconds_bucket"):
        assert f"stf_jax_{name}" in metrics

    def counted(name: str) -> float:
        lines = httpx.get(f"{serving.url}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    for stream in (True, False):
        before = counted("stf_jax_new_tokens_total")
        body = {"messages": [asks("What is this?", RED)], "stream": stream, **GREEDY}
        assert serving.post(body).status_code == 200
        assert counted("stf_jax_new_tokens_total") > before
    page = get("/")
    assert "text/html" in page.headers["content-type"]
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert get("/page.js").status_code == get("/page.css").status_code == 200
    for path in ("/worker.py", "/..%2fapp.py", "/../../pyproject.toml", "/nothing"):
        assert get(path).status_code == 404


def test_until_the_model_is_there(serving: Running) -> None:
    server, thread, url = run(Service(name="tiny", api_key="secret"))
    try:
        assert httpx.get(f"{url}/health").status_code == 503
        body = {"messages": [asks("Hi")]}
        wrong = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        headers = {"Authorization": "Bearer secret"}
        early = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        assert early.status_code == 503
        assert early.headers["retry-after"] == "5"
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
    finally:
        server.should_exit = True
        thread.join()


def test_a_slow_client_holds_nothing(serving: Running) -> None:
    host, _, port = serving.url.removeprefix("http://").partition(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(head.encode())
        assert serving.post({"messages": [asks("Hi")], **GREEDY}).status_code == 200
    wait_until_idle(serving)


def test_shutting_down_tells_everybody(serving: Running) -> None:
    """Last in this file: the server answers nobody afterwards."""
    wait_until_idle(serving)
    serving.worker.shut(within=60)
    refused = serving.post({"messages": [asks("Hi")], **GREEDY})
    assert refused.status_code == 503
    assert "shutting down" in refused.json()["error"]["message"]
    serving.worker._deadline = None


def test_errors_have_openais_form() -> None:
    body = ApiError(429, "wait", code="queue_full").body()
    assert body == {
        "error": {
            "message": "wait",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
    }


@pytest.mark.parametrize("name", ["stf", "voco", "pmod", "fastv"])
def test_the_room_of_a_server_is_its_systems(name: str) -> None:
    """Prefixes take what the system holds; a prompt of the whole context fits."""
    config = config_of(name)
    engine = Engine(build(config))
    serve = ServeConfig(name="tiny", slots=4, context=256, max_new_tokens=16, prefix_context=128)
    room = serve.room(engine)
    assert set(room.contexts) == {256}
    worker = Worker(engine, room, queue=4, metrics=Metrics(), context=256, new=16)
    try:
        tokens, behind = config.tokens_per_image, own_tokens(config)
        image = np.full(tokens, IMAGE_TOKEN_ID)
        rest = np.full(240 - 8 - tokens - len(behind), 9)
        ids = np.concatenate([np.full(8, 7), image, behind, rest]).astype(np.int32)
        side = config.image_size
        pixels = np.zeros((1, side, side, 3), np.float32)
        assert worker.fits(Prompt(ids=ids, pixels=pixels, budget=tokens)) == 16
    finally:
        worker.close()
    assert (max(room.prefixes) < 128) == (name == "voco")
    if name == "fastv":
        # The question decides what stays, so nothing shorter is a prefix.
        assert room.prefixes == room.contexts
