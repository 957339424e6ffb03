"""PyramidDrop (CVPR 2025, arXiv 2410.17247; Cooperx521/PyramidDrop, MIT).

The language model is cut into stages, and each keeps a part of an image's tokens: by default half
of them from layer 8 on, a quarter from layer 16 and an eighth from layer 24. Before layer l that
layer's own norm, query and key are applied to the present hidden states; the positions that ask
score the tokens, by the mean over heads and over these positions. In a prompt its last position
asks, in training each position just before an answer. Rotary positions are numbered anew after
every drop, so a new token has another position in each stage. It works over the weights of a plain
LLaVA-1.5, and the paper trains stage 2 with it, too.

The released code prunes only the first image of a sample; here each image is ranked by itself, by
the positions that see it. It keeps all tokens of a sample without an answer, which teaches nothing.
Where an answer follows an image without any text between, the image's last token may be gone, which
predicts the answer's first; no template does that.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import yaml

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.pruning import PrunedLlama, Schedule
from stf_jax.systems.pruning import PruningSystem

_LAYERS, _RATIOS = "layer_list", "image_token_ratio_list"


class PyramidDropLlama(PrunedLlama):
    """The layer after a drop scores, and positions close the gap."""

    scored_by_next = True
    renumbers = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidDrop(PruningSystem):
    """Defaults: as published.

    Attributes:
        layers: the first of each stage but the first.
        ratios: the part of an image's tokens that each of these stages keeps, rounded down.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)

    name: ClassVar[str] = "pyramiddrop"
    title: ClassVar[str] = "PyramidDrop"
    family: ClassVar[str] = "llava_pyramiddrop"
    published_keys: ClassVar = (_LAYERS, _RATIOS)
    llama: ClassVar[type[PrunedLlama]] = PyramidDropLlama
    # Trained, 270 tokens on average (paper, and its README).
    published: ClassVar = {
        "gqa": 61.9,
        "mmbench": 66.1,
        "textvqa": 58.5,
        "pope": 86.0,
        "scienceqa": 71.0,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != len(self.ratios):
            raise ValueError(
                f"PyramidDrop has {len(self.layers)} layers and {len(self.ratios)} ratios; give "
                "one ratio a layer"
            )
        if any(not 0 <= ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"PyramidDrop.ratios are {self.ratios}; give parts from 0 to 1")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The published stages by their depth: a quarter of the layers each."""
        layers = dict.fromkeys(text.layers * part // 4 for part in (1, 2, 3))
        drops = [(layer, ratio) for layer, ratio in zip(layers, cls.ratios, strict=False) if layer]
        return {
            "layers": tuple(layer for layer, _ in drops),
            "ratios": tuple(ratio for _, ratio in drops),
        }

    def stages(self, vision: VisionConfig) -> Schedule:
        """Its counts are parts of what an image begins with."""
        tokens = self.tokens(vision)
        counts = [int(tokens * ratio) for ratio in self.ratios]
        return tuple(zip(self.layers, counts, strict=True))

    @classmethod
    def read_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any] | None:
        """The released keys; lists, which the released scripts write as text."""
        if _LAYERS not in hf or _RATIOS not in hf:
            return None
        values = [hf[_LAYERS], hf[_RATIOS]]
        layers, ratios = (yaml.safe_load(v) if isinstance(v, str) else v for v in values)
        return {"layers": layers, "ratios": ratios}

    def hf_keys(self, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The same keys."""
        return {_LAYERS: list(self.layers), _RATIOS: list(self.ratios)}
