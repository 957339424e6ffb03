"""VQToken: neural discrete tokens for video (arXiv 2503.16980).

All tokens of all frames of a clip, projected, become one codebook:

1. Clustering (section 3.2): unit vectors, K-means by cosine, with K fixed or found per clip.
2. Codebook: the mean of each cluster. Index map: which cluster each patch of each frame is in.
3. VQ-Attn (section 3.3): one decoder layer whose queries are the frames' rows of the index map, and
   whose memory is the codebook. The released code feeds the codebook itself to the language model.

A learned row, `image_newline`, ends a clip. An image passes through as it is, or is a clip of one
frame (`images`). Clusters are numbered by what they begin with, and VQ-Attn reads their numbers.
Clips begin with tokens at evenly spread places in a shuffled order, the same for every clip; the
released code draws them anew each time. Dropout of VQ-Attn is left out, as in all systems here.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from stf_jax.config.checks import check_positive
from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.batch import ClipLayout
from stf_jax.models.clustering import (
    average_clusters,
    choose_seeds,
    find_clusters,
    normalize,
)
from stf_jax.models.connector import Connector, Tokens
from stf_jax.models.layers import MLP, Init, LayerNorm, Linear, PackedAttention
from stf_jax.models.selection import take_rows
from stf_jax.models.weights import (
    SAME,
    Entry,
    attention_entries,
    linear_entries,
    make_entry,
    norm_entries,
)
from stf_jax.systems.base import System
from stf_jax.systems.shapes import Shapes, matrix

_ATTENTION, _NEWLINE = "cross_attention.", "image_newline"
_LAYER = f"{_ATTENTION}transformer_decoder.layers.0."
_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQToken(System):
    """Defaults: 32 clusters, VQ-Attn, images untouched.

    Attributes:
        clusters: K of a clip; with `adaptive`, the most that are tried.
        adaptive: whether each clip has its own K, where the error's curve bends most (elbow).
        least: with `adaptive`, the fewest that are tried.
        slip: with `adaptive`, count the bend from 4 on, as released, and not from `least` + 1 on.
        steps: of K-means, at most; released: 50, and 100 with `adaptive`.
        output: what the language model sees: VQ-Attn's rows, or the codebook itself (as released).
        images: whether an image passes through whole, as published, or is a clip of one frame.
        heads: of VQ-Attn.
        attention_width: of VQ-Attn's feed-forward network.
        seed: of the order of the places that clusters begin with.
    """

    clusters: int = 32
    adaptive: bool = False
    least: int = 12
    slip: bool = True
    steps: int = 50
    output: Literal["attention", "codebook"] = "attention"
    images: Literal["whole", "clip"] = "whole"
    heads: int = 8
    attention_width: int = 2048
    seed: int = 0

    name: ClassVar[str] = "vqtoken"
    title: ClassVar[str] = "VQToken"
    family: ClassVar[str] = "llava_vqtoken"
    # With 32 clusters, of LLaVA-OneVision-0.5B (paper, table 1).
    published: ClassVar = {"nextqa": 57.46}
    prefixes: ClassVar = {"mm_projector.": "llava", _ATTENTION: "llava", _NEWLINE: "llava"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "clusters", "least", "steps", "heads", "attention_width")
        if self.adaptive and not 2 <= self.least <= self.clusters - 2:
            raise ValueError(
                f"VQToken.least is {self.least} and clusters is {self.clusters}; an elbow needs 2 "
                "or more, and three numbers to choose among"
            )

    @classmethod
    def proportions(cls, vision: VisionConfig, text: TextConfig) -> dict[str, Any]:
        """An image is a clip of one frame; no more clusters than a quarter of its patches."""
        return {
            "clusters": min(cls.clusters, max(vision.patches // 4, 1)),
            "images": "clip",
            "attention_width": min(cls.attention_width, 4 * text.width),
        }

    def check(self, vision: VisionConfig, text: TextConfig) -> None:
        """One frame has as many patches as there are clusters, and the heads divide the width."""
        super().check(vision, text)
        if self.clusters > vision.patches:
            raise ValueError(f"clusters is {self.clusters}; a frame has {vision.patches} patches")
        if text.width % self.heads:
            raise ValueError(
                f"heads is {self.heads}, which does not divide the language model's width "
                f"{text.width}"
            )

    @property
    def most(self) -> int:
        """The most clusters that a clip can have in the end."""
        if not self.adaptive:
            return self.clusters
        bend = self.clusters - self.least - 2  # The last place of a bend.
        return max(self.least, bend + 4) if self.slip else self.least + 1 + bend

    def clip_tokens(self, frames: int) -> int:
        """Slots of a clip of so many frames, the last row among them."""
        rows = max(frames, self.most) if self.output == "attention" else self.most
        return rows + 1

    def clip_layout(self, frames: int) -> ClipLayout:
        """The frames of a clip are joined."""
        whole = self.images == "whole"
        return ClipLayout(frames=frames, tokens=self.clip_tokens(frames), after_images=whole)

    def tokens(self, vision: VisionConfig) -> int:
        """Of an image; the last row is `image_newline`."""
        return vision.patches + 1 if self.images == "whole" else self.clip_tokens(1)

    def connector(self, vision: VisionConfig, text: TextConfig, *, init: Init) -> Connector:
        """LLaVA-1.5's projector, then the codebook."""
        return VQTokenConnector(self, vision, text, init=init)

    def hf_code(self, vision: VisionConfig) -> dict[str, Any]:
        """What becomes of an image; clips of several frames have no place there."""
        if self.adaptive and self.images == "clip":
            raise ValueError(
                "all images need one number of tokens, and VQToken with adaptive finds a number "
                "for each; import it with --system vqtoken --field adaptive=false"
            )
        patches = np.array([vision.patches], np.int32)
        seeds = choose_seeds(jnp.asarray(patches), count=self.clusters, seed=self.seed)
        return {
            "kind": self.name,
            "images": self.images,
            "output": self.output,
            "patches": vision.patches,
            "seeds": np.asarray(seeds)[0].tolist(),
            "steps": self.steps,
            "heads": self.heads,
            "attention_width": self.attention_width,
        }

    def flops(self, vision: VisionConfig, text: TextConfig) -> float:
        """Of an image; K-means counts as one step, since nobody knows how many there will be."""
        patches, width = vision.patches, text.width
        projector = patches * self.projector_width * (vision.width + width)
        if self.images == "whole":
            return 2.0 * projector
        tried = self.clusters - self.least + 1 if self.adaptive else 1
        means = (2 * tried * self.clusters + self.most) * patches * width
        rows = self.clip_tokens(1) - 1
        attention = rows * (patches * width + 8 * width**2 + 4 * rows * width)
        attention += 2 * rows * width * self.attention_width
        return 2.0 * (projector + means + (attention if self.output == "attention" else 0))

    def tensor_sizes(self) -> dict[str, int]:
        """The projector's, and the feed-forward network's."""
        return {**super().tensor_sizes(), "attention_width": self.attention_width}

    def weights(self, vision: VisionConfig, text: TextConfig) -> tuple[Entry, ...]:
        """The released names."""
        width, inner, at = text.width, self.attention_width, "connector/attention"
        entries = [
            make_entry("connector/newline", _NEWLINE, (width,), (width,), SAME),
            *linear_entries(
                f"{at}/query", f"{_ATTENTION}to_q_proj", inputs=vision.patches, outputs=width
            ),
        ]
        for native, torch in (("self_attention", "self_attn"), ("cross", "multihead_attn")):
            entries += attention_entries(
                f"{at}/{native}", _LAYER + torch, width=width, heads=self.heads
            )
        for number, inputs, outputs in ((1, width, inner), (2, inner, width)):
            entries += linear_entries(
                f"{at}/mlp/linear_{number}",
                f"{_LAYER}linear{number}",
                inputs=inputs,
                outputs=outputs,
            )
        for number in (1, 2, 3):
            entries += norm_entries(f"{at}/norm_{number}", f"{_LAYER}norm{number}", width=width)
        return (*entries, *super().weights(vision, text))

    @classmethod
    def recognizes(cls, shapes: Shapes, vision: VisionConfig) -> bool:
        """There is a VQ-Attn."""
        return f"{_ATTENTION}to_q_proj.weight" in shapes

    @classmethod
    def own_fields(cls, shapes: Shapes) -> dict[str, Any]:
        """The weights tell one width; clusters, heads and the path are no weights."""
        inner, _ = matrix(shapes, f"{_LAYER}linear1.weight")
        return {"attention_width": inner}


