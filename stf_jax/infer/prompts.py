"""Prompts of different lengths and image counts as one batch of static shape."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stf_jax.data.batch import Batch, ClipLayout
from stf_jax.data.clips import Clip, order_visuals, place_clips
from stf_jax.data.conversation import PromptText
from stf_jax.data.fetch import URL_SCHEMES, fetch
from stf_jax.data.images import ImageError, ImageProcessor, ImageSource, load_image
from stf_jax.data.question import check_prompt, encode_question
from stf_jax.data.tokenizer import (
    IGNORED_LABEL,
    IMAGE_TOKEN_ID,
    Tokenizer,
    encode_prompt,
    expand_images,
)
from stf_jax.data.visuals import Placed, clip_array, place_visuals, tokens_of
from stf_jax.models.cache import KVCache

# Suffixes and questions are short; to pad them to the buckets of whole prompts would double their
# cost.
LEAST_QUESTION = 16


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One prompt, ready for the model.

    Attributes:
        ids: int32 [T], each image already the K placeholders that its tokens will replace.
        pixels: float32 [images, size, size, 3], or what makes them when they are needed.
        budget: K, where the system has several; None is its most.
        image_key: prompts with equal keys have the same images; None equals no other.
        question: int32 [_], what the images are asked, where the model reads it.
        visuals: where the system joins the frames of clips and there are clips: frames of each
            clip, 0 for an image beside them, in the order of the prompt.
        layout: of the clips, likewise.
        cached: what the model keeps of the images, in place of pixels.
    """

    ids: np.ndarray
    pixels: np.ndarray | Callable[[], np.ndarray]
    image_key: Hashable | None = None
    budget: int | None = None
    question: np.ndarray | None = None
    visuals: tuple[int, ...] = ()
    layout: ClipLayout | None = None
    cached: KVCache | None = None

    @property
    def clip_shape(self) -> tuple[int, ...]:
        """Clips, the most frames of one, and images; equal for prompts that a batch can hold."""
        if self.layout is None:
            return ()
        clips = sum(frames > 0 for frames in self.visuals)
        return clips, self.layout.frames, len(self.visuals) - clips

    def place(self, images: int) -> Placed:
        """Where its images and clips stand in a row with room for so many images."""
        assert self.layout is not None
        assert self.budget is not None
        return place_visuals(self.visuals, self.layout, images=images, tokens_per_image=self.budget)

    @property
    def prefix_key(self) -> Hashable | None:
        """Prompts with equal keys have images that become the same tokens."""
        if self.image_key is None or self.question is None:
            return self.image_key
        return self.image_key, self.question.tobytes()

    def until(self, end: int) -> "Prompt":
        """The first `end` positions, pixels loaded; all images must lie before `end`.

        Raises:
            ValueError: more or fewer placeholders than its images have tokens.
        """
        pixels, ids = self.load(), self.ids[:end]
        held = int((ids == IMAGE_TOKEN_ID).sum())
        counted = self.layout is None and self.cached is None
        if counted and self.budget is not None and held != len(pixels) * self.budget:
            raise ValueError(
                f"{len(pixels)} images of {self.budget} tokens and {held} placeholders; make the "
                "two agree"
            )
        return dataclasses.replace(self, ids=ids, pixels=pixels)

    def load(self) -> np.ndarray:
        """The pixels."""
        return self.pixels() if callable(self.pixels) else self.pixels


