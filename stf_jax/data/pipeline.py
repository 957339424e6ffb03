"""Batches for training: from datasets on disk to numpy arrays, the same for any number of hosts.

data = TrainingData(config, tokenizer=..., image_processor=..., tokens_per_image=144)
for step in data.batches(start_step=resumed_at):
    train(step.batch)
"""

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import sys
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from stf_jax.data.batch import Batch, ClipLayout
from stf_jax.data.config import DataConfig
from stf_jax.data.conversation import render_prompt
from stf_jax.data.dataset import Dataset, DatasetError
from stf_jax.data.features import ImageFeatures
from stf_jax.data.fit import fit_template
from stf_jax.data.images import ImageProcessor
from stf_jax.data.index import Index
from stf_jax.data.planner import Planner
from stf_jax.data.prefetch import read_ahead
from stf_jax.data.question import check_prompt
from stf_jax.data.rows import Lost, Row, RowMaker, RowSource
from stf_jax.data.templates import Template
from stf_jax.data.tokenizer import Tokenizer
from stf_jax.data.visuals import clip_array

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPlan:
    """A summary of the training data.

    Attributes:
      examples: used, over all datasets.
      examples_per_epoch: with the datasets' weights.
      rows: of the first epoch.
      steps: of the first epoch.
      fill: the part of its rows that holds tokens.
      tokens: of its rows, padding not counted.
      truncated: used examples that are cut to the sequence length.
      too_long: left out, because no supervised token is within the sequence length.
      too_many_images: left out, because they have more images than a row.
      unfit: left out, because the template cannot take them or they teach nothing.
      masked: left out, because strict labels mask them whole.
    """

    examples: int
    examples_per_epoch: int
    rows: int
    steps: int
    fill: float
    tokens: int
    truncated: int
    too_long: int
    too_many_images: int
    unfit: int
    masked: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingStep:
    """This host's part of one global batch.

    Attributes:
      step: its number; continuing from it is `batches(start_step=step + 1)`.
      example_ids: what stands in each row, in order; "dataset/id" if there are several datasets.
      batch: numpy arrays with this host's rows; pixels are 8-bit values, a quarter of the bytes,
        which the training step normalizes.
      lost: what was to stand there and could not be read.
    """

    step: int
    example_ids: tuple[tuple[str, ...], ...]
    batch: Batch
    lost: tuple[Lost, ...]


