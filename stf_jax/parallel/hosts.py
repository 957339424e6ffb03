"""Several hosts as one: starting `jax.distributed`, and which rows of a batch a host makes."""

import contextlib
import dataclasses
import glob
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stf_jax.data.batch import Batch
from stf_jax.parallel.sharding import BATCH_AXES


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float,
) -> None:
    """Joins the other hosts; on a TPU pod without arguments, elsewhere with all three.

    Must run before anything asks JAX for devices. Alone, without arguments, it does nothing. If the
    others do not come, the process ends with status 1 and a line on stderr: JAX cannot be stopped
    from waiting in another way.

    Args:
        coordinator: "host:port" of process 0.
        processes: how many there are.
        process: the number of this one, from 0.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: one or two of the three, or a number that does not fit.
    """
    given = (coordinator, processes, process)
    if all(option is None for option in given):
        if _on_tpu():
            # A single TPU VM is a pod of one.
            with _no_longer_than(timeout, "this host"):
                jax.distributed.initialize(initialization_timeout=_longer(timeout))
        return
    if coordinator is None or processes is None or process is None:
        raise ValueError("give --coordinator, --processes and --process together, or none of them")
    if not 0 <= process < processes:
        raise ValueError(
            f"--process is {process}; with --processes {processes} it is 0 to {processes - 1}"
        )
    with _no_longer_than(timeout, f"process {process} of {processes}"):
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=_longer(timeout)
        )


@contextlib.contextmanager
def _no_longer_than(seconds: float, who: str) -> Iterator[None]:
    def give_up() -> None:
        sys.stderr.write(
            f"error: {who} has waited {seconds:g} s for the other hosts in vain; start the same "
            "command on all of them at once, as 'python -m launch' does (docs/launching.md)\n"
        )
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _longer(timeout: float) -> int:
    """The seconds for JAX's own timeout, which ends the process with a stack trace."""
    return int(timeout) + 60


def _on_tpu() -> bool:
    """Whether this machine is a TPU VM; JAX itself may not be asked yet."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in platforms and ("TPU_WORKER_ID" in os.environ or bool(devices))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How the rows of a global batch lie on the devices: R rows as A micro-batches of B.

    Row r of the global batch is row r // A of micro-batch r % A, so that what a host makes for its
    devices follows each other in the global batch.

    Attributes:
        mesh: None for one device.
        rows: R.
        micro_batches: A.

    Raises:
        ValueError: R does not divide.
    """

    mesh: Mesh | None
    rows: int
    micro_batches: int

    def __post_init__(self) -> None:
        parts = self.micro_batches * self._parts
        if self.rows % parts:
            raise ValueError(
                f"data.batch_size {self.rows} does not divide into {self.micro_batches} "
                f"micro-batches over {self._parts} devices (data x fsdp); "
                f"make it a multiple of {parts}, {-(-self.rows // parts) * parts} for instance"
            )

    @property
    def _parts(self) -> int:
        return 1 if self.mesh is None else int(np.prod([self.mesh.shape[a] for a in BATCH_AXES]))

    @property
    def rows_per_device(self) -> int:
        """Rows of a micro-batch on each device."""
        return self.rows // self.micro_batches // self._parts

    @property
    def _shape(self) -> tuple[int, int]:
        return self.micro_batches, self.rows // self.micro_batches

    @property
    def local_rows(self) -> tuple[int, ...]:
        """The rows that this process makes, ascending; with `tensor` over hosts, others do too."""
        if self.mesh is None:
            return tuple(range(self.rows))
        sharding = NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))
        places: Any = sharding.addressable_devices_indices_map(self._shape).values()
        inner = {row for place in places for row in range(*place[1].indices(self._shape[1]))}
        return tuple(
            row * self.micro_batches + micro
            for row in sorted(inner)
            for micro in range(self.micro_batches)
        )

    def like(self, batch: Batch) -> Batch:
        """Shapes and shardings [A, B, ...] of a batch of which `batch` is one process' part."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (*self._shape, *leaf.shape[1:]), leaf.dtype, sharding=self._sharding(leaf.ndim)
            ),
            batch,
        )

    def place(self, batch: Batch) -> Batch:
        """The rows `local_rows`, host arrays, as a part of the global arrays [A, B, ...]."""
        # Where in the local rows each row of a micro-batch lies.
        local = {
            row // self.micro_batches: n
            for n, row in enumerate(self.local_rows[:: self.micro_batches])
        }

        def place_leaf(leaf: np.ndarray) -> jax.Array:
            # [b, A, ...] -> [A, b, ...]
            split = (len(leaf) // self.micro_batches, self.micro_batches, *leaf.shape[1:])
            parts = leaf.reshape(split).swapaxes(0, 1)
            sharding = self._sharding(leaf.ndim)
            if sharding is None:
                return jax.device_put(parts)
            shape = (*self._shape, *leaf.shape[1:])

            def part(index: Any) -> np.ndarray[Any, Any]:
                rows = [local[row] for row in range(*index[1].indices(shape[1]))]
                return parts[:, rows[0] : rows[-1] + 1]

            return jax.make_array_from_callback(shape, sharding, part)

        return jax.tree.map(place_leaf, batch)

    def _sharding(self, ndim: int) -> NamedSharding | None:
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES, *(None,) * (ndim - 1)))
