"""The vision-language model: encode images, insert their tokens into the text, decode, loss.

Liu et al. 2023, arXiv 2310.03744; what a system changes comes with the config.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IGNORED_LABEL
from stf_jax.models.attention import IMAGE, TEXT, Marks
from stf_jax.models.cache import CacheDType, KVCache
from stf_jax.models.clip import VisionTower
from stf_jax.models.connector import Architecture, VisionFeatures
from stf_jax.models.layers import Init, Remat
from stf_jax.models.llama import Llama
from stf_jax.models.lora import LoRAConfig
from stf_jax.parallel.sharding import ShardingRules, on_mesh


class Llava(nnx.Module):
    """CLIP tower -> connector -> LLaMA, which has adapters where `lora` is given."""

    def __init__(self, config: Architecture, *, init: Init, lora: LoRAConfig | None = None):
        self.config, self.rules = config, init.rules
        self.vision = VisionTower(config.vision, taps=config.system.taps, init=init)
        self.connector = config.system.connector(config.vision, config.text, init=init)
        self.text = Llama(config.text, init=init, lora=lora)

    @classmethod
    def abstract(
        cls,
        config: Architecture,
        *,
        rules: ShardingRules = ShardingRules.none(),
        dtype: DTypeLike = jnp.float32,
        lora: LoRAConfig | None = None,
    ) -> "Llava":
        """The model with shapes, dtypes and, on a mesh, shardings in place of arrays."""
        model = nnx.eval_shape(
            lambda: cls(config, init=Init(rngs=nnx.Rngs(0), rules=rules, dtype=dtype), lora=lora)
        )
        if rules != ShardingRules.none():
            # Shapes know the abstract mesh; what is to be filled in lies on the real one.
            mesh = jax.sharding.get_mesh()
            nnx.update(model, jax.tree.map(lambda leaf: on_mesh(leaf, mesh), nnx.state(model)))
        return model

    def encode(self, pixels: Float[Array, "B I height width 3"]) -> Float[Array, "B _ H"]:
        """Vision tokens of every image of a row, one image after the other.

        The tower is frozen in every stage, so no gradient enters it.
        """
        rows, images, *image = pixels.shape
        flat = jax.lax.reshape(pixels, (rows * images, *image), out_sharding=self.rules.tokens)
        taps = jax.lax.stop_gradient(self.vision(flat))
        tokens = self.connector(VisionFeatures(taps=taps)).values
        row = (rows, images * tokens.shape[1], tokens.shape[2])
        return jax.lax.reshape(tokens, row, out_sharding=self.rules.tokens)

    def insert(self, batch: Batch) -> Float[Array, "B T H"]:
        """Text embeddings with image tokens at their slots: two gathers, no ragged pieces."""
        text = self.text.embed(batch.ids)
        if batch.pixels.shape[1] == 0:
            return text
        tokens = self.encode(batch.pixels)
        slots = batch.image_slots[..., None]
        images = jnp.take_along_axis(tokens, jnp.maximum(slots, 0), axis=1)
        return jnp.where(slots >= 0, images, text)

    def __call__(self, batch: Batch) -> Float[Array, "B T V"]:
        """Float32 logits at every position: for parity and small batches; see `loss`."""
        return self.text.logits(self._hidden(batch))

    def loss(
        self, batch: Batch, *, chunk: int = 256, remat: Remat = "none"
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """Sum of the next-token cross entropies in nats, and the number of supervised tokens.

        The head runs over `chunk` positions at a time and again in the backward pass, so logits
        of the whole batch never exist. `remat` says what else is computed again.
        """
        hidden = self._hidden(batch, remat=remat)
        # What a position predicts is what the next one is; the last predicts nothing.
        targets = jnp.pad(batch.labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
        length = hidden.shape[1]
        total, count = jnp.float32(0), jnp.int32(0)
        kernel = self.text.head_kernel()
        entropy = jax.checkpoint(self._cross_entropy)
        for start in range(0, length, chunk):
            part, known = entropy(
                hidden[:, start : start + chunk], targets[:, start : start + chunk], kernel
            )
            total, count = total + part, count + known
        return total, count

    def prefill(
        self, batch: Batch, *, cache_dtype: CacheDType | None = None
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits after each row's last position, and a cache of T slots; a row is one sequence."""
        hidden, cache = self.text.prefill(
            self.insert(batch), marks=marks_of(batch), cache_dtype=cache_dtype
        )
        return self._logits_at((batch.segments > 0).sum(axis=1) - 1, hidden), cache

    def extend(
        self,
        ids: Int[Array, "B T"],
        *,
        start: Int[Array, "B"],
        lengths: Int[Array, "B"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits after `lengths` further tokens a row, the first of which is at position `start`.

        What stands in `ids` behind them is padding.
        """
        index = jnp.arange(ids.shape[1], dtype=jnp.int32)
        positions = start[:, None] + index
        marks = Marks.text(positions, (index < lengths[:, None]).astype(jnp.int32))
        hidden, cache = self.text.extend(
            self.text.embed(ids), marks=marks, slots=positions, cache=cache
        )
        return self._logits_at(lengths - 1, hidden), cache

    def _logits_at(
        self, index: Int[Array, "B"], hidden: Float[Array, "B T H"]
    ) -> Float[Array, "B V"]:
        one = jnp.take_along_axis(hidden, index[:, None, None], axis=1)
        return self.text.logits(one)[:, 0]

    def _hidden(self, batch: Batch, *, remat: Remat = "none") -> Float[Array, "B T H"]:
        return self.text(self.insert(batch), marks=marks_of(batch), remat=remat)

    def _cross_entropy(
        self,
        hidden: Float[Array, "B T H"],
        targets: Int[Array, "B T"],
        kernel: Float[Array, "..."],
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        logits = self.text.logits(hidden, kernel)
        known = targets != IGNORED_LABEL
        # A sum over the vocabulary rather than a gather: it stays sharded.
        chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
        right = jnp.where(chosen, logits, 0).sum(-1)
        lost = jax.nn.logsumexp(logits, axis=-1) - right
        return jnp.where(known, lost, 0).sum(), known.sum()


def marks_of(batch: Batch) -> Marks:
    """What each position of a batch is, for the rule of attention."""
    kind = jnp.where(batch.image_slots >= 0, jnp.int32(IMAGE), jnp.int32(TEXT))
    return Marks(position=batch.positions, segment=batch.segments, kind=kind)
