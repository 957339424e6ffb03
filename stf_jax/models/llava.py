"""The vision-language model: encode images, insert their tokens into the text, decode, loss.

Liu et al. 2023, arXiv 2310.03744; what a system changes comes with the config.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IGNORED_LABEL
from stf_jax.models.cache import CacheDType, KVCache
from stf_jax.models.clip import VisionTower
from stf_jax.models.connector import Architecture, Tokens, VisionFeatures
from stf_jax.models.layers import Init, Remat
from stf_jax.models.llama import take
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.marks import ANSWER, IMAGE, TEXT, Marks
from stf_jax.parallel.sharding import ShardingRules, on_mesh


class Llava(nnx.Module):
    """CLIP tower -> connector -> LLaMA, which has adapters where `lora` is given.

    Without a tower it has no `vision`, and takes batches with `features` only.
    """

    def __init__(
        self,
        config: Architecture,
        *,
        init: Init,
        lora: LoRAConfig | None = None,
        tower: bool = True,
    ):
        self.config, self.rules = config, init.rules
        if tower:
            self.vision = VisionTower.of(config, init=init)
        self.connector = config.system.connector(config.vision, config.text, init=init)
        self.text = config.system.decoder(config.vision, config.text, init=init, lora=lora)

    @classmethod
    def abstract(
        cls,
        config: Architecture,
        *,
        rules: ShardingRules = ShardingRules.none(),
        dtype: DTypeLike = jnp.float32,
        lora: LoRAConfig | None = None,
        training: bool = False,
        tower: bool = True,
    ) -> "Llava":
        """The model with shapes, dtypes and, on a mesh, shardings in place of arrays."""

        def make() -> "Llava":
            init = Init(rngs=nnx.Rngs(0), rules=rules, dtype=dtype, training=training)
            return cls(config, init=init, lora=lora, tower=tower)

        model = nnx.eval_shape(make)
        if rules != ShardingRules.none():
            # Shapes know the abstract mesh; what is to be filled in lies on the real one.
            mesh = jax.sharding.get_mesh()
            nnx.update(model, jax.tree.map(lambda leaf: on_mesh(leaf, mesh), nnx.state(model)))
        return model

    def encode(self, batch: Batch) -> Tokens:
        """Vision tokens of every image of a row, one image after the other: [B, I*K, H].

        Where the system joins the frames of clips, those of the clips come last.
        """
        tokens, budget = self._encode_images(batch), batch.budget
        if budget is not None and budget != self.config.tokens_per_image:
            tokens = self.connector.shrink(tokens, budget)
        return self._join_images(tokens, batch)

    def insert(self, batch: Batch) -> tuple[Float[Array, "B T H"], Marks]:
        """Text embeddings with image tokens at their slots, and what each position is."""
        if batch.pixels.shape[1] == 0:
            return self.text.embed(batch.ids), self._marks(batch)
        return self._insert_tokens(batch, self.encode(batch))

    def __call__(self, batch: Batch) -> Float[Array, "B T V"]:
        """Float32 logits at every position: for parity and small batches; see `loss`."""
        x, marks = self.insert(batch)
        return self.text.logits(self.text(x, marks=marks))

    def loss(
        self, batch: Batch, *, chunk: int = 256, remat: Remat = "none"
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """Sum of the next-token cross entropies in nats, and the number of supervised tokens.

        The head runs over `chunk` positions at a time and again in the backward pass, so logits
        of the whole batch never exist. `remat` says what else is computed again. A system that
        trains several budgets has the mean over them; images are encoded once.
        """
        views = self._views(batch)
        entropies = [self._entropy_of(batch, *view, chunk=chunk, remat=remat) for view in views]
        totals, counts = zip(*entropies, strict=True)
        return jnp.stack(totals).mean(), counts[0]

    def _entropy_of(
        self,
        batch: Batch,
        x: Float[Array, "B T H"],
        marks: Marks,
        *,
        chunk: int,
        remat: Remat,
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        hidden = self.text(x, marks=marks, remat=remat)
        # What a position predicts is what the next one is; the last predicts nothing.
        targets = jnp.pad(batch.labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
        length = hidden.shape[1]
        total, count = jnp.float32(0), jnp.int32(0)
        kernel = self.text.head_kernel()
        weights = self.text.loss_weights(marks)
        entropy = jax.checkpoint(self._cross_entropy)
        for start in range(0, length, chunk):
            end = start + chunk
            counted = None if weights is None else weights[:, start:end]
            part, known = entropy(hidden[:, start:end], targets[:, start:end], counted, kernel)
            total, count = total + part, count + known
        return total, count

    def prefill(
        self, batch: Batch, *, cache_dtype: CacheDType | None = None
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits after each row's last position, and a cache of T slots; a row is one sequence."""
        x, marks = self.insert(batch)
        images = batch.pixels.shape[1] if batch.uniform else None
        last = (batch.segments > 0).sum(axis=1) - 1
        hidden, cache = self.text.prefill(
            x, marks=marks, last=last, images=images, cache_dtype=cache_dtype
        )
        return self.text.logits(hidden[:, None])[:, 0], cache

    def extend(
        self,
        ids: Int[Array, "B T"],
        *,
        start: Int[Array, "B"],
        lengths: Int[Array, "B"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits after `lengths` further tokens a row, the first of which goes to slot `start`.

        What stands in `ids` behind them is padding. Positions continue from what the slots before
        hold, some of which may be empty.
        """
        hidden, cache = self.read(ids, start=start, lengths=lengths, cache=cache)
        return self.text.logits(take(hidden, lengths - 1)[:, None])[:, 0], cache

    def read(
        self,
        ids: Int[Array, "B T"],
        *,
        start: Int[Array, "B"],
        lengths: Int[Array, "B"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T H"], KVCache]:
        """As `extend`: the hidden state of every token, which `text.logits` takes."""
        index = jnp.arange(ids.shape[1], dtype=jnp.int32)
        positions = cache.next_position(start)[:, None] + index
        marks = Marks.text(positions, (index < lengths[:, None]).astype(jnp.int32))
        hidden, cache = self.text.extend(
            self.text.embed(ids), marks=marks, slots=start[:, None] + index, cache=cache
        )
        return hidden, cache

    def _encode_images(self, batch: Batch) -> Tokens:
        """Of each image by itself: [B*I, K, H].

        The tower is frozen in every stage: no gradient reaches its weights.
        """
        question = self._read_questions(batch)
        if batch.features is not None:
            system, packed = self.config.system, self._split_images(batch.features)
            features = VisionFeatures.unpack(
                packed, taps=len(system.taps), captures=system.captures
            )
            return self.connector(features, question)
        flat = self._split_images(batch.pixels)
        extra = self.connector.extra_tokens()
        if extra is None:
            return self.connector(jax.lax.stop_gradient(self.vision(flat)), question)
        # The extra tokens are trained, through the frozen layers.
        graph, state = nnx.split(self.vision)
        tower = nnx.merge(graph, jax.lax.stop_gradient(state))
        return self.connector(tower(flat, extra), question)

    def _read_questions(self, batch: Batch) -> Float[Array, "_ H"] | None:
        """The last hidden state of each image's question, read alone; nothing is learnt by it."""
        if batch.questions is None or batch.question_lengths is None:
            return None
        with jax.named_scope("question"):
            ids, lengths = map(self._split_images, (batch.questions, batch.question_lengths))
            index = jnp.broadcast_to(
                jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape, out_sharding=self.rules.tokens
            )
            marks = Marks.text(index, (index < lengths[:, None]).astype(jnp.int32))
            hidden = self.text(self.text.embed(ids), marks=marks)
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
            return jax.lax.stop_gradient(last[:, 0])

    def _split_images(self, array: Array) -> Array:
        """[B, I, ...] -> [B*I, ...]."""
        rows, images, *rest = array.shape
        return jax.lax.reshape(array, (rows * images, *rest), out_sharding=self.rules.tokens)

    def _join_images(self, tokens: Tokens, batch: Batch) -> Tokens:
        """[B*I, K, ...] -> [B, I*K, ...]."""
        return self.connector.join(tokens, rows=len(batch.pixels), clips=batch.clips)

    def _views(self, batch: Batch) -> list[tuple[Float[Array, "B T H"], Marks]]:
        """What goes into the decoder, once for each budget that a step trains."""
        if batch.pixels.shape[1] == 0:
            return [self.insert(batch)]
        views = self.connector.views(self._encode_images(batch))
        return [self._insert_tokens(batch, self._join_images(view, batch)) for view in views]

    def _insert_tokens(self, batch: Batch, tokens: Tokens) -> tuple[Float[Array, "B T H"], Marks]:
        """Two gathers, no ragged pieces."""
        slots = batch.image_slots[..., None]
        images = jnp.take_along_axis(tokens.values, jnp.maximum(slots, 0), axis=1)
        x = jnp.where(slots >= 0, images, self.text.embed(batch.ids))
        return x, self._marks(batch, tokens.valid)

    def _marks(self, batch: Batch, valid: Bool[Array, "B _"] | None = None) -> Marks:
        """What each position of a batch is, for the decoder."""
        tokens = self.config.choose_budget(batch.budget)
        return self.text.mark(batch.ids, marks_of(batch, valid, tokens_per_image=tokens))

    def _cross_entropy(
        self,
        hidden: Float[Array, "B T H"],
        targets: Int[Array, "B T"],
        weights: Float[Array, "B T"] | None,
        kernel: Float[Array, "..."],
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        logits = self.text.logits(hidden, kernel)
        known = targets != IGNORED_LABEL
        # A sum over the vocabulary rather than a gather: it stays sharded.
        chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
        right = jnp.where(chosen, logits, 0).sum(-1)
        lost = jax.nn.logsumexp(logits, axis=-1) - right
        lost = lost if weights is None else lost * weights
        return jnp.where(known, lost, 0).sum(), known.sum()


def marks_of(
    batch: Batch, valid: Bool[Array, "B _"] | None = None, *, tokens_per_image: int
) -> Marks:
    """What each position of a batch is, for the rule of attention.

    Slots of images that hold nothing are padding, and rotary positions do not count them.
    """
    slots, position, segment = batch.image_slots, batch.positions, batch.segments
    text = jnp.where(batch.labels == IGNORED_LABEL, jnp.int32(TEXT), jnp.int32(ANSWER))
    kind = jnp.where(slots >= 0, jnp.int32(IMAGE), text)
    image = jnp.where(slots >= 0, slots // tokens_per_image, -1)
    if valid is not None:
        empty = (slots >= 0) & ~jnp.take_along_axis(valid, jnp.maximum(slots, 0), axis=1)
        # Empty slots before each position; those before its own segment do not count.
        before = jnp.cumsum(empty, axis=1, dtype=jnp.int32) - empty
        first = jnp.arange(slots.shape[1], dtype=jnp.int32) - position
        position = position - (before - jnp.take_along_axis(before, first, axis=1))
        segment = jnp.where(empty, 0, segment)
    return Marks(position=position, segment=segment, kind=kind, image=image)
