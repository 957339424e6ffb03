"""VisToG: "Efficient Multi-modal Large Language Models via Visual Token Grouping" (2411.17773).

Learned semantic tokens travel through the frozen tower behind the patches (figure 1). They see the
image and each other; the image does not see them, so its features are plain CLIP's. Behind the
tower every patch joins one semantic token, and the groups go to LLaVA-1.5's projector.

There is no released code. The abstract and figure 1 say what stands above; these choices are ours:
semantic tokens have no positions and see each other; the grouping layer is GroupViT's assignment
(arXiv 2202.11094, section 3.2), alone or with its whole block; rates and stages are LLaVA-1.5's.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config.checks import check_positive
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.connector import Connector, Tokens, VisionFeatures
from stf_jax.models.keys import StepKey
from stf_jax.models.layers import Init, LayerNorm, Linear, gelu
from stf_jax.models.weights import SAME, Entry, linear_entries, make_entry, norm_entries
from stf_jax.systems.base import System
from stf_jax.systems.shapes import Shapes

_PREFIX = "mm_grouping."
_TOKENS = f"{_PREFIX}semantic_tokens"
_NORM_EPS = 1e-5
# Widths of the block's two MLPs, in tower widths: over the tokens, and over the channels.
_MIX, _CHANNELS, _CROSS = 0.5, 4, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisToG(System):
    """Defaults: 64 tokens an image, the fewest that the paper shows.

    Attributes:
        semantic_tokens: K.
        grouping: the assignment alone, or GroupViT's whole block around it.
        assign_eps: added to the size of a group before it divides; with GroupViT's 1.0 a group of m
            patches is the sum over m + 1, and an empty one is zero.
        temperature: of the noisy softmax whose gradient training takes.
    """

    semantic_tokens: int = 64
    grouping: Literal["assign", "full"] = "assign"
    assign_eps: float = 1.0
    temperature: float = 1.0

    name: ClassVar[str] = "vistog"
    title: ClassVar[str] = "VisToG"
    family: ClassVar[str] = "llava_vistog"
    prefixes: ClassVar = {"mm_projector.": "llava", _PREFIX: "llava"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "semantic_tokens")
        for name in ("assign_eps", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"VisToG.{name} is {getattr(self, name)}; give more than 0")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """No more groups than a quarter of the patches."""
        tokens = min(cls.semantic_tokens, max(vision.patches // 4, 1))
        return {"semantic_tokens": tokens}

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """There are as many patches as groups."""
        super().check(vision, text)
        if self.semantic_tokens > vision.patches:
            raise ValueError(
                f"semantic_tokens is {self.semantic_tokens}; an image has {vision.patches} patches"
            )

    @property
    def extra_count(self) -> int:
        """The semantic tokens go through the tower."""
        return self.semantic_tokens

    def tokens(self, vision: VisionConfig) -> int:
        """One a group."""
        return self.semantic_tokens

    def connector(self, vision: VisionConfig, text: TextConfig, *, init: Init) -> Connector:
        """Grouping, then LLaVA-1.5's projector."""
        return VisToGConnector(self, vision, text, init=init)

    def hf_code(self, vision: VisionConfig) -> dict[str, Any]:
        """The groups; noise belongs to training."""
        del vision
        return {
            "kind": self.name,
            "semantic_tokens": self.semantic_tokens,
            "grouping": self.grouping,
            "assign_eps": self.assign_eps,
        }

    def flops(self, vision: VisionConfig, text: TextConfig) -> float:
        """The grouping, and the projector over the groups."""
        count, patches, width = self.semantic_tokens, vision.patches, vision.width
        products = 2 * (count + patches) * width**2 + 2 * count * patches * width
        if self.grouping == "full":
            products += 2 * count * int(_MIX * width) * width
            products += 2 * (count + patches) * width**2 + 2 * count * patches * width
            products += 2 * count * (_CROSS + _CHANNELS) * width**2
        return 2.0 * products + super().flops(vision, text)

    def weights(self, vision: VisionConfig, text: TextConfig) -> tuple[Entry, ...]:
        """GroupViT's names behind a prefix of ours; nothing is published."""
        width, count = vision.width, self.semantic_tokens
        entries = [
            make_entry("connector/semantic_tokens", _TOKENS, (count, width), (count, width), SAME)
        ]

        def norm(native: str, torch: str) -> None:
            entries.extend(norm_entries(f"connector/{native}", f"{_PREFIX}{torch}", width=width))

        def linear(native: str, torch: str, inputs: int = width, outputs: int = width) -> None:
            path, name = f"connector/{native}", f"{_PREFIX}{torch}"
            entries.extend(linear_entries(path, name, inputs=inputs, outputs=outputs))

        def mlp(native: str, torch: str, *, outer: int, inner: int) -> None:
            linear(f"{native}/linear_1", f"{torch}.fc1", outer, inner)
            linear(f"{native}/linear_2", f"{torch}.fc2", inner, outer)

        for native, torch in _PROJECTIONS:
            linear(f"assign/{native}", f"assign.{torch}")
        linear("assign/output", "assign.proj")
        if self.grouping == "full":
            for native, torch in (
                ("group_norm", "norm_tokens"),
                ("mixed_norm", "norm_post_tokens"),
                ("patch_norm", "norm_x"),
                ("cross_mlp_norm", "pre_assign_attn.norm2"),
                ("cross_norm", "pre_assign_attn.norm_post"),
                ("new_norm", "norm_new_x"),
            ):
                norm(f"block/{native}", torch)
            mlp("block/mix", "mlp_inter", outer=count, inner=int(_MIX * width))
            mlp("block/cross_mlp", "pre_assign_attn.mlp", outer=width, inner=_CROSS * width)
            mlp("block/channels", "mlp_channels", outer=width, inner=_CHANNELS * width)
            for native, torch in _PROJECTIONS:
                linear(f"block/cross/{native}", f"pre_assign_attn.attn.{torch}")
            linear("block/cross/output", "pre_assign_attn.attn.out_proj")
        return (*entries, *super().weights(vision, text))

    @classmethod
    def recognizes(cls, shapes: Shapes, vision: VisionConfig) -> bool:
        """There are semantic tokens."""
        return _TOKENS in shapes

    @classmethod
    def own_fields(cls, shapes: Shapes) -> dict[str, Any]:
        """How many, and which grouping, follow from the weights."""
        if _TOKENS not in shapes:
            raise ValueError(f"there is no {_TOKENS}: these are no weights of VisToG")
        full = f"{_PREFIX}norm_tokens.weight" in shapes
        return {
            "semantic_tokens": shapes[_TOKENS][0],
            "grouping": "full" if full else "assign",
        }


