"""A loaded model as an answerer: all questions through the engine, by image."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stf_jax.data.clips import UNIFORM, Clip, FrameSampling, open_clip
from stf_jax.data.conversation import render_prompt
from stf_jax.data.fit import fit_template
from stf_jax.data.templates import IMAGE_MARKER, Template
from stf_jax.eval.questions import Decoding, Question, Reply
from stf_jax.infer.model import Model
from stf_jax.infer.prompts import Prompt, make_prompt, read_pixels, show
from stf_jax.infer.sampling import GREEDY
from stf_jax.util.files import name_some


class ModelAnswerer:
    """Answers with the engine of a model.

    Args:
      model: from `stf_jax.load`.
      model_id: its name in the answer files.
      slots: answers in the making at a time; greedy answers in float32 do not depend on it.
      tokens: an image, where the system has several budgets; by default its most.
      sampling: which frames of a clip are shown.
      dtype: of weights and arithmetic, for the protocol.
    """

    def __init__(
        self,
        model: Model,
        *,
        model_id: str,
        slots: int = 16,
        tokens: int | None = None,
        sampling: FrameSampling = UNIFORM,
        dtype: str,
    ):
        if slots < 1:
            raise ValueError(f"slots is {slots}; give 1 or more")
        self._tokens = model.config.choose_budget(tokens)
        self.model_id = model_id
        self._model, self._slots, self._dtype = model, slots, dtype
        self._sampling = sampling
        # Several questions are about one clip.
        self._clips: dict[Path, Clip] = {}

    def describe(self) -> dict[str, Any]:
        """Weights, image mode, vision tokens, dtypes, and how an image stands in a prompt."""
        marker, first = self._model.tokenizer.image_marker, self._model.tokenizer.images_first
        return {
            **({} if self._sampling == UNIFORM else {"clips": asdict(self._sampling)}),
            **({} if marker == IMAGE_MARKER else {"image_marker": marker}),
            **({} if first is None else {"images_first": asdict(first)}),
            "weights": self._model.engine.program.checksum,
            "image_mode": self._model.image_processor.mode,
            "image_size": self._model.image_processor.image_size,
            "system": self._model.config.system.describe(),
            "tokens_per_image": self._tokens,
            "dtype": self._dtype,
            "cache_dtype": self._model.engine.program.cache_dtype or self._dtype,
        }

    def answer(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[Reply]:
        """Replies as they come; images are read shortly before they are needed.

        Raises:
          ValueError: naming every question that is longer than the context, before the first reply.
          ImageError: an image that cannot be read.
        """
        template = fit_template(decoding.template, self._model.tokenizer)
        prompts = [self._prompt(question, template) for question in questions]
        self._check_lengths(questions, prompts)
        for index, answer in self._model.answer(
            prompts,
            template=template,
            max_new_tokens=decoding.max_new_tokens,
            sampling=GREEDY,
            slots=self._slots,
        ):
            yield Reply(number=questions[index].number, text=answer.text)

    def _prompt(self, question: Question, template: Template) -> Prompt:
        clips = []
        for path in question.clips:
            if path not in self._clips:
                self._clips[path] = open_clip(path, self._sampling)
            clips.append(self._clips[path])
        shown = show(
            question.prompt,
            question.images,
            clips,
            layout=self._model.config.system.clip_layout(self._sampling.frames),
        )

        def pixels() -> np.ndarray:
            return read_pixels(
                shown.load(),
                self._model.image_processor,
                upright=False,  # The reference ignores EXIF.
                unnamed=f"the image of {question.question_id}",
            )

        return make_prompt(
            render_prompt(shown.text, template=template),
            pixels,
            tokenizer=self._model.tokenizer,
            tokens_per_image=self._tokens,
            question_length=self._model.config.question_length,
            image_key=(*question.images, *question.clips) or None,
            visuals=shown.visuals,
            layout=shown.layout,
        )

    def _check_lengths(self, questions: Sequence[Question], prompts: Sequence[Prompt]) -> None:
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
