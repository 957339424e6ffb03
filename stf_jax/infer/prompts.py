"""Prompts of different lengths and image counts as one batch of static shape."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from stf_jax.batch import IGNORED_LABEL, Batch
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One prompt, ready for the model.

    Attributes:
        ids: int32 [T], each image already the K placeholders that its tokens will replace.
        pixels: float32 [images, S, S, 3].
    """

    ids: np.ndarray
    pixels: np.ndarray


def bucket(length: int) -> int:
    """The next of 64, 96, 128, 192, 256, 384, ...: at most a third is padding above 64."""
    size = 64
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def pad_prompts(prompts: Sequence[Prompt], *, rows: int, image_size: int) -> Batch:
    """Pads to the next bucket of the longest prompt, to the most images, and to `rows` rows.

    Rows beyond the prompts hold one token, so that nothing they compute is undefined.
    """
    length = bucket(max(len(prompt.ids) for prompt in prompts))
    images = max(len(prompt.pixels) for prompt in prompts)
    shape = (rows, length)
    # Host arrays in a batch are what `jax.jit` and `jax.device_put` take.
    ids: Any = np.zeros(shape, np.int32)
    segments: Any = np.zeros(shape, np.int32)
    image_slots: Any = np.full(shape, -1, np.int32)
    pixels: Any = np.zeros((rows, images, image_size, image_size, 3), np.float32)
    labels: Any = np.full(shape, IGNORED_LABEL, np.int32)
    positions: Any = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    segments[:, 0] = 1
    for row, prompt in enumerate(prompts):
        size = len(prompt.ids)
        at_image = prompt.ids == IMAGE_TOKEN_ID
        ids[row, :size] = prompt.ids
        segments[row, :size] = 1
        image_slots[row, :size][at_image] = np.arange(at_image.sum())
        pixels[row, : len(prompt.pixels)] = prompt.pixels
    return Batch(
        ids=ids,
        labels=labels,
        positions=positions,
        segments=segments,
        image_slots=image_slots,
        pixels=pixels,
    )
