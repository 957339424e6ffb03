"""One directory of PyTorch weights, under canonical names: a whole model, or a part of one."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from stf_jax.convert.bundle import Bundle
from stf_jax.convert.dtypes import Array, DType
from stf_jax.convert.foreign import describe_names, refuse_family, refuse_tensors
from stf_jax.convert.layouts import Layout, canonical, is_ignored, recognize
from stf_jax.convert.mapping import TOWER
from stf_jax.convert.readers import Tensors, open_tensors, read_json
from stf_jax.convert.safetensors_file import TensorInfo
from stf_jax.models.weights import Entry
from stf_jax.store.checkpoint import is_native
from stf_jax.systems import connector_prefixes
from stf_jax.util.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file."""

    file: Tensors
    name: str  # as published

    @property
    def info(self) -> TensorInfo:
        """Its shape and dtype."""
        return self.file.infos[self.name]

    def read(self) -> Array:
        """Its values; of an adapted weight in float32, whatever its dtype."""
        return self.file.read(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one directory holds."""

    path: epath.Path
    layout: Layout
    hf: Mapping[str, Any]  # config.json, empty where there is none
    tensors: Mapping[str, Tensor]  # by canonical name; of a LoRA adapter, by the published one
    unknown: tuple[str, ...]  # published names that the layout does not have
    bundled: epath.Path | None = None  # where the small files lie that the file of weights held

    @property
    def folder(self) -> epath.Path:
        """The directory with the small files, of a single file, too."""
        if self.bundled is not None:
            return self.bundled
        return self.path if self.path.is_dir() else self.path.parent

    def select(self, *prefixes: str) -> dict[str, Tensor]:
        """The tensors whose canonical names begin so."""
        return {name: t for name, t in self.tensors.items() if name.startswith(prefixes)}

    @property
    def tower(self) -> dict[str, Tensor]:
        """The vision tower's tensors."""
        return self.select(TOWER)

    @property
    def connector(self) -> dict[str, Tensor]:
        """The tensors of an adapter."""
        return self.select(*connector_prefixes())

    @property
    def language(self) -> dict[str, Tensor]:
        """The language model's tensors."""
        return self.select("model.", "lm_head.")


def open_part(path: epath.PathLike) -> Part:
    """Opens a directory of PyTorch weights, or a single file of them.

    Raises:
        CheckpointError: there are none, they are not whole, or they are of another family.
    """
    path = epath.Path(path)
    if path.is_dir() and is_native(path):
        raise CheckpointError(
            f"{path} is a native checkpoint; a PyTorch one is expected here. "
            "`stf-jax convert export` makes one"
        )
    config = path / "config.json"
    hf = read_json(config) if path.is_dir() and config.exists() else {}
    refuse_family(path, hf)
    file = open_tensors(path)
    bundled = file.folder if isinstance(file, Bundle) else None
    if bundled is not None:
        hf = read_json(bundled / "config.json")
    refuse_tensors(path, file.infos, hf)
    layout = recognize(file.infos)
    if layout is None:
        kind = f"model_type {hf['model_type']!r}" if "model_type" in hf else "unknown tensor names"
        known = describe_names(file.infos)
        raise CheckpointError(
            f"{path} {known}"
            if known
            else f"{path} is no CLIP, LLaMA or LLaVA checkpoint ({kind}); stf_jax reads only those"
        )
    tensors, unknown = {}, []
    for name in file.infos:
        if is_ignored(name, layout):
            continue
        ours = name if layout == "lora" else canonical(name, layout)
        if ours is None or ours in tensors:
            unknown.append(name)
        else:
            tensors[ours] = Tensor(file, name)
    return Part(
        path=path, layout=layout, hf=hf, tensors=tensors, unknown=tuple(unknown), bundled=bundled
    )


@dataclasses.dataclass(frozen=True)
class RandomTensors:
    """New weights of a system, as PyTorch starts its layers.

    Linear layers and convolutions are uniform within 1 / sqrt(inputs), their biases too; a norm
    scales by 1 and adds 0; learned tokens are normal with deviation 0.02, as CLIP's embeddings.
    """

    infos: Mapping[str, TensorInfo]
    seed: int
    zeros: frozenset[str] = frozenset()

    @classmethod
    def for_entries(cls, entries: tuple[Entry, ...], *, dtype: DType, seed: int) -> "RandomTensors":
        """Weights for the layers of a table."""
        return cls(
            {name: TensorInfo(e.shape, dtype) for e in entries for name in e.tensors},
            seed,
            frozenset(name for e in entries if e.start == "zeros" for name in e.tensors),
        )

    def read(self, name: str) -> Array:
        """The same values at every call."""
        info = self.infos[name]
        if name in self.zeros:
            return np.zeros(info.shape, info.dtype)
        # A stream for each tensor: none depends on which others are drawn.
        rng = np.random.default_rng([self.seed, list(self.infos).index(name)])
        # "x.weight" and "x.bias", or "in_proj_weight" and "in_proj_bias".
        layer, kind = name[: -len("weight")], "weight"
        if name.endswith("bias"):
            layer, kind = name[: -len("bias")], "bias"
        weight = self.infos.get(f"{layer}weight")
        if weight is None or not name.endswith(("weight", "bias")):
            return (0.02 * rng.standard_normal(info.shape, np.float32)).astype(info.dtype)
        if len(weight.shape) == 1:
            return np.full(info.shape, kind == "weight", info.dtype)
        values = rng.random(info.shape, dtype=np.float32)
        bound = np.float32(1 / np.sqrt(math.prod(weight.shape[1:])))
        return ((2 * values - 1) * bound).astype(info.dtype)
