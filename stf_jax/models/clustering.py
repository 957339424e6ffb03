"""K-means by cosine over the tokens of several clips at once, with a static number of slots."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Clustering stops when the centroids move by less, all of them together.
_TOLERANCE = 1e-4
# Squared, the least length of a vector that is made a unit vector.
_TINY = 1e-24


def normalize(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """Unit vectors in float32; a zero vector, of which the released code makes NaN, stays zero."""
    wide = x.astype(jnp.float32)
    square = jnp.square(wide).sum(axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(jnp.maximum(square, _TINY))


def choose_seeds(tokens: Int[Array, "M"], *, count: int, seed: int) -> Int[Array, "M K"]:
    """Places of the tokens that clusters begin with: the middles of `count` equal parts, shuffled.

    K clusters begin with the first K of them.
    """
    order = np.random.default_rng(seed).permutation(count).astype(np.int32)
    return tokens[:, None] * (2 * order + 1) // (2 * count)


# Steps taken, whether a clip has stopped, its labels and its centroids.
_State = tuple[Int[Array, ""], Bool[Array, "M G"], Int[Array, "M G n"], Float[Array, "M G K H"]]


def find_clusters(
    units: Float[Array, "M n H"],
    mask: Bool[Array, "M n"],
    start: Float[Array, "M K H"],
    used: Bool[Array, "G K"],
    *,
    steps: int,
) -> tuple[Int[Array, "M G n"], Float[Array, "M G K H"]]:
    """K-means by cosine: the labels of the last assignment, and the centroids.

    Centroids are means of unit vectors; an empty cluster keeps its own. A step that moves them by
    less than the tolerance is the last one, and is not adopted.

    Args:
        units: unit vectors of M clips.
        mask: whether there is one.
        start: the first centroids, of any length.
        used: which of them there are, in each of G runs.
        steps: at most.
    """
    # On a TPU the default would round to bfloat16, and labels with it.
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def move(state: _State) -> _State:
        step, stopped, labels, centroids = state
        distance = 1 - einsum("mnh,mgkh->mgnk", units, normalize(centroids))
        distance = jnp.where(used[:, None], distance, jnp.inf)
        nearest = jnp.argmin(distance, axis=-1).astype(jnp.int32)
        members, counts = _members(nearest, mask[:, None], count=used.shape[1])
        means = einsum("mgnk,mnh->mgkh", members, units) / jnp.maximum(counts, 1)[..., None]
        moved = jnp.where((counts > 0)[..., None], means, centroids)
        distance = jnp.sqrt(jnp.square(moved - centroids).sum(axis=(2, 3)))
        labels = jnp.where(stopped[..., None], labels, nearest)
        stopped |= distance < _TOLERANCE
        return step + 1, stopped, labels, jnp.where(stopped[..., None, None], centroids, moved)

    centroids = jnp.repeat(start[:, None], len(used), axis=1)
    labels = jnp.zeros_like(jnp.repeat(mask[:, None], len(used), axis=1), jnp.int32)
    state = jnp.int32(0), jnp.zeros_like(labels[..., 0], bool), labels, centroids
    _, _, labels, centroids = jax.lax.while_loop(
        lambda state: (state[0] < steps) & ~state[1].all(), move, state
    )
    return labels, centroids


def average_clusters(
    units: Float[Array, "M n H"],
    mask: Bool[Array, "M n"],
    labels: Int[Array, "M n"],
    *,
    count: int,
) -> Float[Array, "M K H"]:
    """The codebook: the mean of each cluster, zero where it is empty."""
    members, counts = _members(labels, mask, count=count)
    return jnp.einsum("mnk,mnh->mkh", members, units) / jnp.maximum(counts, 1)[..., None]


def _members(
    labels: Int[Array, "... n"], mask: Bool[Array, "... n"], *, count: int
) -> tuple[Float[Array, "... n K"], Float[Array, "... K"]]:
    """1 where a token is in a cluster, and how many are."""
    members = jax.nn.one_hot(labels, count) * mask[..., None]
    return members, members.sum(axis=-2)
