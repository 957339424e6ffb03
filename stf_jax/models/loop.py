"""The one loop over the decoder's layers: whole sequences, or further tokens against a cache."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from flax import nnx
from jaxtyping import Array, Float, Int

from stf_jax.models.attention import attention
from stf_jax.models.cache import KVCache, cache_attention
from stf_jax.models.layers import Remat, apply_layers
from stf_jax.models.marks import Marks, Rule

# Cosine and sine of each position's rotation.
Angles: TypeAlias = tuple[Float[Array, "B T 1 D"], Float[Array, "B T 1 D"]]
# Rotated key, and value.
KeyValue: TypeAlias = tuple[Float[Array, "B T G D"], Float[Array, "B T G D"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a layer is told of the positions that it computes.

    Attributes:
        marks: of the positions.
        angles: by which they turn.
        slots: where the layer's cache takes them in, if there is one.
    """

    marks: Marks
    angles: Angles
    slots: Int[Array, "B T"] | None = None


@runtime_checkable
class Block(Protocol):
    """A layer, in the two halves between which attention lies."""

    def project(
        self, x: Float[Array, "B T H"], angles: Angles
    ) -> tuple[Float[Array, "B T N D"], Float[Array, "B T G D"], Float[Array, "B T G D"]]:
        """Rotated query, rotated key, value."""

    def finish(
        self, x: Float[Array, "B T H"], attended: Float[Array, "B T N D"]
    ) -> Float[Array, "B T H"]:
        """Adds what attention found, then the MLP of it."""


def run_layers(
    x: Float[Array, "B T H"],
    layers: Any,
    *,
    inputs: Sequence[Inputs],
    rule: Rule,
    cache: KVCache | None = None,
    keep: bool = False,
    remat: Remat = "none",
) -> tuple[Float[Array, "B T H"], KVCache | None, list[KeyValue | None]]:
    """Hidden states after the last layer, the cache, and each layer's keys and values.

    Args:
        x: embeddings.
        layers: `Block`s, stacked or a list; with a cache, a list.
        inputs: the one for all layers; with a cache, of each of its groups of layers.
        rule: which positions, or slots, a position sees.
        cache: of everything before `x`, whose marks hold those of `x` already; None where `x` is
            whole sequences.
        keep: whether each layer's keys and values are returned.
        remat: what the backward pass computes again.
    """

    def step(carry: Any, layer: Block) -> tuple[Any, KeyValue | None]:
        x, cache, index = carry
        at = inputs[0 if cache is None else cache.layer_groups[index]]
        query, key, value = layer.project(x, at.angles)
        if cache is None:
            attended = attention(query, key, value, marks=at.marks, rule=rule)
        else:
            assert at.slots is not None
            cache = cache.write(index, key, value, slots=at.slots)
            stored = cache.keys[index], cache.values[index]
            held = cache.groups[cache.layer_groups[index]].marks
            attended = cache_attention(query, *stored, marks=at.marks, slots=held, rule=rule)
            index += 1
        return (layer.finish(x, attended), cache, index), (key, value) if keep else None

    if cache is not None:
        # Each layer's keys and values are arrays of their own, so its number is no tracer.
        assert isinstance(layers, nnx.List)
    start = None if cache is None else 0
    (x, cache, _), kept = apply_layers(step, (x, cache, start), layers, remat=remat)
    return x, cache, kept
