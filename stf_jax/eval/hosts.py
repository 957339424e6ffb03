"""Several hosts that share a benchmark's questions."""

import json
from typing import Any, Protocol

import numpy as np


class Hosts(Protocol):
    """All hosts of a run, as one of them sees it.

    Attributes:
      number: of this host, from 0.
      count: how many there are.
    """

    number: int
    count: int

    def gather(self, message: Any) -> list[Any]:
        """What each host has to say, by number; waits for all. Messages are what JSON can hold."""


class Alone:
    """One host."""

    number, count = 0, 1

    def gather(self, message: Any) -> list[Any]:
        """The message itself."""
        return [message]


class JaxHosts:
    """The processes of `jax.distributed`, once it has been started."""

    def __init__(self) -> None:
        import jax

        self.number, self.count = jax.process_index(), jax.process_count()

    def gather(self, message: Any) -> list[Any]:
        """Padded to the longest, since all arrays of a collective have one shape."""
        from jax.experimental.multihost_utils import process_allgather

        said = np.frombuffer(json.dumps(message).encode(), np.uint8)
        lengths = np.asarray(process_allgather(np.int32(len(said)))).reshape(self.count)
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: len(said)] = said
        rows = np.asarray(process_allgather(padded)).reshape(self.count, -1)
        return [
            json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)
        ]
