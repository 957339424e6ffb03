"""FastV: "An Image is Worth 1/2 Tokens After Layer 2" (ECCV 2024, arXiv 2403.06764).

After the first layers most tokens of an image receive hardly any attention. At the input of layer
K the tokens that the last position of the prompt attends to most in layer K-1 stay, by the mean
over heads; the others are dropped. Those that stay keep their rotary positions. It works over the
weights of a plain LLaVA-1.5, without training.

The released code ranks anew at every step, without a cache, in its first version; its version for
Hugging Face ranks once and keeps the survivors' keys. Here a prefill ranks once. To rank anew at
every step, run the whole row without a cache: its last position ranks. The released code prunes one
image of a fixed place; here each image is ranked by itself, wherever it stands. In training the
positions just before the answers rank, which no code does: FastV is not trained.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from stf_jax.config.checks import check_positive
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.pruning import Schedule
from stf_jax.systems.pruning import PruningSystem

# Keys of config.json: the first released code's, and those of its version for Hugging Face.
_LAYER, _KEEP = "fast_v_agg_layer", "fast_v_attention_rank"
_HF_LAYER, _HF_DROPPED, _HF_TOKENS = "fastv_k", "fastv_r", "image_token_length"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastV(PruningSystem):
    """Defaults: half of 576 tokens after layer 2.

    Attributes:
        layer: K, the first that sees fewer tokens.
        keep: tokens of an image from there on.
    """

    layer: int = 2
    keep: int = 288

    name: ClassVar[str] = "fastv"
    title: ClassVar[str] = "FastV"
    family: ClassVar[str] = "llava_fastv"
    published_keys: ClassVar = (_LAYER, _KEEP, _HF_LAYER, _HF_DROPPED)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "layer", "keep")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """Half of the tokens after layer 2, where there are more layers."""
        return {
            "layer": min(cls.layer, max(text.layers - 1, 1)),
            "keep": max(vision.patches // 2, 1),
        }

    def stages(self, vision: VisionConfig) -> Schedule:
        """One drop."""
        return ((self.layer, self.keep),)

    @classmethod
    def read_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any] | None:
        """The released keys; the newer ones give the share that is dropped."""
        if _LAYER in hf and _KEEP in hf:
            return {"layer": hf[_LAYER], "keep": hf[_KEEP]}
        if not {_HF_LAYER, _HF_DROPPED, _HF_TOKENS} <= hf.keys():
            return None
        return {"layer": hf[_HF_LAYER], "keep": round(hf[_HF_TOKENS] * (1 - hf[_HF_DROPPED]))}

    def hf_keys(self, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """The keys of the first released code."""
        return {_LAYER: self.layer, _KEEP: self.keep}
