"""Tokens of images that are dropped between the decoder's layers, for good.

A schedule says how many tokens of each image stay from a layer on; those with the highest scores
do, in their order. A token's score is how much some positions of text attend to it: the mean over
heads, and over those positions that see it. These few rows of attention are computed beside the
fused attention, and nothing is learnt by them.

In training rows keep their length, and what is dropped is hidden: a row may hold several sequences
with several images. A prefill gathers what stays, so later layers compute less and their caches are
shorter. Text is never dropped.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from stf_jax.config.text import TextConfig
from stf_jax.models.cache import CacheDType, KVCache, SlotGroup
from stf_jax.models.layers import Init, Remat, layer_at, split_layers
from stf_jax.models.llama import DecoderLayer, Llama, take
from stf_jax.models.loop import KeyValue, run_layers
from stf_jax.models.lora import LoRAConfig
from stf_jax.models.marks import ANSWER, IMAGE, Marks, Rule, visible
from stf_jax.models.selection import gather_order, rank, take_rows

# (layer, tokens of an image from this layer on), layers ascending from 1 on.
Schedule: TypeAlias = tuple[tuple[int, int], ...]

# Queries whose attention is computed at a time.
_CHUNK = 256


# Some of the decoder's layers, a stack or a list.
_Layers: TypeAlias = DecoderLayer | nnx.List[DecoderLayer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Layers that compute the same positions.

    Attributes:
        x: what came out of the last of them, [B, S, H].
        marks: of the positions. What is dropped but has not moved away sees itself alone.
        scoring: the positions that score tokens, [B, S].
        dropped: positions of each row that are gathered no more, [B].
        scores: what its tokens were chosen by, [B, S of the stage before]; None in the first stage,
            and where there is no image.
        read: what went into the last layer, if that is a part by itself, [B, S, H].
        kept: keys and values of each layer, if asked for.
    """

    x: Float[Array, "B S H"]
    marks: Marks
    scoring: Bool[Array, "B S"]
    dropped: Int[Array, "B"]
    scores: Float[Array, "B _"] | None
    read: Float[Array, "B S H"]
    kept: list[KeyValue | None]


