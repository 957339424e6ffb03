"""From lengths to steps: which examples stand in which row of which global batch.

A plan reads an index and nothing else. It is the same in every process, so a step's number is all
the state that an iterator has.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from stf_jax.data.config import Packing
from stf_jax.data.packing import Rows, group, pack, permutation

# Examples packed together: fewer fill rows worse, more take longer and mix no better.
_WINDOW = 16384
_EPOCHS_KEPT = 2
_ROWS, _EXAMPLES = 0, 1  # keys of the two shuffles


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Planner:
    """Plans each epoch from lengths.

    Attributes:
      lengths: int32 [examples], tokens by example of all datasets, none above `row_length`.
      images: int32 [examples], how many by example, none above `row_images`.
      pools: for each dataset the examples that are used, int64, in order.
      draws: for each dataset how many examples an epoch takes of it.
      row_length: T.
      row_images: I.
      batch_size: rows in a global batch.
      packing: see `DataConfig`.
      seed: of the order.
    """

    lengths: np.ndarray
    images: np.ndarray
    pools: Sequence[np.ndarray]
    draws: Sequence[int]
    row_length: int
    row_images: int
    batch_size: int
    packing: Packing
    seed: int
    _plans: dict[int, Rows] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _steps: dict[int, int] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def rows(self, epoch: int) -> Rows:
        """The rows of an epoch, in the order in which batches take them."""
        if epoch not in self._plans:
            while len(self._plans) >= _EPOCHS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self._plan_rows(epoch)
        return self._plans[epoch]

    def _plan_rows(self, epoch: int) -> Rows:
        examples = self.examples(epoch)
        order = examples[permutation(len(examples), key=(self.seed, epoch, _EXAMPLES))]
        if self.packing == "single":
            return Rows.singles(order)
        if self.packing == "grouped":
            return Rows.singles(
                group(order, lengths=self.lengths, images=self.images, batch_size=self.batch_size)
            )
        rows = pack(
            order,
            lengths=self.lengths,
            images=self.images,
            row_length=self.row_length,
            row_images=self.row_images,
            window=_WINDOW,
        )
        return rows.reorder(permutation(len(rows), key=(self.seed, epoch, _ROWS)))

    def examples(self, epoch: int) -> np.ndarray:
        """The examples of an epoch, dataset by dataset.

        A dataset is an endless row of passes, each in an order of its own; an epoch takes the next
        `draws` of it. So whatever the weight, no example comes a second time before all have come
        once.
        """
        taken = []
        for number, (pool, draws) in enumerate(zip(self.pools, self.draws, strict=True)):
            place, end = epoch * draws, (epoch + 1) * draws
            while place < end:
                turn, start = divmod(place, len(pool))
                stop = min(len(pool), start + end - place)
                order = permutation(len(pool), key=(self.seed, number, turn, len(pool)))
                taken.append(pool[order[start:stop]])
                place += stop - start
        return np.concatenate(taken)

    def steps(self, epoch: int) -> int:
        """Global batches of an epoch; the last may have empty rows."""
        if epoch not in self._steps:
            self._steps[epoch] = -(-len(self.rows(epoch)) // self.batch_size)
        return self._steps[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number within the epoch."""
        epoch = 0
        while step >= self.steps(epoch):
            step -= self.steps(epoch)
            epoch += 1
        return epoch, step

    def row(self, step: int, row: int) -> np.ndarray:
        """The examples of a row of a global batch, int64; none for a row that fills up."""
        epoch, within = self.locate(step)
        return self.rows(epoch)[within * self.batch_size + row]

    @functools.cached_property
    def fill(self) -> float:
        """The part of the first epoch's rows that holds tokens."""
        rows = self.rows(0)
        return float(self.lengths[rows.examples].sum() / (len(rows) * self.row_length))
