"""Plain weights to integers and scales, and back, layer by layer.

qwix rounds (`absmax`: the largest of a group becomes 7.5 or 127.5 steps, and is cut there). Its
matmul and its providers stay aside: they cut a weight into groups as they compute, and the TPU
compiler writes the numbers of all of it out for that (docs/quantization.md).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stf_jax.convert.dtypes import Array, DType
from stf_jax.models.layers import Init
from stf_jax.models.llama import Llama
from stf_jax.models.lora import is_adapter, merge
from stf_jax.store.arrays import flatten, place, to_disk
from stf_jax.store.checkpoint import Leaf, NativeCheckpoint
from stf_jax.store.packing import INT4, PACKED, packed_shape
from stf_jax.store.run import TrainedCheckpoint, adapter_path
from stf_jax.systems.base import LlavaConfig
from stf_jax.util.errors import CheckpointError

# Layers of one weight that are read and rounded at a time.
_THREADS = 4

Shape = jax.ShapeDtypeStruct
# A stacked weight, whole or layer by layer.
Layers = Array | Callable[[int], Array]


def _weights_of(config: LlavaConfig) -> dict[str, Shape]:
    """Every parameter of the language model, by its path."""

    def make() -> Llama:
        init = Init(rngs=nnx.Rngs(0))
        return config.system.decoder(config.vision, config.text, init=init, lora=None)

    return flatten({"text": nnx.to_pure_dict(nnx.state(nnx.eval_shape(make)))})


def quantized_weights(config: LlavaConfig) -> dict[str, tuple[Shape, Shape]]:
    """Integers and scales, [layers, ...], of every weight of a quantized model, by its path."""
    if config.text.quantization is None:
        return {}
    shapes = _weights_of(config)
    return {
        path.removesuffix("/integers"): (leaf, shapes[path.replace("/integers", "/scales")])
        for path, leaf in shapes.items()
        if path.endswith("/kernel/integers")
    }


def quantize(weight: Array, *, integers: Shape, scales: Shape) -> tuple[Array, Array]:
    """One layer's integers and scales.

    Args:
        weight: of any float dtype; rounded from float32.
        integers: their shape, into which the weight is cut, and dtype.
        scales: the same of theirs; an axis of 1 shares one.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        result = _quantizer(integers, scales)(jnp.asarray(weight))
        return np.asarray(result.qvalue), np.asarray(result.scale)


@functools.cache
def _quantizer(integers: Shape, scales: Shape) -> Callable[[jax.Array], Any]:
    import qwix  # Imports all of itself, for seconds.

    sizes = enumerate(zip(integers.shape, scales.shape, strict=True))
    own = [axis for axis, (size, count) in sizes if size == count]

    def run(weight: jax.Array) -> Any:
        return qwix.quantize(
            weight.astype(jnp.float32).reshape(integers.shape),
            integers.dtype,
            channelwise_axes=own,
            scale_dtype=scales.dtype,
        )

    return jax.jit(run)


def dequantize(integers: Array, scales: Array) -> Array:
    """One layer's weight in its groups, float32: each integer times its scale."""
    import qwix

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        scale = jnp.asarray(scales).astype(jnp.float32)
        return np.asarray(qwix.dequantize(qwix.QArray(jnp.asarray(integers), scale)))


