"""Which tokens of an image stay, in static shapes: ranks within groups, and gathering what stays.

Several images and several sequences may share a row; each group is ranked by itself.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from stf_jax.models.marks import Marks


def rank(scores: Float[Array, "B T"], groups: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The place of each position in its group, by score, from 0 for the highest.

    Equal scores go by index, the lower first.
    """
    index = jnp.arange(scores.shape[1])
    mine, other = scores[:, :, None], scores[:, None, :]
    before = (other > mine) | ((other == mine) & (index < index[:, None]))
    same = groups[:, :, None] == groups[:, None, :]
    return (before & same).sum(axis=2, dtype=jnp.int32)


def gather_order(kept: Bool[Array, "B T"], size: int) -> Int[Array, "B S"]:
    """The indices of what is kept, in order, then of some that is not: S = `size` of them."""
    return jnp.argsort(~kept, axis=1, stable=True)[:, :size].astype(jnp.int32)


def take_rows(x: Shaped[Array, "B T *C"], index: Int[Array, "B S"]) -> Shaped[Array, "B S *C"]:
    """The positions at `index` of each row."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def hide(marks: Marks, kept: Bool[Array, "B T"]) -> Marks:
    """With what is not kept as padding, which nothing sees."""
    return Marks(
        position=marks.position,
        segment=jnp.where(kept, marks.segment, 0),
        kind=marks.kind,
        image=marks.image,
    )
