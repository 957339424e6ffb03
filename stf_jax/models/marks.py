"""What each position of a sequence, or slot of a cache, is; and rules of who sees whom.

A rule says of two positions' marks whether the first sees the second.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# What a position holds. An answer is the text that a loss supervises.
TEXT, IMAGE, ANSWER = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Marks:
    """What a rule may ask of a position of a sequence, or of a slot of a cache.

    Attributes:
        position: rotary position, from 0 in each segment.
        segment: which sequence of a packed row it belongs to, from 1; 0 is padding or an empty
            slot, which nothing sees.
        kind: `TEXT`, `IMAGE` or `ANSWER`, or a kind of one system.
        image: which image of the row it is part of, from 0; -1 is none.
    """

    position: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    kind: Int[Array, "B T"]
    image: Int[Array, "B T"]

    @classmethod
    def text(cls, position: Int[Array, "B T"], segment: Int[Array, "B T"]) -> "Marks":
        """Of positions that all hold text."""
        return cls(
            position=position,
            segment=segment,
            kind=jnp.full_like(position, TEXT),
            image=jnp.full_like(position, -1),
        )

    def take(self, index: Int[Array, "B S"]) -> "Marks":
        """Those of the positions that stand at `index`."""
        return Marks(
            **{
                field.name: jnp.take_along_axis(getattr(self, field.name), index, axis=1)
                for field in dataclasses.fields(self)
            }
        )

    def join(self, other: "Marks") -> "Marks":
        """These positions, then the others."""
        joined: Marks = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), self, other)
        return joined


# (marks of the queries [B, T, 1], marks of the keys [B, 1, S]) -> True where a query sees a key.
Rule: TypeAlias = Callable[[Marks, Marks], Bool[Array, "B T S"]]


def causal(query: Marks, key: Marks) -> Bool[Array, "B T S"]:
    """A query sees its own segment, up to its own position."""
    same = (query.segment == key.segment) & (key.segment != 0)
    return same & (query.position >= key.position)


def visible(rule: Rule, query: Marks, key: Marks) -> Bool[Array, "B T S"]:
    """The rule as an array."""
    queries: Marks = jax.tree.map(lambda mark: mark[:, :, None], query)
    keys: Marks = jax.tree.map(lambda mark: mark[:, None, :], key)
    return rule(queries, keys)
