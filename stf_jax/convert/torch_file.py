"""PyTorch's own `.bin` files, which hold pickles: read through `weights_only`, or not at all."""

import dataclasses
import functools
import os
import pickle
import tempfile
import zipfile
from typing import Any

import numpy as np
from etils import epath

from stf_jax.convert.dtypes import FLOATS, Array, DType
from stf_jax.convert.safetensors_file import TensorInfo, check_weights_file
from stf_jax.util.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """One `.bin` file; its tensors stay on disk until they are read."""

    path: epath.Path

    @functools.cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """What the file holds.

        Raises:
            CheckpointError: no whole PyTorch file, one that would run code, or no PyTorch here.
        """
        return {
            name: TensorInfo(tuple(tensor.shape), _dtype(name, tensor, self.path))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Array:
        """One tensor."""
        return _to_numpy(self._tensors[name])

    @functools.cached_property
    def _tensors(self) -> dict[str, Any]:
        check_weights_file(self.path)
        torch = import_torch(f"to read {self.path}")
        with tempfile.TemporaryDirectory() as folder:
            local = self.path
            if "://" in os.fspath(self.path):
                # A mapped file stays readable after its name is gone.
                local = self.path.copy(epath.Path(folder) / self.path.name)
            with local.open("rb") as file:
                zipped = zipfile.is_zipfile(file)
            try:
                content = torch.load(
                    os.fspath(local), weights_only=True, map_location="cpu", mmap=zipped
                )
            except pickle.UnpicklingError as error:
                # The operands are those of pickles; a file with others is none.
                no_code = "Unsupported operand" in str(error)
                if no_code or "Weights only load failed" not in str(error):
                    raise _damage_error(self.path) from error
                raise CheckpointError(
                    f"{self.path} holds more than tensors and would run code when loaded: refused; "
                    "ask its author for a safetensors file"
                ) from error
            except Exception as error:  # the unpickler fails in any way over what is no pickle
                raise _damage_error(self.path) from error
        if not isinstance(content, dict) or not all(
            isinstance(value, torch.Tensor) for value in content.values()
        ):
            raise CheckpointError(
                f"{self.path} is no state dict, tensors by name; save model.state_dict() alone"
            )
        return content


def write_torch(path: epath.Path, tensors: dict[str, Array]) -> None:
    """Writes a `.bin` file; needs PyTorch."""
    torch = import_torch(f"to write {path}")
    with path.open("wb") as file:
        torch.save({name: _from_numpy(torch, array) for name, array in tensors.items()}, file)


def import_torch(purpose: str) -> Any:
    """The module `torch`.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"PyTorch is needed {purpose}: pip install 'stf-jax[torch]', or use safetensors"
        ) from error
    return torch


def _damage_error(path: epath.Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a PyTorch file, or is truncated; download or copy it again"
    )


def _dtype(name: str, tensor: Any, path: epath.Path) -> DType:
    kind, layout = (str(what).removeprefix("torch.") for what in (tensor.dtype, tensor.layout))
    if tensor.is_meta or layout != "strided":
        raise CheckpointError(
            f"{name} in {path} is a {'meta' if tensor.is_meta else layout} tensor, which stf_jax "
            "does not read; save the model with ordinary tensors"
        )
    if kind in FLOATS:
        return FLOATS[kind]
    if kind in ("int64", "int32", "int16", "int8", "uint8", "bool", "float64"):
        return np.dtype(kind)
    raise CheckpointError(
        f"{name} in {path} has dtype {kind}, which stf_jax does not read; "
        "save the model in float32, float16 or bfloat16"
    )


def _to_numpy(tensor: Any) -> Array:
    torch = import_torch("")
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(FLOATS["bfloat16"])
    array: Array = tensor.numpy()
    return array


def _from_numpy(torch: Any, array: Array) -> Any:
    array = np.ascontiguousarray(array)
    if array.dtype == FLOATS["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
