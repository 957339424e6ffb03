"""The page at `/`: what it loads and says without a browser, and how it works in Chromium.

    STF_JAX_SCREENSHOTS=DIR pytest tests/stf_jax/serve/test_page.py

keeps what Chromium shows. Its tests are skipped where neither it nor playwright is installed.
"""

import asyncio
import base64
import dataclasses
import importlib.util
import io
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw

from stf_jax.convert.stored_model import load_processors
from stf_jax.infer.answers import AnswerBuilder
from stf_jax.infer.prompts import Prompt
from stf_jax.serve.app import Ready, Service
from stf_jax.serve.prompts import Prompts
from stf_jax.serve.schema import ApiError
from stf_jax.serve.worker import Piece, Usage
from tests.stf_jax.serve.conftest import run
from tests.stf_jax.systems.conftest import config_of

STATIC = files("stf_jax.serve").joinpath("static")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LONG = "A cat sits in a yellow chair beside the window and looks at the birds outside. " * 30


class _Worker(SimpleNamespace):
    """Answers at once; what is asked decides how."""

    async def answer(self, prompt: Prompt, *_: object, **__: object) -> AsyncIterator[Piece]:
        images = len(prompt.load())
        if self.queue:
            raise ApiError(429, f"{self.queue} requests wait already; try again in a second")
        words = self.text.split(" ")
        cached, self.cached = self.cached, len(prompt.ids) - 3
        for n, word in enumerate(words, start=1):
            await asyncio.sleep(self.pause)
            usage = Usage(
                prompt=len(prompt.ids),
                image=images * (prompt.budget or 0),
                cached=cached,
                new=n,
            )
            end = "stop" if n == len(words) else None
            yield Piece(text=f"{word} " if end is None else word, finish_reason=end, usage=usage)


@dataclasses.dataclass
class Site:
    """A server whose answers a test chooses."""

    url: str
    worker: _Worker


@pytest.fixture(scope="module")
def site(reference: Path) -> Iterator[Site]:
    processors, config = load_processors(reference / "llava-stf"), config_of("m3")
    tokenizer = processors.tokenizer
    model: Any = SimpleNamespace(
        config=config,
        tokenizer=tokenizer,
        image_processor=processors.image_processor.for_size(config.image_size),
        make_builder=lambda template, stops: AnswerBuilder(tokenizer, stop_ids=(), stops=stops),
    )
    worker = _Worker(check_queue=lambda: None, fits=lambda prompt: 64, context=256, broken=None)
    service = Service(name="llava-m3")
    prompts = Prompts(model, template="v1")
    service.ready = Ready(model=model, prompts=prompts, worker=worker)  # type: ignore[arg-type]
    server, thread, url = run(service)
    yield Site(url, worker)
    server.should_exit = True
    thread.join()


@pytest.fixture(autouse=True)
def _fresh(site: Site) -> None:
    site.worker.__dict__.update(text="Two blue squares.", pause=0.0, cached=0, queue=0)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] and self.tags[-1][0] in ("script", "style") and data.strip():
            self.inside.append(data)


def test_the_page_runs_and_loads_only_its_own_files(site: Site) -> None:
    page = httpx.get(site.url)
    policy = dict(
        part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    for kind in ("script-src", "style-src", "connect-src"):
        assert policy[kind] == "'self'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    parser = _Tags()
    parser.feed(page.text)
    assert parser.inside == []
    for tag, given in parser.tags:
        assert not [name for name in given if name.startswith("on") or name == "style"], tag
        for name in ("src", "href"):
            if tag != "a" and (value := given.get(name)) and not value.startswith("data:"):
                assert STATIC.joinpath(value).is_file()
                assert httpx.get(f"{site.url}/{value}").status_code == 200
    script = STATIC.joinpath("page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|\beval\(|new Function|document\.write", script)
    assert not re.search(r"(https?:)?//[a-z]+\.", script)


def test_everything_on_the_page_has_a_name() -> None:
    """For a reader's voice and for the keyboard."""
    text = STATIC.joinpath("page.html").read_text()
    parser = _Tags()
    parser.feed(text)
    labeled = {given.get("for") for tag, given in parser.tags if tag == "label"}
    inside = set(re.findall(r'<label[^>]*>[^<]*<(?:input|select) id="(\w+)"', text))
    for tag, given in parser.tags:
        if tag in ("input", "select", "textarea") and "hidden" not in given:
            assert given["id"] in labeled | inside
        if given.get("role") == "button":
            assert given["tabindex"] == "0"
            assert given["aria-label"]
    assert any(tag == "html" and given.get("lang") for tag, given in parser.tags)
    assert any(given.get("name") == "viewport" for _, given in parser.tags)
    ids = [given["id"] for _, given in parser.tags if "id" in given]
    assert len(ids) == len(set(ids))
    # What the script looks for is there.
    script = STATIC.joinpath("page.js").read_text()
    assert set(re.findall(r'\bat\("(\w+)"\)', script)) <= {*ids}


def cat() -> bytes:
    """A photograph, more or less."""
    image = Image.new("RGB", (320, 240), (120, 170, 220))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 160, 320, 240), fill=(90, 140, 70))
    draw.ellipse((110, 70, 210, 200), fill=(240, 160, 60), outline=(60, 40, 20), width=4)
    out = io.BytesIO()
    image.save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs playwright and Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class View:
    """A page that tells of every error in it."""

    def __init__(self, browser: Any, site: Site, **options: Any):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda line: self.errors.append(line.text) if line.type == "error" else None,
        )
        self.page.goto(site.url)
        self.until("document.getElementById('model').textContent.includes('m3')")

    def until(self, condition: str) -> None:
        """Waits; the page's own policy forbids what playwright would do."""
        deadline = time.monotonic() + 30
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(20)

    def show(self, image: bytes) -> None:
        given = {"name": "cat.jpg", "mimeType": "image/jpeg", "buffer": image}
        self.page.set_input_files("#files", given)
        self.page.wait_for_selector("#shown img")

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")

    def wait(self, kind: str, count: int = 1) -> str:
        done = f"document.querySelectorAll('#turns .{kind}').length >= {count}"
        self.until(f"{done} && !document.getElementById('ask').disabled")
        return str(self.page.locator(f"#turns .{kind} .said").last.text_content())

    def keep(self, name: str) -> None:
        if folder := os.environ.get("STF_JAX_SCREENSHOTS"):
            self.page.screenshot(path=f"{folder}/{name}.png")

    def close(self) -> None:
        self.context.close()
        assert self.errors == []


