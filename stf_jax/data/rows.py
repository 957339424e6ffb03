"""One row of a batch, made of its examples. Runs in the worker processes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from stf_jax.data.batch import ClipLayout
from stf_jax.data.dataset import Dataset, DatasetError, Stored
from stf_jax.data.encoding import (
    EncodedConversation,
    encode_conversation,
    expand_conversation,
    expand_visuals,
)
from stf_jax.data.features import ImageFeatures
from stf_jax.data.images import ImageError, ImageProcessor
from stf_jax.data.planner import Planner
from stf_jax.data.question import encode_question
from stf_jax.data.templates import Template
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID, Tokenizer
from stf_jax.data.visuals import place_visuals, tokens_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lost:
    """An example that could not be read any more, and why."""

    id: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowContents:
    """What stands in a row: ids of the examples, and of those that were to stand there."""

    example_ids: tuple[str, ...]
    lost: tuple[Lost, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """The text of a row of a `Batch`, without its B axis.

    Attributes:
      ids: int32 [T].
      labels: int32 [T]; `IGNORED_LABEL` at the first token of each segment.
      positions: int32 [T], from 0 in each segment.
      segments: int32 [T], from 1; 0 is padding.
      image_slots: int32 [T], index into the row's I*K image tokens; -1 where text is.
      contents: what stands in it.
      questions: int32 [_] for each image, what it is asked; none where the model reads none.
      clips: which of the row's images the frames of each clip are, where the system joins them.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    image_slots: np.ndarray
    contents: RowContents
    questions: tuple[np.ndarray, ...] = ()
    clips: tuple[range, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowMaker:
    """Makes rows from examples' numbers.

    Attributes:
      datasets: in the planner's order.
      starts: int64 [datasets + 1], the number of each dataset's first example among all.
      names: what the ids of each dataset are prefixed with.
      tokenizer: of the model.
      template: of the conversations.
      image_processor: of the tower.
      tokens_per_image: K.
      question_length: tokens of an image's question that the model reads; 0 where it reads none.
      sequence_length: T.
      strict_labels: the PyTorch reference's labels.
      images_per_row: I.
      layout: of clips, where the system joins their frames.
      features: of the images of each dataset, where they are read in place of pixels.
    """

    datasets: Sequence[Dataset]
    starts: np.ndarray
    names: Sequence[str]
    tokenizer: Tokenizer
    template: Template
    image_processor: ImageProcessor
    tokens_per_image: int
    sequence_length: int
    strict_labels: bool
    question_length: int = 0
    images_per_row: int = 0
    layout: ClipLayout | None = None
    features: Sequence[ImageFeatures] = ()

    def make(self, examples: np.ndarray) -> tuple[Row, np.ndarray]:
        """The row of these examples, and its images uint8 [images, size, size, 3].

        Where features are read, they are its images: the bits of [images, N, C].

        One that cannot be read, or an image of which cannot, is left out whole: a conversation
        about an image that is not there would teach guessing. The others move up; the free places
        become padding.
        """
        encoded: list[EncodedConversation] = []
        visuals: list[int] = []
        images: list[np.ndarray] = []
        names: list[str] = []
        lost: list[Lost] = []
        for example in examples.tolist():
            dataset = int(np.searchsorted(self.starts, example, side="right")) - 1
            number = example - int(self.starts[dataset])
            name = f"{self.names[dataset]}example {number}"
            try:
                stored = self.datasets[dataset][number]
                name = f"{self.names[dataset]}{stored.id}"
                conversation, shown = self._encode(stored)
                seen = self._see(dataset, number, stored.images[: conversation.num_images])
            except (DatasetError, ImageError) as error:
                lost.append(Lost(id=name, reason=str(error)))
                continue
            encoded.append(conversation)
            visuals += shown
            images += seen
            names.append(name)
        contents = RowContents(example_ids=tuple(names), lost=tuple(lost))
        row = self._assemble(encoded, visuals, contents)
        if images:
            return row, np.stack(images)
        if self.features:
            return row, self.features[0].blank[None][:0]
        side = self.image_processor.image_size
        return row, np.zeros((0, side, side, 3), np.uint8)

    def _encode(self, stored: Stored) -> tuple[EncodedConversation, tuple[int, ...]]:
        """The conversation, and its visuals where the system joins frames."""
        joined = self.layout is not None
        encoded = encode_conversation(
            self.tokenizer,
            stored.conversation,
            template=self.template,
            num_images=len(stored.images),
            max_length=None if joined else self.sequence_length,
            strict=self.strict_labels,
        )
        length, image = self.sequence_length, self.tokens_per_image
        if self.layout is None:
            return expand_conversation(encoded, tokens_per_image=image, max_length=length), ()
        alone = 0 if self.layout.after_images else 1
        visuals = tuple(n or alone for n in stored.visuals) or (alone,) * len(stored.images)
        return expand_visuals(
            encoded,
            visuals=visuals,
            tokens=tokens_of(visuals, self.layout, tokens_per_image=image),
            max_length=length,
        )

    def _see(self, dataset: int, example: int, images: Sequence[bytes]) -> list[np.ndarray]:
        if self.features:
            store = self.features[dataset]
            return [store.read(example, place, data) for place, data in enumerate(images)]
        return [self.image_processor.square(self.image_processor.load(data)) for data in images]

    def _assemble(
        self,
        encoded: Sequence[EncodedConversation],
        visuals: Sequence[int],
        contents: RowContents,
    ) -> Row:
        length = self.sequence_length
        ids, positions, segments = (np.zeros(length, np.int32) for _ in range(3))
        labels = np.full(length, IGNORED_LABEL, np.int32)
        image_slots = np.full(length, -1, np.int32)
        start = slots = 0
        for segment, conversation in enumerate(encoded, start=1):
            end = start + len(conversation.ids)
            ids[start:end] = conversation.ids
            labels[start:end] = conversation.labels
            # Alone, an example has nothing in front that its first token could be predicted from.
            labels[start] = IGNORED_LABEL
            positions[start:end] = np.arange(end - start)
            segments[start:end] = segment
            places = start + np.flatnonzero(conversation.ids == IMAGE_TOKEN_ID)
            image_slots[places] = slots + np.arange(len(places))
            start, slots = end, slots + len(places)
        clips: tuple[range, ...] = ()
        if self.layout is not None:
            placed = place_visuals(
                visuals,
                self.layout,
                images=self.images_per_row,
                tokens_per_image=self.tokens_per_image,
            )
            image_slots[image_slots >= 0] = placed.slots
            clips = placed.clips
        return Row(
            clips=clips,
            ids=ids,
            labels=labels,
            positions=positions,
            segments=segments,
            image_slots=image_slots,
            contents=contents,
            questions=self._questions(encoded),
        )

    def _questions(self, encoded: Sequence[EncodedConversation]) -> tuple[np.ndarray, ...]:
        """All images of a conversation share one."""
        questions: list[np.ndarray] = []
        if self.question_length:
            for conversation in encoded:
                if conversation.num_images:
                    ids = encode_question(
                        self.tokenizer, conversation.ids, length=self.question_length
                    )
                    questions += [ids] * conversation.num_images
        return tuple(questions)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowSource:
    """The rows of one host from a step on, by number: what Grain reads.

    Attributes:
      planner: which examples a row has.
      maker: makes a row of them.
      start_step: the step of row 0.
      batch_rows: of each global batch, the rows that this host makes.
      rows: how many there are.
    """

    planner: Planner
    maker: RowMaker
    start_step: int
    batch_rows: Sequence[int]
    rows: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: int) -> tuple[Row, np.ndarray]:
        # Apart from the row, so that Grain hands the images over in shared memory.
        step, row = divmod(int(number), len(self.batch_rows))
        return self.maker.make(self.planner.row(self.start_step + step, self.batch_rows[row]))
