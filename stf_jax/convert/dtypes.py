"""The dtypes of PyTorch checkpoints: their names, how they combine, how one becomes another."""

from typing import Any, Literal

import ml_dtypes
import numpy as np

from stf_jax.util.errors import CheckpointError

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]

# The dtypes that a checkpoint can be converted to, by PyTorch's names.
FloatName = Literal["float32", "float16", "bfloat16"]
FLOATS: dict[str, DType] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# By the names in the header of a safetensors file.
SAFETENSORS: dict[str, DType] = {
    "F32": FLOATS["float32"],
    "F16": FLOATS["float16"],
    "BF16": FLOATS["bfloat16"],
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
SAFETENSORS_NAMES: dict[DType, str] = {dtype: name for name, dtype in SAFETENSORS.items()}

# Without its sign, a value whose bits are below those of infinity is finite.
_INFINITIES: dict[DType, tuple[Any, int]] = {
    FLOATS["float32"]: (np.uint32, 0x7F800000),
    FLOATS["float16"]: (np.uint16, 0x7C00),
    FLOATS["bfloat16"]: (np.uint16, 0x7F80),
}
_MAGNITUDE = {np.uint32: np.uint32(0x7FFFFFFF), np.uint16: np.uint16(0x7FFF)}
_BLOCK = 2**16


def is_float(dtype: DType) -> bool:
    """Whether weights may have this dtype; the others are buffers or quantized weights."""
    return dtype in FLOATS.values()


def common(dtypes: set[DType]) -> DType:
    """The smallest of the float dtypes that holds every value of the given ones."""
    (first, *rest) = dtypes
    return FLOATS["float32"] if rest else first


def check_finite(array: Array, *, name: str) -> None:
    """Refuses weights of which some are NaN or infinite; a buffer of another dtype may be anything.

    Raises:
        CheckpointError: names them, with how many there are.
    """
    if array.dtype not in _INFINITIES:
        return
    bits, infinity = _INFINITIES[array.dtype]
    values = np.ascontiguousarray(array).reshape(-1).view(bits)
    # In blocks that stay in the cache: a few times as fast as numpy's isfinite.
    for start in range(0, values.size, _BLOCK):
        if (values[start : start + _BLOCK] & _MAGNITUDE[bits]).max() >= infinity:
            break
    else:
        return
    nans = int(np.isnan(array).sum())
    others = int(np.isinf(array).sum())
    raise CheckpointError(
        f"{name} holds {nans} NaN and {others} infinite of {array.size} values: the training "
        "diverged or the file is damaged; take an earlier checkpoint, or download it again"
    )


def cast(array: Array, dtype: DType, *, name: str) -> Array:
    """`array` in `dtype`, rounded to nearest.

    Raises:
        CheckpointError: a value that float16 cannot hold.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype == FLOATS["float16"] and not np.isfinite(result).all() and np.isfinite(array).all():
        raise CheckpointError(f"{name} holds values beyond float16; choose bfloat16 or float32")
    return result
