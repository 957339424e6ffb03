"""Weights as integers and scales, and the matmul that never has all of a layer's as numbers.

weight = integers * scales; `stf_jax.config.quantization` has the schemes. A TPU compiler turns
integers into numbers inside the matmul's own loop, if nothing cuts them into groups there: they lie
in groups, [G, g, F] with scales [G, 1, F]. XLA's CPU back end writes every operand out first, as it
does for bfloat16; there the weight goes by in blocks of rows that stay in the cache.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stf_jax.config.quantization import Scheme
from stf_jax.models.attention import platform
from stf_jax.parallel.sharding import Spec, reshard

# Bytes of a block as float32: with what else is at work, it stays in a core's share of the cache.
_BLOCK_BYTES = 4 * 2**20


class QuantizedKernel(nnx.Module):
    """A weight [*inputs, *outputs] in a scheme; zeros, to be filled from a checkpoint.

    Args:
        scheme: bits and groups.
        inputs: the axes that the matmul contracts; the last is cut into groups.
        outputs: the axes that it makes.
        spec: partition spec of the weight; integers and the scales of groups are split alike.
    """

    def __init__(
        self,
        scheme: Scheme,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        spec: PartitionSpec | None,
    ):
        self.inputs, self.outputs = inputs, outputs
        *leading, last = inputs
        self.per_channel = scheme.group is None
        self.group = scheme.inputs_per_scale(last)
        # Of the integers: the axes of the inputs, the last in groups, and which of them share.
        self.axes = inputs if self.per_channel else (*leading, last // self.group, self.group)
        count = len(inputs)
        shared = (1,) * count if self.per_channel else (*self.axes[:-1], 1)
        self.spec, self.scales_spec = spec, spec
        if spec is not None:
            split = spec[:count] if self.per_channel else (*spec[:count], None)
            self.spec = PartitionSpec(*split, *spec[count:])
            of_scales = (None,) * count if self.per_channel else split
            self.scales_spec = PartitionSpec(*of_scales, *spec[count:])
        self.integers = nnx.Param(
            jnp.zeros((*self.axes, *outputs), scheme.dtype, out_sharding=self.spec)
        )
        self.scales = nnx.Param(
            jnp.ones((*shared, *outputs), scheme.scale_dtype, out_sharding=self.scales_spec)
        )

    def dot(self, x: Float[Array, "..."], *, out: PartitionSpec | None) -> Float[Array, "..."]:
        """X @ weight: [..., *inputs] -> [..., *outputs], of which `out` is the partition spec."""
        integers = _all_gather_fsdp(self.integers[...], self.spec)
        scales = _all_gather_fsdp(self.scales[...], self.scales_spec)
        blocks = self._blocks() if platform() == "cpu" and self.spec is None else 1
        whole = self._dot_per_channel if self.per_channel else self._dot_in_groups
        compute = partial(self._dot_in_blocks, blocks=blocks) if blocks > 1 else whole
        # The backward pass makes the numbers again rather than store them.
        y: Array = jax.checkpoint(partial(compute, out=out))(x, integers, scales)
        return y

    def _dot_per_channel(
        self, x: Array, integers: Array, scales: Array, *, out: PartitionSpec | None
    ) -> Array:
        """Scales go to the result, which is smaller."""
        # Unscaled, a sum of float16 numbers may be too large for float16.
        wide = jnp.float32 if x.dtype == jnp.float16 else None
        y = self._contract(x, integers.astype(x.dtype), out=out, result=wide)
        return (y * scales.reshape(self.outputs)).astype(x.dtype)

    def _dot_in_groups(
        self, x: Array, integers: Array, scales: Array, *, out: PartitionSpec | None
    ) -> Array:
        batch, spec = x.shape[: x.ndim - len(self.inputs)], None
        if self.spec is not None:
            split = jax.typeof(x).sharding.spec
            spec = PartitionSpec(*split, *(None,) * (x.ndim + 1 - len(split)))
        x = jax.lax.reshape(x, (*batch, *self.axes), out_sharding=spec)
        return self._contract(x, integers.astype(x.dtype) * scales.astype(x.dtype), out=out)

    def _contract(
        self, x: Array, weight: Array, *, out: PartitionSpec | None, result: DTypeLike | None = None
    ) -> Array:
        count = len(self.axes)
        axes = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
        y: Array = jax.lax.dot_general(
            x, weight, (axes, ((), ())), preferred_element_type=result, out_sharding=out
        )
        return y

    def _blocks(self) -> int:
        """Into how many blocks of rows the weight is cut; groups stay whole."""
        units = math.prod(self.inputs) // (1 if self.per_channel else self.group)
        size = 4 * math.prod(self.inputs) * math.prod(self.outputs)
        least = math.ceil(size / _BLOCK_BYTES)
        return next((count for count in range(least, units + 1) if units % count == 0), units)

    def _dot_in_blocks(
        self, x: Array, integers: Array, scales: Array, *, out: PartitionSpec | None, blocks: int
    ) -> Array:
        """The sum over blocks of rows, in float32."""
        del out
        rows, columns = math.prod(self.inputs), math.prod(self.outputs)
        batch = x.shape[: x.ndim - len(self.inputs)]
        xs = x.astype(jnp.float32).reshape(-1, blocks, rows // blocks).swapaxes(0, 1)
        # Neighbors in memory, which int4 has in one byte: a weight for each of the two.
        parts = 2 if integers.dtype == jnp.int4 else 1
        packed = integers.reshape(rows, columns // parts, parts)
        packed = jax.lax.bitcast_convert_type(packed if parts == 2 else packed[..., 0], jnp.int8)
        packed = packed.reshape(blocks, rows // blocks, columns // parts)
        scales = scales.reshape(-1, columns // parts, parts)
        if not self.per_channel:
            scales = scales.reshape(blocks, -1, *scales.shape[1:])

        def add(sums: Array, block: tuple[Array, Array, Array | None]) -> tuple[Array, None]:
            x, packed, scales = block
            weights = [packed] if parts == 1 else [(packed << 4) >> 4, packed >> 4]
            products = []
            for part, integers in enumerate(weights):
                weight = integers.astype(jnp.float32)
                if scales is not None:
                    groups = weight.reshape(len(scales), -1, weight.shape[-1])
                    scaled = groups * scales[:, None, :, part].astype(jnp.float32)
                    weight = scaled.reshape(weight.shape)
                products.append(x @ weight)
            return sums + jnp.stack(products), None

        start = jnp.zeros((parts, xs.shape[1], columns // parts), jnp.float32)
        sums, _ = jax.lax.scan(add, start, (xs, packed, None if self.per_channel else scales))
        y = jnp.moveaxis(sums, 0, -1)
        if self.per_channel:
            y = y * scales
        return y.reshape(*batch, *self.outputs).astype(x.dtype)


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))


def _all_gather_fsdp(array: Int[Array, "..."] | Float[Array, "..."], spec: Spec) -> Array:
    """Whole along `fsdp`, as integers; nothing flows back to what is frozen."""
    return array if spec is None else reshard(array, _without_fsdp(spec))


def is_quantized(path: str) -> bool:
    """Whether a parameter of this path is a part of a quantized weight, which keeps its dtype."""
    return path.endswith(("/kernel/integers", "/kernel/scales"))


def bytes_per_value(dtype: DTypeLike) -> float:
    """Half a byte for int4, which numpy holds in a whole one."""
    return 0.5 if dtype == jnp.int4 else float(jnp.dtype(dtype).itemsize)
