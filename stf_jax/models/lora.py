"""Low-rank adapters beside frozen weights: y = x W + (alpha / r) dropout(x) A B.

Hu et al. 2021, arXiv 2106.09685. LLaVA puts them on every matmul of the decoder's layers
(arXiv 2310.03744).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from stf_jax.models.keys import StepKey
from stf_jax.parallel.sharding import all_gather_fsdp


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Defaults: LLaVA-1.5's.

    Attributes:
        rank: r, the inner width.
        alpha: the product A B is scaled by alpha / rank.
        dropout: the part of the inputs of A that is zeroed, in training.
    """

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1")
        # An adapter scaled by zero would be trained and change nothing.
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha is {self.alpha}; it must be above 0, and finite")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; give 0 or more, below 1")

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank


class LoRA(nnx.Module):
    """(alpha / r) dropout(x) A B, with A [*inputs, r] and B [r, *outputs]; zero to begin with.

    Args:
        config: rank, scale and dropout.
        inputs: the axes that the weight contracts.
        outputs: the axes that it makes.
        kernel: the weight's partition spec; A is split like its inputs, B like its outputs.
        inner: partition spec of the activation between A and B.
        key: a random key, for A and as a place for the dropout's.
        dtype: of A and B.
    """

    def __init__(
        self,
        config: LoRAConfig,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        kernel: PartitionSpec | None,
        inner: PartitionSpec | None,
        key: Array,
        dtype: Any,
    ):
        self.config, self.contracted, self.inner = config, len(inputs), inner
        spec_a, spec_b = None, None
        if kernel is not None:
            spec_a = PartitionSpec(*kernel[: len(inputs)], None)
            spec_b = PartitionSpec(None, *kernel[len(inputs) :])
        # As torch.nn.Linear starts, from which PEFT takes A: uniform, and B zero.
        bound = 1 / math.sqrt(math.prod(inputs))
        a = jax.random.uniform(
            key, (*inputs, config.rank), dtype, -bound, bound, out_sharding=spec_a
        )
        self.spec_a, self.spec_b = spec_a, spec_b
        self.a = nnx.Param(a)
        self.b = nnx.Param(jnp.zeros((config.rank, *outputs), dtype, out_sharding=spec_b))
        self.key = StepKey(key) if config.dropout else None

    def __call__(self, x: Float[Array, "..."], *, out: PartitionSpec | None) -> Float[Array, "..."]:
        """What is to be added to the weight's own result, of which `out` is the partition spec."""
        if self.key is not None:
            kept = 1 - self.config.dropout
            sharding = jax.typeof(x).sharding if self.inner is not None else None
            drawn = jax.random.bernoulli(self.key[...], kept, x.shape, out_sharding=sharding)
            x = jnp.where(drawn, x / kept, 0)
        axes = tuple(range(x.ndim - self.contracted, x.ndim)), tuple(range(self.contracted))
        a, b = all_gather_fsdp(self.a[...], self.spec_a), all_gather_fsdp(self.b[...], self.spec_b)
        inner = jax.lax.dot_general(x, a, (axes, ((), ())), out_sharding=self.inner)
        last = ((inner.ndim - 1,), (0,))
        y = jax.lax.dot_general(inner, b, (last, ((), ())), out_sharding=out)
        return y * jnp.asarray(self.config.scale, y.dtype)


def is_adapter(path: str) -> bool:
    """Whether a parameter of this path belongs to an adapter."""
    return "/lora/" in path


def low_rank(a: np.ndarray, b: np.ndarray, *, scale: float) -> np.ndarray:
    """What an adapter adds to one layer's weight: scale A B, float32 [*inputs, *outputs]."""
    product = np.tensordot(a.astype(np.float32), b.astype(np.float32), axes=1)
    product *= np.float32(scale)
    return product


def merge(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, *, scale: float) -> np.ndarray:
    """One layer's weight with its adapter in it: W + scale A B, float32."""
    merged = low_rank(a, b, scale=scale)
    merged += kernel
    return merged