class TrainingData:
    """Datasets, planned into rows and steps.

    Global batch number s is a function of (config, datasets, s) and of nothing else: not of hosts,
    of workers, or of where a run was stopped.

    Args:
      config: see there.
      tokenizer: of the model.
      image_processor: of the tower; `config` decides whether it pads or crops.
      tokens_per_image: K.
      question_length: tokens of an image's question that the model reads; 0 where it reads none.
      layout: of a clip of `config.clip_frames`, where the system joins frames.

    Raises:
      DatasetError: a line for each dataset that is missing, unfinished, or has no index for the
        tokenizer and the template.
      ValueError: no dataset, a template that does not fit the tokenizer, or no example that fits.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        tokens_per_image: int,
        question_length: int = 0,
        layout: ClipLayout | None = None,
    ):
        self.config = config
        joins = layout is not None
        layout = layout if config.clip_frames else None
        template = fit_template(config.template, tokenizer)
        if question_length:
            check_prompt(render_prompt("?", template=template.training or template).text)
        datasets, indices = _open(config, tokenizer, template)
        self._prints = [dataset.fingerprint for dataset in datasets]
        if joins and layout is None and any(index.clips.any() for index in indices):
            raise ValueError(
                "the datasets have clips, and the system joins their frames; set data.clip_frames "
                "to the frames of a clip that they were built with"
            )
        columns = _Columns.of(indices, config, tokens_per_image, layout)
        sizes = [len(index) for index in indices]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        used = np.flatnonzero(columns.used)
        if not len(used):
            raise ValueError(columns.nothing_fits(config))
        pools = [
            used[(used >= first) & (used < last)] for first, last in itertools.pairwise(starts)
        ]
        # An empty pool has nothing to draw from.
        draws = [
            max(1, round(source.weight * len(pool))) if len(pool) else 0
            for source, pool in zip(config.datasets, pools, strict=True)
        ]
        self.planner = Planner(
            lengths=np.minimum(columns.tokens, config.sequence_length),
            images=columns.images,
            pools=pools,
            draws=draws,
            row_length=config.sequence_length,
            row_images=config.images_per_row,
            batch_size=config.batch_size,
            packing=config.packing,
            seed=config.seed,
        )
        self._maker = RowMaker(
            datasets=datasets,
            starts=starts,
            names=_prefixes(datasets),
            tokenizer=tokenizer,
            template=template,
            image_processor=dataclasses.replace(
                image_processor, mode=config.image_mode, fast=config.fast_images
            ),
            tokens_per_image=tokens_per_image,
            question_length=question_length,
            sequence_length=config.sequence_length,
            strict_labels=config.strict_labels,
            images_per_row=config.images_per_row,
            layout=layout,
        )
        self._columns = columns
        self.lost: dict[str, str] = {}

    @property
    def datasets(self) -> Sequence[Dataset]:
        """The datasets of the mixture, in the config's order."""
        return self._maker.datasets

    @property
    def image_processor(self) -> ImageProcessor:
        """The image processor, with the mode that the config asks for."""
        return self._maker.image_processor

    def read_features(self, features: Sequence[ImageFeatures]) -> None:
        """Has batches hold features, of each dataset in their order, in place of pixels."""
        self._maker = dataclasses.replace(self._maker, features=features)

    @property
    def fingerprint(self) -> str:
        """Identifies the datasets, wherever they lie, and the examples that are used."""
        digest = hashlib.sha256("".join(self._prints).encode())
        planner = self.planner
        for array in (planner.lengths, planner.images, *planner.pools, planner.draws):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of the first epoch; packed, a later one may have a few more or less."""
        return self.planner.steps(0)

    def num_steps(self, epochs: int) -> int:
        """Global batches of so many whole epochs."""
        return sum(self.planner.steps(epoch) for epoch in range(epochs))

    def plan(self) -> DataPlan:
        """A summary of the training data, in figures."""
        rows = self.planner.rows(0)
        columns = self._columns
        return DataPlan(
            examples=int(columns.used.sum()),
            examples_per_epoch=len(rows.examples),
            rows=len(rows),
            steps=self.steps_per_epoch,
            fill=self.planner.fill,
            tokens=int(self.planner.lengths[rows.examples].sum()),
            truncated=int((columns.used & (columns.tokens > self.config.sequence_length)).sum()),
            too_long=int(columns.too_long.sum()),
            too_many_images=int(columns.too_many_images.sum()),
            unfit=int(columns.unfit.sum()),
            masked=int(columns.masked.sum()),
        )

    def batches(
        self,
        *,
        start_step: int = 0,
        stop_step: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> Generator[TrainingStep, None, None]:
        """This host's part of each global batch from `start_step` on; close it when done.

        Args:
          start_step: the first.
          stop_step: one after the last; None continues for ever, epoch after epoch.
          rows: of each global batch, those that this host makes, ascending; default all. Hosts may
            ask for the same ones, as where a row's computation is spread over several.

        Raises:
          ValueError: `rows` are not rows of the global batch, at once.
          DatasetError: more than `config.max_lost` examples of this host could not be read.
        """
        rows = range(self.config.batch_size) if rows is None else rows
        if not rows or sorted({*rows} & {*range(self.config.batch_size)}) != list(rows):
            raise ValueError(
                f"rows is {rows}; give rows of the global batch, ascending, "
                f"from 0 to {self.config.batch_size - 1}"
            )
        source = RowSource(
            planner=self.planner,
            maker=self._maker,
            start_step=start_step,
            batch_rows=rows,
            rows=sys.maxsize if stop_step is None else (stop_step - start_step) * len(rows),
        )
        # Planned here, so that it travels to the workers and not each plans again.
        self.planner.locate(start_step)
        return self._iterate(source)

    def _iterate(self, source: RowSource) -> Generator[TrainingStep, None, None]:
        rows: list[tuple[Row, np.ndarray]] = []
        step = source.start_step
        with contextlib.closing(read_ahead(source, workers=self.config.workers)) as rows_ahead:
            for row in rows_ahead:
                rows.append(row)
                if len(rows) < len(source.batch_rows):
                    continue
                yield self._collate(rows, step)
                rows = []
                step += 1

    def _collate(self, rows_and_images: list[tuple[Row, np.ndarray]], step: int) -> TrainingStep:
        rows = [row for row, _ in rows_and_images]
        count = len(rows), self.config.images_per_row
        arrays: dict[str, Any] = {
            name: np.stack([getattr(row, name) for row in rows])
            for name in ("ids", "labels", "positions", "segments", "image_slots")
        }
        arrays |= self._collate_images([images for _, images in rows_and_images])
        if self._maker.question_length:
            arrays |= _collate_questions(rows, *count, self._maker.question_length)
        if (layout := self._maker.layout) is not None:
            arrays["clips"] = clip_array(
                [row.clips for row in rows],
                clips=self.config.images_per_row // layout.frames,
                frames=layout.frames,
            )
        lost = tuple(example for row in rows for example in row.contents.lost)
        self._count_missing(lost)
        return TrainingStep(
            step=step,
            example_ids=tuple(row.contents.example_ids for row in rows),
            batch=Batch(**arrays),
            lost=lost,
        )

    def _collate_images(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """The pixels of each row's images; or their features, and pixels of no size."""
        count = len(images), self.config.images_per_row
        if not self._maker.features:
            side = self.image_processor.image_size
            pixels = np.zeros((*count, side, side, 3), np.uint8)
            for number, squares in enumerate(images):
                pixels[number, : len(squares)] = squares
            return {"pixels": pixels}
        store = self._maker.features[0]
        features = np.empty((*count, *store.shape), store.bits)
        for number, stored in enumerate(images):
            features[number, : len(stored)] = stored
            # As the tower sees what is not there.
            features[number, len(stored) :] = store.blank
        return {
            "pixels": np.zeros((*count, 0, 0, 3), np.uint8),
            "features": features.view(store.dtype),
        }

    def _count_missing(self, lost: tuple[Lost, ...]) -> None:
        for example in lost:
            if example.id not in self.lost:
                self.lost[example.id] = example.reason
                _log.warning(
                    "left out, since it cannot be read: %s (%s)", example.id, example.reason
                )
        if len(self.lost) > self.config.max_lost:
            raise DatasetError(
                f"{len(self.lost)} examples cannot be read any more, and max_lost is "
                f"{self.config.max_lost}: {', '.join(self.lost)}; build the dataset again, or "
                "raise max_lost"
            )


