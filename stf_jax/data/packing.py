"""Which examples share a row, and the order of the rows: plans over lengths, no data touched.

A plan is a pure function of (lengths, key): the same on every host, in every worker and under
every numpy, so that a row can be made anywhere from its number alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows of examples: row r holds `examples[offsets[r] : offsets[r + 1]]`.

    Attributes:
      examples: int64 [examples]; every example once.
      offsets: int64 [R + 1], from 0 to N.
    """

    examples: np.ndarray
    offsets: np.ndarray

    @classmethod
    def singles(cls, examples: np.ndarray) -> "Rows":
        """One example a row."""
        return cls(examples=examples, offsets=np.arange(len(examples) + 1, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """The examples of a row; none for a row beyond the last, which fills up a batch."""
        if row >= len(self):
            return self.examples[:0]
        return self.examples[self.offsets[row] : self.offsets[row + 1]]

    def reorder(self, order: np.ndarray) -> "Rows":
        """The same rows in another order, int64 [R]."""
        sizes = np.diff(self.offsets)[order]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        starts = np.repeat(self.offsets[:-1][order] - offsets[:-1], sizes)
        return Rows(examples=self.examples[starts + np.arange(offsets[-1])], offsets=offsets)


def permutation(count: int, *, key: Sequence[int]) -> np.ndarray:
    """A permutation int64 [count] that depends on `key` alone, not on numpy's version.

    Numbers are sorted by their splitmix64 hash (Steele et al., 2014).
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64(part % 2**64))
    return np.argsort(_mix(state + np.arange(count, dtype=np.uint64)), kind="stable")


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def pack(
    order: np.ndarray,
    *,
    lengths: np.ndarray,
    images: np.ndarray,
    row_length: int,
    row_images: int,
    window: int = 16384,
) -> Rows:
    """Packs examples into rows, window by window of `order`; rows come out window by window.

    Within a window this is best-fit decreasing: the longest first, each into the fullest row that
    still has room. A small window keeps together what `order` put together; a large one fills
    better.

    Args:
      order: int64 [examples], the examples to pack.
      lengths: tokens by example, none above `row_length`.
      images: how many, by example, none above `row_images`.
      row_length: tokens in a row.
      row_images: how many a row has room for.
      window: examples packed together.
    """
    examples: list[int] = []
    sizes: list[int] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        rows = _best_fit(
            part.tolist(), lengths[part].tolist(), images[part].tolist(), row_length, row_images
        )
        for row in rows:
            examples.extend(row)
            sizes.append(len(row))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Rows(examples=np.array(examples, np.int64), offsets=offsets)


def _best_fit(
    examples: list[int], lengths: list[int], images: list[int], row_length: int, row_images: int
) -> list[list[int]]:
    # rows_with[i][s]: rows with room for i more images and s more tokens; bit s of rooms[i] says
    # whether there is any, so that the tightest fit is the lowest bit from the length upwards.
    rows_with: list[list[list[list[int]]]] = [
        [[] for _ in range(row_length + 1)] for _ in range(row_images + 1)
    ]
    rooms = [0] * (row_images + 1)
    rows: list[list[int]] = []
    row: list[int]
    for example, length, image_count in zip(examples, lengths, images, strict=True):
        room, slots = row_length + 1, row_images
        for candidate in range(image_count, row_images + 1):
            fits = rooms[candidate] >> length
            if fits:
                tightest = length + (fits & -fits).bit_length() - 1
                if tightest < room:
                    room, slots = tightest, candidate
        if room > row_length:
            room, row = row_length, []
            rows.append(row)
        else:
            row = rows_with[slots][room].pop()
            if not rows_with[slots][room]:
                rooms[slots] ^= 1 << room
        row.append(example)
        rows_with[slots - image_count][room - length].append(row)
        rooms[slots - image_count] |= 1 << (room - length)
    return rows


def group(
    order: np.ndarray, *, lengths: np.ndarray, images: np.ndarray, batch_size: int
) -> np.ndarray:
    """The order of LLaVA-1.5's second stage: batches of one modality, alike in length.

    Examples with and without images are cut, each kind in the order given, into whole batches;
    these come in a random order that `order` decides, each sorted with the longest first. What is
    left of both kinds makes the last ones.

    Args:
      order: int64 [examples], shuffled.
      lengths: tokens by example.
      images: how many, by example.
      batch_size: examples in a global batch.
    """
    has_images = images[order] > 0
    whole: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    # Where a batch's first example stands in `order` is as random as `order` is.
    first: list[np.ndarray] = []
    for kind in (True, False):
        places = np.flatnonzero(has_images == kind)
        end = len(places) // batch_size * batch_size
        batches = places[:end].reshape(-1, batch_size)
        whole.append(order[batches])
        first.append(batches[:, 0])
        rest.append(order[places[end:]])
    batches = np.concatenate(whole)[np.argsort(np.concatenate(first), kind="stable")]
    by_length = np.argsort(-lengths[batches], axis=1, kind="stable")
    remainder = np.concatenate(rest)
    remainder = remainder[np.argsort(-lengths[remainder], kind="stable")]
    return np.concatenate([np.take_along_axis(batches, by_length, axis=1).ravel(), remainder])
