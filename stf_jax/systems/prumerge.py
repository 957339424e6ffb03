"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388): keep what the class token looks at, merge.

Nothing is trained for it; it sits between the tower and LLaVA-1.5's projector.

1. Scores (section 3.2): how the class token attends to each patch in the tower's last block.
2. How many: the outliers among the scores by the interquartile rule, or a fixed share. PruMerge+
   adds patches at a regular distance (section 3.4).
3. Merge (section 3.3): each kept token takes up the `neighbors` tokens whose keys are most like its
   own, weighted by their scores; one more token sums up what was dropped.

Tokens come in the order of their scores, as released. The released code counts outliers over the
whole batch; here every image has its own count, in a static number of slots with a mask.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.models.connector import ClassAttention, Connector, Tokens, VisionFeatures
from stf_jax.models.layers import Init
from stf_jax.models.selection import take_rows
from stf_jax.systems.base import System, Variant

# In float32 on every platform: a TPU would round what it multiplies to bfloat16.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
# Above the third quartile by so many interquartile ranges a score is an outlier.
_IQR = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruMerge(System):
    """Defaults: PruMerge, adaptive.

    Attributes:
        plus: whether patches at a regular distance are kept too.
        ratio: share of the patches that is kept for its scores; None lets each image have its
            outliers, which are at most a quarter.
        neighbors: tokens that each kept one takes up.
        order: of the tokens: by score as released, or as in the image.
        repeats: whether a patch that is kept for its score and for its place counts twice, as in
            the released PruMerge+ with a fixed share.
    """

    plus: bool = False
    ratio: float | None = None
    neighbors: int = 32
    order: Literal["score", "raster"] = "score"
    repeats: bool = True

    name: ClassVar[str] = "prumerge"
    title: ClassVar[str] = "PruMerge"
    family: ClassVar[str] = "llava_prumerge"
    # Paper, table 1: PruMerge with 32 tokens on average, fine-tuned with LoRA.
    published: ClassVar = {
        "vqav2": 72.0,
        "scienceqa": 68.5,
        "textvqa": 56.0,
        "pope": 76.3,
        "mme": 1350.3,
        "mmbench": 60.9,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"PruMerge.ratio is {self.ratio}; give more than 0, at most 1")
        if self.neighbors < 0:
            raise ValueError(f"PruMerge.neighbors is {self.neighbors}; give 0 or more")

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """As many neighbors as published, where there are as many patches."""
        return {"neighbors": min(cls.neighbors, vision.patches - 1)}

    @classmethod
    def variants(cls, *, vision: VisionConfig, text: TextConfig) -> Mapping[str, Variant]:
        """Both papers' names, with the share that they were trained with."""
        base = dataclasses.replace(cls.for_model(vision=vision, text=text), ratio=1 / 8)
        plus = dataclasses.replace(base, plus=True)
        return {
            "prumerge": Variant(title="PruMerge", system=base),
            "prumerge_plus": Variant(title="PruMerge+", system=plus),
        }

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """There are enough patches, and the places fit the share."""
        super().check(vision, text)
        patches = vision.patches
        if self.neighbors >= patches:
            raise ValueError(f"neighbors is {self.neighbors}; an image has {patches} patches")
        if self.ratio is None:
            return
        top = self.top(patches)
        if top == 0:
            raise ValueError(f"ratio {self.ratio} keeps none of {patches} patches; give more")
        if self.plus and len(self.places(patches)) != top:
            raise ValueError(
                f"ratio {self.ratio} keeps {top} of {patches} patches for their scores and "
                f"{len(self.places(patches))} for their places; PruMerge+ needs as many of both: "
                f"try {', '.join(f'1/{step}' for step in _steps(patches))}"
            )

    @property
    def captures(self) -> bool:
        """Scores and likeness come from the tower's last block."""
        return True

    def top(self, patches: int) -> int:
        """Patches that can be kept for their scores."""
        return patches // 4 if self.ratio is None else int(patches * self.ratio)

    def places(self, patches: int) -> Int[np.ndarray, "_"]:
        """Patches that PruMerge+ keeps for their place, with a fixed share; never the last."""
        assert self.ratio is not None
        step = int(1 / self.ratio)
        return np.arange(step // 2, patches - 1, step, dtype=np.int32)

    def rows(self, patches: int) -> int:
        """Slots for kept patches."""
        if not self.plus:
            return self.top(patches)
        return patches if self.ratio is None else 2 * self.top(patches)

    def tokens(self, vision: VisionConfig) -> int:
        """The kept ones, and the sum of the dropped."""
        return self.rows(vision.patches) + 1

    def flops(self, vision: VisionConfig, text: TextConfig) -> float:
        """Scores, likeness, and the sum over neighbors as a matmul; then the projector."""
        patches, width = vision.patches, vision.width
        rows = self.rows(patches)
        merge = 2 * rows * (rows + patches) * width
        return 2.0 * (patches + 1) * width + 2.0 * merge + super().flops(vision, text)

    def connector(self, vision: VisionConfig, text: TextConfig, *, init: Init) -> Connector:
        """Selection and merging, then LLaVA-1.5's projector."""
        return PruMergeConnector(self, vision, text, init=init)

    def hf_code(self, vision: VisionConfig) -> dict[str, Any]:
        """How many patches for their scores, and which for their places."""
        patches = vision.patches
        if self.ratio is None:
            fixed = 1 / _steps(patches)[0] if self.plus else 0.125
            raise ValueError(
                "all images need one number of tokens, and without a ratio PruMerge keeps each "
                f"image's outliers; import it with --system prumerge --field ratio={fixed}"
            )
        if self.plus and not self.repeats:
            raise ValueError(
                "all images need one number of tokens, and PruMerge+ without repeats has fewer of "
                "some; import it with --system prumerge --field repeats=true"
            )
        return {
            "kind": self.name,
            "top": self.top(patches),
            "places": self.places(patches).tolist() if self.plus else [],
            "neighbors": self.neighbors,
            "order": self.order,
        }


def _steps(patches: int) -> list[int]:
    """The s of shares 1/s that PruMerge+ can keep for their place, the ten largest."""
    possible = []
    for step in range(2, patches):
        system = PruMerge(plus=True, ratio=1 / step)
        if len(system.places(patches)) == system.top(patches) > 0:
            possible.append(step)
    return possible[:10]


class PruMergeConnector(Connector):
    """Select, merge, project."""

    def __init__(self, system: PruMerge, vision: VisionConfig, text: TextConfig, *, init: Init):
        self.system = system
        super().__init__(**system.widths(vision, text), init=init)

    def __call__(
        self, features: VisionFeatures, question: Float[Array, "B H"] | None = None
    ) -> Tokens:
        """Kept tokens at the end of the slots, behind them the sum of what was dropped."""
        del question
        (tap,), captured = features.taps, features.class_attention
        assert captured is not None
        with jax.named_scope("prumerge"):
            scores = class_scores(captured)
            kept = select(self.system, scores)
            merged = merge(tap, captured.keys[:, 1:], scores, kept, neighbors=self.system.neighbors)
        valid = None
        if not kept.full:
            last = jnp.ones_like(kept.valid[:, :1])
            valid = jnp.concatenate([kept.valid, last], axis=1)
        return Tokens(values=self.project(merged.astype(tap.dtype)), valid=valid)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """Which patches of an image are kept, in the order of the tokens.

    Attributes:
        index: of the patch; means nothing where the slot is empty.
        valid: False where the slot is empty: the first ones, where there are fewer than slots.
        full: no slot of any image is ever empty.
    """

    index: Int[Array, "B M"]
    valid: Bool[Array, "B M"]
    full: bool = dataclasses.field(metadata={"static": True})


def class_scores(captured: ClassAttention) -> Float[Array, "B P"]:
    """The class token's attention to the patches as one head of the whole width, in float32.

    Its attention to itself is left out, so that a row adds up to less than 1.
    """
    query, keys = (a.astype(jnp.float32) for a in (captured.query, captured.keys))
    logits = _einsum("bc,bpc->bp", query, keys) / math.sqrt(query.shape[-1])
    return jax.nn.softmax(logits, axis=-1)[:, 1:]


def count_outliers(scores: Float[Array, "B P"]) -> Int[Array, "B"]:
    """Scores of each image above the third quartile by 1.5 interquartile ranges."""
    quartiles = jnp.percentile(scores, jnp.array([25.0, 75.0]), axis=1, method="linear")
    low, high = quartiles[0], quartiles[1]
    return (scores > (high + _IQR * (high - low))[:, None]).sum(axis=1)


def select(
    system: PruMerge, scores: Float[Array, "B P"], *, counts: Int[Array, "B"] | None = None
) -> Kept:
    """The patches to keep.

    Args:
        system: how many, in which order.
        scores: of every patch.
        counts: outliers of each image, where they are not to be counted.
    """
    images, patches = scores.shape
    top = jax.lax.top_k(scores, system.top(patches))[1]
    if system.ratio is None:
        counts = count_outliers(scores) if counts is None else counts
        # The released arithmetic in float64: a share, then a number of patches.
        numbers = np.array([int(patches * (c / patches)) for c in range(patches + 1)], np.int32)
        count = jnp.minimum(_look_up(numbers, counts), top.shape[1])
        first = jnp.arange(top.shape[1]) < count[:, None]
        if not system.plus:
            return _align(top, first, system=system)
        steps = [0] + [int(int(1 / (c / patches)) / 3) for c in range(1, patches + 1)]
        step = _look_up(np.array(steps, np.int32), count)[:, None]
        place = jnp.arange(patches)
        spaced = (place % jnp.maximum(step, 1) == 0) & (place < patches - 1) & (step > 0)
        return _align(*_append(top, first, spaced), system=system)
    first = jnp.ones_like(top, bool)
    if not system.plus:
        return _align(top, first, system=system, full=True)
    places = system.places(patches)
    if system.repeats:
        spaced = jnp.broadcast_to(places, (images, len(places)))
        index = jnp.concatenate([top, spaced], axis=1)
        return _align(index, jnp.ones_like(index, bool), system=system, full=True)
    regular = jnp.broadcast_to(jnp.isin(jnp.arange(patches), places), scores.shape)
    index, valid = _append(top, first, regular)
    rows = system.rows(patches)
    return _align(index[:, :rows], valid[:, :rows], system=system)


def _look_up(table: Int[np.ndarray, "N"], index: Int[Array, "B"]) -> Int[Array, "B"]:
    """Entries of a short table; a sum, since a mesh cannot tell where a gather's result lies."""
    return jnp.where(jnp.arange(len(table)) == index[:, None], table, 0).sum(axis=1)


def _append(
    top: Int[Array, "B K"], first: Bool[Array, "B K"], spaced: Bool[Array, "B P"]
) -> tuple[Int[Array, "B P"], Bool[Array, "B P"]]:
    """The top patches in their order, then the spaced ones that are not among them, ascending."""
    patches = spaced.shape[1]
    rank = jnp.where(first, jnp.arange(top.shape[1]), 2 * patches)
    place = jnp.where(spaced, patches + jnp.arange(patches), 2 * patches)
    place = jax.vmap(lambda place, top, rank: place.at[top].min(rank))(place, top, rank)
    index = jnp.argsort(place, axis=1)
    return index, jnp.take_along_axis(place, index, axis=1) < 2 * patches


def _align(
    index: Int[Array, "B M"], valid: Bool[Array, "B M"], *, system: PruMerge, full: bool = False
) -> Kept:
    """Empty slots to the front, the rest in the order that the system asks for."""
    order = (
        index
        if system.order == "raster"
        else jnp.broadcast_to(jnp.arange(index.shape[1]), index.shape)
    )
    if not full or system.order == "raster":
        by = jnp.argsort(jnp.where(valid, order, -1), axis=1, stable=True)
        index, valid = (take_rows(array, by) for array in (index, valid))
    return Kept(index=index, valid=valid, full=full)


def find_rest(kept: Kept, patches: int) -> Bool[Array, "B P"]:
    """What counts as dropped.

    As released: where a patch is kept twice, the lowest patch that nobody kept is forgotten.
    """
    held = jax.nn.one_hot(kept.index, patches, dtype=jnp.int32) * kept.valid[..., None]
    times = held.sum(axis=1)
    twice = jnp.maximum(times - 1, 0).sum(axis=1, keepdims=True)
    other = times == 0
    return other & (jnp.cumsum(other, axis=1) > twice)


def find_nearest(
    keys: Float[Array, "B P C"],
    index: Int[Array, "B M"],
    candidate: Bool[Array, "B M M+P"],
    *,
    count: int,
) -> Int[Array, "B M count"]:
    """The candidates that are most alike by cosine, for each kept patch, in float32.

    Args:
        keys: of the patches.
        index: the kept ones.
        candidate: which of the kept ones, by row, and then of the patches may be taken.
        count: of the nearest.
    """
    wide = keys.astype(jnp.float32)
    units = wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    chosen = take_rows(units, index)
    likeness = _einsum("bmc,bnc->bmn", chosen, jnp.concatenate([chosen, units], axis=1))
    return jax.lax.top_k(jnp.where(candidate, likeness, -jnp.inf), count)[1]


def merge(
    x: Float[Array, "B P C"],
    keys: Float[Array, "B P C"],
    scores: Float[Array, "B P"],
    kept: Kept,
    *,
    neighbors: int,
) -> Float[Array, "B _ C"]:
    """Kept tokens with their neighbors, and the sum of the dropped, in float32.

    Args:
        x: features of the patches, before their last block.
        keys: by whose cosine patches are alike.
        scores: the weight of a patch that is merged.
        kept: which patches are kept.
        neighbors: taken up by each.
    """
    x, patches = x.astype(jnp.float32), x.shape[1]
    rest = find_rest(kept, patches)
    weighted = scores[..., None] * x
    index, rows = kept.index, kept.index.shape[1]

    dropped = _einsum("bp,bpc->bc", rest.astype(x.dtype), weighted)
    tokens = take_rows(x, index)
    if neighbors:
        # A patch that is kept twice is a neighbor of itself, so the kept ones are candidates by
        # row, and the dropped ones by patch.
        candidate = jnp.concatenate([kept.valid, rest], axis=1)[:, None]
        candidate &= ~jnp.eye(rows, rows + patches, dtype=bool)
        nearest = find_nearest(keys, index, candidate, count=neighbors)
        merged = jax.nn.one_hot(nearest, rows + patches, dtype=x.dtype).sum(axis=2) * candidate
        both = jnp.concatenate([take_rows(weighted, index), weighted], axis=1)
        tokens += _einsum("bmn,bnc->bmc", merged, both)
    return jnp.concatenate([tokens, dropped[:, None]], axis=1)
