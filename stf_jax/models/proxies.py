"""Proxies: few tokens that go through a decoder's layers in place of an image's many.

ProxyV (arXiv 2505.15816), section 3: how proxies are made, where they stand, who sees whom, and how
the many learn from them. The N tokens of an image that they stand for are called full tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from stf_jax.models.attention import attention
from stf_jax.models.layers import Init, Linear, Remat, RMSNorm, apply_layers
from stf_jax.models.llama import DecoderLayer
from stf_jax.models.loop import Inputs, KeyValue
from stf_jax.models.marks import IMAGE, Marks, causal
from stf_jax.models.selection import gather_order, take_rows
from stf_jax.models.weights import LINEAR, SAME, Entry, Transform, make_entry, transpose

# Kinds beside those of `stf_jax.models.marks`: a proxy, and the token that ends an image.
PROXY, NEWLINE = 3, 4

# How much of each proxy a full token gets: the same for all M images, or of each.
Splat: TypeAlias = Float[Array, "N P"] | Float[Array, "M N P"]


def by_position(query: Marks, key: Marks) -> Bool[Array, "B T S"]:
    """As `causal`, where positions need not ascend; kernels that go by index do not know it."""
    return causal(query, key)


def through_proxies(query: Marks, key: Marks) -> Bool[Array, "B T S"]:
    """By position; but proxies see no full token, and nothing else sees a proxy."""
    is_proxy = query.kind == PROXY
    blind = (is_proxy & (key.kind == IMAGE)) | (~is_proxy & (key.kind == PROXY))
    return causal(query, key) & ~blind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Crops:
    """Where the I images of a row stand: N full tokens and a newline each, and P proxies.

    Images with nothing between them are the crops of one. The positions of its proxies begin where
    it begins, and run on over its crops.

    Attributes:
        marks: of the row's positions; newlines have a kind of their own.
        proxies: marks of the proxies, image by image.
        index: where the full tokens stand; means nothing for an image that the row lacks.
        slots: which full token a position holds; -1 is none.
        tokens: N.
    """

    marks: Marks
    proxies: Marks
    index: Int[Array, "B I*N"]
    slots: Int[Array, "B T"]
    tokens: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def find(cls, marks: Marks, *, images: int, tokens: int, proxies: int, slip: bool) -> "Crops":
        """The images of a row, by where there are image tokens.

        Args:
            marks: of the row's positions.
            images: I, at least as many as any row has.
            tokens: N.
            proxies: P.
            slip: whether the newline of every crop but the first stands one crop too early.
        """
        length, size = marks.position.shape[1], tokens + 1
        place = jnp.arange(length, dtype=jnp.int32)
        shown = marks.image >= 0
        # The same conversation's image token stands before it.
        same = marks.segment[:, 1:] == marks.segment[:, :-1]
        goes_on = jnp.pad(shown[:, :-1] & same, ((0, 0), (1, 0)))
        first = jax.lax.cummax(jnp.where(shown & ~goes_on, place, -1), axis=1)
        crop, within = (place - first) // size, (place - first) % size
        begins, newline = shown & (within == 0), shown & (within == tokens)
        number = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
        position = jnp.where(newline & (crop > 0) & slip, marks.position - size, marks.position)
        # Of each image, at its first token.
        starts = gather_order(begins, images)
        there = jnp.arange(images) < begins.sum(axis=1, keepdims=True)

        def at_start(array: Int[Array, "B T"]) -> Int[Array, "B I"]:
            return take_rows(array, starts)

        def spread(array: Int[Array, "B I"], count: int, *, step: int) -> Int[Array, "B I*count"]:
            each = jnp.tile(jnp.arange(count, dtype=jnp.int32), images)
            return jnp.repeat(array, count, axis=1) + step * each

        start = at_start(marks.position) + at_start(crop) * (proxies - size)
        return cls(
            marks=Marks(
                position=position,
                segment=marks.segment,
                kind=jnp.where(newline, jnp.int32(NEWLINE), marks.kind),
                image=marks.image,
            ),
            proxies=Marks(
                position=spread(start, proxies, step=1),
                segment=spread(jnp.where(there, at_start(marks.segment), 0), proxies, step=0),
                kind=spread(jnp.full_like(starts, PROXY), proxies, step=0),
                image=spread(at_start(marks.image), proxies, step=0),
            ),
            index=jnp.minimum(spread(starts, tokens, step=1), length - 1),
            slots=jnp.where(shown & (within < tokens), number * tokens + within, -1),
            tokens=tokens,
        )

    @property
    def others(self) -> Int[Array, "B T"]:
        """Which of the row's positions without a full token each one is, from 0."""
        return jnp.cumsum(self.slots < 0, axis=1, dtype=jnp.int32) - 1

    def take(self, x: Float[Array, "B T H"]) -> Float[Array, "B I*N H"]:
        """The full tokens of a row."""
        return take_rows(x, self.index)

    def put(self, x: Float[Array, "B T H"], full: Float[Array, "B I*N H"]) -> Float[Array, "B T H"]:
        """The row with these full tokens."""
        taken = take_rows(full, jnp.maximum(self.slots, 0))
        return jnp.where(self.slots[..., None] >= 0, taken, x)


