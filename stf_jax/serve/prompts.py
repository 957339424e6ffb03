"""Messages of a client to a prompt of the model: text by the template, images decoded."""

import base64
import binascii
import hashlib
import io
import urllib.parse
from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image

from stf_jax.data.conversation import PromptText, render_prompt, take_system
from stf_jax.data.fetch import URL_SCHEMES, fetch
from stf_jax.data.fit import fit_template
from stf_jax.data.images import FORMATS, ImageError
from stf_jax.data.templates import IMAGE_MARKER, VIDEO_MARKER, Template
from stf_jax.infer.model import Model
from stf_jax.infer.prompts import Prompt, make_prompt, read_pixels
from stf_jax.serve.schema import ApiError, Message

# Pixels of an image; more of them take longer to decode than to send.
_MOST_PIXELS = 40_000_000
# Characters of a token, at most, to refuse a text before it is tokenized.
_LONGEST_TOKEN = 64


class Prompts:
    """Makes prompts for one model.

    Args:
        model: from `stf_jax.load`.
        template: the form of the conversations.
        domains: from which an image may be fetched.
        most_images: of a request.
        context: positions of a request, its answer included; by default the model's own.
        budgets: tokens of an image that may be asked for; by default all of the system's.
    """

    def __init__(
        self,
        model: Model,
        *,
        template: str,
        domains: Collection[str] = (),
        most_images: int = 16,
        context: int | None = None,
        budgets: Collection[int] = (),
    ):
        self._model, self.template = model, fit_template(template, model.tokenizer)
        self._longest = _LONGEST_TOKEN * (context or model.config.text.max_positions)
        self._domains, self.most_images = frozenset(domains), most_images
        every = model.config.system.budgets(model.config.vision)
        chosen = {model.config.choose_budget(budget) for budget in budgets or every}
        # The most first, which is the default.
        self.budgets = sorted(chosen, reverse=True)

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
        if len(urls) > self.most_images:
            raise ApiError(
                400,
                f"the messages show {len(urls)} images; give {self.most_images} at most",
                param="messages",
            )
        if not _words(rest[-1].text).strip():
            raise ApiError(400, "the last message has no text; ask something", param="messages")
        history = list(zip(turns[:-1:2], turns[1:-1:2], strict=True))
        try:
            text = render_prompt(turns[-1], template=template, history=history)
            return self._make(text, urls, self._budget(tokens)), template
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
        text = _words(text)
        if not text:
            raise ApiError(400, "the prompt is empty", param="prompt")
        return self._make(PromptText(text=text, typed=((0, len(text)),)), [], self.budgets[0])

    def _budget(self, tokens: int | None) -> int:
        if tokens is None:
            return self.budgets[0]
        budget = self._model.config.choose_budget(tokens)
        if budget not in self.budgets:
            some = " or ".join(map(str, self.budgets))
            raise ApiError(
                400, f"this server shows an image in {some} tokens", param="image_tokens"
            )
        return budget

    def _system(self, messages: Sequence[Message]) -> tuple[Template, Sequence[Message]]:
        if messages[0].role not in ("system", "developer"):
            return self.template, messages
        if messages[0].images:
            raise ApiError(400, "only a user's message can show images", param="messages")
        turn = {"from": "system", "value": _words(messages[0].text)}
        try:
            return take_system([turn], self.template)[1], messages[1:]
        except ValueError as error:
            raise ApiError(400, str(error).partition(": ")[2], param="messages") from error

    def _make(self, text: PromptText, urls: Sequence[str], budget: int) -> Prompt:
        if len(text.text) > self._longest:
            raise ApiError(
                400,
                f"the text has {len(text.text)} characters, which leaves no room for an answer; "
                "shorten it",
                code="context_length_exceeded",
            )
        sources = [self._read(url) for url in urls]
        for source in sources:
            _check_size(source)
        pixels = read_pixels(sources, self._model.image_processor, upright=True, unnamed="an image")
        # Text alone has one program, whatever an image would take.
        return self._finish(text, pixels, budget if urls else self.budgets[0])

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
    while IMAGE_MARKER in text or VIDEO_MARKER in text:
        text = text.replace(IMAGE_MARKER, "").replace(VIDEO_MARKER, "")
    return text


def _check_size(content: bytes) -> None:
    """Refuses an image of more pixels than a server decodes; what is no image is told later."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            pixels = image.width * image.height
    except (OSError, SyntaxError, ValueError):
        return
    if pixels > _MOST_PIXELS:
        raise ApiError(
            400, f"an image has {pixels} pixels; give {_MOST_PIXELS} at most", param="messages"
        )


def _decode(url: str) -> bytes:
    """The bytes of a data URL, padded or not."""
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageError("a data URL has no comma: data:image/png;base64,...")
    if not head.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    # In bytes: characters of a string would take many times their size.
    packed = body.encode(errors="replace")
    if b"%" in packed:
        for escaped, byte in ((b"%2B", b"+"), (b"%2F", b"/"), (b"%3D", b"=")):
            packed = packed.replace(escaped, byte).replace(escaped.lower(), byte)
    packed = packed.translate(None, b" \t\r\n").rstrip(b"=")
    try:
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("a data URL is no base64") from error
