"""What requests can come: prompts of every length and number of images that a server takes."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from stf_jax.data.tokenizer import IMAGE_TOKEN_ID
from stf_jax.infer.prompts import LEAST_QUESTION, Prompt, bucket
from stf_jax.models.connector import Architecture
from stf_jax.serve.prompts import Prompts


def every_length(
    config: Architecture, prompts: Prompts, *, budgets: Sequence[int], context: int
) -> Iterator[Prompt]:
    """A prompt of each length, with each number of images in each budget; pixels are zeros.

    Args:
        config: of the model.
        prompts: of the server.
        budgets: tokens of an image, that requests can ask for.
        context: positions of a request.
    """
    text = prompts.plain("What?")
    for length in range(1, context):
        yield dataclasses.replace(text, ids=np.resize(text.ids, length))
    size = config.image_size
    for budget in budgets:
        for images in range(1, prompts.most_images + 1):
            seen = prompts.show(np.zeros((images, size, size, 3), np.float32), budget)
            first = int(np.flatnonzero(seen.ids == IMAGE_TOKEN_ID)[0])
            begun, rest = seen.ids[:1], seen.ids[first:]
            for length in range(1 + len(rest), context):
                more = np.resize(seen.ids[1:first], length - 1 - len(rest))
                prompt = dataclasses.replace(seen, ids=np.concatenate([begun, more, rest]))
                yield from _questions(prompt, config.question_length)


def _questions(prompt: Prompt, longest: int) -> Iterator[Prompt]:
    """With a question of each length that is compiled for, where the model reads it."""
    if prompt.question is None:
        yield prompt
        return
    for length in sorted({bucket(n, least=LEAST_QUESTION) for n in range(1, longest + 1)}):
        question = np.resize(prompt.question, min(length, longest))
        yield dataclasses.replace(prompt, question=question)
