"""p-MoD: "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay" (arXiv 2412.04449).

LLaVA-1.5 whose deeper layers let through fewer and fewer vision tokens, by the released code:

- the share of layer i is c = cos(pi i / (L - 1)) / 2 + 1/2 ("shiftedcos") or 1 - i / (L - 1)
  ("shiftedlinear"): with c above `most` it is dense, else max(c, `least`) of all vision tokens of
  the sequence go through, rounded down;
- a router's logit on the layer's input gives the weight 0.2 tanh(logit) + 1, and the largest
  weights go through, at their own positions;
- of what goes through, the MLP's part is weighted; what skips is x times its weight.

A new router is zero, so training starts from weights of 1 and, among equals, the first tokens; the
released code leaves open which. Weights are compared in float32, in which they tie less often than
in its bfloat16. Its code computes layers of other routers (deep_all, softmax); this one does not.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.layers import Init
from stf_jax.models.llama import DecoderLayer
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.routing import Depths, RoutedLlama, Routing, router_entries
from stf_jax.models.weights import Entry
from stf_jax.systems.routed import RoutedSystem
from stf_jax.systems.shapes import Shapes

_SCHEDULE = re.compile(r"(shiftedcos|shiftedlinear)_decay_(\d+\.\d+)_(\d+\.\d+)")
_GATE = re.compile(r"tanh_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(?!router\.)")
# Keys of config.json of the released code.
_LAYERS, _NORM = "mod_target_layers", "mod_weight_norm"
# What else these may be is not computed here: vision tokens of all images, and how c is shifted.
_FIXED = {"mod_target_token_type": "vision_all", "mod_router_factor": 0.5, "mod_bias_enabled": True}
_INDICES, _INIT = "mod_target_layer_indices", "mod_special_init"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PMoD(RoutedSystem):
    """Defaults: p-MoD-LLaVA-1.5-7B.

    Attributes:
        schedule: "shiftedcos" or "shiftedlinear", then `most` and `least`, as released:
            "shiftedcos_decay_0.85_0.15".
        gate: "tanh", by what it is multiplied and what is added, as released: "tanh_0.2_1".
        depth: L, the layers of the language model, over which the schedule runs.
    """

    schedule: str = "shiftedcos_decay_0.85_0.15"
    gate: str = "tanh_0.2_1"
    depth: int = 32

    name: ClassVar[str] = "pmod"
    title: ClassVar[str] = "p-MoD"
    family: ClassVar[str] = "llava_pmod"
    router: ClassVar[str] = "model.layers.{}.router.router"
    model_type: ClassVar[str] = "pmod_llava_llama"
    architecture: ClassVar[str] = "PmodLlavaLlamaForCausalLM"
    published_keys: ClassVar = (_LAYERS, _NORM, *_FIXED, _INDICES, _INIT)
    # README of the released code.
    published: ClassVar = {
        "gqa": 62.2,
        "mme": 1482.8,
        "mmbench": 65.4,
        "pope": 85.5,
        "scienceqa": 69.3,
        "textvqa": 44.8,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        schedule = _SCHEDULE.fullmatch(self.schedule)
        if schedule is None or not 0 < float(schedule[3]) <= float(schedule[2]) <= 1:
            raise ValueError(
                f"schedule is {self.schedule!r}; give one such as shiftedcos_decay_0.85_0.15: "
                "shiftedcos or shiftedlinear, the share above which a layer is dense, the least"
            )
        if _GATE.fullmatch(self.gate) is None:
            raise ValueError(f"gate is {self.gate!r}; give one such as tanh_0.2_1")
        if self.depth < 2:
            raise ValueError(f"depth is {self.depth}; the schedule runs over 2 layers or more")
        if not self.depths.ratios:
            raise ValueError(f"schedule {self.schedule} leaves every layer dense; give a lower one")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The published schedule over the layers of the language model."""
        return {"depth": max(text.layers, 2)}

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """The schedule runs over the layers of this language model."""
        super().check(vision, text)
        if self.depth != text.layers:
            raise ValueError(
                f"the schedule runs over {self.depth} layers, and the language model has "
                f"{text.layers}; give depth {text.layers}"
            )

    @property
    def depths(self) -> Depths:
        """The share of each routed layer."""
        match = _SCHEDULE.fullmatch(self.schedule)
        assert match is not None
        kind, most, least = match[1], float(match[2]), float(match[3])
        place = np.arange(self.depth) / (self.depth - 1)
        shares = np.cos(np.pi * place) / 2 + 0.5 if kind == "shiftedcos" else 1 - place
        ratios = tuple(
            (layer, max(float(share), least)) for layer, share in enumerate(shares) if share <= most
        )
        return Depths(ratios=ratios, keep=_keep, per_image=False)

    def decoder(
        self, vision: VisionConfig, text: TextConfig, *, init: Init, lora: LoRAConfig | None
    ) -> "PMoDLlama":
        """LLaMA with routed layers."""
        return PMoDLlama(self, self.tokens(vision), text, init=init, lora=lora)

    def decoder_weights(self, vision: VisionConfig, text: TextConfig) -> tuple[Entry, ...]:
        """The released names; new ones are zero."""
        del vision
        return router_entries(self.router, text, self.depths.layers, bias=True, start="zeros")

    def rename(self, name: str) -> str:
        """A routed layer stands beside its router, a level deeper."""
        layer = _LAYER.match(name)
        if layer is None or int(layer[1]) not in self.depths.layers:
            return name
        return f"{layer[0]}decoder_layer.{name[layer.end() :]}"

    @classmethod
    def own_fields(cls, shapes: Shapes) -> dict[str, Any]:
        """The last layer is routed in every schedule, so its router tells the depth."""
        routed = cls.routed_layers(shapes)
        return {"depth": routed[-1] + 1} if routed else {}

    @classmethod
    def read_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any] | None:
        """The schedule and the gate; settings of other routers are refused."""
        if hf.get(_LAYERS) is None:
            return None
        for key, value in _FIXED.items():
            if hf.get(key, value) != value:
                raise ValueError(f"{key} is {hf[key]!r} in config.json; {cls.title} has {value!r}")
        return {"schedule": hf[_LAYERS]} | ({"gate": hf[_NORM]} if _NORM in hf else {})

    def hf_keys(self, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """Those of the released code."""
        del vision, text
        return {
            _LAYERS: self.schedule,
            _NORM: self.gate,
            **_FIXED,
            _INDICES: list(self.depths.layers),
        }


def _keep(tokens: Int[np.ndarray, "N"], ratio: float) -> Int[np.ndarray, "N"]:
    """Rounded down, as Python multiplies."""
    return np.floor(tokens * ratio).astype(int)


class PMoDLlama(RoutedLlama):
    """The MLP's part of what goes through is weighted, and so is all of what skips."""

    def __init__(
        self,
        system: PMoD,
        tokens_per_image: int,
        text: TextConfig,
        *,
        init: Init,
        lora: LoRAConfig | None,
    ):
        super().__init__(
            text,
            system.depths,
            tokens_per_image=tokens_per_image,
            bias=True,
            zeros=True,
            init=init,
            lora=lora,
        )
        gate = _GATE.fullmatch(system.gate)
        assert gate is not None
        self.scale, self.offset = float(gate[1]), float(gate[2])

    def weigh(self, logits: Float[Array, "B T"]) -> Float[Array, "B T"]:
        """Around 1."""
        return self.scale * jnp.tanh(logits) + self.offset

    def passed(
        self,
        layer: DecoderLayer,
        x: Float[Array, "B T H"],
        attended: Float[Array, "B T N D"],
        routing: Routing,
    ) -> Float[Array, "B T H"]:
        """Attention is added as it is, the MLP by the weight."""
        x = layer.add_attention(x, attended)
        return x + routing.weight * layer.feed(x)

    def skipped(self, x: Float[Array, "B T H"], routing: Routing) -> Float[Array, "B T H"]:
        """By its weight."""
        return routing.weight * x
