"""The header of a GGUF file: its metadata, and where each tensor lies.

The `gguf` package reads headers, too, but follows a damaged length without end, and takes seconds
for a vocabulary. Source: the GGUF specification, versions 2 and 3, little-endian.
"""

import dataclasses
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from stf_jax.convert.safetensors_file import check_weights_file
from stf_jax.util.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4

# Kinds of values, by their numbers in the file.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What the header says of one tensor."""

    shape: tuple[int, ...]  # as numpy's: the last dimension is contiguous
    kind: int  # the number of its ggml type
    offset: int  # its first byte in the file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The metadata and the tensors of one file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    size: int  # bytes of the whole file


def read_header(path: epath.Path) -> Header:
    """Reads the header of a GGUF file.

    Raises:
        CheckpointError: another version, or a file that is damaged or truncated.
    """
    size = check_weights_file(path)
    with path.open("rb") as file:
        try:
            return _read(_Cursor(file, size))
        except ValueError as error:  # also of text that is no UTF-8
            raise CheckpointError(
                f"{path} is no whole GGUF file ({error}); download or copy it again"
            ) from error


class _Cursor:
    """Reads one value after the other, none beyond the end."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.at = file, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise ValueError(f"it ends within its header, at byte {self.size}")
        self.at += count
        return self.file.read(count)

    def number(self, code: str) -> int:
        (value,) = struct.unpack(code, self.take(struct.calcsize(code)))
        return int(value)

    def text(self) -> str:
        return self.take(self.number("<Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner == _STRING:
                # No list for a length that the file cannot hold: each has eight bytes at least.
                if count > (self.size - self.at) // 8:
                    raise ValueError(f"it ends within its header, at byte {self.size}")
                return [self.text() for _ in range(count)]
            return self._scalars(inner, count).tolist()
        (value,) = self._scalars(kind, 1)
        # The shortest decimal number that is this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(value)) if kind == 6 else value.item()

    def _scalars(self, kind: int, count: int) -> np.ndarray[Any, Any]:
        if kind not in _SCALARS:
            raise ValueError(f"a value of unknown kind {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def _read(cursor: _Cursor) -> Header:
    if cursor.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("<I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}; 2 and 3, little-endian, are read")
    tensor_count, value_count = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        name = cursor.text()
        metadata[name] = cursor.value(cursor.number("<I"))
    tensors: dict[str, StoredTensor] = {}
    for _ in range(tensor_count):
        name = cursor.text()
        dimensions = cursor.number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))
        kind, offset = cursor.number("<I"), cursor.number("<Q")
        tensors[name] = StoredTensor(shape=shape[::-1], kind=kind, offset=offset)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return Header(
        metadata=metadata,
        tensors={
            name: dataclasses.replace(tensor, offset=start + tensor.offset)
            for name, tensor in tensors.items()
        },
        size=cursor.size,
    )
