"""Choosing the next token: greedy, or temperature, top-k and top-p with a seed for each row."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

# What is less may be zero to the device.
_COLDEST = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy, whatever the rest says.

    Attributes:
        temperature: divides the logits.
        top_k: only the k most likely tokens; 0 is all of them.
        top_p: only the fewest most likely tokens that together have probability `top_p`.
        seed: every row draws from its own stream of this seed, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; give 0 (greedy) or a larger finite number"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give more than 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 0 (all tokens) or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; give 0 to {2**32 - 1}")


GREEDY = Sampling()


def likely(
    logits: Float[Array, "B V"], *, top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """The logits with all but the likely tokens at minus infinity: top-k, then top-p of those.

    The token that crosses `top_p` is kept, so at least one always is.
    """
    top_k, top_p = top_k[:, None], top_p[:, None]
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where((top_k == 0) | (rank < top_k), ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    # Rounded, the chances before a token of the tail may add up to one.
    within = (before < top_p) | (top_p >= 1) | (rank == 0)
    ranked = jnp.where(within, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def sample(
    logits: Float[Array, "B V"],
    *,
    step: Int[Array, "B"],
    temperature: Float[Array, "B"],
    seed: UInt[Array, "B"],
    top_k: Int[Array, "B"] | None = None,
    top_p: Float[Array, "B"] | None = None,
) -> Int[Array, "B"]:
    """One token a row, the `step`-th of its answer; seed and step alone decide the noise.

    Without `top_k` and `top_p` all tokens count, which they do in the same way at 0 and 1.
    """
    # At a temperature next to nothing all but the best become minus infinity, and none infinity.
    below = logits - logits.max(axis=-1, keepdims=True)
    candidates = below / jnp.maximum(temperature, _COLDEST)[:, None]
    if top_k is not None and top_p is not None:
        candidates = likely(candidates, top_k=top_k, top_p=top_p)

    def gumbel(seed: UInt[Array, ""], step: Int[Array, ""]) -> Float[Array, "V"]:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), step), logits.shape[-1:])

    # An answer depends neither on its row nor on its neighbors. A greedy one has no noise.
    noise = jnp.where(temperature[:, None] > 0, jax.vmap(gumbel)(seed, step), 0)
    return jnp.argmax(candidates + noise, axis=-1).astype(jnp.int32)
