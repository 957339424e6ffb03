"""A loaded model as an answerer: all questions through the engine, by picture."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stf_jax.data.conversation import get_template, render_prompt
from stf_jax.data.images import ImageError, load_image
from stf_jax.data.tokenizer import encode_prompt, expand_images
from stf_jax.eval.questions import Decoding, Question, Reply
from stf_jax.util.files import name_some

if TYPE_CHECKING:
    from stf_jax.infer.model import Model
    from stf_jax.infer.prompts import Prompt

# Steps between looks at the answers.
_EVERY = 16


class ModelAnswerer:
    """Answers with the engine of a model.

    Args:
      model: from `stf_jax.load`.
      model_id: its name in the answer files.
      slots: answers in the making at a time; greedy answers in float32 do not depend on it.
      dtype: of weights and arithmetic, for the protocol.
    """

    def __init__(self, model: "Model", *, model_id: str, slots: int = 16, dtype: str):
        if slots < 1:
            raise ValueError(f"slots is {slots}; give 1 or more")
        self.model_id = model_id
        self._model, self._slots, self._dtype = model, slots, dtype

    def describe(self) -> dict[str, Any]:
        """Weights, image mode, vision tokens and dtypes."""
        return {
            "weights": self._model.engine.program.checksum,
            "image_mode": self._model.image_processor.mode,
            "image_size": self._model.image_processor.image_size,
            "tokens_per_image": self._model.config.tokens_per_image,
            "dtype": self._dtype,
            "cache_dtype": self._model.engine.program.cache_dtype or self._dtype,
        }

    def answer(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[Reply]:
        """Replies as they come; pictures are read shortly before they are needed.

        Raises:
          ValueError: naming every question that is longer than the context, before the first reply.
          ImageError: a picture that cannot be read.
        """
        from stf_jax.infer.answers import AnswerBuilder
        from stf_jax.infer.sampling import GREEDY

        prompts = [self._prompt(one, decoding) for one in questions]
        self._check_lengths(questions, prompts)
        model, stops = self._model, get_template(decoding.template).stop_strings
        builders: dict[int, AnswerBuilder] = {}

        def take(index: int, ids: np.ndarray) -> bool:
            if index not in builders:
                builders[index] = AnswerBuilder(
                    model.tokenizer, eos_ids=model.config.text.eos_ids, stops=stops
                )
            builders[index].push(ids)
            return not builders[index].finished

        for index in model.engine.run(
            prompts,
            slots=self._slots,
            max_new_tokens=decoding.max_new_tokens,
            sampling=GREEDY,
            every=_EVERY,
            take=take,
        ):
            builder = builders.pop(index)
            builder.finish()
            yield Reply(number=questions[index].number, text=builder.text.strip())

    def _prompt(self, question: Question, decoding: Decoding) -> "Prompt":
        from stf_jax.infer.prompts import Prompt

        text = render_prompt(question.prompt, template=get_template(decoding.template))
        ids = encode_prompt(self._model.tokenizer, text)
        return Prompt(
            ids=expand_images(ids, tokens_per_image=self._model.config.tokens_per_image),
            pixels=partial(self._pixels, question),
            pictures=question.images or None,
        )

    def _pixels(self, question: Question) -> np.ndarray:
        """Pictures as they are stored: the reference ignores EXIF's orientation."""
        processor = self._model.image_processor
        size = processor.image_size
        pixels = np.zeros((len(question.images), size, size, 3), np.float32)
        for image, out in zip(question.images, pixels, strict=True):
            name = (
                str(image) if isinstance(image, Path) else f"the picture of {question.question_id}"
            )
            picture = load_image(image, name=name)
            try:
                out[...] = processor.pixels(picture)
            except ImageError as error:
                raise ImageError(f"{name}: {error}") from error
        return pixels

    def _check_lengths(self, questions: Sequence[Question], prompts: "Sequence[Prompt]") -> None:
        room = self._model.config.text.max_positions
        too_long = [
            f"{question.question_id} ({len(prompt.ids)})"
            for question, prompt in zip(questions, prompts, strict=True)
            if len(prompt.ids) >= room
        ]
        if too_long:
            raise ValueError(
                f"{len(too_long)} questions leave no room for an answer in the model's context of "
                f"{room} tokens: {name_some(too_long)}; use a model with a longer context or fewer "
                "vision tokens"
            )
