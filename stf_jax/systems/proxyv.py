"""ProxyV: "Streamline Without Sacrifice" (arXiv 2505.15816).

Every vision token stays, but from layer `start` on only a few proxies go through the layers:

1. At `start` each image's tokens are resized to a grid of proxies, or learned queries ask for them.
2. In a layer, proxies and text have queries; vision tokens ("full" ones) have keys and values only.
   Text sees full tokens and never proxies; proxies see text and never full tokens.
3. A small VisionMLP a layer then tells each full token what the layer did to its proxy. After the
   last layer nothing reads that, so the last one is not computed.

A learned token, `newline`, ends each image. The cache holds full tokens, newlines and text in every
layer, so it is as long as LLaVA's, and what comes later, further turns of a chat too, sees every
vision token as the layers left it. What is saved is arithmetic of the prefill.

Images with nothing between them are the crops of one image: the positions of its proxies run on.
That proxies of an image after text begin anew is our choice: the released code has one image a
sample. It also puts newlines of further crops one crop too early, which is `slip`. Learned queries
begin with the deviation 0.02 of all learned tokens here; released: 1 / sqrt(4 `mlp_width`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from stf_jax.config.checks import check_positive
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.cache import CacheDType, KVCache
from stf_jax.models.connector import Connector, Tokens, VisionFeatures
from stf_jax.models.flops import decoder_layer
from stf_jax.models.layers import Init, Remat, split_layers, stack, unstack
from stf_jax.models.llama import Llama, take
from stf_jax.models.loop import KeyValue, run_layers
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.marks import Marks, causal
from stf_jax.models.proxies import (
    Crops,
    LearnedProxies,
    ProxiedLayer,
    Splat,
    VisionMLP,
    by_position,
    grow_matrix,
    learned_entries,
    run_proxied,
    shrink_matrix,
    vision_mlp_entries,
)
from stf_jax.models.selection import gather_order
from stf_jax.models.weights import SAME, Entry, make_entry
from stf_jax.systems.base import System
from stf_jax.systems.shapes import Shapes, matrix

_NEWLINE = "image_newline"
_MLP, _LEARNED = "model.vision_mlp_layers.{}.", "model.proxyv_initializer."
# Keys of config.json, as the released code writes them.
_FIELDS = {
    "start": "proxyv_start_layer",
    "reduce": "proxyv_reduce_factor",
    "learned": "learn_proxy",
}
_ON, _TOKENS, _COUNT = "proxyv", "per_crop_token_len", "num_of_vision_mlp_layers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyV(System):
    """Defaults: ProxyV-L12 of Vicuna-7B.

    Attributes:
        start: the first layer that proxies go through; as many as there are layers is none.
        reduce: how many times fewer proxies than patches there are along a side.
        learned: whether learned queries make the proxies.
        mlp_width: between the linear layers of a VisionMLP; also of learned queries.
        slip: whether newlines of all crops but the first have the position of the crop before, as
            in the released code and so in published weights.
    """

    start: int = 12
    reduce: int = 4
    learned: bool = False
    mlp_width: int = 1024
    slip: bool = False

    name: ClassVar[str] = "proxyv"
    title: ClassVar[str] = "ProxyV"
    family: ClassVar[str] = "llava_proxyv"
    published_keys: ClassVar = (_ON, *_FIELDS.values(), _TOKENS, _COUNT)
    prefixes: ClassVar = {"mm_projector.": "llava", _NEWLINE: "llava"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "reduce", "mlp_width")
        if self.start < 0:
            raise ValueError(f"ProxyV.start is {self.start}; give the number of a layer, from 0 on")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """Two fifths of the layers without proxies, and the released width of a VisionMLP."""
        sides = [side for side in (4, 2) if vision.grid % side == 0 and vision.grid > side]
        return {
            "start": text.layers * 2 // 5,
            "reduce": sides[0] if sides else 1,
            "mlp_width": text.width // (4 if text.width >= 1024 else 2),
        }

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """The layers reach to the first with proxies, and a cell is a whole number of patches."""
        super().check(vision, text)
        if self.start > text.layers:
            raise ValueError(
                f"start is {self.start}; the language model has {text.layers} layers, and "
                f"{text.layers} is none with proxies"
            )
        if vision.grid % self.reduce:
            raise ValueError(
                f"reduce {self.reduce} does not divide the {vision.grid} patches along a side"
            )

    def tokens(self, vision: VisionConfig) -> int:
        """Every patch, and the newline."""
        return vision.patches + 1

    def proxies(self, vision: VisionConfig) -> int:
        """P, of an image."""
        return (vision.grid // self.reduce) ** 2

    def connector(self, vision: VisionConfig, text: TextConfig, *, init: Init) -> Connector:
        """LLaVA-1.5's projector, and the newline."""
        return ProxyVConnector(**self.widths(vision, text), init=init)

    def decoder(
        self, vision: VisionConfig, text: TextConfig, *, init: Init, lora: LoRAConfig | None
    ) -> Llama:
        """LLaMA with proxies from `start` on; VisionMLPs have no adapters, they train in full."""
        return ProxyVLlama(self, vision, text, init=init, lora=lora)

    @property
    def compacts(self) -> bool:
        """Full tokens have no queries, so the prefill gathers what has."""
        return True

    def flops(self, vision: VisionConfig, text: TextConfig) -> float:
        """The newline is not projected."""
        return 2.0 * vision.patches * self.projector_width * (vision.width + text.width)

    def layer_lengths(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> tuple[int, ...]:
        """Positions with a query."""
        fewer = length + images * (self.proxies(vision) - vision.patches)
        return (length,) * self.start + (fewer,) * (text.layers - self.start)

    def decoder_flops(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> float:
        """Keys and values of full tokens, and how queries see them; and what the proxies add."""
        full, layers = images * vision.patches, text.layers - self.start
        queries = self.layer_lengths(vision, text, length=length, images=images)[-1]
        keys = 4 * full * text.width * text.kv_heads * text.head_dim
        keys += 4 * queries * full * text.heads * text.head_dim
        return layers * keys + images * self._proxy_flops(vision, text)

    def training_flops(
        self, vision: VisionConfig, text: TextConfig, *, length: int, images: int
    ) -> float:
        """Rows are longer by their proxies, which see and are seen."""
        more = length + images * self.proxies(vision)
        longer = sum(decoder_layer(text, more)) - sum(decoder_layer(text, length))
        layers = text.layers - self.start
        return 3 * (layers * longer + images * self._proxy_flops(vision, text))

    def _proxy_flops(self, vision: VisionConfig, text: TextConfig) -> float:
        """Of one image: how its proxies are made, and the VisionMLPs; the last one is not run."""
        layers, full, count = text.layers - self.start, vision.patches, self.proxies(vision)
        if not layers:
            return 0.0
        width, hidden = text.width, self.mlp_width
        mlp = 2 * full * (width + hidden) * hidden + count * (width + full) * hidden
        made = count * full * width
        if self.learned:
            made += full * hidden * (width + count)
        return 2.0 * ((layers - 1) * mlp + made)

    def tensor_sizes(self) -> dict[str, int]:
        """The projector's, and the VisionMLPs'."""
        return {**super().tensor_sizes(), "mlp_width": self.mlp_width}

    def weights(self, vision: VisionConfig, text: TextConfig) -> tuple[Entry, ...]:
        """The released names."""
        shape = (text.width,)
        newline = make_entry("connector/newline", _NEWLINE, shape, shape, SAME)
        return (newline, *super().weights(vision, text))

    def decoder_weights(self, vision: VisionConfig, text: TextConfig) -> tuple[Entry, ...]:
        """The released names; the last VisionMLP has weights, though nothing reads what it says."""
        width, hidden, layers = text.width, self.mlp_width, text.layers - self.start
        if not layers:
            return ()
        entries = vision_mlp_entries(_MLP, width=width, hidden=hidden, layers=layers)
        if self.learned:
            count = self.proxies(vision)
            entries += learned_entries(_LEARNED, count=count, width=width, hidden=hidden)
        return entries

    @classmethod
    def recognizes(cls, shapes: Shapes, vision: VisionConfig) -> bool:
        """There are VisionMLPs."""
        return f"{_MLP.format(0)}input_proj.weight" in shapes

    @classmethod
    def own_fields(cls, shapes: Shapes) -> dict[str, Any]:
        """The width of the VisionMLPs, who makes proxies, and by the layers' number where to start.

        By how much proxies are fewer is no weight, but for learned ones.
        """
        if _NEWLINE not in shapes:
            raise ValueError(f"there is no {_NEWLINE}: these are no weights of ProxyV")
        name = f"{_MLP}input_proj.weight"
        if name.format(0) not in shapes:
            return {}
        width, _ = matrix(shapes, name.format(0))
        fields = {"mlp_width": width, "learned": f"{_LEARNED}Wk.weight" in shapes}
        layers = _count(shapes, "model.layers.{}.input_layernorm.weight")
        if layers:
            fields["start"] = layers - _count(shapes, name)
        return fields

    @classmethod
    def read_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any] | None:
        """The released keys; such weights were trained with the slip."""
        if not hf.get(_ON):
            return None
        given = {field: hf[key] for field, key in _FIELDS.items() if key in hf}
        return {"slip": True, **given}

    def hf_keys(self, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The released keys."""
        return {
            _ON: True,
            **{key: getattr(self, field) for field, key in _FIELDS.items()},
            _TOKENS: vision.patches,
            _COUNT: text.layers - self.start,
        }


def _count(shapes: Shapes, name: str) -> int:
    """How many layers have a tensor of this name."""
    return next(number for number in range(len(shapes) + 1) if name.format(number) not in shapes)


class ProxyVConnector(Connector):
    """Every patch, projected, then a learned token that ends the image."""

    def __init__(self, *, inputs: int, width: int, outputs: int, init: Init):
        self.newline = init.normal(outputs, spec=init.rules.vector)
        super().__init__(inputs=inputs, width=width, outputs=outputs, init=init)

    def __call__(
        self, features: VisionFeatures, question: Float[Array, "B H"] | None = None
    ) -> Tokens:
        """The patches in raster order, and the newline."""
        return Tokens(values=self.end(super().__call__(features, question).values))

    def end(self, values: Float[Array, "M N H"]) -> Float[Array, "M N+1 H"]:
        """The newline behind each image."""
        shape = (len(values), 1, values.shape[2])
        row = jnp.broadcast_to(self.newline[...], shape, out_sharding=self.rules.tokens)
        return jnp.concatenate([values, row.astype(values.dtype)], axis=1)


class ProxyVLlama(Llama):
    """LLaMA, in whose layers from `start` on proxies stand for full tokens."""

    def __init__(
        self,
        system: ProxyV,
        vision: VisionConfig,
        text: TextConfig,
        *,
        init: Init,
        lora: LoRAConfig | None,
    ):
        super().__init__(text, init=init, lora=lora)
        self.system, self.tokens, self.grid = system, vision.patches, vision.grid
        self.count, layers = system.proxies(vision), text.layers - system.start
        width, hidden = text.width, system.mlp_width
        self.vision_mlp = (
            stack(
                lambda init: VisionMLP(width, hidden, epsilon=text.norm_eps, init=init),
                layers,
                init=init,
            )
            if layers
            else None
        )
        learned = system.learned and layers
        self.proxies = LearnedProxies(self.count, width, hidden, init=init) if learned else None

    def __call__(
        self, x: Float[Array, "B T H"], *, marks: Marks, remat: Remat = "none"
    ) -> Float[Array, "B T H"]:
        """Normed hidden states of whole rows; those of full tokens mean nothing.

        Every position goes through every layer, and full tokens are then replaced.
        """
        images = x.shape[1] // (self.tokens + 1)
        if not images or self.vision_mlp is None:
            return super().__call__(x, marks=marks, remat=remat)
        with jax.named_scope("decoder"):
            crops = self.find(marks, images)
            x, _ = self._run(x, crops, None, remat=remat)
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
        """As LLaMA's; proxies are not in the cache.

        With `images`, full tokens have no queries from `start` on.
        """
        length = x.shape[1]
        count = length // (self.tokens + 1) if images is None else images
        if not count or self.vision_mlp is None:
            return super().prefill(x, marks=marks, last=last, cache_dtype=cache_dtype)
        with jax.named_scope("decoder"):
            crops, rest = self.find(marks, count), None
            if images is not None:
                rest = gather_order(crops.slots < 0, length - images * self.tokens)
                place = jnp.take_along_axis(crops.others, last[:, None], axis=1)[:, 0]
            x, kept = self._run(x, crops, rest, keep=True)
            keys, values = zip(*kept, strict=True)
            hidden = self.norm(take(x, last if rest is None else place))
            return hidden, KVCache.of(keys, values, marks, dtype=cache_dtype)

    def find(self, marks: Marks, images: int) -> Crops:
        """Where images and their proxies stand."""
        system = self.system
        return Crops.find(
            marks, images=images, tokens=self.tokens, proxies=self.count, slip=system.slip
        )

    def make_proxies(self, full: Float[Array, "M N H"]) -> tuple[Float[Array, "M P H"], Splat]:
        """The proxies of each image, and how what becomes of them goes back to full tokens."""
        if self.proxies is not None:
            return self.proxies(full)
        shrink, grow = (
            jnp.asarray(make(self.grid, self.system.reduce), full.dtype)
            for make in (shrink_matrix, grow_matrix)
        )
        return jnp.einsum("pn,mnh->mph", shrink, full), grow

    def _run(
        self,
        x: Float[Array, "B T H"],
        crops: Crops,
        rest: Int[Array, "B R"] | None,
        *,
        keep: bool = False,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B _ H"], list[KeyValue]]:
        """All layers; see `run_proxied`."""
        inputs, (layers, stages) = [self.inputs(crops.marks)], self._stages()
        rule = by_position if self.system.slip else causal
        x, _, kept = run_layers(x, layers, inputs=inputs, rule=rule, keep=keep, remat=remat)
        x, more = run_proxied(
            x,
            stages,
            crops=crops,
            rest=rest,
            make_proxies=self.make_proxies,
            make_inputs=self.inputs,
            out=self.rules.tokens,
            keep=keep,
            remat=remat,
        )
        return x, [pair for pair in (*kept, *more) if pair is not None]

    def _stages(self) -> tuple[Any, list[Any]]:
        """The layers before `start`; those from it on with VisionMLPs, the last one without."""
        with_mlp = self.config.layers - self.system.start - 1
        plain, layers, last = split_layers(self.layers, (self.system.start, with_mlp, 1))
        assert self.vision_mlp is not None
        mlps, _ = split_layers(self.vision_mlp, (with_mlp, 1))
        if isinstance(layers, nnx.List) and isinstance(last, nnx.List):
            pairs = zip(layers, unstack(mlps), strict=True)
            listed = nnx.List([ProxiedLayer(layer, mlp) for layer, mlp in pairs])
            return plain, [listed, nnx.List([ProxiedLayer(last[0], None)])]
        return plain, [ProxiedLayer(layers, mlps), ProxiedLayer(last, None)]
