"""The row that a language model's vocabulary gets for a token of its system's own."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from stf_jax.convert.dtypes import Array
from stf_jax.convert.parts import Tensor
from stf_jax.convert.safetensors_file import TensorInfo
from stf_jax.systems import SYSTEMS
from stf_jax.systems.base import System

# Of new rows, as transformers draws them where it resizes an embedding.
_DEVIATION = 0.02

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def find_token(
    system: str | System | None,
    hf: Mapping[str, Any],
    tokens: Callable[[], Mapping[str, int]],
    *,
    rows: int,
) -> int | None:
    """The id of the own token of a system that is chosen over a checkpoint; None if it has none.

    Args:
        system: the choice.
        hf: config.json of the checkpoint, which may be of this system already.
        tokens: reads those of its tokenizer, which may have the token; none without a tokenizer.
        rows: of its embedding. Without a tokenizer the token comes behind them.
    """
    kind = SYSTEMS.get(system) if isinstance(system, str) else type(system) if system else None
    if kind is None or kind.own_token is None:
        return None
    if (known := (kind.read_hf(hf) or {}).get("token_id")) is not None:
        return int(known)
    ids = tokens()
    # A tokenizer numbers what is added on from its last token, however many rows there are.
    return ids.get(kind.own_token, max(ids.values(), default=rows - 1) + 1)


def add_rows(tensors: Mapping[str, Tensor], *, rows: int, seed: int) -> dict[str, Tensor]:
    """The tensors whose embedding and head have so many rows: the new ones are N(0, 0.02)."""
    names = [name for name in (_EMBEDDING, _HEAD) if name in tensors]
    longer = _LongerTensors({name: tensors[name] for name in names}, rows=rows, seed=seed)
    return {**tensors, **{name: Tensor(longer, name) for name in names}}


@dataclasses.dataclass(frozen=True)
class _LongerTensors:
    """Matrices with random rows behind their own."""

    tensors: Mapping[str, Tensor]
    rows: int
    seed: int

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Their shapes; what is no matrix, or long enough, stays as it is."""
        return {name: self._info(tensor.info) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Array:
        """The same values at every call."""
        array, shape = self.tensors[name].read(), self.infos[name].shape
        if array.shape == shape:
            return array
        # A stream for each matrix.
        rng = np.random.default_rng([self.seed, list(self.tensors).index(name)])
        new = rng.standard_normal((shape[0] - len(array), shape[1]), np.float32)
        return np.concatenate([array, (_DEVIATION * new).astype(array.dtype)])

    def _info(self, info: TensorInfo) -> TensorInfo:
        if len(info.shape) != 2:
            return info
        return TensorInfo((max(info.shape[0], self.rows), info.shape[1]), info.dtype)
