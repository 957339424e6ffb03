"""Checkpoints of a run: the trained parameters, the optimizer and the step, written by Orbax.

They are written while training continues. Each host writes its own shards. A checkpoint appears
under its step only when it is complete. A run restores on another mesh and another number of hosts.
Frozen weights are not in it. The data pipeline needs no state: what it gives depends on the step.

A checksum of every array is written with it. A checkpoint that is damaged on disk is set aside,
and the run continues from the one before.
"""

import contextlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath
from jax.experimental import multihost_utils

from stf_jax.store.arrays import flatten
from stf_jax.store.checksum import NO_MESH, checksums, name_leaves
from stf_jax.store.quiet import quiet_failures
from stf_jax.store.run import CHECKSUMS, PARAMETERS
from stf_jax.systems.older import is_older, older_path, upgrade_path
from stf_jax.train.step import TrainState
from stf_jax.util.errors import CheckpointError, first_line
from stf_jax.util.files import check_files

# What storage says where the fault may pass, or is the machine's: nothing is damaged then.
_PASSING = ("PERMISSION_DENIED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
# A damaged checkpoint has this behind its step; Orbax takes it for none.
_ASIDE = ".damaged"
# Bytes of a replicated array from which its replicas write it together.
_LEAST_PART = 2**20

# What decides the numbers of a run; recorded to explain them, not to refuse a resumption.
_VERSIONS = ("stf-jax", "jax", "flax", "optax", "orbax-checkpoint")


class Checkpoints:
    """The checkpoints of one run, in one directory; close it, or use it in a `with`.

    Args:
        directory: local or on gs://; made if it is not there.
        config: the resolved config of the run, plain values nested in dictionaries.
        every: steps between checkpoints.
        keep: how many of the latest are kept; all others are deleted.
        free: keys of the config, or sections of it ("mesh"), in which a resumed run may differ.
        defaults: a config of default values, for keys that an older release did not write.

    Raises:
        CheckpointError: the directory cannot be written to, or belongs to a run with another
            config; lists each difference.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        config: Mapping[str, Any],
        every: int,
        keep: int,
        free: Sequence[str] = (),
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ):
        self._directory = epath.Path(directory)
        # As it will be read back: JSON has no tuples.
        config = json.loads(json.dumps(config))
        # Orbax reports each save at length, and each failure that it raises, too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._every = every
        if jax.process_index() == 0:
            check_files(self._directory, error=CheckpointError, fix="move it away")
        context = ocp.Context()
        # Otherwise every bias is cut in parts, and each part of each shape is a program to compile.
        context.array.saving.min_slice_bytes_for_replica_parallel = _LEAST_PART
        with self._explain_errors():
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                context=context,
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                custom_metadata={
                    "config": config,
                    "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
                },
                cleanup_tmp_directories=True,
            )
        self._writing: Any = None
        self._refuse_another_config(config, free, json.loads(json.dumps(dict(defaults))))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written when `step` steps are done."""
        return step % self._every == 0

    def save(self, step: int, state: TrainState) -> None:
        """Begins to write a checkpoint, unless there is one of that step.

        Args:
            step: that of the state, known here so that nothing waits for the device.
            state: may be donated to the next step at once: what is written was copied before.

        Raises:
            CheckpointError: this one or the one before cannot be written.
        """
        with self._explain_errors():
            self._finish()
            if self.latest != step:
                sums = checksums(name_leaves(_as_tree(state)))
                tree = _as_tree(state) | {CHECKSUMS: np.array([*sums.values()], np.uint32)}
                self._writing = self._checkpointer.save_async(step, tree, force=True)

    def wait(self) -> None:
        """Returns when everything that was begun is written.

        Raises:
            CheckpointError: it cannot be written.
        """
        with self._explain_errors():
            self._finish()

    def _finish(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self._directory}: no checkpoint can be written ({first_line(error)}); see "
                "that there is room and that it may be written to"
            ) from error

    def restore(self, like: TrainState, *, report: Callable[[str], None]) -> TrainState | None:
        """The newest checkpoint that is whole, in the shapes, dtypes and shardings of `like`.

        A damaged one is set aside under another name. None where that leaves nothing and nothing
        is lost by beginning again.

        Args:
            like: arrays, or their shapes, dtypes and shardings.
            report: is told in one line of each that was set aside.

        Raises:
            CheckpointError: there is none, the only one is damaged, or it cannot be read for now.
        """
        if self.latest is None:
            raise CheckpointError(f"{self._directory} has no complete checkpoint")
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding or one_device
            ),
            like,
        )
        while steps := [checkpoint.step for checkpoint in self._checkpointer.checkpoints]:
            step = steps[-1]
            state, reason = self._read(step, abstract)
            if state is not None:
                return state
            path = self._directory / str(step)
            if len(steps) == 1 and step > 0:
                raise CheckpointError(
                    f"{path} is damaged ({reason}), and there is no other; delete it to begin again"
                )
            self._set_aside(step)
            instead = f"from step {steps[-2]}" if len(steps) > 1 else "from the beginning"
            report(
                f"{path} is damaged ({reason}); it is {path.name}{_ASIDE} now, and the run "
                f"continues {instead}"
            )
        return None

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState | None, str]:
        """The checkpoint of a step; or None, on all hosts, and why."""
        state, reason, older = None, "", False
        try:
            with quiet_failures():
                described: Any = self._checkpointer.metadata(step).metadata
            if not isinstance(described, Mapping) or PARAMETERS not in described:
                raise ValueError("nothing describes its arrays")
            older = is_older(described[PARAMETERS])
            like = _as_tree(rename_keys(abstract, older_path) if older else abstract)
            if CHECKSUMS in described:
                shape = described[CHECKSUMS].shape
                like |= {CHECKSUMS: np.zeros(shape, np.uint32)}
            with quiet_failures():
                tree = self._checkpointer.load(step, like)
            recorded = tree.pop(CHECKSUMS, None)
            state = TrainState(**tree)
        except MemoryError:
            raise
        except Exception as error:  # Orbax and its storage raise bare ones, too
            passing = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            if passing or any(word in str(error) for word in _PASSING):
                raise CheckpointError(
                    f"{self._directory / str(step)} cannot be read ({first_line(error)}); see that "
                    "it can, and start the run again"
                ) from error
            reason = first_line(error)
        if not _agree(not reason):
            return None, reason or "another host cannot read it"
        # An older release wrote no checksums.
        if state is not None and recorded is not None:
            sums = checksums(name_leaves(_as_tree(state)))
            changed = [
                name
                for name, number in zip(sums, recorded.tolist(), strict=False)
                if sums[name] != number
            ]
            if changed or len(sums) != len(recorded):
                return None, f"{(changed or ['the checksums'])[0]} is not what was written"
        return rename_keys(state, upgrade_path) if older else state, ""

    def _set_aside(self, step: int) -> None:
        path = self._directory / str(step)
        if jax.process_index() == 0:
            aside = path.with_name(f"{path.name}{_ASIDE}")
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
        if jax.process_count() > 1:
            with jax.set_mesh(NO_MESH):
                multihost_utils.sync_global_devices(f"checkpoint {step} is set aside")
        self._checkpointer.reload()

    def close(self) -> None:
        """Waits until everything is written."""
        with self._explain_errors():
            self._finish()
            self._checkpointer.close()

    def _refuse_another_config(
        self, config: Mapping[str, Any], free: Sequence[str], defaults: Mapping[str, Any]
    ) -> None:
        written = self._written_config()
        differences = [
            line
            for key, line in _differences(written, config, defaults)
            if not any(f"{key}.".startswith(f"{prefix}.") for prefix in free)
        ]
        if differences:
            self.close()
            raise CheckpointError(
                f"{self._directory} belongs to a run with another config; choose another directory "
                "or take back:\n" + "\n".join(f"  {line}" for line in differences)
            )

    def _written_config(self) -> Any:
        """The config under which the checkpoints were written."""
        try:
            described = self._checkpointer.root_metadata().custom_metadata or {}
            written = described.get("config", {})
            if not isinstance(written, Mapping):
                raise TypeError("the config is none")
        except Exception as error:  # Orbax raises any kind
            raise CheckpointError(
                f"{self._directory / 'metadata'} is damaged ({first_line(error)}); move it away, "
                "and the run continues without comparing its config with the one before"
            ) from error
        return written


def _as_tree(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, PARAMETERS: state.parameters, "optimizer": state.optimizer}


def _agree(fine: bool) -> bool:
    """Whether all hosts say so."""
    if jax.process_count() == 1:
        return fine
    with jax.set_mesh(NO_MESH):
        return bool(multihost_utils.process_allgather(np.array([fine])).all())


def _differences(
    written: Mapping[str, Any], config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Each key whose values differ, with both of them."""
    before, after, default = (
        {path.replace("/", "."): value for path, value in flatten(tree).items()}
        for tree in (written, config, defaults)
    )
    for key in sorted(before | after):
        old, new = before.get(key, default.get(key)), after.get(key)
        if old != new:
            yield key, f"{key}: {old!r} there, {new!r} here"


def rename_keys(tree: Any, rename: Callable[[str], str]) -> Any:
    """The same tree with other keys in its dictionaries, at every depth."""

    def at_dictionary(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {rename(key): rename_keys(child, rename) for key, child in node.items()}

    return jax.tree.map(at_dictionary, tree, is_leaf=lambda node: isinstance(node, dict))
