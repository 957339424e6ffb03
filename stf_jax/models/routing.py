"""Layers that only some of an image's tokens go through, and the rest skip: mixture of depths.

Raposo et al. 2024, arXiv 2404.02258; here as VideoLLM-MoD and p-MoD have it: text goes through
every layer, and a router chooses among vision tokens. Two forms give the same numbers:

- masked, for packed rows and training: a layer computes every position, and hides the keys of those
  that skip it;
- gathered, where all rows have as many images: a layer computes what goes through, and no more.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from stf_jax.config.text import TextConfig
from stf_jax.models.attention import attention
from stf_jax.models.cache import CacheDType, KVCache, SlotGroup
from stf_jax.models.layers import Init, Remat, apply_layers, unstack
from stf_jax.models.llama import DecoderLayer, Llama, take
from stf_jax.models.loop import Angles, Inputs, KeyValue
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.marks import IMAGE, Marks
from stf_jax.models.selection import gather_order, hide, rank, take_rows
from stf_jax.models.weights import Entry, Transform, make_entry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depths:
    """Which layers choose, and how many of so many vision tokens each lets through.

    Attributes:
        ratios: (layer, ratio) of each routed layer, ascending; all other layers are dense.
        keep: (tokens, ratio) -> how many go through.
        per_image: whether the tokens of each image are chosen among by themselves; else those of a
            sequence, all images together.
    """

    ratios: tuple[tuple[int, float], ...]
    keep: Callable[[Int[np.ndarray, "N"], float], Int[np.ndarray, "N"]]
    per_image: bool

    @property
    def layers(self) -> tuple[int, ...]:
        """The routed ones."""
        return tuple(layer for layer, _ in self.ratios)

    @property
    def distinct(self) -> tuple[float, ...]:
        """Every ratio once, in the order of the layers."""
        return tuple(dict.fromkeys(ratio for _, ratio in self.ratios))

    def groups(self, layers: int) -> tuple[int, ...]:
        """The cache's group of each layer: 0 is dense, the others have a ratio each."""
        ratios, distinct = dict(self.ratios), self.distinct
        return tuple(
            1 + distinct.index(ratios[layer]) if layer in ratios else 0 for layer in range(layers)
        )

    def dropped(self, ratio: float, *, images: int, tokens_per_image: int) -> int:
        """Tokens of a sequence that skip a layer of this ratio."""
        each, times = images * tokens_per_image, 1
        if self.per_image:
            each, times = tokens_per_image, images
        return times * (each - int(self.keep(np.array([each]), ratio)[0]))

    def held(self, length: int, *, images: int, tokens_per_image: int) -> tuple[int, ...]:
        """Positions of a sequence in each group of layers."""
        return length, *(
            length - self.dropped(ratio, images=images, tokens_per_image=tokens_per_image)
            for ratio in self.distinct
        )

    def lengths(
        self, layers: int, *, length: int, images: int, tokens_per_image: int
    ) -> tuple[int, ...]:
        """Positions of a sequence in each layer."""
        held = self.held(length, images=images, tokens_per_image=tokens_per_image)
        return tuple(held[group] for group in self.groups(layers))


class Router(nnx.Module):
    """x . kernel + bias, a linear map to one number for each routed layer."""

    def __init__(self, layers: int, width: int, *, bias: bool, zeros: bool, init: Init):
        spec = init.rules.vector
        make = init.zeros if zeros else init.normal
        self.kernel = make(layers, width, spec=spec)
        self.bias = init.zeros(layers, spec=spec) if bias else None

    def __call__(self, x: Float[Array, "B T H"], row: int | Int[Array, ""]) -> Float[Array, "B T"]:
        """In float32 throughout, since what it says is compared; `row` counts routed layers."""

        def of(parameter: nnx.Param[Array]) -> Array:
            wide = parameter[...].astype(jnp.float32)
            return jax.lax.dynamic_index_in_dim(wide, row, keepdims=False)

        logits = (x.astype(jnp.float32) * of(self.kernel)).sum(axis=-1)
        return logits if self.bias is None else logits + of(self.bias)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """What a routed layer does with each position.

    Attributes:
        vision: whether it is a vision token; all others go through, unweighted.
        weight: of a vision token, by its score; 1 elsewhere.
        kept: whether it goes through.
    """

    vision: Bool[Array, "B T 1"]
    weight: Float[Array, "B T 1"]
    kept: Bool[Array, "B T 1"]

    def take(self, index: Int[Array, "B S"]) -> "Routing":
        """That of the positions at `index`."""
        taken: Routing = jax.tree.map(lambda array: take_rows(array, index), self)
        return taken


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """Which positions compete with which, the same in every layer.

    Attributes:
        vision: whether it is a vision token.
        groups: those of a group compete.
        sizes: positions in the group of each.
    """

    vision: Bool[Array, "B T"]
    groups: Int[Array, "B T"]
    sizes: Int[Array, "B T"]

    @classmethod
    def of(cls, marks: Marks, *, per_image: bool) -> "Candidates":
        """The vision tokens of each image, or of each segment."""
        vision = (marks.kind == IMAGE) & (marks.segment > 0)
        groups = jnp.where(vision, marks.image if per_image else marks.segment, -1)
        same = groups[:, :, None] == groups[:, None, :]
        return cls(vision=vision, groups=groups, sizes=same.sum(axis=2, dtype=jnp.int32))


