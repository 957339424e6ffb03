"""A server with OpenAI's interface as an answerer, ours or another's, under one protocol."""

import base64
import concurrent.futures
import http.client
import io
import json
import mimetypes
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from stf_jax.data.templates import IMAGE_MARKER
from stf_jax.eval.questions import Decoding, Question, Reply

# A server that is full or starting is asked again after so many seconds, so many times.
_PAUSE, _TRIES = 2.0, 150
_SECONDS = 600.0


class ServerAnswerer:
    """Asks `/v1/chat/completions`, greedily; the server's own template is used.

    Args:
        url: of the API, such as http://127.0.0.1:8000/v1.
        model: its name there; by default the server's first.
        key: sent as `Authorization: Bearer`.
        slots: requests at a time.

    Raises:
        ValueError: nothing answers there, or not in this form.
    """

    def __init__(
        self, url: str, *, model: str | None = None, key: str | None = None, slots: int = 16
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--server is {url!r}; give a URL such as http://127.0.0.1:8000/v1")
        if slots < 1:
            raise ValueError(f"slots is {slots}; give 1 or more")
        self._url, self._key, self._slots = url.rstrip("/"), key, slots
        try:
            models = [item["id"] for item in self._call("models", None)["data"]]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{url} does not list its models as OpenAI's API does") from error
        if model is not None and model not in models:
            raise ValueError(f"{url} has no model {model!r}; it has {', '.join(models)}")
        if not models:
            raise ValueError(f"{url} has no model")
        self.model_id: str = models[0] if model is None else model

    def describe(self) -> dict[str, Any]:
        """What is known of it: its name. Templates and weights are the server's business."""
        return {"server_model": self.model_id}

    def answer(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[Reply]:
        """Replies as they come.

        Raises:
            ValueError: a question with a clip, or one that the server refuses.
        """
        clips = [question.question_id for question in questions if question.clips]
        if clips:
            raise ValueError(f"question {clips[0]} shows a clip, which such servers do not take")

        def ask(question: Question) -> Reply:
            body = {
                "model": self.model_id,
                "messages": [{"role": "user", "content": _content(question)}],
                "temperature": 0,
                "max_tokens": decoding.max_new_tokens,
            }
            try:
                (choice,) = self._call("chat/completions", body)["choices"]
                text = choice["message"]["content"] or ""
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"question {question.question_id}: {error}") from error
            return Reply(number=question.number, text=text.strip())

        with concurrent.futures.ThreadPoolExecutor(self._slots) as pool:
            futures = [pool.submit(ask, question) for question in questions]
            try:
                for done in concurrent.futures.as_completed(futures):
                    yield done.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _call(self, path: str, body: Any) -> Any:
        """The server's JSON.

        Raises:
            ValueError: it cannot be reached, or refuses.
        """
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/{path}", data, headers)
        for _ in range(_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                if error.code not in (429, 503):
                    raise ValueError(f"{self._url} answers {_reason(error)}") from error
                wait = error.headers.get("Retry-After", "")
                time.sleep(float(wait) if wait.isdigit() else _PAUSE)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                raise ValueError(f"{self._url} cannot be reached: {reason}") from error
        raise ValueError(f"{self._url} was full or starting {_TRIES} times; ask again later")


def _content(question: Question) -> list[dict[str, Any]]:
    """The question as parts: its images, then its words."""
    urls = [_data_url(image) for image in question.images]
    text = question.prompt.replace(f"{IMAGE_MARKER}\n", "").replace(IMAGE_MARKER, "")
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*images, {"type": "text", "text": text}]


def _data_url(image: Path | bytes) -> str:
    content = image if isinstance(image, bytes) else image.read_bytes()
    kind = None if isinstance(image, bytes) else mimetypes.guess_type(image.name)[0]
    with Image.open(io.BytesIO(content)) as opened:
        # The reference ignores EXIF, servers turn a photograph as its owner sees it.
        if opened.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            out = io.BytesIO()
            opened.convert("RGB").save(out, "PNG", exif=b"")
            content, kind = out.getvalue(), "image/png"
    return f"data:{kind or 'image/jpeg'};base64,{base64.b64encode(content).decode()}"


def _reason(error: urllib.error.HTTPError) -> str:
    """The server's own words, in one line."""
    try:
        message = json.loads(error.read())["error"]["message"]
    except (KeyError, TypeError, ValueError):
        message = error.reason
    return f"{error.code}: {' '.join(str(message).split())[:300]}"
