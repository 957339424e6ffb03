"""The lengths of a dataset's examples, in a numpy file beside it: all that packing reads."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

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
      first_supervised: int32 [examples].
      images_before: int32 [examples].
      mismatches: bool [examples].
    """

    ids: np.ndarray
    lengths: np.ndarray
    images: np.ndarray
    first_supervised: np.ndarray
    images_before: np.ndarray
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
            first_supervised=column("first_supervised"),
            images_before=column("images_before"),
            mismatches=column("mismatch").astype(bool),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, tokens_per_image: int) -> np.ndarray:
        """Tokens of each example int32 [examples], images as so many; uncut."""
        return self.lengths + self.images * (tokens_per_image - 1)

    def teaches(self, sequence_length: int, tokens_per_image: int) -> np.ndarray:
        """Bool [examples]: whether a cut to `sequence_length` leaves a supervised token."""
        place = self.first_supervised + self.images_before * (tokens_per_image - 1)
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
                index = cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})
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
    digest = hashlib.sha256("\n".join(content).encode()).hexdigest()[:12]
    return f"index-{template.name}-{digest}.npz"
