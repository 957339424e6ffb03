"""The paper: making few vision tokens of many, one file for each way.

"Learning Compact Vision Tokens for Efficient Large Multimodal Models", arXiv 2506.07138.
`mbtf.py` is Multi-Block Token Fusion, `stf.py` Spatial Token Fusion, `average.py` the paper's
pooling baseline, `identity.py` LLaVA-1.5 itself. A fusion knows no language model.
"""

from flax import nnx
from jaxtyping import Array, Float

from stf_jax.models.layers import Init
from stf_jax.systems.average import average_pooling
from stf_jax.systems.base import FusionConfig
from stf_jax.systems.llava import identity
from stf_jax.systems.mbtf import MBTF
from stf_jax.systems.stf import spatial_token_fusion

REDUCTIONS = {
    "identity": identity,
    "average": average_pooling,
    "stf": spatial_token_fusion,
}


def fused_width(config: FusionConfig, *, vision_width: int) -> int:
    """Channels of one fused token: what the projector takes in."""
    return vision_width * (config.window**2 if config.reduction == "stf" else 1)


class Fusion(nnx.Module):
    """Tower taps to vision tokens: blocks are fused first, then space (paper, figure 2)."""

    def __init__(self, config: FusionConfig, *, vision_width: int, init: Init):
        self.config, self.rules = config, init.rules
        self.mbtf = config.mbtf and MBTF(
            config.mbtf, blocks=len(config.taps), vision_width=vision_width, init=init
        )

    def __call__(self, taps: tuple[Float[Array, "B P C"], ...]) -> Float[Array, "B K _"]:
        """M taps -> K tokens an image, in raster order."""
        features = self.mbtf.mix(taps) if self.mbtf else taps[0]
        reduce = REDUCTIONS[self.config.reduction]
        return reduce(features, window=self.config.window, out=self.rules.tokens)
