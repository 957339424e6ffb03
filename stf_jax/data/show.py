"""`stf-jax data show`: one example as the model will meet it."""

import dataclasses
import itertools
import os
from typing import Any

import numpy as np
from PIL import Image

from stf_jax.data.dataset import Dataset, DatasetError
from stf_jax.data.encoding import encode_conversation, expand_conversation
from stf_jax.data.fit import fit_template
from stf_jax.data.images import ImageProcessor
from stf_jax.data.templates import IMAGE_MARKER
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of an example's text, decoded from its tokens, all supervised or none."""

    text: str
    supervised: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownExample:
    """An example, decoded back from its tokens.

    Attributes:
      id: of the entry in LLaVA's JSON.
      number: its place in the dataset.
      spans: its text; each image is an `<image>`.
      tokens: with images expanded, after the cut.
      supervised: tokens that count in the loss.
      images: how many the tower will see.
      truncated: whether tokens were cut off.
      png: file with what the tower will see, side by side; None if nothing was to be written.
    """

    id: str
    number: int
    spans: tuple[Span, ...]
    tokens: int
    supervised: int
    images: int
    truncated: bool
    png: str | None

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return dataclasses.asdict(self)

    def render(self, *, start: str = "[[", end: str = "]]") -> str:
        """For a terminal; supervised text stands between `start` and `end`."""
        cut = ", cut" if self.truncated else ""
        lines = [
            f"{self.id} (number {self.number}): {self.tokens} tokens{cut}, "
            f"{self.supervised} supervised, {self.images} images",
            "".join(f"{start}{s.text}{end}" if s.supervised else s.text for s in self.spans),
        ]
        if self.png:
            lines.append(f"What the tower sees is in {self.png}.")
        return "\n".join(lines)


def show(
    dataset: str | os.PathLike[str],
    example: int | str,
    *,
    tokenizer: Tokenizer,
    template: str = "v1",
    image_processor: ImageProcessor | None = None,
    tokens_per_image: int = 144,
    sequence_length: int = 2048,
    strict_labels: bool = False,
    png: str | os.PathLike[str] | None = None,
) -> ShownExample:
    """Decodes one example back from the tokens and labels that training would use.

    Args:
      dataset: folder made by `build`.
      example: its place, or its id; a text that is no id but a number is a place too.
      tokenizer: of the model.
      template: one of `templates.TEMPLATES`.
      image_processor: default CLIP's at 336 px, padding.
      tokens_per_image: placeholders for each image.
      sequence_length: cut there.
      strict_labels: the PyTorch reference's labels.
      png: file to write the images to, as the tower sees them; not written if there are none.

    Raises:
      DatasetError: no such dataset or example.
      ValueError: a template that does not fit the tokenizer, a conversation that it cannot take,
        or an image that cannot be read.
    """
    opened = Dataset(dataset)
    number = _find(opened, example)
    stored = opened[number]
    encoded = encode_conversation(
        tokenizer,
        stored.conversation,
        template=fit_template(template, tokenizer),
        num_images=len(stored.images),
        max_length=sequence_length,
        strict=strict_labels,
    )
    expanded = expand_conversation(
        encoded, tokens_per_image=tokens_per_image, max_length=sequence_length
    )
    processor = image_processor or ImageProcessor()
    seen = [
        Image.fromarray(processor.square(processor.load(data, name=f"image of {stored.id}")))
        for data in stored.images[: expanded.num_images]
    ]
    if png is not None and seen:
        _side_by_side(seen).save(png, "PNG")
    ids, labels = expanded.ids, expanded.labels
    starts = ids == IMAGE_TOKEN_ID
    # Of each image's run of placeholders one is shown.
    shown = ~starts
    shown[np.flatnonzero(starts)[::tokens_per_image]] = True
    return ShownExample(
        id=stored.id,
        number=number,
        spans=_spans(tokenizer, ids[shown], labels[shown] != IGNORED_LABEL),
        tokens=len(ids),
        supervised=expanded.num_supervised,
        images=expanded.num_images,
        truncated=encoded.truncated or expanded.truncated,
        png=os.fspath(png) if png is not None and seen else None,
    )


def _find(dataset: Dataset, example: int | str) -> int:
    if isinstance(example, str):
        ids = dataset.ids()
        if example in ids:
            return ids.index(example)
        if not example.isdecimal():
            raise DatasetError(
                f"{dataset.path}: no example with the id {example!r}; "
                f"give another, or a place from 0 to {len(dataset) - 1}"
            )
    number = int(example)
    if not 0 <= number < len(dataset):
        raise DatasetError(f"{dataset.path}: no example {number}; it has 0 to {len(dataset) - 1}")
    return number


def _spans(tokenizer: Tokenizer, ids: np.ndarray, supervised: np.ndarray) -> tuple[Span, ...]:
    is_image = ids == IMAGE_TOKEN_ID
    changes = (np.diff(supervised.astype(int)) != 0) | (np.diff(is_image.astype(int)) != 0)
    bounds = [0, *(np.flatnonzero(changes | is_image[1:]) + 1).tolist(), len(ids)]
    spans: list[Span] = []
    text_before, first = "", 0
    for start, end in itertools.pairwise(bounds):
        if is_image[start]:
            spans.append(Span(text=IMAGE_MARKER, supervised=False))
            # The text after an image is tokenized on its own.
            text_before, first = "", end
            continue
        # A span alone would lose its leading space.
        text = tokenizer.backend.decode(ids[first:end].tolist(), skip_special_tokens=False)
        shown = text.removeprefix(text_before)
        spans.append(Span(text=shown, supervised=bool(supervised[start])))
        text_before = text
    return tuple(spans)


def _side_by_side(images: list[Image.Image]) -> Image.Image:
    side = images[0].width
    sheet = Image.new("RGB", (side * len(images), side))
    for place, image in enumerate(images):
        sheet.paste(image, (place * side, 0))
    return sheet
