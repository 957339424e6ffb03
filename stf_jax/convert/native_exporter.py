"""Native -> native: one checkpoint of a run and the model that it began with, or in integers."""

import functools
import math
from collections.abc import Iterator

from etils import epath

from stf_jax.convert.dtypes import Array, DType, cast, check_finite
from stf_jax.convert.quantize import check_plain, quantized_leaves, quantized_weights
from stf_jax.models.quantization import is_quantized
from stf_jax.store import checkpoint
from stf_jax.store.checkpoint import NativeCheckpoint
from stf_jax.util.errors import CheckpointError
from stf_jax.util.progress import byte_progress


def write_native(
    source: NativeCheckpoint, out: epath.PathLike, dtype: DType | None, quantize: str | None
) -> None:
    """Writes a native checkpoint; a parameter at a time is in memory.

    Args:
        source: a checkpoint, or the model of a run.
        out: the new directory.
        dtype: of every parameter that is no integer; None is as stored.
        quantize: the scheme of the language model's weights; None leaves them as they are.

    Raises:
        CheckpointError: adapters lie over integers, the weights are integers already, or the scheme
            does not fit.
    """
    if source.adapters is not None:
        check_plain(
            source,
            to="take in the adapters that were trained beside them",
            fix="write those with --layout lora, or all with --dequantize",
        )
    config = source.config
    if quantize is not None:
        check_plain(source, to="be quantized again", fix="leave out --quantize")
        try:
            config = config.with_quantization(quantize)
        except ValueError as error:
            raise CheckpointError(f"{source.path}: {error}") from error
    weights = quantized_weights(config) if quantize is not None else {}

    def leaves() -> Iterator[checkpoint.Leaf]:
        sizes = {
            path: math.prod(leaf.shape) * leaf.dtype.itemsize
            for path, leaf in source.shapes.items()
        }
        with byte_progress("Exporting", total=sum(sizes.values())) as advance:
            for path, leaf in source.shapes.items():
                # What becomes integers is rounded once.
                stays = is_quantized(path) or path in weights
                kind = leaf.dtype if dtype is None or stays else dtype
                read = functools.partial(_read, source, path, kind)
                if path in weights:
                    yield from quantized_leaves(path, weights[path], read)
                else:
                    yield checkpoint.Leaf(path=path, shape=leaf.shape, dtype=kind, read=read)
                advance(sizes[path])

    checkpoint.write(out, config=config, leaves=leaves(), extras=source.copy_extras)


def _read(source: NativeCheckpoint, name: str, dtype: DType) -> Array:
    array = source.read(name)
    check_finite(array, name=name)
    return cast(array, dtype, name=name)
