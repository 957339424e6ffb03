"""A conversation about pictures: history in the template's form, answers as they come."""

import dataclasses
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stf_jax.data.conversation import IMAGE_MARKER, get_template, render_prompt
from stf_jax.data.images import ImageSource, load_image
from stf_jax.data.tokenizer import encode_prompt, expand_images
from stf_jax.infer.answers import AnswerBuilder
from stf_jax.infer.program import Limits, limit_new_tokens
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import GREEDY, Sampling
from stf_jax.infer.session import Session

if TYPE_CHECKING:
    from stf_jax.infer.model import Model

_EVERY = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A picture of the conversation, by the name that its owner gave, as the tower sees it."""

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

    Raises:
      ValueError: an unknown template, or no tokens wanted.
    """

    def __init__(
        self,
        model: "Model",
        *,
        template: str = "v1",
        max_new_tokens: int = 512,
        sampling: Sampling = GREEDY,
    ):
        self._model, self._template = model, get_template(template)
        most = limit_new_tokens(max_new_tokens, room=model.config.text.max_positions)
        self._limits = Limits(sampling=sampling, max_new_tokens=most)
        self._session = Session(model.engine.program)
        self.restart()

    def restart(self) -> None:
        """Forgets what was said and shown."""
        self.history: list[tuple[str, str]] = []
        self.pictures: list[Picture] = []
        self._pending: list[Picture] = []

    def show(self, image: ImageSource) -> None:
        """Adds a picture, which goes with the next question.

        Raises:
          ImageError: a picture that cannot be used.
        """
        # A photograph is shown upright, as its owner sees it.
        pixels = self._model.image_processor.pixels(load_image(image, apply_orientation=True))
        name = str(image) if isinstance(image, str | Path) else "picture"
        self._pending.append(Picture(name=name, pixels=pixels))

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer's text as it comes; an answer that is not heard to its end is history, too.

        Raises:
          ValueError: an empty question, or a conversation that has become too long; it is then as
            it was before.
        """
        asked = f"{IMAGE_MARKER}\n" * len(self._pending) + question.replace(IMAGE_MARKER, "")
        if not question.strip():
            raise ValueError("the question is empty; ask something")
        shown = self.pictures + self._pending
        prompt = self._prompt(asked, shown)
        answer = AnswerBuilder(
            self._model.tokenizer,
            eos_ids=self._model.config.text.eos_ids,
            stops=self._template.stop_strings,
        )
        stream = self._session.stream(prompt, limits=self._limits, every=_EVERY)
        try:
            for ids in stream:
                yield answer.push(ids)
                if answer.finished:
                    break
            yield answer.finish()
        finally:
            stream.close()
            if answer.token_ids:
                self.history.append((asked, answer.text.strip()))
                self.pictures, self._pending = shown, []

    def to_json(self) -> dict[str, Any]:
        """The conversation as a record of LLaVA's training files, with the pictures' names."""
        turns = [
            {"from": sender, "value": text}
            for pair in self.history
            for sender, text in zip(("human", "gpt"), pair, strict=True)
        ]
        names = [picture.name for picture in self.pictures]
        images = {"image": names[0] if len(names) == 1 else names} if names else {}
        return {"id": "chat", **images, "conversations": turns}

    def _prompt(self, question: str, shown: list[Picture]) -> Prompt:
        text = render_prompt(question, template=self._template, history=self.history)
        ids = encode_prompt(self._model.tokenizer, text)
        size = self._model.config.image_size
        pixels = [picture.pixels for picture in shown] or np.zeros((0, size, size, 3), np.float32)
        return Prompt(
            ids=expand_images(ids, tokens_per_image=self._model.config.tokens_per_image),
            pixels=partial(np.asarray, pixels),
            pictures=tuple(shown),
        )
