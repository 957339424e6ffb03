"""The lengths of a dataset's examples, in a numpy file beside it: all that packing reads."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from stf_jax.data.batch import ClipLayout
from stf_jax.data.inspection import Measures
from stf_jax.data.templates import IMAGE_MARKER, Template, get_template
from stf_jax.data.tokenizer import Tokenizer
from stf_jax.util.errors import first_line
from stf_jax.util.files import write_whole


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """One entry for each of a dataset's N examples, in its order; see `Measures`.

    Attributes:
      ids: str [examples], all different.
      lengths: int32 [examples].
      images: int32 [examples].
      clips: int32 [examples].
      frames: int32 [examples].
      longest_clip: int32 [examples].
      first_supervised: int32 [examples].
      images_before: int32 [examples].
      clips_before: int32 [examples].
      frames_before: int32 [examples].
      mismatches: bool [examples].
    """

    ids: np.ndarray
    lengths: np.ndarray
    images: np.ndarray
    clips: np.ndarray
    frames: np.ndarray
    longest_clip: np.ndarray
    first_supervised: np.ndarray
    images_before: np.ndarray
    clips_before: np.ndarray
    frames_before: np.ndarray
    mismatches: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[str], measures: Sequence[Measures]) -> Self:
        """From the measures of each example."""

        def column(name: str) -> np.ndarray:
            return np.array([getattr(measure, name) for measure in measures], np.int32)

        return cls(
            ids=np.array(ids, np.str_),
            lengths=column("length"),
            images=column("images"),
            clips=column("clips"),
            frames=column("frames"),
            longest_clip=column("longest_clip"),
            first_supervised=column("first_supervised"),
            images_before=column("images_before"),
            clips_before=column("clips_before"),
            frames_before=column("frames_before"),
            mismatches=column("mismatch").astype(bool),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, tokens_per_image: int, layout: ClipLayout | None = None) -> np.ndarray:
        """Tokens of each example int32 [examples], images as so many; uncut.

        Frames are images, unless `layout` says that a system joins them.
        """
        return _expand(self.lengths, self.images, self.clips, self.frames, tokens_per_image, layout)

    def teaches(
        self, sequence_length: int, tokens_per_image: int, layout: ClipLayout | None = None
    ) -> np.ndarray:
        """Bool [examples]: whether a cut to `sequence_length` leaves a supervised token."""
        place = _expand(
            self.first_supervised,
            self.images_before,
            self.clips_before,
            self.frames_before,
            tokens_per_image,
            layout,
        )
        return (self.first_supervised >= 0) & (place < sequence_length)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        with write_whole(path) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, **dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
          ValueError: the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                content = {name: arrays[name] for name in arrays.files}
                # Older releases know no clips.
                for name in ("clips", "frames", "longest_clip", "clips_before", "frames_before"):
                    content.setdefault(name, np.zeros_like(content["images"]))
                index = cls(
                    **{field.name: content[field.name] for field in dataclasses.fields(cls)}
                )
            columns = dataclasses.asdict(index)
            kinds = {
                name: "U" if name == "ids" else "b" if name == "mismatches" else "i"
                for name in columns
            }
            for name, column in columns.items():
                if column.shape != (len(index.ids),) or column.dtype.kind != kinds[name]:
                    raise ValueError(f"{name} is {column.dtype} {list(column.shape)}")
        # numpy and zipfile raise any kind.
        except Exception as error:
            raise ValueError(
                f"{path}: damaged ({first_line(error)}); delete it and build again"
            ) from error
        return index


def _expand(
    length: np.ndarray,
    images: np.ndarray,
    clips: np.ndarray,
    frames: np.ndarray,
    tokens_per_image: int,
    layout: ClipLayout | None,
) -> np.ndarray:
    """A length, in which each image and each frame counts as one, in tokens."""
    if layout is None:
        return length + images * (tokens_per_image - 1)
    alone = tokens_per_image if layout.after_images else layout.tokens
    return length + (images - frames) * (alone - 1) + clips * layout.tokens - frames


def index_name(tokenizer: Tokenizer, template: Template) -> str:
    """The file of the index for a tokenizer and a template; a dataset may have several.

    Args:
      tokenizer: that the lengths are counted in.
      template: as `fit_template` spells it for this tokenizer.
    """
    content = [tokenizer.backend.to_str(), str(tokenizer.bos_id), str(tokenizer.marks_start)]
    # Only where it is not LLaMA's, so that the names of older releases stay.
    if template != get_template(template.name):
        content += [template.reply_end, template.before_question]
    if tokenizer.image_marker != IMAGE_MARKER:
        content.append(tokenizer.image_marker)
    if (first := tokenizer.images_first) is not None:
        content.append(f"{first.token} {first.count}")
    digest = hashlib.sha256("\n".join(content).encode()).hexdigest()[:12]
    return f"index-{template.name}-{digest}.npz"
