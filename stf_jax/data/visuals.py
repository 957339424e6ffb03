"""Images and clips where a system joins the frames of a clip: their tokens, slots and frames.

`visuals` lists them in the order of the text: the frames of each clip, and 0 for an image that is
none. Their pixels, frame by frame, are in the same order.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from stf_jax.data.batch import ClipLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """Where images and clips stand in a row.

    Attributes:
      slots: int32 [_], which of the row's image tokens each placeholder is.
      clips: of each clip, which of the row's images its frames are.
    """

    slots: np.ndarray
    clips: tuple[range, ...]


def tokens_of(
    visuals: Sequence[int], layout: ClipLayout, *, tokens_per_image: int
) -> tuple[int, ...]:
    """The tokens of each."""
    return tuple(layout.tokens if frames else tokens_per_image for frames in visuals)


def place_visuals(
    visuals: Sequence[int], layout: ClipLayout, *, images: int, tokens_per_image: int
) -> Placed:
    """Slots and frames, from those of the first image on.

    Args:
      visuals: of a whole row.
      layout: of its clips.
      images: that a row has room for, frames among them.
      tokens_per_image: K.
    """
    slots, clips = [np.zeros(0, np.int32)], []
    next_clip = images * tokens_per_image if layout.after_images else 0
    image = 0
    for frames in visuals:
        if frames:
            slots.append(next_clip + np.arange(layout.tokens, dtype=np.int32))
            next_clip += layout.tokens
            clips.append(range(image, image + frames))
        else:
            first = image * tokens_per_image
            slots.append(first + np.arange(tokens_per_image, dtype=np.int32))
        image += max(frames, 1)
    return Placed(slots=np.concatenate(slots), clips=tuple(clips))


def clip_array(rows: Sequence[Sequence[range]], *, clips: int, frames: int) -> np.ndarray:
    """Int32 [rows, clips, frames] of a batch: the images of each clip, -1 where there is none."""
    array = np.full((len(rows), clips, frames), -1, np.int32)
    for row, ranges in enumerate(rows):
        for number, shown in enumerate(ranges):
            array[row, number, : len(shown)] = shown
    return array
