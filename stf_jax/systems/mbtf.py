"""Multi-Block Token Fusion (paper, section 3.3): low and high blocks of the tower in one token.

Every patch's features at M blocks are concatenated and mixed by two linear layers back to the
tower's width, so that fine detail of early blocks survives the loss of tokens that follows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stf_jax.models.layers import MLP, Init, gelu
from stf_jax.systems.base import MBTFConfig


class MBTF(MLP):
    """Concatenate on channels, Linear, GELU, Linear: M x [B, P, C] -> [B, P, C]."""

    def __init__(self, config: MBTFConfig, *, blocks: int, vision_width: int, init: Init):
        super().__init__(blocks * vision_width, config.mlp_width, vision_width, init=init)
        self.last_activation = config.last_activation

    def mix(self, taps: tuple[Float[Array, "B P C"], ...]) -> Float[Array, "B P C"]:
        """`taps` in the order of the config; LLaVA-1.5 reads the first alone."""
        with jax.named_scope("mbtf"):
            mixed = self(jnp.concatenate(taps, axis=-1), activation=gelu)
            return gelu(mixed) if self.last_activation else mixed