# Hidden states, keys and values of each layer, groups of layers, and the group of each.
_Prefilled: TypeAlias = tuple[
    Array, Sequence[Array], Sequence[Array], Sequence[SlotGroup], Sequence[int]
]


class RoutedLlama(Llama):
    """LLaMA with routed layers; what a layer does with a weight, a subclass says.

    The layers of one group of the cache let through as many tokens, but not the same ones: the
    marks of its slots are those of its first layer. All that they say of an image's slots is that
    what comes later sees them.
    """

    def __init__(
        self,
        config: TextConfig,
        depths: Depths,
        *,
        tokens_per_image: int,
        bias: bool,
        zeros: bool,
        init: Init,
        lora: LoRAConfig | None,
    ):
        super().__init__(config, init=init, lora=lora)
        self.depths, self.tokens_per_image = depths, tokens_per_image
        self.router = Router(len(depths.layers), config.width, bias=bias, zeros=zeros, init=init)

    # --- What a system writes.

    def weigh(self, logits: Float[Array, "B T"]) -> Float[Array, "B T"]:
        """The weights of vision tokens, by which they are chosen too."""
        raise NotImplementedError

    def passed(
        self,
        layer: DecoderLayer,
        x: Float[Array, "B T H"],
        attended: Float[Array, "B T N D"],
        routing: Routing,
    ) -> Float[Array, "B T H"]:
        """The output at positions that go through a routed layer."""
        raise NotImplementedError

    def skipped(self, x: Float[Array, "B T H"], routing: Routing) -> Float[Array, "B T H"]:
        """The output at positions that skip it."""
        raise NotImplementedError

    # --- How the layers are run.

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """Layers that let through as many tokens share a group."""
        return self.depths.groups(self.config.layers)

    def candidates(self, marks: Marks) -> Candidates:
        """What competes with what in every routed layer."""
        return Candidates.of(marks, per_image=self.depths.per_image)

    def route(
        self, x: Float[Array, "B T H"], candidates: Candidates, index: int | Int[Array, ""]
    ) -> Routing:
        """Which positions go through layer `index`; all do through a dense one."""
        sizes = np.arange(x.shape[1] + 1)
        table = np.stack(
            [self.depths.keep(sizes, ratio).astype(np.int32) for _, ratio in self.depths.ratios]
        )
        rows = np.full(self.config.layers, -1, np.int32)
        rows[list(self.depths.layers)] = np.arange(len(table))
        row = jnp.asarray(rows)[index]
        routed, row = candidates.vision & (row >= 0), jnp.maximum(row, 0)
        weight = self.weigh(self.router(x, row))
        keep = jax.lax.dynamic_index_in_dim(jnp.asarray(table), row, keepdims=False)
        keep = keep.at[candidates.sizes].get(mode="clip", out_sharding=self.rules.tokens)
        kept = ~routed | (rank(weight, candidates.groups) < keep)
        weight = jnp.where(routed, weight, 1).astype(x.dtype)
        return Routing(vision=routed[..., None], weight=weight[..., None], kept=kept[..., None])

    def apply(
        self,
        layer: DecoderLayer,
        x: Float[Array, "B T H"],
        marks: Marks,
        angles: Angles,
        routing: Routing,
    ) -> tuple[Float[Array, "B T H"], KeyValue]:
        """The masked form of a layer: its output, and its keys and values."""
        query, key, value = layer.project(x, angles)
        seen = hide(marks, routing.kept[..., 0])
        attended = attention(query, key, value, marks=seen, rule=self.rule)
        through = self.passed(layer, x, attended, routing)
        return jnp.where(routing.kept, through, self.skipped(x, routing)), (key, value)

    def __call__(
        self, x: Float[Array, "B T H"], *, marks: Marks, remat: Remat = "none"
    ) -> Float[Array, "B T H"]:
        """Normed hidden states of whole sequences, in the masked form."""
        with jax.named_scope("decoder"):
            x, _ = self._mask(x, marks, remat=remat, keep=False)
            return self.norm(x)

    def prefill(
        self,
        x: Float[Array, "B T H"],
        *,
        marks: Marks,
        last: Int[Array, "B"],
        images: int | None = None,
        cache_dtype: CacheDType | None = None,
    ) -> tuple[Float[Array, "B H"], KVCache]:
        """Normed hidden states of one position a row, and the cache of what went through.

        Without `images` every layer has T slots, those of tokens that skipped it hidden.
        """
        with jax.named_scope("decoder"):
            run = self._prefill_masked if images is None else self._prefill_gathered
            x, keys, values, groups, layer_groups = run(x, marks, images or 0)
            cache = KVCache.of(keys, values, groups, layer_groups=layer_groups, dtype=cache_dtype)
            return self.norm(take(x, last)), cache

    def _mask(
        self, x: Float[Array, "B T H"], marks: Marks, *, remat: Remat, keep: bool
    ) -> tuple[Float[Array, "B T H"], list[Any]]:
        """Hidden states, and of each layer keys, values and what went through."""
        angles, candidates = self.inputs(marks).angles, self.candidates(marks)
        # In a scan the number of a layer is traced, in a loop over a list it is known.
        start = 0 if isinstance(self.layers, nnx.List) else jnp.int32(0)

        def step(carry: Any, layer: DecoderLayer) -> tuple[Any, Any]:
            x, index = carry
            routing = self.route(x, candidates, index)
            x, pair = self.apply(layer, x, marks, angles, routing)
            return (x, index + 1), (*pair, routing.kept[..., 0]) if keep else None

        (x, _), saved = apply_layers(step, (x, start), self.layers, remat=remat)
        return x, saved

    def _prefill_masked(self, x: Float[Array, "B T H"], marks: Marks, images: int) -> _Prefilled:
        del images
        x, saved = self._mask(x, marks, remat="none", keep=True)
        keys, values, kept = zip(*saved, strict=True)
        groups, layer_groups = [SlotGroup.whole(marks)], [0] * len(keys)
        for layer in self.depths.layers:
            # No two layers hide the same slots.
            layer_groups[layer] = len(groups)
            groups.append(SlotGroup.whole(hide(marks, kept[layer])))
        return x, keys, values, groups, layer_groups

    def _prefill_gathered(self, x: Float[Array, "B T H"], marks: Marks, images: int) -> _Prefilled:
        inputs, candidates = self.inputs(marks), self.candidates(marks)
        sizes = self.depths.held(x.shape[1], images=images, tokens_per_image=self.tokens_per_image)
        # Groups are numbered in the order of their first layers.
        groups, pairs = {0: SlotGroup.whole(marks)}, []
        for index, layer in enumerate(unstack(self.layers)):
            group = self.layer_groups[index]
            if group == 0:
                query, key, value = layer.project(x, inputs.angles)
                attended = attention(query, key, value, marks=marks, rule=self.rule)
                x = layer.finish(x, attended)
            else:
                routing = self.route(x, candidates, index)
                x, (key, value), held = self._gather(layer, x, inputs, routing, sizes[group])
                groups.setdefault(group, held)
            pairs.append((key, value))
        keys, values = zip(*pairs, strict=True)
        return x, keys, values, list(groups.values()), self.layer_groups

    def _gather(
        self,
        layer: DecoderLayer,
        x: Float[Array, "B T H"],
        inputs: Inputs,
        routing: Routing,
        size: int,
    ) -> tuple[Float[Array, "B T H"], KeyValue, SlotGroup]:
        """The gathered form of a routed layer: `size` positions of a row go through."""
        kept = routing.kept[..., 0]
        order = gather_order(kept, size)
        marks, short = inputs.marks.take(order), take_rows(x, order)
        cos, sin = (take_rows(angle, order) for angle in inputs.angles)
        query, key, value = layer.project(short, (cos, sin))
        attended = attention(query, key, value, marks=marks, rule=self.rule)
        through = self.passed(layer, short, attended, routing.take(order))
        # Back to the places that they came from.
        place = jnp.clip(jnp.cumsum(kept, axis=1, dtype=jnp.int32) - 1, 0, size - 1)
        x = jnp.where(routing.kept, take_rows(through, place), self.skipped(x, routing))
        dropped = (~kept).sum(axis=1, dtype=jnp.int32)
        return x, (key, value), SlotGroup(marks=marks, dropped=dropped)


# Of a linear layer with one output: its weight [1, C] <-> [C], and its bias [1] <-> [].
_ROW = Transform(lambda tensor: tensor.reshape(-1), lambda array: array.reshape(1, -1))
_SCALAR = Transform(lambda tensor: tensor.reshape(()), lambda array: array.reshape(1))


def router_entries(
    name: str,
    text: TextConfig,
    layers: tuple[int, ...],
    *,
    bias: bool = False,
    start: Literal["torch", "zeros"] = "torch",
) -> tuple[Entry, ...]:
    """`torch.nn.Linear(H, 1)` for each routed layer.

    Args:
        name: in PyTorch, with {} for the layer.
        text: the language model.
        layers: the routed ones.
        bias: whether there is one.
        start: how new ones begin.
    """
    width = text.width
    kernel = make_entry(
        "text/router/kernel",
        f"{name}.weight",
        (1, width),
        (width,),
        _ROW,
        layers=layers,
        start=start,
    )
    if not bias:
        return (kernel,)
    shift = make_entry(
        "text/router/bias", f"{name}.bias", (1,), (), _SCALAR, layers=layers, start=start
    )
    return kernel, shift
