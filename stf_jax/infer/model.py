"""A model as a user holds it: weights, tokenizer and image processor, ready to answer.

model = stf_jax.load("llava-stf-7b")
(answer,) = model.generate([Request(prompt="What is this?", images=["cat.jpg"])])
"""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from etils import epath
from jax.sharding import Mesh

from stf_jax.data.clips import (
    UNIFORM,
    ClipSource,
    FrameSampling,
    open_clip,
)
from stf_jax.data.conversation import render_prompt
from stf_jax.data.fit import fit_template, stop_ids
from stf_jax.data.images import ImageError, ImageProcessor, ImageSource
from stf_jax.data.templates import IMAGE_MARKER, VIDEO_MARKER, Template
from stf_jax.data.tokenizer import Tokenizer
from stf_jax.infer.answers import Answer, AnswerBuilder
from stf_jax.infer.engine import Engine
from stf_jax.infer.image_cache import ImageCache, encode, identity, read
from stf_jax.infer.prompts import Prompt, make_prompt, read_pixels, show
from stf_jax.infer.sampling import GREEDY, Sampling
from stf_jax.models.cache import CacheDType
from stf_jax.models.llava import Llava

# Steps between looks at the tokens: few enough for text to flow, many enough to be fast.
_STREAM_EVERY = 4
_STOP_EVERY = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A question about images.

    Attributes:
        prompt: the question. `<image>` marks where each image stands, `<video>` each clip; without
            any mark they come first, as in training.
        images: paths, bytes, Pillow images or uint8 [h, w, 3] of numpy; a single one, too; None
            is no image. Or all of them as `Model.encode_images` gave them.
        clips: video files, folders of frames, or uint8 [frames, h, w, 3] of numpy; a single one,
            too; None is no clip.
        sampling: which frames of a clip are shown.
        clip_fps: frames a second of folders and arrays, where it is known.
        timestamps: whether the prompt says when the frames are.
    """

    prompt: str
    images: ImageSource | Sequence[ImageSource] | ImageCache | None = ()
    clips: ClipSource | Sequence[ClipSource] | None = ()
    sampling: FrameSampling = UNIFORM
    clip_fps: float | None = None
    timestamps: bool = False


class Model:
    """Make one with `stf_jax.load`."""

    def __init__(
        self,
        network: Llava,
        *,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        mesh: Mesh | None = None,
        cache_dtype: CacheDType | None = None,
    ):
        self.network, self.config = network, network.config
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.engine = Engine(network, mesh=mesh, cache_dtype=cache_dtype)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        template: str = "v1",
        max_new_tokens: int = 512,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        slots: int = 16,
        allow_urls: bool = False,
        tokens: int | None = None,
    ) -> list[Answer]:
        """Answers requests, in order; those about the same images share work.

        In float32 an answer does not depend on its neighbors. In bfloat16 its later tokens may: a
        matmul over another number of rows sums in another order, and bfloat16 rounds the difference
        to one that tips a close choice. Ask one by one where answers must be the same again.

        Args:
            requests: of any length and number of images.
            template: the form of the prompt; see `stf_jax.data.templates.TEMPLATES`.
            max_new_tokens: where an answer is cut.
            sampling: greedy by default.
            stop: strings that end an answer, besides the template's own.
            on_text: called with a request's index and its new text, as text comes.
            slots: how many answers are in the making at a time; what memory has room for.
            allow_urls: whether an image may be a URL, which is fetched; see `fetch`.
            tokens: an image, where the system has several budgets; by default its most.

        Raises:
            ImageError: an image that cannot be used.
            TypeError: no list of requests.
            ValueError: a template that is unknown or does not fit the tokenizer, an empty prompt,
                one that is too long, or more or fewer `<image>` than images.
        """
        form = fit_template(template, self.tokenizer)
        prompts = self.make_prompts(requests, template=form, allow_urls=allow_urls, tokens=tokens)
        if not prompts:
            return []
        answers = dict(
            self.answer(
                prompts,
                template=form,
                slots=min(slots, len(prompts)),
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop=[stop] if isinstance(stop, str) else stop,
                on_text=on_text,
            )
        )
        return [answers[number] for number in range(len(prompts))]

    def make_prompts(
        self,
        requests: Sequence[Request],
        *,
        template: Template,
        allow_urls: bool = False,
        tokens: int | None = None,
    ) -> list[Prompt]:
        """What `answer` takes, of each request.

        Args:
            requests: as for `generate`, and likewise the others.
            template: from `fit_template`.
            allow_urls: likewise.
            tokens: likewise.

        Raises:
            ImageError: an image that cannot be used.
            TypeError: no list of requests.
            ValueError: as `generate`.
        """
        if isinstance(requests, Request | str):
            raise TypeError("this takes a list: write [Request(prompt=...)]")
        given: Sequence[object] = requests
        for request in given:
            if not isinstance(request, Request):
                raise TypeError(
                    f"this takes a list of Request, not of {type(request).__name__}: write "
                    "[Request(prompt=..., images=...)]"
                )
        tokens = self.config.choose_budget(tokens)
        prompts = []
        for number, request in enumerate(requests, start=1):
            try:
                prompts.append(self._prompt(request, template, tokens, allow_urls=allow_urls))
            except ValueError as error:
                if len(requests) == 1:
                    raise
                kind = ImageError if isinstance(error, ImageError) else ValueError
                raise kind(f"request {number} of {len(requests)}: {error}") from error
        return prompts

    def encode_images(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        template: str = "v1",
        allow_urls: bool = False,
        tokens: int | None = None,
    ) -> ImageCache:
        """What the model keeps of images, for any number of questions, with `ImageCache.save`.

        Args:
            images: as for a request; one or more, which come first in its prompt.
            template: as for `generate`, and likewise the others; requests need the same.
            allow_urls: likewise.
            tokens: likewise.

        Raises:
            ImageError: an image that cannot be used.
            ValueError: no image, or a system that looks at the question before it keeps anything.
        """
        form, tokens = fit_template(template, self.tokenizer), self.config.choose_budget(tokens)
        prompt = self._prompt(
            Request(prompt="?", images=images), form, tokens, allow_urls=allow_urls
        )
        split = self.config.system.split(prompt.ids)
        if prompt.question is not None or split.start < split.prefilled:
            raise ValueError(
                "this model keeps of an image what the question wants; give the images with each "
                "request"
            )
        if not len(prompt.load()):
            raise ValueError("there is no image to encode; give one or more")
        return encode(self.engine.program, prompt.until(split.prefilled))

    def load_images(self, path: epath.PathLike) -> ImageCache:
        """What `ImageCache.save` wrote of this model.

        Raises:
            CheckpointError: a file that is missing or damaged, or of another model.
        """
        return read(path, self.engine.program)

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        template: Template,
        max_new_tokens: int,
        sampling: Sampling,
        slots: int,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Yields the number of a prompt and its answer, in the order in which they are complete.

        Args:
            prompts: their pixels may be made when they are needed, in other threads.
            template: of the prompts, from `fit_template`; it says what ends an answer.
            max_new_tokens: as for `generate`, and likewise the others.
            sampling: likewise.
            slots: likewise.
            stop: likewise.
            on_text: likewise.

        Raises:
            ValueError: as `generate`.
        """
        builders = defaultdict[int, AnswerBuilder](partial(self.make_builder, template, stop))
        _ = builders[0]  # Stops that cannot be are refused now, before the first token.

        def emit(number: int, text: str) -> None:
            if text and on_text:
                on_text(number, text)

        def take(number: int, ids: np.ndarray) -> bool:
            emit(number, builders[number].push(ids))
            return not builders[number].finished

        # The devices themselves stop at the model's own end of text alone.
        stops = template.stop_strings or stop or self._stop_ids(template) - self._own_stop_ids
        for number in self.engine.run(
            prompts,
            slots=slots,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            every=_STREAM_EVERY if on_text else _STOP_EVERY if stops else max_new_tokens,
            take=take,
        ):
            builder = builders.pop(number)
            emit(number, builder.finish())
            yield number, builder.build(prompts[number])

    def make_builder(self, template: Template, stop: Sequence[str] = ()) -> AnswerBuilder:
        """What turns this model's ids into text, to where the template or a string ends it."""
        return AnswerBuilder(
            self.tokenizer,
            stop_ids=self._stop_ids(template) | self._own_stop_ids,
            stops=(*template.stop_strings, *stop),
        )

    def _stop_ids(self, template: Template) -> frozenset[int]:
        return stop_ids(template, self.tokenizer)

    @property
    def _own_stop_ids(self) -> frozenset[int]:
        return frozenset(self.config.text.eos_ids)

    def _prompt(
        self, request: Request, template: Template, tokens: int, *, allow_urls: bool
    ) -> Prompt:
        """Text to ids with a placeholder for each vision token, images to pixels."""
        images, sources, question = request.images, request.clips, request.prompt
        if isinstance(images, ImageCache):
            return self._cached_prompt(request, images, template, tokens)
        if images is None:
            images = ()
        elif isinstance(images, ImageSource):
            images = [images]
        if sources is None:
            sources = ()
        elif isinstance(sources, ClipSource):
            sources = [sources]
        clips = [open_clip(source, request.sampling, fps=request.clip_fps) for source in sources]
        if not request.prompt.replace(IMAGE_MARKER, "").replace(VIDEO_MARKER, "").strip():
            raise ValueError("the prompt is empty; ask something")
        for marker, shown_first in ((VIDEO_MARKER, clips), (IMAGE_MARKER, images)):
            if marker not in request.prompt:
                question = f"{marker}\n" * len(shown_first) + question
        shown = show(
            question,
            images,
            clips,
            layout=self.config.system.clip_layout(request.sampling.frames),
            timestamps=request.timestamps,
        )
        pixels = read_pixels(
            shown.load(), self.image_processor, upright=True, allow_urls=allow_urls
        )
        return make_prompt(
            render_prompt(shown.text, template=template),
            pixels,
            tokenizer=self.tokenizer,
            tokens_per_image=tokens,
            question_length=self.config.question_length,
            image_key=(hashlib.sha256(pixels.tobytes()).digest(), shown.visuals)
            if shown.sources
            else None,
            visuals=shown.visuals,
            layout=shown.layout,
        )

    def _cached_prompt(
        self, request: Request, images: ImageCache, template: Template, tokens: int
    ) -> Prompt:
        """The prompt of a question about images that were encoded before."""
        question = request.prompt
        if request.clips is not None and (isinstance(request.clips, ClipSource) or request.clips):
            raise ValueError("a request has encoded images or clips, not both; leave out one")
        if not question.replace(IMAGE_MARKER, "").strip():
            raise ValueError("the prompt is empty; ask something")
        if images.model != identity(self.engine.program):
            raise ValueError("the images were encoded by another model; encode them with this one")
        if IMAGE_MARKER not in question:
            question = f"{IMAGE_MARKER}\n" * images.images + question
        prompt = make_prompt(
            render_prompt(question, template=template),
            np.zeros((0, 1, 1, 3), np.float32),
            tokenizer=self.tokenizer,
            tokens_per_image=tokens,
            question_length=0,
            image_key=images,
        )
        end = self.config.system.split(prompt.ids).prefilled
        if not np.array_equal(prompt.ids[:end], images.ids):
            raise ValueError(
                "the images were encoded for another prompt; encode them with this template and "
                "number of tokens, and put no text in front of them"
            )
        return dataclasses.replace(prompt, cached=images.cache)
