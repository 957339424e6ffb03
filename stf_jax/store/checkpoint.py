"""The native checkpoint: one self-contained directory, local or on gs://.

    config.json   format, version, an id, the model's config, the size of every other file, a
                  checksum of every parameter and a digest of every file beside them
    params/       the parameters, a Zarr array each, written and read by Orbax on any mesh
    hf/           tokenizer, image processor and config.json as they came from PyTorch
    pytorch/      what `convert` needs to give back a PyTorch checkpoint bit for bit

Arrays are stored in chunks of at most 64 MiB, split along the longest axes, so that a host reads
little more than the part that its devices hold. Every array is held against its checksum when it
has been read, so that damage on disk is found and not computed with.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from stf_jax.models.lora import LoRAConfig
from stf_jax.store.arrays import (
    CONCURRENT_BYTES,
    Tree,
    batches,
    flatten,
    host_like,
    load_and_check,
    load_some,
    to_disk,
    unflatten,
)
from stf_jax.store.checksum import checksum, has_checksum
from stf_jax.store.packing import describe_unpacked
from stf_jax.store.quiet import quiet, quiet_failures
from stf_jax.systems import config_from_dict
from stf_jax.systems.base import LlavaConfig
from stf_jax.systems.older import older_path, upgrade_config, upgrade_path
from stf_jax.util.errors import CheckpointError, first_line, missing
from stf_jax.util.files import absolute, file_size, list_some, new_directory, read_json, sha256

FORMAT = "stf_jax"
VERSION = 2
# Before it, a model had a "fusion" in place of a system.
_OLDEST = 1

_CONFIG = "config.json"
_PARAMS = "params"
# Folders beside the parameters, copied as they are from one native checkpoint to the next.
EXTRAS = ("hf", "pytorch")

_CHUNK_BYTES = 64 * 2**20
# Small leaves are saved together: each save costs some 30 ms.
_BATCH_BYTES = 256 * 2**20
# Files beside the parameters are read to be checked when a checkpoint is opened, if not larger.
_DIGEST_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One parameter: where it lies in the model, and how to get it, when its turn comes."""

    path: str  # "text/layers/mlp/up/kernel"
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray[Any, Any]]


def is_native(path: epath.PathLike) -> bool:
    """Whether `path` is a directory that `write` made, whole or damaged."""
    config = epath.Path(path) / _CONFIG
    if not config.is_file():
        return False
    try:
        return bool(read_json(config).get("format") == FORMAT)
    except ValueError:
        return False


def write(
    path: epath.PathLike,
    *,
    config: LlavaConfig,
    leaves: Iterable[Leaf],
    extras: Callable[[epath.Path], None],
) -> None:
    """Writes a native checkpoint, holding one leaf in memory at a time.

    Args:
        path: The new directory; it appears under this name only when it is complete.
        config: The model whose parameters these are.
        leaves: Every parameter, in any order.
        extras: Called with the unfinished directory, to put the folders `EXTRAS` into it.

    Raises:
        CheckpointError: `path` exists.
    """
    with new_directory(path) as unfinished:
        extras(unfinished)
        recorded = _write_params(unfinished / _PARAMS, leaves)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "id": secrets.token_hex(16),
            "model": config.to_dict(),
            "files": _sizes(unfinished),
            "checksums": recorded,
            "digests": {name: sha256(unfinished / name) for name in _list_extras(unfinished)},
        }
        content["digest"] = _digest_content(content)
        # Last: without it, a directory is not taken for a checkpoint.
        (unfinished / _CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def open_native(path: epath.PathLike) -> "NativeCheckpoint":
    """Opens a native checkpoint and checks that all its files are there and whole.

    Raises:
        CheckpointError: no native checkpoint, one of a newer version, or a damaged one.
    """
    if not epath.Path(path).exists():
        raise missing(path)
    path = absolute(path)
    if not is_native(path):
        raise CheckpointError(
            f"{path} is not a native checkpoint; `stf-jax convert import` makes one from PyTorch's"
        )
    content = read_json(path / _CONFIG)
    version, model, files = (content.get(key) for key in ("version", "model", "files"))
    if isinstance(version, int) and not _OLDEST <= version <= VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this stf_jax reads {VERSION}; "
            "install the release that wrote it"
        )
    if not isinstance(version, int) or not isinstance(model, dict) or not isinstance(files, dict):
        raise _damage_error(path / _CONFIG)
    sizes = _sizes(path)
    broken = [
        f"{name}: {sizes.get(name, 'no')} bytes of {size}"
        for name, size in files.items()
        if sizes.get(name) != size
    ]
    if broken:
        raise CheckpointError(f"{_damage_error(path)}:\n" + list_some(broken))
    try:
        config = config_from_dict(upgrade_config(model))
    except ValueError as error:
        raise _damage_error(path / _CONFIG) from error
    # Older releases wrote none of the three.
    if content.get("digest", _digest_content(content)) != _digest_content(content):
        raise _damage_error(path / _CONFIG)
    digests = content.get("digests", {})
    small = {name: digest for name, digest in digests.items() if files[name] <= _DIGEST_BYTES}
    if changed := _find_changed(path, small):
        raise CheckpointError(f"{_damage_error(path)}:\n" + list_some(changed))
    return NativeCheckpoint(
        path=path,
        config=config,
        id=str(content.get("id", "")),
        version=version,
        checksums=content.get("checksums", {}),
        digests=digests,
    )