_PROJECTIONS = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))


class VisToGConnector(Connector):
    """The semantic tokens, the grouping, the projector."""

    def __init__(self, system: VisToG, vision: VisionConfig, text: TextConfig, *, init: Init):
        self.system = system
        self.semantic_tokens = init.normal(
            system.semantic_tokens, vision.width, spec=init.rules.vector
        )
        self.assign = Assign(
            vision.width, epsilon=system.assign_eps, temperature=system.temperature, init=init
        )
        full = system.grouping == "full"
        count = system.semantic_tokens
        self.block = GroupingBlock(count, vision, init=init) if full else None
        # Noise belongs to training.
        self.key = StepKey(init.rngs.params()) if init.training else None
        super().__init__(**system.widths(vision, text), init=init)

    def extra_tokens(self) -> Float[Array, "E C"]:
        """The semantic tokens, as they enter the tower."""
        return self.semantic_tokens[...]

    def __call__(
        self, features: VisionFeatures, question: Float[Array, "B H"] | None = None
    ) -> Tokens:
        """One token a group, in the order of the semantic tokens."""
        del question
        (patches,), groups = features.taps, features.extra
        assert groups is not None
        noise = None
        if self.key is not None:
            shape = (*groups.shape[:2], patches.shape[1])
            out = None if self.rules.tokens is None else jax.typeof(groups).sharding
            noise = jax.random.gumbel(self.key[...], shape, jnp.float32, out_sharding=out)
        return Tokens(values=self.project(self.group(groups, patches, noise)))

    def group(
        self,
        groups: Float[Array, "B K C"],
        patches: Float[Array, "B P C"],
        noise: Float[Array, "B K P"] | None = None,
    ) -> Float[Array, "B K C"]:
        """Patches join groups; `noise`, Gumbel's, is for training."""
        with jax.named_scope("vistog"):
            if self.block is None:
                return groups + self.assign(groups, patches, noise)
            groups, patches = self.block.before(groups, patches)
            return self.block.after(groups + self.assign(groups, patches, noise))


