"""One training example, looked into: is it fit to train on, and how long is it?"""

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from stf_jax.data.conversation import Template
from stf_jax.data.encoding import EncodedConversation, encode_conversation
from stf_jax.data.images import ImageError, ImageProcessor, load_image
from stf_jax.data.sources import RawExample
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID, Tokenizer

Kind = Literal[
    "entry", "conversation", "missing picture", "bad picture", "nothing to learn",
    "other extension", "empty reply", "strict mask",
]  # fmt: skip

# Tried in this order where a picture is not there under its own name.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about an example that its owner should know.

    Attributes:
      kind: to count by.
      id: the example's.
      where: file and place in it.
      reason: one line that says what is wrong, and the fix.
    """

    kind: Kind
    id: str
    where: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measures:
    """What a plan needs to know of an example, whatever the tokens of an image.

    Attributes:
      length: tokens, a picture counting as one; 0 if it cannot be encoded.
      images: pictures.
      first_supervised: where the first supervised token stands, -1 if there is none.
      images_before: pictures in front of that token.
      mismatch: the PyTorch reference's labels would mask it whole.
    """

    length: int = 0
    images: int = 0
    first_supervised: int = -1
    images_before: int = 0
    mismatch: bool = False

    def tokens(self, tokens_per_image: int) -> int:
        """Tokens with images expanded."""
        return self.length + self.images * (tokens_per_image - 1)

    def place(self, tokens_per_image: int) -> int:
        """Where the first supervised token stands with images expanded."""
        return self.first_supervised + self.images_before * (tokens_per_image - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What came of looking into an example.

    Attributes:
      id: the example's.
      problems: why it cannot be trained on; none if it can.
      notes: what is odd and does no harm.
      measures: of an example without problems.
      conversation: its turns as JSON.
      num_pictures: picture files read to their end.
      pictures: their bytes.
    """

    id: str
    problems: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    measures: Measures = Measures()
    conversation: str = ""
    num_pictures: int = 0
    pictures: tuple[bytes, ...] = ()


class _Unfit(Exception):
    def __init__(self, kind: Kind, reason: str):
        super().__init__(reason)
        self.kind: Kind = kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspector:
    """Looks into examples; the same for `check` and for `build`.

    Attributes:
      images: the folder that the entries' picture paths start from; None if they have no pictures.
      tokenizer: of the model to be trained.
      template: to be trained with.
      image_processor: its pad or crop must be able to take each picture.
    """

    images: str | None
    tokenizer: Tokenizer
    template: Template
    image_processor: ImageProcessor

    def __call__(self, raw: RawExample) -> Inspection:
        """Reads the pictures and encodes the conversation; all problems are found, none raised."""
        problems: list[Finding] = []
        notes: list[Finding] = []

        def finding(kind: Kind, reason: str) -> Finding:
            return Finding(kind=kind, id=raw.id, where=raw.where, reason=reason)

        try:
            turns, names = _parts(raw)
        except _Unfit as error:
            return Inspection(id=raw.id, problems=(finding(error.kind, str(error)),))
        pictures = []
        for name in names:
            try:
                data, note = self._picture(name)
            except _Unfit as error:
                problems.append(finding(error.kind, str(error)))
                continue
            pictures.append(data)
            if note:
                notes.append(finding("other extension", note))
        measures = Measures()
        try:
            measures = measure(
                turns, tokenizer=self.tokenizer, template=self.template, num_images=len(names)
            )
        except ValueError as error:
            problems.append(finding("conversation", str(error)))
        else:
            empty = [n for n, turn in enumerate(turns, start=1) if _is_empty_reply(turn)]
            replies = sum(turn["from"] == "gpt" for turn in turns)
            if measures.first_supervised < 0 or len(empty) == replies:
                problems.append(finding("nothing to learn", "no reply has any text; drop it"))
            if empty and not problems:
                places = ", ".join(map(str, empty))
                notes.append(finding("empty reply", f"turn {places} is an empty reply"))
            if measures.mismatch and not problems:
                notes.append(finding("strict mask", "strict labels would mask it whole"))
        return Inspection(
            id=raw.id,
            problems=tuple(problems),
            notes=tuple(notes),
            measures=measures,
            conversation=json.dumps(turns, ensure_ascii=False),
            num_pictures=len(pictures),
            pictures=tuple(pictures),
        )

    def _picture(self, name: str) -> tuple[bytes, str | None]:
        if self.images is None:
            raise _Unfit("missing picture", f"{name}: no folder of pictures was given")
        path = Path(self.images, name)
        note = None
        if not path.is_file():
            others = [path.with_suffix(end) for end in EXTENSIONS if end != path.suffix]
            found = next((other for other in others if other.is_file()), None)
            if found is None:
                raise _Unfit(
                    "missing picture",
                    f"{path}: no such file, nor with another extension; fetch it",
                )
            path, note = found, f"{name} is there as {found.name}, which is used"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _Unfit("bad picture", f"{path}: cannot be read ({error.strerror})") from error
        try:
            check_picture(data, name=str(path), image_processor=self.image_processor)
        except ImageError as error:
            raise _Unfit("bad picture", str(error)) from error
        return data, note


def check_picture(data: bytes, *, name: str, image_processor: ImageProcessor) -> None:
    """Reads a picture file to its end; ImageError if training could not use it."""
    # Damage shows at an eighth of the size just as well, in a fraction of the time.
    load_image(data, name=name, min_edge=1)
    with Image.open(io.BytesIO(data)) as header:
        try:
            image_processor.check_size(*header.size)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None


def measure(
    conversation: list[dict[str, str]], *, tokenizer: Tokenizer, template: Template, num_images: int
) -> Measures:
    """Encodes a conversation to see how long it is.

    Raises:
      ValueError: what is wrong with it; see `encode_conversation`.
    """
    encoded, strict = (
        encode_conversation(
            tokenizer, conversation, template=template, num_images=num_images, strict=strict
        )
        for strict in (False, True)
    )
    first = _find_supervision(encoded)
    return Measures(
        length=len(encoded.ids),
        images=num_images,
        first_supervised=first,
        images_before=int(np.count_nonzero(encoded.ids[: max(first, 0)] == IMAGE_TOKEN_ID)),
        mismatch=strict.mismatch,
    )


def _find_supervision(encoded: EncodedConversation) -> int:
    # A segment's first token has nothing before it that could predict it.
    supervised = np.flatnonzero(encoded.labels[1:] != IGNORED_LABEL) + 1
    return int(supervised[0]) if len(supervised) else -1


def _parts(raw: RawExample) -> tuple[list[dict[str, str]], list[str]]:
    """The turns and the picture paths of an entry."""
    if raw.unreadable is not None:
        raise _Unfit("entry", raw.unreadable)
    if not isinstance(raw.content, Mapping):
        raise _Unfit("entry", f"a {type(raw.content).__name__}, not an object")
    turns: Any = raw.content.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise _Unfit("entry", "'conversations' must be a list of objects")
    named: Any = raw.content.get("image")
    names = [] if named is None else named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) and name for name in names):
        raise _Unfit("entry", f"'image' is {named!r}; it must be a path or a list of paths")
    return turns, names


def _is_empty_reply(turn: Mapping[str, str]) -> bool:
    return turn["from"] == "gpt" and not turn["value"].strip()
