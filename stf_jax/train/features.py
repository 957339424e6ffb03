"""The frozen tower's features of a run's images, computed before the first step and kept on disk.

Every image goes through the tower in a batch of a fixed size, so that its features depend neither
on its neighbors nor on how many devices or hosts take part.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from stf_jax.config.vision import VisionConfig
from stf_jax.data.dataset import Dataset
from stf_jax.data.features import FeatureIdentity, FeaturesError, ImageFeatures
from stf_jax.data.images import ImageProcessor
from stf_jax.data.pipeline import TrainingData
from stf_jax.data.prefetch import read_ahead
from stf_jax.models.clip import VisionTower
from stf_jax.models.layers import Init
from stf_jax.parallel.sharding import ShardingRules
from stf_jax.store.arrays import flatten, host_like, unflatten
from stf_jax.store.checkpoint import NativeCheckpoint
from stf_jax.store.checksum import NO_MESH, checksums
from stf_jax.systems.base import LlavaConfig
from stf_jax.util.disk import explain_full_disk, free_bytes
from stf_jax.util.progress import count_progress

# Images of a device at a time.
_BATCH = 16
# Batches that the devices have at a time: one is computed while the next is placed.
_AHEAD = 2
_AXIS = "images"


class _EndedError(Exception):
    """A signal has come."""


def check_cacheable(config: LlavaConfig) -> None:
    """Refuses a system whose tower computes more than features of an image by itself.

    Raises:
        FeaturesError: it is one.
    """
    if config.system.extra_count:
        raise FeaturesError(
            f"{config.system.title} trains tokens that go through the tower, whose features change "
            "with every step; leave data.features at computed"
        )


def packed_shape(config: LlavaConfig) -> tuple[int, int]:
    """N, C of an image's features."""
    patches = (config.image_size // config.vision.patch_size) ** 2
    # The class token's query, and its key before those of the patches.
    attention = patches + 2 if config.system.captures else 0
    return len(config.system.taps) * patches + attention, config.vision.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedFeatures:
    """The features of a run's datasets: known, and computed as far as they are on disk.

    Attributes:
        config: of the model.
        stores: of each dataset once, by its path.
        weights: of the tower by path, in host memory, in the compute dtype.
    """

    config: LlavaConfig
    stores: dict[Path, ImageFeatures]
    weights: dict[str, np.ndarray[Any, Any]]

    @classmethod
    def open(
        cls,
        first: NativeCheckpoint,
        data: Sequence[TrainingData],
        *,
        dtype: str,
        directory: str | None,
    ) -> "CachedFeatures":
        """Finds out which features there are and which are needed; computes none yet.

        Args:
            first: the model.
            data: of the run, and what it validates with.
            dtype: of the tower.
            directory: where features are kept; None is beside each dataset.

        Raises:
            FeaturesError: the system cannot have any, those on disk are damaged, or there is no
                room for the rest.
        """
        config = first.config
        check_cacheable(config)
        weights = _read_tower(first, dtype)
        identity = FeatureIdentity(
            tower=_digest(config.vision, weights),
            taps=config.system.taps,
            captures=config.system.captures,
            image_processor=data[0].image_processor,
            dtype=dtype,
            shape=packed_shape(config),
        )
        stores = {
            dataset.path: _open_store(dataset, identity, directory)
            for part in data
            for dataset in part.datasets
        }
        opened = cls(config=config, stores=stores, weights=weights)
        opened._check_room()
        return opened

    def describe(self) -> str:
        """Images, bytes of each and of all, how many of them are there, and where."""
        stores = self.stores.values()
        size = next(iter(stores)).image_bytes
        total, missing = sum(store.count for store in stores), self._missing
        state = "all there" if not missing else f"{missing:,} to compute, {_gb(missing * size)}"
        return (
            f"cached, {total:,} images of {size:,} bytes, {_gb(total * size)} ({state}) in "
            f"{', '.join(str(store.folder) for store in stores)}"
        )

    def attach(self, data: TrainingData) -> None:
        """Has the batches of some data hold the features."""
        data.read_features([self.stores[dataset.path] for dataset in data.datasets])

    def compute(self, *, workers: int, is_ended: Callable[[], bool] = lambda: False) -> bool:
        """Computes what is missing, each host its share; returns when all of it is on disk.

        What a kill leaves is kept, but for the part that was being written.

        Args:
            workers: processes that decode images.
            is_ended: asked after every batch.

        Returns:
            False where it gave True.
        """
        try:
            for store in self.stores.values():
                if store.missing:
                    with _alone(store.folder, is_ended), explain_full_disk(store.folder):
                        self._compute(store, workers=workers, is_ended=is_ended)
        except _EndedError:
            return False
        if jax.process_count() > 1:
            with jax.set_mesh(NO_MESH):
                multihost_utils.sync_global_devices("features")
        return True

    def _compute(self, store: ImageFeatures, *, workers: int, is_ended: Callable[[], bool]) -> None:
        hosts, host = jax.process_count(), jax.process_index()
        parts = [part for part in store.missing if part % hosts == host]
        if not parts:
            return
        images = store.images(parts)
        done = 0
        with (
            contextlib.closing(read_ahead(images, workers=workers)) as squares,
            contextlib.closing(self._run_tower(store.identity, squares)) as results,
            count_progress("features") as progress,
        ):
            for part in parts:
                with store.write(part) as write:
                    for data, features in itertools.islice(results, len(store.parts[part])):
                        if is_ended():
                            raise _EndedError
                        write(data, features)
                        done += 1
                        progress(done, len(images))

    def _run_tower(
        self, identity: FeatureIdentity, squares: Iterator[Any]
    ) -> Generator[Any, None, None]:
        """The file of each image, and its features or the reason for none."""
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices), (_AXIS,))
        run = _tower(self.config, identity.image_processor, mesh)
        size = _BATCH * len(devices)
        pending: collections.deque[tuple[list[Any], Any]] = collections.deque()
        with jax.set_mesh(mesh):
            weights = jax.device_put(self.weights, jax.NamedSharding(mesh, PartitionSpec()))
        more = True
        while more or pending:
            batch = list(itertools.islice(squares, size))
            more = len(batch) == size
            if batch:
                pixels = np.zeros((size, *batch[0][2].shape), np.uint8)
                pixels[: len(batch)] = [square for _, _, square in batch]
                # Not around a `yield`: the caller may have another mesh.
                with jax.set_mesh(mesh):
                    pending.append((batch, run(weights, pixels)))
            if pending and (len(pending) > _AHEAD or not more):
                items, packed = pending.popleft()
                features = np.asarray(packed)
                for (data, reason, _), item in zip(items, features, strict=False):
                    yield data, reason or item

    @property
    def _missing(self) -> int:
        return sum(map(_count_missing, self.stores.values()))

    def _check_room(self) -> None:
        """Refuses before anything is computed.

        Raises:
            FeaturesError: what is missing is more than is free.
        """
        needs: dict[Path, int] = {}
        for store in self.stores.values():
            folder = store.folder.parent
            needs[folder] = needs.get(folder, 0) + _count_missing(store) * store.image_bytes
        for folder, need in needs.items():
            free = free_bytes(folder)
            if free is not None and need > free:
                size = next(iter(self.stores.values())).image_bytes
                raise FeaturesError(
                    f"the features take {need // size:,} images x {size:,} bytes = {_gb(need)}, "
                    f"and {_gb(free)} are free in {folder}; name another place with "
                    "data.features_directory, or leave data.features at computed"
                )