class Assign(nnx.Module):
    """Each patch goes to one group; a group is the mean of its patches (GroupViT, section 3.2)."""

    def __init__(self, width: int, *, epsilon: float, temperature: float, init: Init):
        self.rules, self.epsilon, self.temperature = init.rules, epsilon, temperature
        self.query, self.key, self.value, self.output = (
            _linear(width, width, init) for _ in range(4)
        )

    def __call__(
        self,
        groups: Float[Array, "B K C"],
        patches: Float[Array, "B P C"],
        noise: Float[Array, "B K P"] | None = None,
    ) -> Float[Array, "B K C"]:
        """What each group gathers."""
        shares = self.assign(self.logits(groups, patches), noise)
        return self.gather(shares, patches)

    def logits(
        self, groups: Float[Array, "B K C"], patches: Float[Array, "B P C"]
    ) -> Float[Array, "B K P"]:
        """Scaled scores in float32, one head."""
        out = self.rules.tokens
        query, key = self.query(groups, out=out), self.key(patches, out=out)
        scores = jnp.einsum(
            "bkc,bpc->bkp",
            query,
            key,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return scores / math.sqrt(groups.shape[-1])

    def assign(
        self, logits: Float[Array, "B K P"], noise: Float[Array, "B K P"] | None
    ) -> Float[Array, "B K P"]:
        """1 where a patch belongs; with noise, the gradient is that of the softmax over groups."""
        if noise is not None:
            logits = (logits + noise) / self.temperature
        hard = jax.nn.one_hot(jnp.argmax(logits, axis=1), logits.shape[1], axis=1)
        if noise is None:
            return hard
        soft = jax.nn.softmax(logits, axis=1)
        return hard + soft - jax.lax.stop_gradient(soft)

    def gather(
        self, shares: Float[Array, "B K P"], patches: Float[Array, "B P C"]
    ) -> Float[Array, "B K C"]:
        """The mean of each group's values."""
        value = self.value(patches, out=self.rules.tokens)
        mean = shares / (shares.sum(axis=2, keepdims=True) + self.epsilon)
        gathered = jnp.einsum("bkp,bpc->bkc", mean.astype(value.dtype), value)
        return self.output(gathered, out=self.rules.tokens)


class GroupingBlock(nnx.Module):
    """What GroupViT computes before and after the assignment; it makes no fewer groups here."""

    def __init__(self, count: int, vision: VisionConfig, *, init: Init):
        width = vision.width
        (
            self.group_norm,
            self.mixed_norm,
            self.patch_norm,
            self.cross_mlp_norm,
            self.cross_norm,
            self.new_norm,
        ) = (LayerNorm(width, epsilon=_NORM_EPS, init=init) for _ in range(6))
        self.mix = PlainMLP(count, int(_MIX * width), init=init)
        self.cross = CrossAttention(width, vision.heads, init=init)
        self.cross_mlp = PlainMLP(width, _CROSS * width, init=init)
        self.channels = PlainMLP(width, _CHANNELS * width, init=init)

    def before(
        self, groups: Float[Array, "B K C"], patches: Float[Array, "B P C"]
    ) -> tuple[Float[Array, "B K C"], Float[Array, "B P C"]]:
        """Groups mix among themselves, then look at the patches."""
        groups, patches = self.group_norm(groups), self.patch_norm(patches)
        groups = self.mixed_norm(self.mix(groups.swapaxes(1, 2)).swapaxes(1, 2))
        groups = groups + self.cross(groups, patches)
        groups = groups + self.cross_mlp(self.cross_mlp_norm(groups))
        return self.cross_norm(groups), patches

    def after(self, groups: Float[Array, "B K C"]) -> Float[Array, "B K C"]:
        """An MLP over the channels."""
        return groups + self.channels(self.new_norm(groups))


class CrossAttention(nnx.Module):
    """Groups attend to patches."""

    def __init__(self, width: int, heads: int, *, init: Init):
        self.rules, self.heads = init.rules, heads
        self.query, self.key, self.value, self.output = (
            _linear(width, width, init) for _ in range(4)
        )

    def __call__(
        self, groups: Float[Array, "B K C"], patches: Float[Array, "B P C"]
    ) -> Float[Array, "B K C"]:
        """What each group gathers."""
        out = self.rules.tokens

        def split(x: Float[Array, "B _ C"]) -> Float[Array, "B _ N D"]:
            shape = (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
            return jax.lax.reshape(x, shape, out_sharding=out)

        query = split(self.query(groups, out=out))
        key, value = (split(f(patches, out=out)) for f in (self.key, self.value))
        attended = jax.nn.dot_product_attention(query, key, value)
        return self.output(jax.lax.reshape(attended, groups.shape, out_sharding=out), out=out)


class PlainMLP(nnx.Module):
    """Linear, GELU, Linear on the last axis; small enough to lie whole on every device."""

    def __init__(self, width: int, inner: int, *, init: Init):
        self.rules = init.rules
        self.linear_1, self.linear_2 = _linear(width, inner, init), _linear(inner, width, init)

    def __call__(self, x: Float[Array, "B _ C"]) -> Float[Array, "B _ C"]:
        """As wide as what came in."""
        out = self.rules.tokens
        return self.linear_2(gelu(self.linear_1(x, out=out)), out=out)


def _linear(inputs: int, outputs: int, init: Init) -> Linear:
    spec = init.rules.vector
    return Linear((inputs,), (outputs,), init=init, kernel=spec, bias=spec)