def shrink_matrix(side: int, factor: int) -> Float[np.ndarray, "P N"]:
    """Bilinear resize of a square grid, `factor` times smaller a side, as rows of weights.

    Centers of pixels lie at halves, and there is no filter against aliasing: a proxy is made of the
    two rows and the two columns that are nearest.
    """
    small = side // factor
    center = (np.arange(small) + 0.5) * factor - 0.5
    low = np.floor(center).astype(int)
    weights = np.zeros((small, side), np.float32)
    weights[np.arange(small), low] = 1 - (center - low)
    weights[np.arange(small), np.minimum(low + 1, side - 1)] += center - low
    return np.kron(weights, weights)


def grow_matrix(side: int, factor: int) -> Float[np.ndarray, "N P"]:
    """The way back: each cell of the small grid, repeated `factor` times a side."""
    repeat = np.kron(np.eye(side // factor, dtype=np.float32), np.ones((factor, 1), np.float32))
    return np.kron(repeat, repeat)


class LearnedProxies(nnx.Module):
    """Proxies that learned queries ask of an image: ProxyV's variant without a grid.

    Args:
        count: P.
        width: H, of the tokens.
        hidden: of queries and keys.
        init: of the weights.
    """

    def __init__(self, count: int, width: int, hidden: int, *, init: Init):
        self.rules = rules = init.rules
        self.queries = init.normal(count, hidden, spec=rules.vector)
        self.key = Linear((width,), (hidden,), init=init, kernel=rules.vector, use_bias=False)

    def __call__(
        self, full: Float[Array, "M N H"]
    ) -> tuple[Float[Array, "M P H"], Float[Array, "M N P"]]:
        """The proxies of each image, and how much of each its tokens will get."""
        queries = self.queries[...]
        keys = self.key(full, out=self.rules.tokens)
        scores = jnp.einsum(
            "ph,mnh->mpn", queries, keys, preferred_element_type=jnp.float32
        ) / math.sqrt(queries.shape[1])
        weights, splat = jax.nn.softmax(scores, axis=2), jax.nn.softmax(scores, axis=1)
        proxies = jnp.einsum("mpn,mnh->mph", weights.astype(full.dtype), full)
        return proxies, splat.swapaxes(1, 2).astype(full.dtype)


class VisionMLP(nnx.Module):
    """How full tokens learn what a layer did to their proxies; the norm comes after the sum.

    Args:
        width: H.
        hidden: between the linear layers.
        epsilon: of the norm.
        init: of the weights.
    """

    def __init__(self, width: int, hidden: int, *, epsilon: float, init: Init):
        self.rules = rules = init.rules
        linear = partial(Linear, init=init, use_bias=False)
        self.context = linear((width,), (hidden,), kernel=rules.column)
        self.input = linear((width,), (hidden,), kernel=rules.column)
        # Two channels side by side, one of the token and one of its proxy.
        self.join = linear((hidden, 2), (hidden,), kernel=rules.row_heads)
        self.output = linear((hidden,), (width,), kernel=rules.row)
        self.norm = RMSNorm(width, epsilon=epsilon, init=init)

    def __call__(
        self, full: Float[Array, "M N H"], proxies: Float[Array, "M P H"], splat: Splat
    ) -> Float[Array, "M N H"]:
        """The full tokens for the next layer."""
        hidden = self.rules.hidden
        context = self.context(proxies, out=hidden)
        # Spread after the projection, where there are fewer channels; both are linear.
        product = "np,mph->mnh" if splat.ndim == 2 else "mnp,mph->mnh"
        context = jnp.einsum(product, splat, context)
        both = jnp.stack([self.input(full, out=hidden), context], axis=-1)
        active = jax.nn.silu(self.join(both, out=hidden))
        return self.norm(full + self.output(active, out=self.rules.tokens))


class ProxiedLayer(nnx.Module):
    """A decoder layer, and the VisionMLP behind it; the last layer has none."""

    def __init__(self, layer: Any, vision_mlp: Any):
        self.layer: DecoderLayer = layer
        self.vision_mlp: VisionMLP | None = vision_mlp


def run_proxied(
    x: Float[Array, "B T H"],
    stages: Sequence[Any],
    *,
    crops: Crops,
    rest: Int[Array, "B R"] | None,
    make_proxies: Callable[[Float[Array, "M N H"]], tuple[Float[Array, "M P H"], Splat]],
    make_inputs: Callable[[Marks], Inputs],
    out: PartitionSpec | None,
    keep: bool,
    remat: Remat,
) -> tuple[Float[Array, "B _ H"], list[KeyValue | None]]:
    """Layers in which proxies stand for full tokens: hidden states, and each one's keys and values.

    Args:
        x: of the row, before these layers.
        stages: `ProxiedLayer`s, in stacks or lists.
        crops: of the row.
        rest: the positions that hold no full token, where these alone are computed; None computes
            all, and then puts full tokens in their places.
        make_proxies: of each image's full tokens; and how they are spread again.
        make_inputs: what a layer is told of positions with such marks.
        out: the partition spec of tokens.
        keep: whether keys and values are returned, of every position and in the row's order.
        remat: what the backward pass computes again.
    """
    rows, marks, count = len(x), crops.marks, crops.proxies.position.shape[1]

    def by_image(x: Float[Array, "B _ H"], size: int) -> Float[Array, "M _ H"]:
        shape = (rows * x.shape[1] // size, size, x.shape[2])
        return jax.lax.reshape(x, shape, out_sharding=out)

    def by_row(x: Float[Array, "M _ H"]) -> Float[Array, "B _ H"]:
        shape = (rows, len(x) // rows * x.shape[1], x.shape[2])
        return jax.lax.reshape(x, shape, out_sharding=out)

    full = by_image(crops.take(x), crops.tokens)
    made, splat = make_proxies(full)
    size = made.shape[1]
    seen, order = None, None
    if rest is not None:
        x, marks = take_rows(x, rest), marks.take(rest)
        seen = make_inputs(crops.marks.take(crops.index))
        # Keys are those of full tokens, of proxies, and of the rest.
        behind = jnp.minimum(crops.others, rest.shape[1] - 1) + crops.index.shape[1] + count
        order = jnp.where(crops.slots < 0, behind, crops.slots)
    own = make_inputs(crops.proxies.join(marks))

    def in_order(array: Float[Array, "B S G D"]) -> Float[Array, "B T G D"]:
        if order is None:
            return array[:, count:]
        return take_rows(array, order)

    def step(carry: tuple[Array, Array], pair: ProxiedLayer) -> tuple[Any, KeyValue | None]:
        (x, full), layer, key_marks = carry, pair.layer, None
        query, key, value = layer.project(x, own.angles)
        if seen is not None:
            before = layer.project_keys(by_row(full), seen.angles)
            key, value = (
                jnp.concatenate(parts, axis=1) for parts in zip(before, (key, value), strict=True)
            )
            key_marks = seen.marks.join(own.marks)
        attended = attention(
            query, key, value, marks=own.marks, key_marks=key_marks, rule=through_proxies
        )
        x = layer.finish(x, attended)
        if pair.vision_mlp is not None:
            proxies, others = x[:, :count], x[:, count:]
            full = pair.vision_mlp(full, by_image(proxies, size), splat)
            if seen is None:
                others = crops.put(others, by_row(full))
            x = jnp.concatenate([proxies, others], axis=1)
        return (x, full), (in_order(key), in_order(value)) if keep else None

    carry = jnp.concatenate([by_row(made), x], axis=1), full
    kept: list[KeyValue | None] = []
    for layers in stages:
        carry, more = apply_layers(step, carry, layers, remat=remat)
        kept += more
    return carry[0][:, count:], kept


def _join() -> Transform:
    """A linear layer over two vectors one after the other: [F, 2*C] <-> [C, 2, F]."""

    def native(tensor: np.ndarray) -> np.ndarray:
        halves = transpose(tensor).reshape(2, -1, len(tensor))
        return np.ascontiguousarray(halves.swapaxes(0, 1))

    def torch(array: np.ndarray) -> np.ndarray:
        return transpose(array.swapaxes(0, 1).reshape(-1, array.shape[-1]))

    return Transform(native, torch)


_JOIN = _join()


def vision_mlp_entries(name: str, *, width: int, hidden: int, layers: int) -> tuple[Entry, ...]:
    """The VisionMLPs of some layers.

    Args:
        name: what their tensors begin with in PyTorch, with {} for the layer.
        width: H.
        hidden: between their linear layers.
        layers: how many.
    """
    return tuple(
        make_entry(
            f"text/vision_mlp/{native}",
            f"{name}{torch}.weight",
            shape,
            to,
            transform,
            layers=layers,
        )
        for native, torch, shape, to, transform in (
            ("context/kernel", "context_proj", (hidden, width), (width, hidden), LINEAR),
            ("input/kernel", "input_proj", (hidden, width), (width, hidden), LINEAR),
            ("join/kernel", "proj.0", (hidden, 2 * hidden), (hidden, 2, hidden), _JOIN),
            ("output/kernel", "proj.2", (width, hidden), (hidden, width), LINEAR),
            ("norm/scale", "layernorm_post", (width,), (width,), SAME),
        )
    )


def learned_entries(name: str, *, count: int, width: int, hidden: int) -> tuple[Entry, ...]:
    """Learned queries.

    Args:
        name: what their tensors begin with in PyTorch.
        count: P.
        width: H.
        hidden: of queries and keys.
    """
    queries, key = (count, hidden), (hidden, width)
    return (
        make_entry("text/proxies/queries", f"{name}proxyv_tokens", queries, queries, SAME),
        make_entry("text/proxies/key/kernel", f"{name}Wk.weight", key, key[::-1], LINEAR),
    )