def test_two_turns_about_an_image_by_keyboard(browser: Any, site: Site) -> None:
    view = View(browser, site, viewport={"width": 1100, "height": 900})
    view.show(cat())
    view.ask("What is this?")
    assert view.wait("assistant") == "Two blue squares."
    measures = view.page.locator(".measures").first.text_content()
    assert re.search(r"\d+ tokens in \(\d+ of images, 0 cached\), 3 out; first token", measures)
    canvas = view.page.locator("#turns canvas")
    assert "tokens" in canvas.get_attribute("aria-label")
    assert view.page.evaluate("document.activeElement.id") == "question"
    view.ask("And now?")
    view.wait("assistant", 2)
    assert re.search(r"[1-9]\d* cached", view.page.locator(".measures").last.text_content())
    view.keep("desktop")
    # From the question on, everything is reached by Tab.
    reached = set()
    for _ in range(12):
        reached.add(view.page.evaluate("document.activeElement.id"))
        view.page.keyboard.press("Tab")
    assert {"question", "ask", "restart", "curl"} <= reached
    view.page.click("#restart")
    assert view.page.locator("#turns li").count() == 0
    view.close()


def test_an_error_says_what_to_do_and_keeps_the_question(browser: Any, site: Site) -> None:
    view = View(browser, site, viewport={"width": 1100, "height": 700})
    site.worker.queue = 256
    view.ask("What is this?")
    assert "256 requests wait already" in view.wait("error")
    assert view.page.input_value("#question") == "What is this?"
    view.keep("error")
    site.worker.queue = 0
    view.page.press("#question", "Enter")
    assert view.wait("assistant") == "Two blue squares."
    # Chromium itself notes every 429.
    view.errors = [error for error in view.errors if "429" not in error]
    view.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_long_answer_on_a_phone(browser: Any, site: Site, scheme: str) -> None:
    phone = {"width": 390, "height": 780}
    view = View(browser, site, viewport=phone, color_scheme=scheme, device_scale_factor=2)
    site.worker.text = LONG + "x" * 300
    view.show(cat())
    view.ask("Tell me all about it, please, and leave nothing out.")
    assert view.wait("assistant").endswith("xxx")
    assert view.page.evaluate("document.documentElement.scrollWidth") <= 390
    back = view.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", back)[:3])) < 80) == (scheme == "dark")
    view.keep(f"phone-{scheme}")
    view.page.evaluate("window.scrollTo(0, 0)")
    view.keep(f"phone-{scheme}-top")
    view.close()


def test_stop_keeps_what_was_said(browser: Any, site: Site) -> None:
    view = View(browser, site, color_scheme="dark", viewport={"width": 1100, "height": 900})
    site.worker.text, site.worker.pause = LONG, 0.02
    view.show(cat())
    view.ask("Go on.")
    view.until("document.querySelector('#turns .assistant .said').textContent")
    view.keep("dark")
    begun = time.monotonic()
    view.page.click("#stop")
    said = view.wait("assistant")
    assert time.monotonic() - begun < 5
    assert LONG.startswith(said.strip())
    assert 0 < len(said) < len(LONG)
    view.close()


def test_the_request_as_curl(browser: Any, site: Site) -> None:
    view = View(browser, site, permissions=["clipboard-read", "clipboard-write"])
    view.show(cat())
    view.page.fill("#question", "What is this?")
    view.page.click("#curl")
    view.until("document.getElementById('curl').textContent === 'Copied'")
    text = view.page.evaluate("navigator.clipboard.readText()")
    assert text.startswith(f"curl {site.url}/v1/chat/completions")
    assert base64.b64encode(cat()).decode()[:200] in text
    view.close()