def quantized_leaves(
    path: str, shapes: tuple[Shape, Shape], open_layers: Callable[[], Layers]
) -> Iterator[Leaf]:
    """A stacked weight's two leaves, the integers first; reading those makes both.

    Args:
        path: of the weight.
        shapes: of the stacks of integers and scales.
        open_layers: called once, gives the weight, or what reads one layer of it.
    """
    integers, scales = shapes
    # The scales, from when the integers are read until they are.
    pending: list[Array] = []

    def read_integers() -> Array:
        packed = integers.dtype == INT4
        result = np.empty(
            packed_shape(integers.shape) if packed else integers.shape,
            PACKED if packed else integers.dtype,
        )
        layer_scales = np.empty(scales.shape, scales.dtype)
        layer_shapes = [Shape(stack.shape[1:], stack.dtype) for stack in shapes]
        opened = open_layers()
        read = opened.__getitem__ if isinstance(opened, np.ndarray) else opened

        def fill(layer: int) -> None:
            rounded, layer_scales[layer] = quantize(
                read(layer), integers=layer_shapes[0], scales=layer_shapes[1]
            )
            result[layer] = to_disk(rounded)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fill, range(len(result))))
        pending.append(layer_scales)
        return result

    for part, shape, read_part in (
        ("integers", integers, read_integers),
        ("scales", scales, pending.pop),
    ):
        dtype = np.dtype(shape.dtype)
        yield Leaf(path=f"{path}/{part}", shape=shape.shape, dtype=dtype, read=read_part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DequantizedCheckpoint(NativeCheckpoint):
    """A quantized model, read as the plain one that it computes with.

    A run's adapters are merged into its weights, which nothing rounds again.

    Attributes:
        first: the quantized model.
        dtype: of the weights.
    """

    first: NativeCheckpoint
    dtype: DType

    @property
    def extras(self) -> Any:
        """Those of the quantized model."""
        return self.first.extras

    @functools.cached_property
    def _weights(self) -> Mapping[str, tuple[Shape, Shape]]:
        return quantized_weights(self.first.config)

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shape and dtype of every parameter, by its path."""
        parts = {f"{path}/{part}" for path in self._weights for part in ("integers", "scales")}
        plain = {
            name: leaf
            for name, leaf in self.first.shapes.items()
            if name not in parts and not is_adapter(name)
        }
        whole = _weights_of(self.config)
        return plain | {path: Shape(whole[path].shape, self.dtype) for path in self._weights}

    def load(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters by path, each cast and placed as it says."""
        rest = {name: like for name, like in wanted.items() if name not in self._weights}
        return {
            **(self.first.load(rest) if rest else {}),
            **{
                name: place(self._read_weight(name), like)
                for name, like in wanted.items()
                if name in self._weights
            },
        }

    def _read_weight(self, path: str) -> Array:
        integers, scales = (self.first.read(f"{path}/{part}") for part in ("integers", "scales"))
        result = np.empty(self.shapes[path].shape, self.dtype)
        first, adapter = self.first, []
        if isinstance(first, TrainedCheckpoint) and adapter_path(path, "a") in first.trained:
            adapter = [first.read_trained(adapter_path(path, which)) for which in "ab"]
        for layer, (rounded, scale) in enumerate(zip(integers, scales, strict=True)):
            weight = dequantize(rounded, scale).reshape(result.shape[1:])
            if adapter:
                assert isinstance(first, TrainedCheckpoint)
                a, b = (part[layer] for part in adapter)
                weight = merge(weight, a, b, scale=first.lora.scale)
            result[layer] = weight.astype(self.dtype)
        return result


def open_dequantized(checkpoint: NativeCheckpoint) -> NativeCheckpoint:
    """The plain model that a quantized one computes with; a plain one as it is."""
    if checkpoint.config.text.quantization is None:
        return checkpoint
    return DequantizedCheckpoint(
        path=checkpoint.path,
        config=checkpoint.config.with_quantization(None),
        id=checkpoint.id,
        version=checkpoint.version,
        first=checkpoint,
        # As everything else came.
        dtype=np.dtype(checkpoint.shapes["text/embedding"].dtype),
    )


def check_plain(checkpoint: NativeCheckpoint, *, to: str, fix: str) -> None:
    """Refuses a quantized model.

    Raises:
        CheckpointError: one line, with the way out.
    """
    scheme = checkpoint.config.text.quantization
    if scheme is not None:
        raise CheckpointError(f"{checkpoint.path} has {scheme} weights and cannot {to}; {fix}")
