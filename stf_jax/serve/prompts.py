"""Messages of a client to a prompt of the model: text by the template, images decoded."""

import base64
import binascii
import hashlib
import urllib.parse
from collections.abc import Collection, Sequence

import numpy as np

from stf_jax.data.conversation import PromptText, render_prompt, take_system
from stf_jax.data.fetch import URL_SCHEMES, fetch
from stf_jax.data.fit import fit_template
from stf_jax.data.images import ImageError
from stf_jax.data.templates import IMAGE_MARKER, VIDEO_MARKER, Template
from stf_jax.infer.model import Model
from stf_jax.infer.prompts import Prompt, make_prompt, read_pixels
from stf_jax.serve.schema import ApiError, Message


class Prompts:
    """Makes prompts for one model.

    Args:
        model: from `stf_jax.load`.
        template: the form of the conversations.
        domains: from which an image may be fetched.
        most_images: of a request.
    """

    def __init__(
        self, model: Model, *, template: str, domains: Collection[str] = (), most_images: int = 16
    ):
        self._model, self.template = model, fit_template(template, model.tokenizer)
        self._domains, self._most_images = frozenset(domains), most_images

    def chat(
        self, messages: Sequence[Message], *, tokens: int | None = None
    ) -> tuple[Prompt, Template]:
        """The prompt of a conversation, and the template that ends its answer.

        Images of a message come before its words, as in training.

        Raises:
            ApiError: turns that do not alternate, an image that cannot be used, or a budget that
                the system does not have.
        """
        template, rest = self._system(messages)
        if not rest or rest[-1].role != "user":
            raise ApiError(400, "the last message must be the user's", param="messages")
        turns, urls = list[str](), list[str]()
        for number, message in enumerate(rest):
            expected = "assistant" if number % 2 else "user"
            if message.role != expected:
                raise ApiError(
                    400,
                    f"message {number + 1 + len(messages) - len(rest)} is the {message.role}'s; "
                    "user and assistant must alternate, beginning with the user",
                    param="messages",
                )
            if message.images and message.role != "user":
                raise ApiError(400, "only a user's message can show images", param="messages")
            urls += message.images
            turns.append(f"{IMAGE_MARKER}\n" * len(message.images) + _words(message.text))
        if len(urls) > self._most_images:
            raise ApiError(
                400,
                f"the messages show {len(urls)} images; give {self._most_images} at most",
                param="messages",
            )
        if not _words(rest[-1].text).strip():
            raise ApiError(400, "the last message has no text; ask something", param="messages")
        history = list(zip(turns[:-1:2], turns[1:-1:2], strict=True))
        try:
            text = render_prompt(turns[-1], template=template, history=history)
            budget = self._model.config.choose_budget(tokens)
            return self._make(text, urls, budget), template
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error

    def show(self, pixels: np.ndarray, budget: int) -> Prompt:
        """A question about images that are pixels already, for the warm-up."""
        text = render_prompt(f"{IMAGE_MARKER}\n" * len(pixels) + "What?", template=self.template)
        return self._finish(text, pixels, budget)

    def plain(self, text: str) -> Prompt:
        """The prompt of a text as it is.

        Raises:
            ApiError: there is none.
        """
        if not text:
            raise ApiError(400, "the prompt is empty", param="prompt")
        return self._make(PromptText(text=text, typed=((0, len(text)),)), [], None)

    def _system(self, messages: Sequence[Message]) -> tuple[Template, Sequence[Message]]:
        if messages[0].role not in ("system", "developer"):
            return self.template, messages
        turn = {"from": "system", "value": _words(messages[0].text)}
        try:
            return take_system([turn], self.template)[1], messages[1:]
        except ValueError as error:
            raise ApiError(400, str(error).partition(": ")[2], param="messages") from error

    def _make(self, text: PromptText, urls: Sequence[str], budget: int | None) -> Prompt:
        sources = [self._read(url) for url in urls]
        pixels = read_pixels(sources, self._model.image_processor, upright=True, unnamed="an image")
        return self._finish(text, pixels, self._model.config.choose_budget(budget))

    def _finish(self, text: PromptText, pixels: np.ndarray, budget: int) -> Prompt:
        return make_prompt(
            text,
            pixels,
            tokenizer=self._model.tokenizer,
            tokens_per_image=budget,
            question_length=self._model.config.question_length if len(pixels) else 0,
            image_key=hashlib.sha256(pixels.tobytes()).digest() if len(pixels) else None,
        )

    def _read(self, url: str) -> bytes:
        """The bytes of an image.

        Raises:
            ImageError: no data URL, or a URL that may not be fetched.
        """
        if url.startswith("data:"):
            return _decode(url)
        if not url.startswith(URL_SCHEMES):
            raise ImageError("an image is neither a data URL nor http(s)")
        host = urllib.parse.urlsplit(url).hostname or ""
        if host not in self._domains:
            raise ImageError(
                f"images are not fetched from {host or 'there'}; send a data URL "
                "(the server's --allow-domain says from where)"
            )
        return fetch(url, hosts=self._domains)


def _words(text: str) -> str:
    """What a person writes: a marker would stand for an image."""
    return text.replace(IMAGE_MARKER, "").replace(VIDEO_MARKER, "")


def _decode(url: str) -> bytes:
    """The bytes of a data URL, padded or not."""
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageError("a data URL has no comma: data:image/png;base64,...")
    if not head.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    body = "".join(urllib.parse.unquote(body).split()).rstrip("=")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), altchars=None, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("a data URL is no base64") from error
