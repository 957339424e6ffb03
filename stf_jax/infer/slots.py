"""What an engine's programs take and give: answers in the making, and questions to begin."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from stf_jax.infer.sampling import GREEDY, Sampling
from stf_jax.models.cache import KVCache

# How tokens are chosen, which is compiled in: the best, or one that is drawn, among all or among
# likely ones.
Choice: TypeAlias = Literal["greedy", "drawn", "likely"]
CHOICES: tuple[Choice, ...] = ("greedy", "drawn", "likely")


def choice_of(samplings: Iterable[Sampling]) -> Choice:
    """What serves all of these."""
    choice: Choice = "greedy"
    for sampling in samplings:
        if sampling.temperature and (sampling.top_k or sampling.top_p < 1):
            return "likely"
        if sampling.temperature:
            choice = "drawn"
    return choice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """The sampling of B answers, and how long each may become, as the devices have it.

    Attributes:
        temperature: 0 is greedy.
        top_k: as in `Sampling`.
        top_p: likewise.
        seed: likewise.
        most: tokens of the answer.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    seed: UInt[Array, "B"]
    most: Int[Array, "B"]

    @classmethod
    def of(cls, rows: Sequence[tuple[Sampling, int]]) -> "Draws":
        """Of answers with these samplings and so many tokens at most; host arrays."""

        def column(values: Iterable[float], dtype: type[np.generic]) -> Any:
            return np.asarray([*values], dtype)

        largest = np.iinfo(np.int32).max
        return cls(
            temperature=column((sampling.temperature for sampling, _ in rows), np.float32),
            top_k=column((min(sampling.top_k, largest) for sampling, _ in rows), np.int32),
            top_p=column((sampling.top_p for sampling, _ in rows), np.float32),
            seed=column((sampling.seed for sampling, _ in rows), np.uint32),
            most=column((most for _, most in rows), np.int32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """B answers in the making, and all that their next tokens depend on.

    Attributes:
        tokens: of each answer so far; the first `counts` of a row mean something.
        counts: tokens so far.
        last: the newest token, which the cache does not hold yet.
        positions: where that token will stand.
        finished: the answer is complete, or the slot was never taken.
        finite: whether all logits so far were, since the slot was taken or cleared.
        draws: how each answer's tokens are chosen, and how many there may be.
        cache: of everything before `last`.
    """

    tokens: Int[Array, "B new"]
    counts: Int[Array, "B"]
    last: Int[Array, "B"]
    positions: Int[Array, "B"]
    finished: Bool[Array, "B"]
    finite: Bool[Array, "B"]
    draws: Draws
    cache: KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Suffixes:
    """R prompts without the prefixes whose cache is there.

    Attributes:
        ids: what follows the prefix, padded.
        lengths: of that, without padding; at least 1.
        starts: length of the prefix.
        prefixes: the row of the prefix.
        slots: the slot for the answer; B and beyond is a padding row.
        draws: of the answers.
    """

    ids: Int[Array, "R T"]
    lengths: Int[Array, "R"]
    starts: Int[Array, "R"]
    prefixes: Int[Array, "R"]
    slots: Int[Array, "R"]
    draws: Draws

    @classmethod
    def empty(cls, rows: int, length: int, *, slots: int) -> "Suffixes":
        """Padding rows in host memory, to be filled in."""

        def full(value: int, *shape: int) -> Any:
            return np.full((rows, *shape), value, np.int32)

        return cls(
            ids=full(0, length),
            lengths=full(1),
            starts=full(0),
            prefixes=full(0),
            slots=full(slots),
            draws=Draws.of([(GREEDY, 1)] * rows),
        )