class VQTokenConnector(Connector):
    """Every frame is projected; then the frames of a clip become one codebook."""

    def __init__(self, system: VQToken, vision: VisionConfig, text: TextConfig, *, init: Init):
        self.system = system
        self.newline = init.normal(text.width, spec=init.rules.vector)
        self.attention = VQAttention(
            vision.patches,
            text.width,
            inner=system.attention_width,
            heads=system.heads,
            init=init,
        )
        super().__init__(**system.widths(vision, text), init=init)

    def join(
        self, tokens: Tokens, *, rows: int, clips: Int[Array, "B C F"] | None = None
    ) -> Tokens:
        """Images first, where they pass through, then clips; the last row of each is learned."""
        count, patches, width = tokens.values.shape
        images = self._reshape(tokens.values, rows, count // rows, patches, width)
        parts = []
        if self.system.images == "whole":
            ended = self._end(tokens.values)
            valid = None if clips is None else self._full(ended.shape[:2], True)
            parts.append(Tokens(values=ended, valid=valid))
        elif clips is None:
            # Each image is a clip.
            present = self._full((count, 1), True)
            parts.append(self.reduce_clips(tokens.values[:, None], present))
        if clips is not None:
            frames = clips.shape[1] * clips.shape[2]
            index = self._reshape(clips, rows, frames)
            taken = take_rows(images, jnp.maximum(index, 0))
            shape = (rows * clips.shape[1], clips.shape[2])
            present = self._reshape(clips, *shape) >= 0
            parts.append(self.reduce_clips(self._reshape(taken, *shape, patches, width), present))
        joined = [super(VQTokenConnector, self).join(part, rows=rows) for part in parts]
        whole: Tokens = jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), *joined)
        return whole

    def reduce_clips(self, tokens: Float[Array, "M F P H"], present: Bool[Array, "M F"]) -> Tokens:
        """M clips in `clip_tokens` slots; a clip's frames come first, the rest is not present."""
        system = self.system
        clips, most, patches, width = tokens.shape
        frames = present.sum(axis=1)
        with jax.named_scope("vqtoken"):
            units = normalize(tokens)
            flat = self._reshape(units, clips, most * patches, width)
            mask = jnp.repeat(present, patches, axis=1)
            order = choose_seeds(frames * patches, count=system.clusters, seed=system.seed)
            found = quantize(system, jax.lax.stop_gradient(flat), mask, order)
            codebook = average_clusters(flat, mask, found.labels, count=system.most)
            codebook = codebook.astype(tokens.dtype)
            if system.output == "codebook":
                values, valid = align(codebook, found.clusters, rows=system.most)
            else:
                labels = self._reshape(found.labels, clips, most, patches).astype(tokens.dtype)
                values, valid = self.attention(labels, codebook, frames, found.clusters)
        return Tokens(
            values=self._end(values),
            valid=jnp.concatenate([valid, jnp.ones_like(valid[:, :1])], axis=1),
        )

    def _end(self, values: Float[Array, "M K H"]) -> Float[Array, "M K+1 H"]:
        """The learned row behind each."""
        row = self._full((len(values), 1, values.shape[2]), self.newline[...])
        return jnp.concatenate([values, row.astype(values.dtype)], axis=1)

    def _reshape(self, array: Array, *shape: int) -> Array:
        return jax.lax.reshape(array, shape, out_sharding=self.rules.tokens)

    def _full(self, shape: tuple[int, ...], value: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(value), shape, out_sharding=self.rules.tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Clusters:
    """What K-means finds in M clips.

    Attributes:
        labels: the cluster of each token; means nothing where there is no token.
        clusters: how many there are.
        distortions: with `adaptive`, the squared error for each number that was tried.
    """

    labels: Int[Array, "M n"]
    clusters: Int[Array, "M"]
    distortions: Float[Array, "M _"] | None = None


def quantize(
    system: VQToken,
    units: Float[Array, "M n H"],
    mask: Bool[Array, "M n"],
    order: Int[Array, "M K"],
) -> Clusters:
    """Clusters of the tokens of each clip.

    Args:
        system: how many.
        units: unit vectors; no gradient flows through labels.
        mask: whether there is a token.
        order: the tokens that clusters begin with.
    """
    start = take_rows(units, order)
    if not system.adaptive:
        used = jnp.ones((1, system.clusters), bool)
        labels, _ = find_clusters(units, mask, start, used, steps=system.steps)
        return Clusters(labels=labels[:, 0], clusters=jnp.full_like(order[:, 0], system.clusters))
    tried = np.arange(system.least, system.clusters + 1, dtype=np.int32)
    used = jnp.asarray(np.arange(system.clusters) < tried[:, None])
    labels, centroids = find_clusters(units, mask, start, used, steps=system.steps)
    missed = units[:, None] - jnp.take_along_axis(centroids, labels[..., None], axis=2)
    distortions = jnp.where(mask[:, None], jnp.square(missed).sum(axis=-1), 0).sum(axis=-1)
    bend = jnp.argmax(jnp.diff(distortions, 2, axis=1), axis=1).astype(jnp.int32)
    chosen = jnp.maximum(bend + 4, system.least) if system.slip else bend + system.least + 1
    labels = jnp.take_along_axis(labels, (chosen - system.least)[:, None, None], axis=1)[:, 0]
    return Clusters(labels=labels, clusters=chosen, distortions=distortions)


def place(rows: int, length: Int[Array, "M"]) -> Int[Array, "M R"]:
    """The number of each row, the last ones of which are `length`; below 0 there is none."""
    return jnp.arange(rows, dtype=jnp.int32) - (rows - length[:, None])


def align(
    values: Float[Array, "M K H"], length: Int[Array, "M"], *, rows: int
) -> tuple[Float[Array, "M R H"], Bool[Array, "M R"]]:
    """The first `length` rows at the end of `rows` slots, and which slots hold one."""
    number = place(rows, length)
    return take_rows(values, jnp.maximum(number, 0)), number >= 0


class VQAttention(nnx.Module):
    """Rows of the index map look at the codebook: one post-norm decoder layer.

    The shorter of the two is repeated until it is as long as the other. So there are as many
    different rows as frames, and numbers of clusters count as numbers.
    """

    def __init__(self, patches: int, width: int, *, inner: int, heads: int, init: Init):
        self.rules, vector = init.rules, init.rules.vector
        self.query = Linear((patches,), (width,), init=init, kernel=vector, bias=vector)
        self.self_attention, self.cross = (
            MaskedAttention(width, heads, init=init) for _ in range(2)
        )
        self.mlp = MLP(width, inner, width, init=init)
        self.norm_1, self.norm_2, self.norm_3 = (
            LayerNorm(width, epsilon=_NORM_EPS, init=init) for _ in range(3)
        )
        for norm in (self.norm_1, self.norm_2, self.norm_3):
            # As released, nearly silent at first.
            norm.scale = init.normal(width, spec=vector, stddev=0.01)

    def __call__(
        self,
        labels: Float[Array, "M F P"],
        codebook: Float[Array, "M K H"],
        frames: Int[Array, "M"],
        clusters: Int[Array, "M"],
    ) -> tuple[Float[Array, "M R H"], Bool[Array, "M R"]]:
        """As many rows as there are frames or clusters, at the end of the slots; which are some.

        Args:
            labels: the index map.
            codebook: of the clips.
            frames: of each clip, 1 or more of the F.
            clusters: of each clip, of the K.
        """
        rows = max(labels.shape[1], codebook.shape[1])
        number = place(rows, jnp.maximum(frames, clusters))
        valid = number >= 0

        def repeat(x: Float[Array, "M _ C"], length: Int[Array, "M"]) -> Float[Array, "M R C"]:
            index = jnp.maximum(number, 0) % jnp.maximum(length, 1)[:, None]
            return take_rows(x, index)

        x = self.query(repeat(labels, frames), out=self.rules.tokens)
        memory = repeat(codebook, clusters)
        x = self.norm_1(x + self.self_attention(x, x, valid))
        x = self.norm_2(x + self.cross(x, memory, valid))
        return self.norm_3(x + self.mlp(x, activation=jax.nn.relu)), valid


class MaskedAttention(PackedAttention):
    """Every row looks at all rows that hold something."""

    def __call__(
        self,
        x: Float[Array, "M R C"],
        memory: Float[Array, "M R C"],
        valid: Bool[Array, "M R"],
    ) -> Float[Array, "M R C"]:
        """What each gathers."""
        query, key, value = self.split(x, memory, memory)
        return self.join(
            jax.nn.dot_product_attention(query, key, value, mask=valid[:, None, None, :])
        )
