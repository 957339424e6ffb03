"""The CLIP vision transformer, read at chosen hidden states (taps) rather than at its end.

Radford et al. 2021, arXiv 2103.00020; LLaVA-STF, arXiv 2506.07138, reads eight of its blocks.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from stf_jax.config.vision import VisionConfig
from stf_jax.models.attention import attention
from stf_jax.models.connector import Architecture, ClassAttention, VisionFeatures
from stf_jax.models.layers import (
    MLP,
    Init,
    LayerNorm,
    Linear,
    apply_layers,
    gelu,
    quick_gelu,
    stack,
)

# Hidden state, that of extra tokens, what is kept of the first, layers done.
Scan = tuple[
    Float[Array, "B T C"], Float[Array, "B E C"] | None, Float[Array, "_ B T C"], Int[Array, ""]
]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "quick_gelu": quick_gelu}


class VisionAttention(nnx.Module):
    """Every token sees every token; all four projections have biases."""

    def __init__(self, config: VisionConfig, *, init: Init):
        self.rules = rules = init.rules
        width, heads = (config.width,), (config.heads, config.head_dim)
        project = partial(Linear, init=init, kernel=rules.column, bias=rules.column_bias)
        self.query, self.key, self.value = (project(width, heads) for _ in range(3))
        self.output = Linear(heads, width, init=init, kernel=rules.row_heads, bias=rules.vector)

    def __call__(
        self, x: Float[Array, "B T C"], extra: Float[Array, "B E C"] | None = None
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B E C"] | None]:
        """What each token gathers from all; `extra` tokens see each other, too."""
        query, key, value = self._project(x)
        attended = self.output(attention(query, key, value), out=self.rules.tokens)
        if extra is None:
            return attended, None
        query, own_key, own_value = self._project(extra)
        key = jnp.concatenate([key, own_key], axis=1)
        value = jnp.concatenate([value, own_value], axis=1)
        return attended, self.output(attention(query, key, value), out=self.rules.tokens)

    def _project(self, x: Float[Array, "B T C"]) -> tuple[Array, Array, Array]:
        out = self.rules.hidden
        return self.query(x, out=out), self.key(x, out=out), self.value(x, out=out)


class VisionLayer(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig, *, init: Init):
        self.activation = config.activation
        self.attention_norm = LayerNorm(config.width, epsilon=config.norm_eps, init=init)
        self.attention = VisionAttention(config, init=init)
        self.mlp_norm = LayerNorm(config.width, epsilon=config.norm_eps, init=init)
        self.mlp = MLP(config.width, config.mlp_width, config.width, init=init)

    def __call__(
        self, x: Float[Array, "B T C"], extra: Float[Array, "B E C"] | None = None
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B E C"] | None]:
        """Attention, then MLP, each added to what came in; `extra` see `x`, which sees them not."""
        normal = None if extra is None else self.attention_norm(extra)
        attended, of_extra = self.attention(self.attention_norm(x), normal)
        x = self._finish(x, attended)
        if extra is None or of_extra is None:
            return x, None
        return x, self._finish(extra, of_extra)

    def _finish(
        self, x: Float[Array, "B T C"], attended: Float[Array, "B T C"]
    ) -> Float[Array, "B T C"]:
        x = x + attended
        return x + self.mlp(self.mlp_norm(x), activation=ACTIVATIONS[self.activation])


class NextLayer(nnx.Module):
    """Of the layer after the last tap, what tells how the class token attends."""

    def __init__(self, config: VisionConfig, *, init: Init):
        self.rules = rules = init.rules
        width = (config.width,)
        # Replicated: two matrices are small, and nothing follows that a split would serve.
        project = partial(Linear, init=init, kernel=rules.vector, bias=rules.vector)
        self.attention_norm = LayerNorm(config.width, epsilon=config.norm_eps, init=init)
        self.query, self.key = project(width, width), project(width, width)

    def __call__(self, x: Float[Array, "B T C"]) -> ClassAttention:
        """From the last tap, class token first."""
        normal, out = self.attention_norm(x), self.rules.tokens
        query = self.query(normal[:, :1], out=out)[:, 0]
        return ClassAttention(query=query, keys=self.key(normal, out=out))


class VisionTower(nnx.Module):
    """Pixels to the hidden states at `taps`. Layers after the last tap do not exist here.

    Args:
        config: sizes.
        taps: hidden states that are read.
        captures: whether the class token's attention in the layer after the last tap is computed.
        init: of the weights.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        taps: tuple[int, ...],
        captures: bool = False,
        init: Init,
    ):
        self.config, self.taps, self.rules = config, taps, init.rules
        rules, width = init.rules, config.width
        # Replicated: it is small, and its 3 * 14 * 14 rows divide by few meshes.
        self.patch_embedding = Linear(
            (3 * config.patch_size**2,), (width,), init=init, kernel=rules.vector, use_bias=False
        )
        self.class_embedding = init.normal(width, spec=rules.vector)
        self.position_embedding = init.normal(config.patches + 1, width, spec=rules.vector)
        self.pre_norm = LayerNorm(width, epsilon=config.norm_eps, init=init)
        self.layers: VisionLayer | nnx.List[VisionLayer] = stack(
            lambda init: VisionLayer(config, init=init), max(taps), init=init
        )
        self.next_layer = NextLayer(config, init=init) if captures else None

    @classmethod
    def of(cls, config: Architecture, *, init: Init) -> "VisionTower":
        """The tower of a model, as far as its system reads it."""
        system = config.system
        return cls(config.vision, taps=system.taps, captures=system.captures, init=init)

    def __call__(
        self,
        pixels: Float[Array, "B height width 3"],
        extra: Float[Array, "E C"] | None = None,
    ) -> VisionFeatures:
        """The hidden states at `taps`, in their order, without the class token.

        Index 0 is the embedding after `pre_norm`, index k the output of layer k; no norm follows.
        `extra` tokens have no position; they see everything and only they see themselves, so the
        image's features are what they are without them (as VisToG isolates them, arXiv 2411.17773).
        """
        with jax.named_scope("vision_tower"):
            x, guests = self.embed(pixels), None
            if extra is not None:
                shape, spec = (len(pixels), *extra.shape), self.rules.tokens
                rows = jnp.broadcast_to(extra.astype(x.dtype), shape, out_sharding=spec)
                guests = self.pre_norm(rows)
            wanted = sorted(set(self.taps))
            # Layers that are not tapped write to one spare slot, so that a scan has static shapes
            # and keeps no more than the taps.
            spare = len(wanted)
            slots = np.full(max(wanted) + 1, spare, np.int32)
            slots[wanted] = range(spare)
            kept = jnp.stack([x] * (spare + 1))

            def step(carry: Scan, layer: VisionLayer) -> tuple[Scan, None]:
                x, guests, kept, index = carry
                # Side by side, so that no gradient of the extra tokens passes through the image's.
                (x, guests), index = layer(x, guests), index + 1
                slot = jnp.asarray(slots)[index]
                kept = jax.lax.dynamic_update_index_in_dim(kept, x, slot, 0)
                return (x, guests, kept, index), None

            start = (x, guests, kept, jnp.int32(0))
            (x, guests, kept, _), _ = apply_layers(step, start, self.layers)
            return VisionFeatures(
                taps=tuple(kept[slots[tap], :, 1:] for tap in self.taps),
                class_attention=None if self.next_layer is None else self.next_layer(x),
                extra=guests,
            )

    def embed(self, pixels: Float[Array, "B height width 3"]) -> Float[Array, "B T C"]:
        """Class token, patches and positions. The patch convolution is a matmul over patches."""
        size = self.config.patch_size
        batch, side, width = pixels.shape[0], pixels.shape[1], self.config.width
        grid = side // size
        patches = jax.lax.reshape(
            pixels, (batch, grid, size, grid, size, 3), out_sharding=self.rules.tokens
        )
        patches = jax.lax.reshape(
            patches.swapaxes(2, 3), (batch, grid**2, size**2 * 3), out_sharding=self.rules.tokens
        )
        first = jnp.broadcast_to(
            self.class_embedding[...], (batch, 1, width), out_sharding=self.rules.tokens
        )
        patches = self.patch_embedding(patches.astype(first.dtype), out=self.rules.tokens)
        x = jnp.concatenate([first, patches], axis=1) + self.positions(grid)
        return self.pre_norm(x)

    def positions(self, grid: int) -> Float[Array, "T C"]:
        """Positions of the class token and of a grid of patches, interpolated where it is smaller.

        Bicubic, as `transformers` interpolates them for images of another size.
        """
        table, trained = self.position_embedding[...], self.config.grid
        if grid == trained:
            return table
        weights = jnp.asarray(bicubic(trained, grid), table.dtype)
        square = table[1:].reshape(trained, trained, -1)
        small = jnp.einsum("or,pc,rcw->opw", weights, weights, square)
        return jnp.concatenate([table[:1], small.reshape(grid * grid, -1)])


def bicubic(inputs: int, outputs: int) -> Float[np.ndarray, "outputs inputs"]:
    """Weights that resize a row of values: Keys' kernel with a = -0.75, half-pixel centers.

    Edge values repeat, and nothing is smoothed before it is sampled, as in PyTorch.
    """
    weights = np.zeros((outputs, inputs))
    for output in range(outputs):
        center = (output + 0.5) * inputs / outputs - 0.5
        first = math.floor(center) - 1
        for tap in range(first, first + 4):
            distance = abs(center - tap)
            if distance <= 1:
                weight = 1.25 * distance**3 - 2.25 * distance**2 + 1
            else:
                weight = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            weights[output, min(max(tap, 0), inputs - 1)] += weight
    return weights