def _damage_error(path: epath.Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged; copy or import it again")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeCheckpoint:
    """A native checkpoint on disk; nothing is read before it is asked for.

    Attributes:
        path: its directory.
        config: the model's.
        id: the same for every copy of it, and for nothing else.
        version: of the format.
        checksums: of the parameters, by the path under which they are stored; see
            `stf_jax.store.checksum`.
        digests: SHA-256 of the files beside them, by name.
    """

    path: epath.Path
    config: LlavaConfig
    id: str
    version: int
    checksums: Mapping[str, int] = dataclasses.field(default_factory=dict)
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def extras(self) -> epath.Path:
        """The directory in which `EXTRAS` lie."""
        return self.path

    @property
    def adapters(self) -> LoRAConfig | None:
        """Of adapters that lie beside the weights; None where there are none, or all are merged."""
        return None

    @functools.cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every stored parameter, by its path ("text/norm/scale").

        Raises:
            CheckpointError: what describes the parameters is damaged.
        """
        with quiet("absl", logging.ERROR):
            stored = ocp.metadata(self.path / _PARAMS).metadata
        # Orbax logs what it cannot read, and gives None.
        if stored is None:
            raise _damage_error(self.path / _PARAMS)
        return {
            upgrade_path(name): describe_unpacked(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            for name, leaf in flatten(stored).items()
        }

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One parameter as it is stored, in host memory."""
        stored = self.shapes[name]
        return self.load({name: host_like(stored.shape, stored.dtype)})[name]

    def read_each(self, names: Iterable[str]) -> Iterator[np.ndarray[Any, Any]]:
        """Parameters as they are stored, in host memory; small ones are read together."""
        for some in batches(names, self.shapes):
            like = {
                name: host_like(self.shapes[name].shape, self.shapes[name].dtype) for name in some
            }
            loaded = self.load(like)
            yield from (loaded.pop(name) for name in some)

    def restore(self, tree: Tree) -> dict[str, Any]:
        """Reads parameters onto devices, each host only what its devices hold.

        Args:
            tree: Nested dictionaries of what is wanted: a `jax.ShapeDtypeStruct` for each
                parameter, with the dtype to cast to and the sharding to have. A part of the
                model may be asked for alone.

        Raises:
            CheckpointError: a parameter that is not stored, or stored with another shape.
        """
        wanted = flatten(tree)
        problems = [f"missing: {name}" for name in wanted if name not in self.shapes]
        problems += [
            f"shape of {name}: {self.shapes[name].shape} stored, {leaf.shape} wanted"
            for name, leaf in wanted.items()
            if name in self.shapes and self.shapes[name].shape != tuple(leaf.shape)
        ]
        if problems:
            raise CheckpointError(f"{self.path} does not fit the model:\n" + list_some(problems))
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return unflatten(
            self.load(
                {
                    name: jax.ShapeDtypeStruct(
                        leaf.shape, leaf.dtype, sharding=leaf.sharding or one_device
                    )
                    for name, leaf in wanted.items()
                }
            )
        )

    def load(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters by path, each cast and placed like `host_like` or a shape with a sharding.

        Raises:
            CheckpointError: an array is not what was written.
        """
        loaded = load_and_check(
            lambda some: flatten(load_some(self.path / _PARAMS, unflatten(some))),
            {self.stored_path(name): like for name, like in wanted.items()},
            stored={self.stored_path(name): self.shapes[name] for name in wanted},
            recorded=self.checksums,
            damaged=lambda reason: CheckpointError(
                f"{self.path} is damaged ({reason}); copy or import it again"
            ),
        )
        return {upgrade_path(path): leaf for path, leaf in loaded.items()}

    def stored_path(self, name: str) -> str:
        """Where a parameter lies in this checkpoint, which may be an older one."""
        return older_path(name) if self.version < VERSION else name

    def verify(self) -> None:
        """Reads everything, one array at a time, and holds each against what was written.

        Raises:
            CheckpointError: lists what is damaged, or says that there is nothing to hold it
                against.
        """
        if not self.checksums:
            raise CheckpointError(
                f"{self.path} has no checksums; it was written by an older release. Copy it with "
                f"stf-jax convert export {self.path} OUT --layout native"
            )
        problems = _find_changed(self.path, self.digests)
        for name in self.shapes:
            try:
                self.read(name)
            except CheckpointError:
                problems.append(f"{name} is not what was written")
            # Of tensorstore: it cannot be decoded.
            except (OSError, ValueError) as error:
                problems.append(f"{name}: {first_line(error)}")
        if problems:
            raise CheckpointError(f"{_damage_error(self.path)}:\n" + list_some(problems))

    def copy_extras(self, directory: epath.Path) -> None:
        """Copies tokenizer, image processor and the rest of `EXTRAS` into another checkpoint."""
        for folder in EXTRAS:
            for name in _sizes(self.extras / folder):
                target = directory / folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                (self.extras / folder / name).copy(target)


def extra_files(extras: epath.Path) -> dict[str, epath.Path]:
    """By name, the files that a native checkpoint carries beside its weights."""
    folder = extras / "hf"
    if not folder.is_dir():
        return {}
    return {file.name: file for file in folder.iterdir() if file.is_file()}


def _write_params(path: epath.Path, leaves: Iterable[Leaf]) -> dict[str, int]:
    """Writes the parameters; returns the checksum of each."""
    context = ocp.Context()
    saving = context.array.saving
    # A plain Zarr 2 file for each chunk: OCDBT holds twice the memory, and weights hardly compress.
    saving.use_zarr3 = False
    saving.use_ocdbt = False
    saving.use_compression = False
    saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    # Without these two, Orbax would hold every array twice.
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = CONCURRENT_BYTES
    recorded: dict[str, int] = {}

    def save(batch: Mapping[str, np.ndarray[Any, Any]]) -> None:
        # Added up while the storage writes.
        summed = {
            name: adder.submit(checksum, array)
            for name, array in batch.items()
            if has_checksum(array.dtype)
        }
        ocp.partial.save(path, unflatten(batch))
        recorded.update({name: future.result() for name, future in summed.items()})

    with (
        context,
        quiet_failures(),
        concurrent.futures.ThreadPoolExecutor(1) as adder,
    ):
        batch: dict[str, np.ndarray[Any, Any]] = {}
        for leaf in leaves:
            batch[leaf.path] = to_disk(leaf.read())
            if sum(array.nbytes for array in batch.values()) >= _BATCH_BYTES:
                save(batch)
                batch.clear()
        if batch:
            save(batch)
        ocp.partial.finalize(path)
    return recorded


def _sizes(path: epath.Path) -> dict[str, int]:
    """Bytes of every file below `path`, by its relative name; empty if there is no `path`."""
    sizes: dict[str, int] = {}
    for child in sorted(path.iterdir()) if path.exists() else ():
        if child.is_dir():
            sizes |= {f"{child.name}/{name}": size for name, size in _sizes(child).items()}
        else:
            sizes[child.name] = file_size(child)
    return sizes


def _list_extras(path: epath.Path) -> list[str]:
    """The names of all files of `EXTRAS` in a checkpoint."""
    return [f"{folder}/{name}" for folder in EXTRAS for name in _sizes(path / folder)]


def _find_changed(path: epath.Path, digests: Mapping[str, str]) -> list[str]:
    return [
        f"{name} is not what was written"
        for name, digest in digests.items()
        if sha256(path / name) != digest
    ]


def _digest_content(content: Mapping[str, Any]) -> str:
    """SHA-256 of what `config.json` says, apart from this digest."""
    plain = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
