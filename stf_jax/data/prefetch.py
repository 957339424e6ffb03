"""Items of a source in their order, made ahead of time by worker processes of Grain."""

import gc
import signal
from collections.abc import Generator, Iterator
from typing import Any, Protocol

import grain
from absl import flags
from PIL import Image

from stf_jax.data.pool import end_with_parent

# Items that a worker keeps ready; each may hold tens of megabytes of pixels.
_ITEMS_AHEAD = 2
# Of at most 16 MB each, for a worker.
_IMAGE_BLOCKS = 8


class Source(Protocol):
    """Items by number; pickled, once for each process."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, number: int) -> Any:
        """One of them."""


def read_ahead(source: Source, *, workers: int) -> Generator[Any, None, None]:
    """Every item of a source; close it when done.

    Args:
        source: see there.
        workers: processes; with 0 each item is made when it is asked for.

    Raises:
        ChildProcessError: a process was killed, by want of memory for instance.
    """
    iterator: Any = iter(_prefetch(source, workers))
    try:
        yield from _explain_death(iterator)
    finally:
        iterator.close()
        # Grain's iterators refer to each other and to the last items' shared memory.
        del iterator
        gc.collect()


def _prefetch(source: Source, workers: int) -> Any:
    dataset = grain.MapDataset.source(source).to_iter_dataset(
        # Threads on top of the processes would only add to what lies ready.
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    if workers == 0:
        return dataset
    if not flags.FLAGS.is_parsed():
        # Grain asks for its flags, which only a program with an absl main has parsed.
        flags.FLAGS.mark_as_parsed()
    return dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_ITEMS_AHEAD),
        worker_init_fn=_start_worker,
    )


def _explain_death(iterator: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from iterator
    except RuntimeError as error:
        if "Worker process was terminated unexpectedly" not in str(error):
            raise
        raise ChildProcessError(
            "a worker process was killed, perhaps for want of memory; "
            "use fewer data.workers and start again"
        ) from error


def _start_worker(worker: int, workers: int) -> None:
    # A scheduler that stops a run signals all its processes; the run itself ends its workers, after
    # its last checkpoint.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    # Memory of images is used again, not given back and fetched anew for each.
    Image.core.set_blocks_max(_IMAGE_BLOCKS)  # type: ignore[attr-defined]
