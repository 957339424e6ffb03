"""The tensors of a PyTorch checkpoint, by their shapes."""

from collections.abc import Mapping

# Shapes by canonical name.
Shapes = Mapping[str, tuple[int, ...]]


def matrix(shapes: Shapes, name: str) -> tuple[int, int]:
    """Rows and columns of a weight.

    Raises:
        ValueError: there is none of that name, or it is no matrix.
    """
    if name not in shapes:
        raise ValueError(f"there is no {name}: a projector of type mlp2x_gelu is expected")
    if len(shapes[name]) != 2:
        raise ValueError(f"{name} has shape {shapes[name]}; a matrix is expected")
    rows, columns = shapes[name]
    return rows, columns
