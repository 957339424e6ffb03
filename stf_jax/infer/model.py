"""A model as a user holds it: weights, tokenizer and image processor, ready to answer.

model = stf_jax.load("llava-stf-7b")
(answer,) = model.generate([Request(prompt="What is this?", images=["cat.jpg"])])
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from stf_jax.data.conversation import IMAGE_MARKER, Template, get_template, render_prompt
from stf_jax.data.images import ImageProcessor, ImageSource, load_image
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID, Tokenizer, encode_prompt, expand_images
from stf_jax.infer.answers import Answer, AnswerBuilder
from stf_jax.infer.engine import Engine
from stf_jax.infer.prompts import Prompt
from stf_jax.infer.sampling import GREEDY, Sampling
from stf_jax.models.cache import CacheDType
from stf_jax.models.llava import Llava

# Steps between looks at the tokens: few enough for text to flow, many enough to be fast.
_STREAM_EVERY = 4
_STOP_EVERY = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A question about pictures.

    Attributes:
        prompt: the question. `<image>` marks where each picture stands; without any mark the
            pictures come first, as in training.
        images: paths, bytes, Pillow images or uint8 [h, w, 3] of numpy; a single one, too; None
            is no image.
    """

    prompt: str
    images: ImageSource | Sequence[ImageSource] | None = ()


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
    ) -> list[Answer]:
        """Answers requests, in order; those about the same pictures share work.

        In float32 an answer does not depend on its neighbours. In bfloat16 its later tokens may: a
        matmul over another number of rows sums in another order, and bfloat16 rounds the difference
        to one that tips a close choice. Ask one by one where answers must be the same again.

        Args:
            requests: of any length and number of images.
            template: the form of the prompt; see `stf_jax.data.conversation.TEMPLATES`.
            max_new_tokens: where an answer is cut.
            sampling: greedy by default.
            stop: strings that end an answer, besides the template's own.
            on_text: called with a request's index and its new text, as text comes.
            slots: how many answers are in the making at a time; what memory has room for.

        Raises:
            ImageError: a picture that cannot be used.
            TypeError: no list of requests.
            ValueError: an unknown template, an empty prompt, one that is too long, or more or fewer
                `<image>` than pictures.
        """
        if isinstance(requests, Request | str):
            raise TypeError("generate takes a list: write generate([Request(prompt=...)])")
        given: Sequence[object] = requests
        for request in given:
            if not isinstance(request, Request):
                raise TypeError(
                    f"generate takes a list of Request, not of {type(request).__name__}: write "
                    "generate([Request(prompt=..., images=...)])"
                )
        if not requests:
            return []
        form = get_template(template)
        stops = (*form.stop_strings, *([stop] if isinstance(stop, str) else stop))
        prompts = [self._prompt(request, form) for request in requests]
        eos_ids = self.config.text.eos_ids
        builders = [AnswerBuilder(self.tokenizer, eos_ids=eos_ids, stops=stops) for _ in prompts]
        every = _STREAM_EVERY if on_text else _STOP_EVERY if stops else max_new_tokens
        emit = on_text or (lambda index, text: None)

        def take(index: int, ids: np.ndarray) -> bool:
            if text := builders[index].push(ids):
                emit(index, text)
            return not builders[index].finished

        for index in self.engine.run(
            prompts,
            slots=min(slots, len(prompts)),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            every=every,
            take=take,
        ):
            if text := builders[index].finish():
                emit(index, text)
        return [self._answer(*pair) for pair in zip(builders, prompts, strict=True)]

    def _prompt(self, request: Request, template: Template) -> Prompt:
        """Text to ids with a placeholder for each vision token, pictures to pixels."""
        images, question = request.images, request.prompt
        if images is None:
            images = ()
        elif isinstance(images, ImageSource):
            images = [images]
        marks = question.count(IMAGE_MARKER)
        if marks == 0:
            question = f"{IMAGE_MARKER}\n" * len(images) + question
        elif marks != len(images):
            there = {0: "is no picture", 1: "is 1 picture"}.get(
                len(images), f"are {len(images)} pictures"
            )
            fix = "give one for each" if images else "give one for each (--image FILE)"
            raise ValueError(
                f"the prompt has {marks} {IMAGE_MARKER} and there {there}; "
                f"{fix}, or leave {IMAGE_MARKER} out"
            )
        if not request.prompt.replace(IMAGE_MARKER, "").strip():
            raise ValueError("the prompt is empty; ask something")
        ids = encode_prompt(self.tokenizer, render_prompt(question, template=template))
        # A photograph is shown upright, as its owner sees it.
        pictures = [load_image(image, apply_orientation=True) for image in images]
        size = self.config.vision.image_size
        pixels = np.zeros((len(pictures), size, size, 3), np.float32)
        for picture, out in zip(pictures, pixels, strict=True):
            out[...] = self.image_processor.pixels(picture)
        return Prompt(
            ids=expand_images(ids, tokens_per_image=self.config.tokens_per_image),
            pixels=pixels,
            pictures=hashlib.sha256(pixels.tobytes()).digest() if pictures else None,
        )

    def _answer(self, builder: AnswerBuilder, prompt: Prompt) -> Answer:
        return Answer(
            text=builder.text.strip(),
            token_ids=builder.token_ids,
            prompt_tokens=len(prompt.ids),
            vision_tokens=int((prompt.ids == IMAGE_TOKEN_ID).sum()),
            finish_reason="stop" if builder.finished else "length",
        )