class PrunedLlama(Llama):
    """A decoder that drops tokens of images; a system says which positions score them.

    Args:
        config: of the language model.
        tokens: of an image, before any is dropped.
        schedule: layers at whose input tokens are dropped, and how many stay of each image.
        init: how parameters begin.
        lora: adapters, if any.
    """

    # Whether tokens are scored by the layer that drops them, rather than by the one before.
    scored_by_next: ClassVar[bool] = False

    def __init__(
        self,
        config: TextConfig,
        *,
        tokens: int,
        schedule: Schedule,
        init: Init,
        lora: LoRAConfig | None = None,
    ):
        super().__init__(config, init=init, lora=lora)
        self.tokens, self.schedule = tokens, schedule

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """The stage of each layer."""
        starts = [layer for layer, _ in self.schedule]
        return tuple(sum(start <= layer for start in starts) for layer in range(self.config.layers))

    def scoring(self, marks: Marks) -> Bool[Array, "B T"]:
        """The positions whose attention scores tokens, as they are before anything is dropped."""
        return question_ends(marks)

    def most_scoring(self, length: int, image_tokens: int) -> int:
        """How many these are at most in a prompt that holds so many tokens of images."""
        del length, image_tokens
        return 1

    def __call__(
        self, x: Float[Array, "B T H"], *, marks: Marks, remat: Remat = "none"
    ) -> Float[Array, "B T H"]:
        """Normed hidden states of whole sequences; of what is dropped they mean nothing."""
        with jax.named_scope("decoder"):
            *_, stage = self.stages(x, marks, remat=remat)
            return self.norm(stage.x)

    def prefill(
        self,
        x: Float[Array, "B T H"],
        *,
        marks: Marks,
        last: Int[Array, "B"],
        images: int | None = None,
        cache_dtype: CacheDType | None = None,
    ) -> tuple[Float[Array, "B H"], KVCache]:
        """As `Llama.prefill`; later layers hold what stays, without it where `images` is None."""
        with jax.named_scope("decoder"):
            groups: list[SlotGroup] = []
            kept: list[KeyValue] = []
            for stage in self.stages(x, marks, gather=True, images=images, keep=True):
                kept += [pair for pair in stage.kept if pair is not None]
                groups.append(
                    SlotGroup(marks=stage.marks, dropped=stage.dropped, renumbered=self.renumbers)
                )
            keys, values = zip(*kept, strict=True)
            # What is dropped lies before the last position, which is text.
            hidden = self.norm(take(stage.x, last - stage.dropped))
            return hidden, KVCache.of(
                keys, values, groups, layer_groups=self.layer_groups, dtype=cache_dtype
            )

    def stages(
        self,
        x: Float[Array, "B T H"],
        marks: Marks,
        *,
        counts: Sequence[int] | Int[Array, "_"] | None = None,
        gather: bool = False,
        images: int | None = None,
        keep: bool = False,
        remat: Remat = "none",
    ) -> Iterator[Stage]:
        """Runs the layers stage by stage.

        Args:
            x: embeddings.
            marks: of the positions.
            counts: tokens of an image that stay at each drop, in place of the schedule's.
            gather: whether what stays moves together; a row is one sequence then, and text stands
                behind its images. Else it is hidden where it stands.
            images: of every row, where all have as many.
            keep: whether each layer's keys and values are returned.
            remat: what the backward pass computes again.
        """
        length = x.shape[1]
        most = length if images is None else self.most_scoring(length, images * self.tokens)
        counts = [count for _, count in self.schedule] if counts is None else counts
        stage = Stage(
            x=x,
            marks=marks,
            scoring=self.scoring(marks),
            dropped=jnp.zeros_like(marks.segment[:, 0]),
            scores=None,
            read=x,
            kept=[],
        )
        for number, parts in enumerate(self._split_stages()):
            # Without an image there is nothing to drop.
            if number and images != 0:
                layer, count = self.schedule[number - 1][0], counts[number - 1]
                size = length - (images or 0) * (self.tokens - int(count)) if gather else None
                stage = self._drop(stage, layer, count, most=most, size=size)
            stage = self._run(stage, parts, keep=keep, remat=remat)
            yield stage

    def _split_stages(self) -> list[list[_Layers]]:
        """The layers of each stage, in parts that run one after the other.

        The layer before a drop is a part by itself where what goes into it scores.
        """
        bounds, sizes = [0, *(layer for layer, _ in self.schedule), self.config.layers], []
        for start, stop in itertools.pairwise(bounds):
            alone = int(not self.scored_by_next and stop < self.config.layers)
            sizes.append([size for size in (stop - start - alone, alone) if size])
        parts = iter(split_layers(self.layers, list(itertools.chain(*sizes))))
        return [list(itertools.islice(parts, len(some))) for some in sizes]

    def _run(self, stage: Stage, parts: list[_Layers], *, keep: bool, remat: Remat) -> Stage:
        """With what these layers compute."""
        inputs, x, read = [self.inputs(stage.marks)], stage.x, stage.x
        kept: list[KeyValue | None] = []
        for part in parts:
            read = x
            x, _, pairs = run_layers(x, part, inputs=inputs, rule=self.rule, keep=keep, remat=remat)
            kept += pairs
        return dataclasses.replace(stage, x=x, read=read, kept=kept)

    def _drop(
        self,
        stage: Stage,
        layer: int,
        count: int | Int[Array, ""],
        *,
        most: int,
        size: int | None,
    ) -> Stage:
        """What goes into `layer`, the first of the next stage.

        Args:
            stage: the one before.
            layer: its number.
            count: tokens of an image that stay.
            most: how many positions score at most.
            size: positions that are gathered; None leaves what is dropped where it stands.
        """
        if self.scored_by_next:
            scorer, read, last = layer, stage.x, None
        else:
            scorer, read, last = layer - 1, stage.read, stage.kept[-1] if stage.kept else None
        scores = self._score(
            layer_at(self.layers, scorer),
            read,
            stage.marks,
            stage.scoring,
            most=most,
            key=None if last is None else last[0],
        )
        gone = choose_dropped(scores, stage.marks, count)
        marks = hide_dropped(stage.marks, gone, renumber=self.renumbers)
        if size is None:
            return dataclasses.replace(stage, marks=marks, scores=scores)
        index = gather_order(marks.segment >= 0, size)
        x = take_rows(stage.x, index)
        return dataclasses.replace(
            stage,
            x=x,
            read=x,
            marks=marks.take(index),
            scoring=take_rows(stage.scoring, index),
            dropped=stage.dropped + gone.sum(axis=1, dtype=jnp.int32),
            scores=scores,
        )

    def _score(
        self,
        layer: DecoderLayer,
        x: Float[Array, "B S H"],
        marks: Marks,
        scoring: Bool[Array, "B S"],
        *,
        most: int,
        key: Float[Array, "B S G D"] | None,
    ) -> Float[Array, "B S"]:
        """How much a layer's scoring positions attend to each position.

        Args:
            layer: whose attention it is.
            x: what goes into it.
            marks: of the positions.
            scoring: which of them score.
            most: how many these are at most.
            key: of the layer, if it is there.
        """
        with jax.named_scope("scores"):
            frozen = jax.lax.stop_gradient
            graph, state = nnx.split(layer)
            layer, x = nnx.merge(graph, frozen(state)), frozen(x)
            index = gather_order(scoring, most)
            rows = marks.take(index)
            read = take_rows(x, index)
            query = layer.project(read, self.inputs(rows).angles)[0]
            key = layer.project(x, self.inputs(marks).angles)[1] if key is None else frozen(key)
            weights = take_rows(scoring, index)
            return attention_received(
                query, key, weights=weights, queries=rows, keys=marks, rule=self.rule
            )