def _collate_questions(rows: Sequence[Row], count: int, images: int, length: int) -> dict[str, Any]:
    """What each image is asked, padded; an image that is not there is asked one token."""
    questions = np.zeros((count, images, length), np.int32)
    lengths = np.ones((count, images), np.int32)
    for number, row in enumerate(rows):
        for image, ids in enumerate(row.questions):
            questions[number, image, : len(ids)] = ids
            lengths[number, image] = len(ids)
    return {"questions": questions, "question_lengths": lengths}


def _open(
    config: DataConfig, tokenizer: Tokenizer, template: Template
) -> tuple[list[Dataset], list[Index]]:
    if not config.datasets:
        raise ValueError("datasets is empty; name at least one folder made by 'stf-jax data build'")
    datasets, indices, problems = [], [], []
    for source in config.datasets:
        try:
            dataset = Dataset(source.path)
            indices.append(dataset.index(tokenizer, template))
            datasets.append(dataset)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise DatasetError("\n".join(problems))
    return datasets, indices


def _prefixes(datasets: list[Dataset]) -> list[str]:
    if len(datasets) == 1:
        return [""]
    names = [dataset.path.name for dataset in datasets]
    # Two folders of the same name differ by their place in the list.
    return [
        f"{name}/" if names.count(name) == 1 else f"{name}({number})/"
        for number, name in enumerate(names, start=1)
    ]


def _images(index: Index, layout: ClipLayout | None) -> np.ndarray:
    """Images of each example. A clip that is joined takes up the room of the most frames.

    One that has more than these takes up more than any row has.
    """
    if layout is None:
        return index.images
    alone = index.images - index.frames
    room = index.clips * layout.frames + alone * (1 if layout.after_images else layout.frames)
    return np.where(index.longest_clip > layout.frames, 2**12 + 1, room)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Columns:
    """By example of all datasets, [examples]: tokens and images, and why it is left out."""

    tokens: np.ndarray
    images: np.ndarray
    unfit: np.ndarray
    masked: np.ndarray
    too_many_images: np.ndarray
    too_long: np.ndarray

    @classmethod
    def of(
        cls,
        indices: list[Index],
        config: DataConfig,
        tokens_per_image: int,
        layout: ClipLayout | None,
    ) -> "_Columns":
        tokens = np.concatenate([index.tokens(tokens_per_image, layout) for index in indices])
        images = np.concatenate([_images(index, layout) for index in indices])
        teaches = np.concatenate(
            [index.teaches(config.sequence_length, tokens_per_image, layout) for index in indices]
        )
        mismatches = np.concatenate([index.mismatches for index in indices])
        unfit = np.concatenate([index.first_supervised < 0 for index in indices])
        # The reference does not check the count of what it has cut.
        whole = np.concatenate([index.lengths < config.sequence_length for index in indices])
        masked = ~unfit & mismatches & whole & config.strict_labels
        too_many = ~unfit & ~masked & (images > config.images_per_row)
        return cls(
            tokens=tokens,
            images=images,
            unfit=unfit,
            masked=masked,
            too_many_images=too_many,
            too_long=~unfit & ~masked & ~too_many & ~teaches,
        )

    @property
    def used(self) -> np.ndarray:
        return ~(self.unfit | self.masked | self.too_many_images | self.too_long)

    def nothing_fits(self, config: DataConfig) -> str:
        reasons = [
            f"{count} have no supervised token within sequence_length {config.sequence_length}"
            for count in [int(self.too_long.sum())] if count
        ] + [
            f"{count} have more images than images_per_row {config.images_per_row}"
            + (", in which a clip takes up clip_frames" if config.clip_frames else "")
            for count in [int(self.too_many_images.sum())] if count
        ] + [
            f"{count} teach nothing under template {config.template!r}"
            for count in [int((self.unfit | self.masked).sum())] if count
        ]  # fmt: skip
        return f"none of the {len(self.tokens)} examples can be trained on: {'; '.join(reasons)}"
