"""The LLaMA decoder: rotary positions, grouped key-value heads, gated MLP, stacked layers.

Touvron et al. 2023, arXiv 2302.13971; rope scaling as Llama 3.1 defines it.
"""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from stf_jax.config.text import RopeScaling, TextConfig
from stf_jax.models.cache import CacheDType, KVCache
from stf_jax.models.layers import (
    Init,
    Linear,
    Remat,
    RMSNorm,
    barrier,
    barrier_gradient,
    stack,
    unstack,
)
from stf_jax.models.loop import Inputs, run_layers
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.marks import Marks, Rule, causal
from stf_jax.parallel.sharding import all_gather_fsdp, reshard


def rope_frequencies(config: TextConfig) -> Float[Array, "_"]:
    """Radians a position for each pair of channels, after scaling."""
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**half
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: Float[Array, "_"], scaling: RopeScaling) -> Float[Array, "_"]:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    turns = scaling.original_positions * frequencies / (2 * jnp.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotate(
    x: Float[Array, "B T N D"], cos: Float[Array, "B T 1 D"], sin: Float[Array, "B T 1 D"]
) -> Float[Array, "B T N D"]:
    """Turns the pairs (d, d + D/2), the order of channels in Hugging Face checkpoints.

    The exchange of a pair's channels is a matmul with zeros and ones, which is exact: a TPU turns
    it and what follows into one pass, and cuts and joins channels of half a register slowly.
    """
    half = x.shape[-1] // 2
    one = np.eye(half)
    exchange = jnp.asarray(np.block([[0 * one, one], [-one, 0 * one]]), x.dtype)
    exchanged = jax.lax.dot_general(
        x,
        exchange,
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (x * cos + exchanged * sin).astype(x.dtype)


class DecoderAttention(nnx.Module):
    """Projections without biases; N query heads share G key-value heads."""

    def __init__(self, config: TextConfig, *, init: Init, lora: LoRAConfig | None):
        self.rules = rules = init.rules
        width, dim = (config.width,), config.head_dim
        linear = partial(Linear, init=init, use_bias=False, lora=lora, scheme=config.scheme)
        project = partial(linear, kernel=rules.column)
        self.query = project(width, (config.heads, dim))
        self.key = project(width, (config.kv_heads, dim))
        self.value = project(width, (config.kv_heads, dim))
        self.output = linear((config.heads, dim), width, kernel=rules.row_heads)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig, *, init: Init, lora: LoRAConfig | None):
        self.rules = rules = init.rules
        width, hidden = (config.width,), (config.mlp_width,)
        linear = partial(Linear, init=init, use_bias=False, lora=lora, scheme=config.scheme)
        self.gate = linear(width, hidden, kernel=rules.column)
        self.up = linear(width, hidden, kernel=rules.column)
        self.down = linear(hidden, width, kernel=rules.row)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        """The hidden width is split over `tensor`, the result is not."""
        hidden = self.rules.hidden
        gate, up = (checkpoint_name(f(x, out=hidden), "mlp") for f in (self.gate, self.up))
        gated = jax.nn.silu(barrier_gradient(gate)) * barrier_gradient(up)
        return self.down(barrier(gated), out=self.rules.tokens)


class DecoderLayer(nnx.Module):
    """A pre-norm transformer block, in the two halves between which keys are cached."""

    def __init__(self, config: TextConfig, *, init: Init, lora: LoRAConfig | None = None):
        self.attention_norm = RMSNorm(config.width, epsilon=config.norm_eps, init=init)
        self.attention = DecoderAttention(config, init=init, lora=lora)
        self.mlp_norm = RMSNorm(config.width, epsilon=config.norm_eps, init=init)
        self.mlp = GatedMLP(config, init=init, lora=lora)

    def project(
        self, x: Float[Array, "B T H"], angles: tuple[Array, Array]
    ) -> tuple[Float[Array, "B T N D"], Float[Array, "B T G D"], Float[Array, "B T G D"]]:
        """Rotated query, rotated key, value."""
        normal = barrier(self.attention_norm(x))
        query = rotate(self.attention.query(normal, out=self.attention.rules.hidden), *angles)
        return query, *self._key_value(normal, angles)

    def project_keys(
        self, x: Float[Array, "B T H"], angles: tuple[Array, Array]
    ) -> tuple[Float[Array, "B T G D"], Float[Array, "B T G D"]]:
        """Rotated key and value of positions that have no query."""
        return self._key_value(barrier(self.attention_norm(x)), angles)

    def _key_value(
        self, normal: Float[Array, "B T H"], angles: tuple[Array, Array]
    ) -> tuple[Float[Array, "B T G D"], Float[Array, "B T G D"]]:
        heads = self.attention.rules.hidden
        key = rotate(self.attention.key(normal, out=heads), *angles)
        return key, self.attention.value(normal, out=heads)

    def finish(
        self, x: Float[Array, "B T H"], attended: Float[Array, "B T N D"]
    ) -> Float[Array, "B T H"]:
        """Adds what attention saw, then the MLP of it."""
        x = self.add_attention(x, attended)
        return x + self.feed(x)

    def add_attention(
        self, x: Float[Array, "B T H"], attended: Float[Array, "B T N D"]
    ) -> Float[Array, "B T H"]:
        """The first half of `finish`."""
        return x + self.attention.output(attended, out=self.attention.rules.tokens)

    def feed(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        """What the MLP adds in the second half of `finish`."""
        return self.mlp(barrier(self.mlp_norm(checkpoint_name(x, "mlp"))))


class Llama(nnx.Module):
    """Embeddings in, hidden states out; the head is applied where logits are wanted.

    With `lora`, every matmul of the layers has an adapter. What a system changes inside the
    language model is a subclass: another rule of who sees whom, or other ways through the layers.
    """

    # Whether rotary positions do not count what layers before have dropped.
    renumbers: ClassVar[bool] = False

    def __init__(self, config: TextConfig, *, init: Init, lora: LoRAConfig | None = None):
        self.config, self.rules = config, init.rules
        rules, width, vocabulary = init.rules, config.width, config.padded_vocab_size
        self.embedding = init.normal(vocabulary, width, spec=rules.embedding)
        self.layers: DecoderLayer | nnx.List[DecoderLayer] = stack(
            lambda init: DecoderLayer(config, init=init, lora=lora), config.layers, init=init
        )
        self.norm = RMSNorm(width, epsilon=config.norm_eps, init=init)
        self.head = (
            None
            if config.tie_embeddings
            else Linear((width,), (vocabulary,), init=init, kernel=rules.column, use_bias=False)
        )

    @property
    def rule(self) -> Rule:
        """Which positions a position sees."""
        return causal

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """The group of each layer: those of one group hold the same positions in the cache."""
        return (0,) * self.config.layers

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T H"]:
        """Rows of the embedding table; ids outside the vocabulary are clamped."""
        table = all_gather_fsdp(self.embedding[...], self.rules.embedding)
        return table.at[ids].get(mode="clip", out_sharding=self.rules.tokens)

    def mark(self, ids: Int[Array, "B T"], marks: Marks) -> Marks:
        """The marks of positions that hold these ids; a system that looks at ids writes this."""
        del ids
        return marks

    def loss_weights(self, marks: Marks) -> Float[Array, "B T"] | None:
        """By how much the loss counts what each position predicts; None counts all alike."""
        del marks
        return None

    def head_kernel(self) -> Float[Array, "..."]:
        """What `logits` multiplies with: [H, V], or the embedding [V, H] where the two are one."""
        if self.head is None:
            return all_gather_fsdp(self.embedding[...], self.rules.embedding)
        kernel = self.head.kernel
        assert isinstance(kernel, nnx.Param)
        return all_gather_fsdp(kernel[...], self.rules.column)

    def logits(
        self, x: Float[Array, "B T H"], kernel: Float[Array, "..."] | None = None
    ) -> Float[Array, "B T V"]:
        """Float32 scores of the next token from normed hidden states.

        Whoever calls this several times gets the kernel from `head_kernel`, once.
        """
        kernel = self.head_kernel() if kernel is None else kernel
        contracted = 1 if self.head is None else 0
        logits = jax.lax.dot_general(
            x,
            kernel,
            (((x.ndim - 1,), (contracted,)), ((), ())),
            preferred_element_type=jnp.float32,
            out_sharding=self.rules.hidden,
        )
        if self.config.vocab_padding:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < self.config.vocab_size, logits, -1e30)
        return logits

    def __call__(
        self, x: Float[Array, "B T H"], *, marks: Marks, remat: Remat = "none"
    ) -> Float[Array, "B T H"]:
        """Normed hidden states of whole sequences; several segments may share a row."""
        with jax.named_scope("decoder"):
            inputs = [self.inputs(marks)]
            x, _, _ = run_layers(x, self.layers, inputs=inputs, rule=self.rule, remat=remat)
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
        """Normed hidden states of one position a row, and the cache of everything.

        Args:
            x: embeddings; a row holds one sequence from position 0 on.
            marks: of the positions.
            last: the position of each row whose state is wanted: its last.
            images: of every row, where all have as many; layers that drop tokens of images have
                fewer slots then.
            cache_dtype: of keys and values.
        """
        del images
        with jax.named_scope("decoder"):
            inputs = [self.inputs(marks)]
            x, _, kept = run_layers(x, self.layers, inputs=inputs, rule=self.rule, keep=True)
            keys, values = zip(*(pair for pair in kept if pair is not None), strict=True)
            return self.norm(take(x, last)), KVCache.of(keys, values, marks, dtype=cache_dtype)

    def extend(
        self,
        x: Float[Array, "B T H"],
        *,
        marks: Marks,
        slots: Int[Array, "B T"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T H"], KVCache]:
        """T further tokens a row against the cache, which takes them in; decoding has T = 1.

        Args:
            x: their embeddings.
            marks: of the tokens; padding has segment 0.
            slots: their places in the row; those that the cache has no room for are dropped.
            cache: of everything before them.
        """
        with jax.named_scope("extend"):
            # New marks lie where those of the cache do.
            rows = self.rules.tokens
            slots, marks = jax.tree.map(lambda array: reshard(array, rows), (slots, marks))
            inputs, groups = [], []
            for group in cache.groups:
                at, held = group.place(slots, marks)
                inputs.append(self.inputs(held, slots=at))
                groups.append(group.put(at, held))
            x, extended, _ = run_layers(
                x,
                unstack(self.layers),
                inputs=inputs,
                rule=self.rule,
                cache=dataclasses.replace(cache, groups=tuple(groups)),
            )
            assert extended is not None
            return self.norm(x), extended

    def inputs(self, marks: Marks, *, slots: Int[Array, "B T"] | None = None) -> Inputs:
        """What the layers are told of positions with these marks."""
        return Inputs(marks=marks, angles=self._angles(marks.position), slots=slots)

    def _angles(self, positions: Array) -> tuple[Array, Array]:
        """Cosine and sine of each position's turns, [B, T, 1, D] in float32."""
        frequencies = jnp.tile(rope_frequencies(self.config), 2)
        turns = positions[..., None, None].astype(jnp.float32) * frequencies
        return jnp.cos(turns), jnp.sin(turns)


def take(x: Float[Array, "B T H"], index: Int[Array, "B"]) -> Float[Array, "B H"]:
    """One position of each row."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
