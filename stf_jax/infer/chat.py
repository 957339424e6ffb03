"""A conversation about images: history in the template's form, answers as they come."""

import dataclasses
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stf_jax.data.conversation import render_prompt
from stf_jax.data.fit import fit_template
from stf_jax.data.images import ImageSource
from stf_jax.data.templates import IMAGE_MARKER
from stf_jax.infer.program import limit_new_tokens
from stf_jax.infer.prompts import Prompt, make_prompt, read_pixels
from stf_jax.infer.sampling import GREEDY, Sampling
from stf_jax.infer.session import Session

if TYPE_CHECKING:
    from stf_jax.infer.model import Model

_EVERY = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShownImage:
    """An image of the conversation, by the name that its owner gave, as the tower sees it."""

    name: str
    pixels: np.ndarray


class Chat:
    """One conversation with a model.

        chat = Chat(stf_jax.load("llava-stf-7b"))
        chat.show("cat.jpg")
        for text in chat.ask("What is this?"):
            print(text, end="")

    Args:
      model: from `stf_jax.load`.
      template: the form of the conversation.
      max_new_tokens: where an answer is cut.
      sampling: greedy by default.
      allow_urls: whether an image may be a URL, which is fetched.
      tokens: an image, where the system has several budgets; by default its most.

    Raises:
      ValueError: a template that is unknown or does not fit the tokenizer, no tokens wanted, or no
        budget of the system.
    """

    def __init__(
        self,
        model: "Model",
        *,
        template: str = "v1",
        max_new_tokens: int = 512,
        sampling: Sampling = GREEDY,
        allow_urls: bool = False,
        tokens: int | None = None,
    ):
        self._allow_urls = allow_urls
        self._tokens = model.config.choose_budget(tokens)
        self._model, self._template = model, fit_template(template, model.tokenizer)
        most = limit_new_tokens(max_new_tokens, room=model.config.text.max_positions)
        self._sampling, self._most = sampling, most
        self._session = Session(model.engine.program)
        self.restart()

    def restart(self) -> None:
        """Forgets what was said and shown."""
        self.history: list[tuple[str, str]] = []
        self.images: list[ShownImage] = []
        self._pending: list[ShownImage] = []

    def show(self, image: ImageSource) -> None:
        """Adds an image, which goes with the next question.

        Raises:
          ImageError: an image that cannot be used.
        """
        pixels = self._read_pixels(image)
        name = str(image) if isinstance(image, str | Path) else "image"
        self._pending.append(ShownImage(name=name, pixels=pixels))

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer's text as it comes; an answer that is not heard to its end is history, too.

        Raises:
          ValueError: an empty question, or a conversation that has become too long; it is then as
            it was before.
        """
        turn = f"{IMAGE_MARKER}\n" * len(self._pending) + question.replace(IMAGE_MARKER, "")
        if not question.strip():
            raise ValueError("the question is empty; ask something")
        shown = self.images + self._pending
        prompt = self._prompt(turn, shown)
        answer = self._model.make_builder(self._template)
        stream = self._session.stream(
            prompt, sampling=self._sampling, max_new_tokens=self._most, every=_EVERY
        )
        try:
            for ids in stream:
                yield answer.push(ids)
                if answer.finished:
                    break
            yield answer.finish()
        finally:
            stream.close()
            if answer.token_ids:
                self.history.append((turn, answer.text.strip()))
                self.images, self._pending = shown, []

    def to_json(self) -> dict[str, Any]:
        """The conversation as a record of LLaVA's training files, with the images' names."""
        turns = [
            {"from": sender, "value": text}
            for pair in self.history
            for sender, text in zip(("human", "gpt"), pair, strict=True)
        ]
        names = [image.name for image in self.images]
        images = {"image": names[0] if len(names) == 1 else names} if names else {}
        return {"id": "chat", **images, "conversations": turns}

    def _prompt(self, question: str, shown: list[ShownImage]) -> Prompt:
        text = render_prompt(question, template=self._template, history=self.history)
        pixels = [image.pixels for image in shown] or [self._read_pixels()]
        return make_prompt(
            text,
            partial(np.concatenate, pixels),
            tokenizer=self._model.tokenizer,
            tokens_per_image=self._tokens,
            question_length=self._model.config.question_length,
            image_key=tuple(shown),
        )

    def _read_pixels(self, *images: ImageSource) -> np.ndarray:
        return read_pixels(
            images,
            self._model.image_processor,
            upright=True,
            allow_urls=self._allow_urls,
        )