def _tower(config: LlavaConfig, processor: ImageProcessor, mesh: Mesh) -> Callable[..., Any]:
    """Weights and uint8 [B, height, width, 3] -> [B, N, C]; each device has `_BATCH` of B."""
    graph = nnx.graphdef(_abstract_tower(config))

    def run(weights: dict[str, jax.Array], pixels: jax.Array) -> jax.Array:
        tower = nnx.merge(graph, unflatten(weights))
        packed: jax.Array = tower(processor.normalize(pixels)).pack()
        return packed

    spec = PartitionSpec(_AXIS)
    # The same program on each device, however many there are.
    return jax.jit(
        jax.shard_map(
            run, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=False
        )
    )


def _abstract_tower(config: LlavaConfig) -> VisionTower:
    rules = ShardingRules.none()
    return nnx.eval_shape(lambda: VisionTower.of(config, init=Init(rngs=nnx.Rngs(0), rules=rules)))


def _read_tower(first: NativeCheckpoint, dtype: str) -> dict[str, np.ndarray[Any, Any]]:
    leaves = flatten(nnx.to_pure_dict(nnx.state(_abstract_tower(first.config), nnx.Param)))
    wanted = {
        f"vision/{name}": host_like(leaf.shape, jnp.dtype(dtype)) for name, leaf in leaves.items()
    }
    return {name.removeprefix("vision/"): leaf for name, leaf in first.load(wanted).items()}


def _digest(vision: VisionConfig, weights: dict[str, np.ndarray[Any, Any]]) -> str:
    lines = [
        f"{name} {weights[name].shape} {number}\n" for name, number in checksums(weights).items()
    ]
    # Heads, activation and epsilon are in no weight.
    sizes = json.dumps(dataclasses.asdict(vision), sort_keys=True)
    return hashlib.sha256("".join([*sorted(lines), sizes]).encode()).hexdigest()


def _open_store(
    dataset: Dataset, identity: FeatureIdentity, directory: str | None
) -> ImageFeatures:
    if directory is not None and "://" in directory:
        raise FeaturesError(
            f"data.features_directory is {directory}; features are read from a file system: mount "
            "the bucket with gcsfuse and name the mounted folder"
        )
    path = dataset.path.with_name(f"{dataset.path.name}.features")
    folder = path if directory is None else Path(directory)
    with explain_full_disk(folder), _explain_refusal(folder):
        if jax.process_index() > 0:
            # The first host looks through the images for all.
            _wait()
        with count_progress(f"images of {dataset.path.name}") as progress:
            store = ImageFeatures.open(dataset, identity, folder, progress=progress, lock=_alone)
        if jax.process_index() == 0:
            _wait()
    return store


@contextlib.contextmanager
def _explain_refusal(folder: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise FeaturesError(
            f"{folder} cannot be written to ({error.strerror}); name another place with "
            "data.features_directory"
        ) from error


def _wait() -> None:
    if jax.process_count() > 1:
        with jax.set_mesh(NO_MESH):
            multihost_utils.sync_global_devices("images")


@contextlib.contextmanager
def _alone(folder: Path, is_ended: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Waits for another run that fills the same folder; the lock ends with the process."""
    waiting = False
    with (folder / f".lock-{jax.process_index()}").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    sys.stderr.write(f"waiting for another process that fills {folder}\n")
                waiting = True
                if is_ended():
                    raise _EndedError from None
                time.sleep(0.2)
        yield


def _count_missing(store: ImageFeatures) -> int:
    return sum(len(store.parts[part]) for part in store.missing)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
