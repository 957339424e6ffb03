"""Safetensors files without PyTorch: checked headers, one tensor at a time in and out.

The format is 8 bytes with the length of the header, little-endian; the header, in JSON, with dtype,
shape and offsets of each tensor; then the tensors.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from stf_jax.convert.dtypes import SAFETENSORS, SAFETENSORS_NAMES, Array, DType
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import decode_json, file_size

_LFS = b"version https://git-lfs"
_LONGEST_HEADER = 100 * 2**20


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """One `.safetensors` file."""

    path: epath.Path

    @functools.cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """What the file holds.

        Raises:
            CheckpointError: no whole safetensors file.
        """
        return {name: info for name, (info, _) in self._index.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """What the header says beside the tensors.

        Raises:
            CheckpointError: no whole safetensors file.
        """
        return self._header[0]

    def read(self, name: str) -> Array:
        """One tensor; read-only."""
        info, offset = self._index[name]
        with self.path.open("rb") as file:
            file.seek(offset)
            data = file.read(info.nbytes)
        return np.frombuffer(data, info.dtype).reshape(info.shape)

    @property
    def _index(self) -> dict[str, tuple[TensorInfo, int]]:
        return self._header[1]

    @functools.cached_property
    def _header(self) -> tuple[dict[str, str], dict[str, tuple[TensorInfo, int]]]:
        """The metadata; and each tensor's shape, dtype and first byte."""
        size = check_weights_file(self.path)
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _LONGEST_HEADER):
                raise CheckpointError(f"{self.path} is not a safetensors file, or is truncated")
            try:
                header = decode_json(file.read(length))
                metadata = dict(header.pop("__metadata__", None) or {})
                entries = {name: _entry(name, value, self.path) for name, value in header.items()}
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(f"{self.path} is not a safetensors file") from error
        start = 8 + length
        end = start
        # The format has neither gaps nor overlaps.
        for name, (info, offset) in sorted(
            entries.items(), key=lambda item: (item[1][1], item[1][0].nbytes)
        ):
            if start + offset != end:
                raise CheckpointError(
                    f"{self.path} is damaged: {name} begins at byte {start + offset}, "
                    f"not at {end}; download or copy it again"
                )
            end += info.nbytes
        if end != size:
            raise CheckpointError(
                f"{self.path} is truncated: {size} bytes of {end}; download or copy it again"
            )
        return metadata, {name: (info, start + offset) for name, (info, offset) in entries.items()}


class SafetensorsWriter:
    """A local `.safetensors` file whose tensors may be written in any order."""

    def __init__(
        self,
        path: epath.PathLike,
        infos: Mapping[str, TensorInfo],
        *,
        metadata: Mapping[str, str] | None = None,
    ):
        """Args: path: a new file; infos: what it will hold, in the order of the file."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for name, info in infos.items():
            header[name] = {
                "dtype": SAFETENSORS_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        # Readers map the file: the tensors start on a multiple of eight.
        encoded += b" " * (-len(encoded) % 8)
        self._infos, self._header, self._start = infos, header, 8 + len(encoded)
        self._path = os.fspath(path)
        with open(self._path, "xb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(self._start + offset)

    def write(self, name: str, array: Array) -> None:
        """Puts one tensor in its place."""
        info = self._infos[name]
        if array.shape != info.shape or array.dtype != info.dtype:
            raise AssertionError(f"{name}: {array.shape} {array.dtype} is not {info}")
        with open(self._path, "r+b") as file:
            file.seek(self._start + self._header[name]["data_offsets"][0])
            # As bytes: numpy has no buffer format for bfloat16.
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def local_file(path: epath.Path) -> Iterator[epath.Path]:
    """A local file to write, which is moved to `path` afterwards if that lies elsewhere."""
    if "://" not in os.fspath(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = epath.Path(folder) / path.name
        yield local
        local.copy(path)


def check_weights_file(path: epath.Path) -> int:
    """The size of a file of weights.

    Raises:
        CheckpointError: it is missing, empty, or what git leaves where git-lfs has not run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download or copy it again")
    size = file_size(path)
    if size == 0:
        raise CheckpointError(f"{path} is empty; download or copy it again")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise CheckpointError(
                f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in {path.parent}"
            )
    return size


def _entry(name: str, value: Mapping[str, Any], path: epath.Path) -> tuple[TensorInfo, int]:
    if value["dtype"] not in SAFETENSORS:
        raise CheckpointError(
            f"{name} in {path} has dtype {value['dtype']}, which stf_jax does not read; "
            "save the model in float32, float16 or bfloat16"
        )
    shape, (begin, end) = tuple(value["shape"]), value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise CheckpointError(
            f"{path} is damaged: the shape or the place of {name} is none; "
            "download or copy it again"
        )
    info = TensorInfo(shape, SAFETENSORS[value["dtype"]])
    if end - begin != info.nbytes:
        raise CheckpointError(
            f"{path} is damaged: {name} has {end - begin} bytes, not {info.nbytes}; "
            "download or copy it again"
        )
    return info, begin
