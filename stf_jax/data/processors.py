"""What texts and images go through before a model's weights; read without reading the weights."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from etils import epath

from stf_jax.config.text import TextConfig
from stf_jax.config.vision import VisionConfig
from stf_jax.data.batch import ClipLayout
from stf_jax.data.images import ImageProcessor
from stf_jax.data.templates import IMAGE_MARKER, ImagesFirst
from stf_jax.data.tokenizer import Tokenizer, load_tokenizer, put_images_first, surround_images
from stf_jax.util.errors import CheckpointError
from stf_jax.util.files import check_file, explain_file, read_json

# Bytes; tokenizers of 256,000 tokens have 33 million.
MOST_TOKENIZER = 2**28


def _frames_are_images(frames: int) -> None:
    """What most systems say of a clip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processors:
    """Everything of a model that data needs to know.

    Attributes:
        tokenizer: of its language model.
        image_processor: of its vision tower; it pads or crops as the model's config says.
        tokens_per_image: K.
        question_length: tokens of an image's question that the model reads; 0 where it reads none.
        clip_layout: of a clip of at most so many frames; None where frames are images.
    """

    tokenizer: Tokenizer
    image_processor: ImageProcessor
    tokens_per_image: int
    question_length: int = 0
    clip_layout: Callable[[int], ClipLayout | None] = _frames_are_images


class ModelSizes(Protocol):
    """What processors ask of a model; `stf_jax.systems.base.LlavaConfig` is one."""

    @property
    def text(self) -> TextConfig:
        """The language model."""

    @property
    def vision(self) -> VisionConfig:
        """The tower."""

    @property
    def image_size(self) -> int:
        """The side in pixels at which the tower sees an image."""

    @property
    def tokens_per_image(self) -> int:
        """K."""

    @property
    def question_length(self) -> int:
        """Tokens of an image's question that the model reads; 0 where it reads none."""

    @property
    def images_first(self) -> ImagesFirst | None:
        """How images come in front of a conversation; None where they stand inside it."""

    def clip_layout(self, frames: int) -> ClipLayout | None:
        """The slots of a clip of at most so many frames; None where frames are images."""


def read_processors(
    path: epath.Path, files: Mapping[str, epath.Path], *, config: ModelSizes
) -> Processors:
    """The processors in `files`, which belong into the directory `path`.

    Raises:
        CheckpointError: a file that is missing, damaged, of another kind or of another model.
    """
    tokenizer = read_tokenizer(path, files)
    if config.images_first is not None:
        try:
            tokenizer = put_images_first(tokenizer, config.images_first)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    check_tokenizer(path, tokenizer, text=config.text)
    images = read_image_processor(path, files)
    if images.image_size == config.vision.image_size != config.image_size:
        images = images.for_size(config.image_size)
    return Processors(
        tokenizer=tokenizer,
        image_processor=images,
        tokens_per_image=config.tokens_per_image,
        question_length=config.question_length,
        clip_layout=config.clip_layout,
    )


def check_tokenizer(path: epath.Path, tokenizer: Tokenizer, *, text: TextConfig) -> None:
    """Checks that the embedding has a row for every token of the tokenizer in `path`.

    Raises:
        CheckpointError: it has not; text would be read as other text.
    """
    rows = text.vocab_size
    # Neither is looked up: one is cut out of the text, the other is masked.
    marker = tokenizer.backend.token_to_id(IMAGE_MARKER)
    harmless = {marker, tokenizer.pad_id} - {tokenizer.eos_id}
    tokens: dict[str, int] = tokenizer.backend.get_vocab(with_added_tokens=True)
    beyond = sorted((n, token) for token, n in tokens.items() if n >= rows and n not in harmless)
    if beyond:
        number, token = beyond[0]
        raise CheckpointError(
            f"{path} has an embedding of {rows} rows and a tokenizer with {len(beyond)} tokens "
            f"beyond it, the first {token!r} with id {number}; copy the tokenizer that belongs to "
            "these weights"
        )


def read_tokenizer(path: epath.Path, files: Mapping[str, epath.Path]) -> Tokenizer:
    """The tokenizer alone, as `read_processors`."""
    with _local(files, lambda name: "token" in name) as directory:
        try:
            tokenizer = load_tokenizer(directory)
        except ValueError as error:
            raise CheckpointError(str(error).replace(str(directory), str(path))) from error
    config = files.get("config.json")
    content = {} if config is None else read_json(config, error=CheckpointError)
    if not content.get("mm_use_im_start_end"):
        return tokenizer
    # Absent is as good as true, to LLaVA.
    return surround_images(tokenizer, patch=bool(content.get("mm_use_im_patch_token", True)))


def read_image_processor(path: epath.Path, files: Mapping[str, epath.Path]) -> ImageProcessor:
    """The image processor alone, as `read_processors`.

    As in LLaVA's second stage and its evaluation it pads, unless the config says otherwise.
    """
    named_settings = find_image_settings(files)
    if named_settings is None:
        raise CheckpointError(
            f"{path} has no preprocessor_config.json; copy it there from the vision tower"
        )
    config = files.get("config.json")
    content = {} if config is None else read_json(config, error=CheckpointError)
    ratio = content.get("image_aspect_ratio", "pad")
    if ratio not in ("pad", "square", None):
        raise CheckpointError(
            f"{path} was trained with image_aspect_ratio {ratio!r}; supported: 'pad', 'square'"
        )
    file, settings = named_settings
    try:
        return ImageProcessor.from_hf(settings, mode="pad" if ratio == "pad" else "crop")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def find_image_settings(
    files: Mapping[str, epath.Path],
) -> tuple[epath.Path, Mapping[str, Any]] | None:
    """The file that holds the image processor's settings, and these; None where there is none.

    As in transformers 5, what stands in processor_config.json counts before
    preprocessor_config.json, which releases before it wrote.

    Raises:
        CheckpointError: a damaged file.
    """
    whole, alone = files.get("processor_config.json"), files.get("preprocessor_config.json")
    if whole is not None:
        settings = read_json(whole, error=CheckpointError).get("image_processor")
        if isinstance(settings, Mapping):
            return whole, settings
        if settings is not None:
            raise CheckpointError(
                f"{whole}: image_processor is {settings!r}; give an object, {{...}}"
            )
    return None if alone is None else (alone, read_json(alone, error=CheckpointError))


def unusable(path: epath.Path, files: Mapping[str, epath.Path]) -> list[str]:
    """Why the processors in `files` cannot be used, and what to do; nothing if they can."""
    problems = []
    for read in (read_tokenizer, read_image_processor):
        try:
            read(path, files)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


@contextlib.contextmanager
def _local(files: Mapping[str, epath.Path], wanted: Any) -> Iterator[Path]:
    """A local directory with the wanted files: transformers cannot read gs://."""
    with tempfile.TemporaryDirectory() as directory:
        for name, file in files.items():
            if wanted(name):
                with explain_file(file, CheckpointError, "copy it again"):
                    check_file(file, most=MOST_TOKENIZER)
                    file.copy(Path(directory, name), overwrite=True)
        yield Path(directory)
