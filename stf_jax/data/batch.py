"""One batch: what the data pipeline makes and the model reads. Every shape is static."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int, UInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipLayout:
    """The slots of a clip, where a system joins the frames of a clip to one thing.

    Attributes:
        frames: F, the most that a clip has.
        tokens: slots of a clip.
        after_images: I*K slots of images come before those of clips; else an image is a clip.
    """

    frames: int
    tokens: int
    after_images: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows of T positions with up to I images each.

    Attributes:
        ids: token ids; what stands at the position of an image token is never read.
        labels: the id that each position *is*, where it is supervised, else `IGNORED_LABEL`. The
            loss shifts.
        positions: rotary positions, from 0 in each segment.
        segments: which conversation of a packed row a position belongs to, from 1; 0 is padding.
        image_slots: index into the row's image tokens, -1 where text is: I*K of its images, behind
            them those of its clips, where the system joins frames.
        pixels: images, channels last, zeros where a row has fewer than I; normalized for the model,
            8-bit values on their way into a training step. Of no height and width where `features`
            stand in their place.
        features: of the images, where a frozen tower has computed them before:
            `VisionFeatures.pack`.
        questions: ids of what each image is asked, where the system reads it.
        question_lengths: of these, without padding; 1 or more.
        clips: the images that are the frames of each clip, where the system joins them; -1 behind
            the last frame of a clip.
        budget: K, where the system has several; None is its most.
        uniform: whether every row holds all of its I images, so that layers which drop tokens of
            images have fewer slots; rows of padding aside.
    """

    ids: Int[Array, "B T"]
    labels: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    image_slots: Int[Array, "B T"]
    pixels: Float[Array, "B I height width 3"] | UInt8[Array, "B I height width 3"]
    features: Float[Array, "B I N C"] | None = None
    questions: Int[Array, "B I Q"] | None = None
    question_lengths: Int[Array, "B I"] | None = None
    clips: Int[Array, "B C F"] | None = None
    budget: int | None = dataclasses.field(default=None, metadata={"static": True})
    uniform: bool = dataclasses.field(default=False, metadata={"static": True})
