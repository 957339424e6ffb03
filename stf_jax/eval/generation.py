"""`stf_jax.Model` as an answerer: a few questions at a time, in one batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from stf_jax.data.conversation import get_template, render_prompt
from stf_jax.data.images import load_image
from stf_jax.data.tokenizer import encode_prompt, expand_images
from stf_jax.eval.files import name_some
from stf_jax.eval.questions import Decoding, Question, Reply

if TYPE_CHECKING:
    from stf_jax.model import Model


class ModelAnswerer:
    """Answers with `Model.generate`, `batch_size` questions at a time.

    Args:
      model: from `stf_jax.load`.
      model_id: its name in the answer files.
      batch_size: greedy answers do not depend on it.
      dtype: of weights and arithmetic, for the protocol.
    """

    def __init__(self, model: "Model", *, model_id: str, batch_size: int = 8, dtype: str):
        if batch_size < 1:
            raise ValueError(f"the batch size is {batch_size}; give 1 or more")
        self.model_id = model_id
        self._model, self._batch_size, self._dtype = model, batch_size, dtype

    def describe(self) -> dict[str, Any]:
        """Image mode, vision tokens and dtype."""
        return {
            "image_mode": self._model.image_processor.mode,
            "image_size": self._model.image_processor.image_size,
            "tokens_per_image": self._model.config.tokens_per_image,
            "dtype": self._dtype,
        }

    def answer(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[Reply]:
        """Replies in the order of the questions.

        Raises:
          ValueError: naming every question that is longer than the context, before the first reply.
          ImageError: a picture that cannot be read.
        """
        from stf_jax.model import Request

        self._check_lengths(questions, decoding)
        for start in range(0, len(questions), self._batch_size):
            batch = questions[start : start + self._batch_size]
            answers = self._model.generate(
                [
                    Request(
                        prompt=one.prompt, images=[_picture(one, image) for image in one.images]
                    )
                    for one in batch
                ],
                template=decoding.template,
                max_new_tokens=decoding.max_new_tokens,
            )
            for one, answer in zip(batch, answers, strict=True):
                yield Reply(number=one.number, text=answer.text)

    def _check_lengths(self, questions: Sequence[Question], decoding: Decoding) -> None:
        template, tokens = get_template(decoding.template), self._model.config.tokens_per_image
        room = self._model.config.text.max_positions
        too_long = []
        for one in questions:
            text = render_prompt(one.prompt, template=template)
            ids = encode_prompt(self._model.tokenizer, text)
            length = len(expand_images(ids, tokens_per_image=tokens))
            if length >= room:
                too_long.append(f"{one.question_id} ({length})")
        if too_long:
            raise ValueError(
                f"{len(too_long)} questions leave no room for an answer in the model's context of "
                f"{room} tokens: {name_some(too_long)}; use a model with a longer context or fewer "
                "vision tokens"
            )


def _picture(question: Question, image: Path | bytes) -> Image.Image:
    """The picture as it is stored: the reference ignores EXIF's orientation."""
    name = str(image) if isinstance(image, Path) else f"the picture of {question.question_id}"
    picture = load_image(image, name=name)
    # Without what else the file says, since `Model.generate` turns pictures upright.
    return Image.frombytes(picture.mode, picture.size, picture.tobytes())
