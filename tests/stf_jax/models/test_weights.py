import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stf_jax.convert.dtypes import FLOATS, cast, common
from stf_jax.models.weights import (
    LINEAR,
    SAME,
    Transform,
    embedding,
    head,
    join_heads,
    patches,
    split_head_bias,
    split_heads,
    transpose,
    windows,
)
from stf_jax.util.errors import CheckpointError

SIZE = st.integers(1, 9)
DTYPE = st.sampled_from([np.dtype(np.float32), np.dtype(np.float16), FLOATS["bfloat16"]])


def numbered(*shape: int, dtype: np.dtype) -> np.ndarray:
    """Every element differs, in bits if not in value."""
    bits = np.arange(np.prod(shape)).astype(f"u{dtype.itemsize}")
    return bits.reshape(shape).view(dtype)


def check(transform: Transform, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    native = transform.native(tensor)
    assert native.shape == shape
    assert native.dtype == tensor.dtype
    back = transform.torch(native)
    assert back.shape == tensor.shape
    assert back.tobytes() == tensor.tobytes()
    return native


@given(st.integers(1, 200), st.integers(1, 200), DTYPE)
def test_transpose(rows: int, columns: int, dtype: np.dtype) -> None:
    matrix = numbered(rows, columns, dtype=dtype)
    native = check(LINEAR, matrix, (columns, rows))
    assert native.tobytes() == np.ascontiguousarray(matrix.T).tobytes()
    assert native.flags.c_contiguous
    assert transpose(matrix).tobytes() == native.tobytes()


@given(SIZE, SIZE, SIZE, DTYPE)
def test_heads(heads: int, width: int, inputs: int, dtype: np.dtype) -> None:
    weight = numbered(heads * width, inputs, dtype=dtype)
    native = check(split_heads(heads), weight, (inputs, heads, width))
    assert native[-1, -1, 0].tobytes() == weight[(heads - 1) * width, -1].tobytes()
    out = numbered(inputs, heads * width, dtype=dtype)
    native = check(join_heads(heads), out, (heads, width, inputs))
    assert native[-1, 0, -1].tobytes() == out[-1, (heads - 1) * width].tobytes()
    check(split_head_bias(heads), numbered(heads * width, dtype=dtype), (heads, width))
    check(SAME, weight, weight.shape)


@given(SIZE, st.integers(1, 4), DTYPE)
def test_patch_rows_are_row_column_channel(width: int, patch: int, dtype: np.dtype) -> None:
    kernel = numbered(width, 3, patch, patch, dtype=dtype)
    native = check(patches(patch), kernel, (patch * patch * 3, width))
    for row in range(patch):
        for column in range(patch):
            for channel in range(3):
                actual = native[(row * patch + column) * 3 + channel]
                assert actual.tobytes() == kernel[:, channel, row, column].tobytes()


@pytest.mark.parametrize("side", [2, 3])
@given(channels=SIZE, outputs=SIZE, dtype=DTYPE)
def test_window_rows_are_row_column_channel(
    side: int, channels: int, outputs: int, dtype: np.dtype
) -> None:
    area = side * side
    weight = numbered(outputs, channels * area, dtype=dtype)
    native = check(windows(side), weight, (area * channels, outputs))
    for channel in range(channels):
        for row in range(side):
            for column in range(side):
                published = area * channel + side * row + column
                ours = (row * side + column) * channels + channel
                assert native[ours].tobytes() == weight[:, published].tobytes()


@given(st.integers(1, 20), st.integers(0, 20), SIZE)
def test_padded_vocabulary_never_wins(rows: int, extra: int, width: int) -> None:
    rng = np.random.default_rng(rows * 1000 + extra)
    table = rng.standard_normal((rows, width)).astype(np.float32)
    padded = check(embedding(rows, rows + extra), table, (rows + extra, width))
    assert padded[:rows].tobytes() == table.tobytes()
    logits = check(head(rows, rows + extra), table, (width, rows + extra)).T @ table[0]
    assert logits.argmax() < rows or np.isclose(logits.max(), logits[:rows].max())


def test_common_dtype_holds_every_value() -> None:
    half, brain, single = FLOATS["float16"], FLOATS["bfloat16"], FLOATS["float32"]
    assert common({half}) == half
    assert common({brain}) == brain
    assert common({half, brain}) == single
    assert common({half, single}) == single


def test_cast_refuses_overflow_of_float16() -> None:
    with pytest.raises(CheckpointError, match=r"w holds values beyond float16; choose bfloat16"):
        cast(np.array([1e5], np.float32), FLOATS["float16"], name="w")
    large = cast(np.array([1e5], np.float32), FLOATS["bfloat16"], name="w")
    assert large.dtype == ml_dtypes.bfloat16
    infinite = cast(np.array([np.inf], np.float32), FLOATS["float16"], name="w")
    assert np.isinf(infinite).all()