def make_prompt(
    text: PromptText,
    pixels: np.ndarray | Callable[[], np.ndarray],
    *,
    tokenizer: Tokenizer,
    tokens_per_image: int,
    question_length: int,
    image_key: Hashable | None = None,
    visuals: tuple[int, ...] = (),
    layout: ClipLayout | None = None,
) -> Prompt:
    """`text`, in a template's form, as ids with placeholders for every image.

    Args:
        text: from `render_prompt`, with an `<image>` for each image.
        pixels: from `read_pixels`, or what calls it when they are needed.
        tokenizer: of the model.
        tokens_per_image: K, a budget of the model.
        question_length: of the model's system.
        image_key: as the prompt's.
        visuals: as the prompt's.
        layout: as the prompt's.
    """
    ids = encode_prompt(tokenizer, text)
    question = None
    if question_length:
        check_prompt(text.text)
        question = encode_question(tokenizer, ids, length=question_length)
    return Prompt(
        ids=expand_images(
            ids,
            tokens_per_image=tokens_per_image
            if layout is None
            else tokens_of(visuals, layout, tokens_per_image=tokens_per_image),
        ),
        pixels=pixels,
        budget=tokens_per_image,
        image_key=image_key,
        question=question,
        visuals=visuals,
        layout=layout,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """What a prompt shows.

    Attributes:
        text: of the question, `<image>` for each image and for each frame, or for each clip where
            the system joins frames.
        sources: images and clips in their order.
        visuals: as the prompt's.
        layout: as the prompt's.
    """

    text: str
    sources: tuple[ImageSource | Clip, ...]
    visuals: tuple[int, ...]
    layout: ClipLayout | None

    def load(self) -> list[ImageSource]:
        """The images, and the frames of the clips, decoded."""
        return [
            image
            for source in self.sources
            for image in (source.load() if isinstance(source, Clip) else [source])
        ]


def show(
    question: str,
    images: Sequence[ImageSource],
    clips: Sequence[Clip],
    *,
    layout: ClipLayout | None,
    timestamps: bool = False,
) -> Shown:
    """Images and clips where their markers stand in the question.

    Args:
        question: with an `<image>` for each image and a `<video>` for each clip.
        images: of the prompt.
        clips: of the prompt.
        layout: of the system's clips; None where frames are images.
        timestamps: whether the prompt says when the frames are.

    Raises:
        ValueError: more or fewer markers than there are.
    """
    sources = tuple(order_visuals(question, images, clips))
    visuals: tuple[int, ...] = ()
    if not clips:
        layout = None
    else:
        question = place_clips(question, clips, joined=layout is not None, timestamps=timestamps)
    if layout is not None:
        alone = 0 if layout.after_images else 1
        visuals = tuple(one.count if isinstance(one, Clip) else alone for one in sources)
    return Shown(text=question, sources=sources, visuals=visuals, layout=layout)


def read_pixels(
    images: Sequence[ImageSource],
    image_processor: ImageProcessor,
    *,
    upright: bool,
    unnamed: str = "the image",
    allow_urls: bool = False,
) -> np.ndarray:
    """What the tower sees of images: float32 [images, size, size, 3].

    Args:
        images: where they come from.
        image_processor: of the model.
        upright: turn a photograph as its owner sees it; LLaVA's own code ignores EXIF.
        unnamed: what errors call an image that is no file.
        allow_urls: whether an image may be a URL.

    Raises:
        ImageError: an image that cannot be used, by its name.
    """
    size = image_processor.image_size
    pixels = np.zeros((len(images), size, size, 3), np.float32)
    for image, out in zip(images, pixels, strict=True):
        name = str(image) if isinstance(image, str | Path) else unnamed
        if allow_urls and isinstance(image, str) and image.startswith(URL_SCHEMES):
            image = fetch(image)
        loaded = load_image(image, name=name, apply_orientation=upright)
        try:
            out[...] = image_processor.pixels(loaded)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error
    return pixels


def bucket(length: int, *, least: int = 64) -> int:
    """The next of 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, ...

    Above 64 at most a third is padding, above 512 a fifth. `least`, a power of two, is where the
    sizes begin.
    """
    size = least
    while size < length:
        power = 1 << (size.bit_length() - 1)
        size += power // (2 if power < 512 else 4)
    return size


def pad_prompts(
    prompts: Sequence[Prompt],
    *,
    rows: int,
    image_size: int,
    uniform: bool = False,
    images: int | None = None,
) -> Batch:
    """Pads prompts to the next bucket of the longest, to `images` or the most, to `rows`.

    They have one budget and one `clip_shape`, and where they are `uniform` as many images each.
    Rows beyond the prompts hold one token, so that nothing they compute is undefined.
    """
    loaded = [prompt.load() for prompt in prompts]
    length = bucket(max(len(prompt.ids) for prompt in prompts))
    images = max(map(len, loaded)) if images is None else images
    if prompts[0].layout is not None:
        # The same for all clips of at most so many frames.
        clips, frames, beside = prompts[0].clip_shape
        images = clips * frames + beside
    shape = (rows, length)
    # Host arrays in a batch are what `jax.jit` and `jax.device_put` take.
    ids: Any = np.zeros(shape, np.int32)
    segments: Any = np.zeros(shape, np.int32)
    image_slots: Any = np.full(shape, -1, np.int32)
    pixels: Any = np.zeros((rows, images, image_size, image_size, 3), np.float32)
    labels: Any = np.full(shape, IGNORED_LABEL, np.int32)
    positions: Any = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    segments[:, 0] = 1
    for row, (prompt, shown) in enumerate(zip(prompts, loaded, strict=True)):
        size = len(prompt.ids)
        at_image = prompt.ids == IMAGE_TOKEN_ID
        ids[row, :size] = prompt.ids
        segments[row, :size] = 1
        image_slots[row, :size][at_image] = (
            np.arange(at_image.sum()) if prompt.layout is None else prompt.place(images).slots
        )
        pixels[row, : len(shown)] = shown
    return Batch(
        ids=ids,
        labels=labels,
        positions=positions,
        segments=segments,
        image_slots=image_slots,
        pixels=pixels,
        budget=prompts[0].budget,
        uniform=uniform,
        **_pad_questions(prompts, rows=rows, images=images),
        **_place_clips(prompts, rows=rows),
    )


def _place_clips(prompts: Sequence[Prompt], *, rows: int) -> dict[str, Any]:
    """Which of a row's images are the frames of each clip; nothing where no prompt has clips."""
    if prompts[0].layout is None:
        return {}
    clips, frames, beside = prompts[0].clip_shape
    images = clips * frames + beside
    placed = [prompt.place(images).clips for prompt in prompts]
    placed += [()] * (rows - len(prompts))
    return {"clips": clip_array(placed, clips=clips, frames=frames)}


def _pad_questions(prompts: Sequence[Prompt], *, rows: int, images: int) -> dict[str, Any]:
    """What each image is asked, padded to a bucket; nothing where no prompt has a question."""
    asked = [prompt.question for prompt in prompts if prompt.question is not None]
    if not asked or not images:
        return {}
    length = bucket(max(map(len, asked)), least=LEAST_QUESTION)
    questions = np.zeros((rows, images, length), np.int32)
    lengths = np.ones((rows, images), np.int32)
    for row, prompt in enumerate(prompts):
        if prompt.question is not None:
            questions[row, :, : len(prompt.question)] = prompt.question
            lengths[row] = len(prompt.question)
    return {"questions": questions, "question_lengths": lengths}