def attention_received(
    query: Float[Array, "B R N D"],
    key: Float[Array, "B S G D"],
    *,
    weights: Bool[Array, "B R"],
    queries: Marks,
    keys: Marks,
    rule: Rule,
) -> Float[Array, "B S"]:
    """Attention probability of each key: the mean over heads, and over the queries that see it.

    Args:
        query: rotated.
        key: rotated.
        weights: which queries count.
        queries: their marks.
        keys: their marks.
        rule: which keys a query sees.
    """
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    total, count = jnp.zeros(keys.segment.shape, jnp.float32), jnp.zeros_like(keys.segment)
    for start in range(0, length, _CHUNK):
        part = slice(start, start + _CHUNK)
        some = query[:, part].reshape(batch, -1, kv_heads, heads // kv_heads, dim)
        marks: Any = jax.tree.map(lambda mark, part=part: mark[:, part], queries)
        seen = visible(rule, marks, keys) & weights[:, part, None]
        scores = jnp.einsum("brgmd,bsgd->bgmrs", some, key, preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, None, None], scores / math.sqrt(dim), -1e30)
        shares = jax.nn.softmax(scores, axis=-1).mean(axis=(1, 2))
        total = total + jnp.where(seen, shares, 0).sum(axis=1)
        count = count + seen.sum(axis=1, dtype=jnp.int32)
    return total / jnp.maximum(count, 1)


def question_ends(marks: Marks) -> Bool[Array, "B T"]:
    """Positions just before an answer; the last one of a sequence in which nothing is answered."""
    segment, kind = marks.segment, marks.kind
    following = jnp.pad(segment[:, 1:], ((0, 0), (0, 1)))
    answers = (kind == ANSWER) & (segment > 0)
    answer_next = jnp.pad(answers[:, 1:], ((0, 0), (0, 1))) & (segment == following)
    same = segment[:, :, None] == segment[:, None, :]
    answered = (same & answers[:, None, :]).any(axis=2)
    ends = (segment != following) & ~answered
    return ((answer_next & ~answers) | ends) & (segment > 0)


def choose_dropped(
    scores: Float[Array, "B S"], marks: Marks, count: int | Int[Array, ""]
) -> Bool[Array, "B S"]:
    """Tokens of images that are not among the `count` best of their image; ties: lower index."""
    alive = (marks.kind == IMAGE) & (marks.segment > 0)
    return alive & (rank(scores, jnp.where(alive, marks.image, -1)) >= count)


def hide_dropped(marks: Marks, gone: Bool[Array, "B S"], *, renumber: bool) -> Marks:
    """Marks of which what is gone sees itself alone, and is seen by nothing else.

    Args:
        marks: of the positions.
        gone: which of them are dropped.
        renumber: whether later rotary positions of the sequence close the gap.
    """
    index = jnp.arange(gone.shape[1], dtype=jnp.int32)
    position = marks.position
    if renumber:
        same = marks.segment[:, :, None] == marks.segment[:, None, :]
        before = same & (index < index[:, None]) & gone[:, None, :]
        position = position - before.sum(axis=2, dtype=jnp.int32)
    # A sequence of its own, which no other position has.
    return dataclasses.replace(
        marks, position=position, segment=jnp.where(gone, -1 - index, marks.segment)
    )
