"""Which PyTorch tensor is which native parameter: names, shapes, and the change of layout.

A transform is a pair of exact inverses; none changes a value. Letters: C a width in, F a width out,
N heads, D head width, W window side, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

Array = np.ndarray


# Rows of a matrix that are transposed together: few enough for the cache.
_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse."""

    native: Callable[[Array], Array]  # PyTorch's layout -> the native one
    torch: Callable[[Array], Array]  # and back


def transpose(matrix: Array) -> Array:
    """[F, C] -> [C, F], contiguous; in strips, which is several times as fast as numpy's own."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for row in range(0, matrix.shape[0], _ROWS):
        result[:, row : row + _ROWS] = matrix[row : row + _ROWS].T
    return result


# Norms, biases, embeddings.
SAME = Transform(lambda tensor: tensor, lambda array: array)

# Weight of a linear layer: [F, C] <-> [C, F].
LINEAR = Transform(transpose, transpose)


def split_heads(heads: int) -> Transform:
    """Weight of a query, key or value projection: [N*D, C] <-> [C, N, D]."""
    return Transform(
        lambda tensor: transpose(tensor).reshape(tensor.shape[1], heads, -1),
        lambda array: transpose(array.reshape(array.shape[0], -1)),
    )


def split_head_bias(heads: int) -> Transform:
    """Bias of a query, key or value projection: [N*D] <-> [N, D]."""
    return Transform(
        lambda tensor: tensor.reshape(heads, -1),
        lambda array: array.reshape(-1),
    )


def join_heads(heads: int) -> Transform:
    """Weight of an attention output projection: [C, N*D] <-> [N, D, C]."""
    return Transform(
        lambda tensor: transpose(tensor).reshape(heads, -1, tensor.shape[0]),
        lambda array: transpose(array.reshape(-1, array.shape[-1])),
    )


def packed_heads(heads: int) -> Transform:
    """Query, key and value projections in one weight: [3*N*D, C] <-> [C, 3, N, D]."""
    return Transform(
        lambda tensor: transpose(tensor).reshape(tensor.shape[1], 3, heads, -1),
        lambda array: transpose(array.reshape(len(array), -1)),
    )


def packed_head_bias(heads: int) -> Transform:
    """Their biases: [3*N*D] <-> [3, N, D]."""
    return Transform(lambda tensor: tensor.reshape(3, heads, -1), lambda array: array.reshape(-1))


def patches(patch: int) -> Transform:
    """The tower's patch convolution: [C, 3, side, side] <-> [side*side*3, C].

    Natively the rows are in the order (row, column, channel).
    """
    return Transform(
        lambda tensor: tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0]),
        lambda array: array.reshape(patch, patch, -1, array.shape[-1]).transpose(3, 2, 0, 1),
    )


def windows(side: int) -> Transform:
    """First weight of the STF projector: [F, C*W*W] <-> [W*W*C, F].

    The released weights expect a window channel by channel, element W*W*channel + W*row + column;
    natively it comes pixel by pixel, element (W*row + column)*C + channel.
    """
    area = side**2

    def native(tensor: Array) -> Array:
        by_channel = tensor.reshape(tensor.shape[0], -1, area)
        return by_channel.transpose(2, 1, 0).reshape(-1, tensor.shape[0])

    def torch(array: Array) -> Array:
        by_pixel = array.reshape(area, -1, array.shape[-1])
        return by_pixel.transpose(2, 1, 0).reshape(array.shape[-1], -1)

    return Transform(native, torch)


def embedding(torch_rows: int, native_rows: int) -> Transform:
    """Embedding of a vocabulary that may be padded: [V, C] <-> [V', C].

    Rows beyond the vocabulary are the mean of the real ones: the logit of such a token is the mean
    logit, which is never above the largest, so greedy decoding does not see the padding. The
    inverse is exact where there are at least as many native rows.
    """
    return Transform(
        lambda tensor: _with_rows(tensor, native_rows),
        lambda array: _with_rows(array, torch_rows),
    )


def head(torch_rows: int, native_rows: int) -> Transform:
    """Head over a vocabulary that may be padded, as in `embedding`: [V, C] <-> [C, V']."""
    rows = embedding(torch_rows, native_rows)
    return Transform(
        lambda tensor: transpose(rows.native(tensor)),
        lambda array: rows.torch(transpose(array)),
    )


def _with_rows(matrix: Array, rows: int) -> Array:
    missing = rows - len(matrix)
    if missing <= 0:
        return matrix[:rows]
    mean = matrix.mean(0, dtype=np.float32, keepdims=True).astype(matrix.dtype)
    return np.concatenate([matrix, np.repeat(mean, missing, axis=0)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One native parameter, and the tensor or the tensors, one a layer, that it is made of."""

    native: str  # "text/layers/mlp/up/kernel"
    torch: str  # "model.layers.{}.mlp.up_proj.weight"
    shape: tuple[int, ...]  # of each tensor
    native_shape: tuple[int, ...]  # of the parameter
    transform: Transform
    layers: int | None = None  # None: not stacked
    numbers: tuple[int, ...] = ()  # of the layers, where they are not 0, 1, 2, ...
    start: Literal["torch", "zeros"] = "torch"  # as PyTorch starts its layers, or with zeros

    @property
    def tensors(self) -> tuple[str, ...]:
        """The canonical names of its tensors, in the order of the stack."""
        if self.layers is None:
            return (self.torch,)
        return tuple(self.torch.format(layer) for layer in self.numbers or range(self.layers))


def make_entry(
    native: str,
    torch: str,
    shape: tuple[int, ...],
    to: tuple[int, ...],
    transform: Transform,
    *,
    layers: int | tuple[int, ...] | None = None,
    start: Literal["torch", "zeros"] = "torch",
) -> Entry:
    """One row of a table; shapes are those of one layer, `layers` how many or which there are."""
    numbers = layers if isinstance(layers, tuple) else ()
    count = len(layers) if isinstance(layers, tuple) else layers
    return Entry(
        native=native,
        torch=torch,
        shape=shape,
        native_shape=to if count is None else (count, *to),
        transform=transform,
        layers=count,
        numbers=numbers,
        start=start,
    )


def mlp_entries(
    native: str,
    torch: str,
    *,
    inputs: int,
    hidden: int,
    outputs: int,
    first: Transform = LINEAR,
    modules: tuple[int, int] = (0, 2),
) -> tuple[Entry, ...]:
    """Linear, activation, Linear: two modules of a `torch.nn.Sequential`."""
    entries: list[Entry] = []
    for number, module, rows, columns, transform in (
        (1, modules[0], hidden, inputs, first),
        (2, modules[1], outputs, hidden, LINEAR),
    ):
        entries += linear_entries(
            f"{native}/linear_{number}",
            f"{torch}{module}",
            inputs=columns,
            outputs=rows,
            first=transform,
        )
    return tuple(entries)


def linear_entries(
    native: str, torch: str, *, inputs: int, outputs: int, first: Transform = LINEAR
) -> tuple[Entry, Entry]:
    """One `torch.nn.Linear`, whose weight is changed by `first`."""
    shape, to = (outputs, inputs), (inputs, outputs)
    return (
        make_entry(f"{native}/kernel", f"{torch}.weight", shape, to, first),
        make_entry(f"{native}/bias", f"{torch}.bias", (outputs,), (outputs,), SAME),
    )


def norm_entries(native: str, torch: str, *, width: int) -> tuple[Entry, Entry]:
    """One `torch.nn.LayerNorm`."""
    return (
        make_entry(f"{native}/scale", f"{torch}.weight", (width,), (width,), SAME),
        make_entry(f"{native}/bias", f"{torch}.bias", (width,), (width,), SAME),
    )


def attention_entries(native: str, torch: str, *, width: int, heads: int) -> tuple[Entry, ...]:
    """One `torch.nn.MultiheadAttention`."""
    name, parts = f"{torch}.in_proj_", (3, heads, width // heads)
    kernel, bias = packed_heads(heads), packed_head_bias(heads)
    return (
        make_entry(
            f"{native}/kernel", f"{name}weight", (3 * width, width), (width, *parts), kernel
        ),
        make_entry(f"{native}/bias", f"{name}bias", (3 * width,), parts, bias),
        *linear_entries(f"{native}/output", f"{torch}.out_proj", inputs=width, outputs=width),
    )
