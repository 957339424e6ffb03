"""One training example, looked into: is it fit to train on, and how long is it?"""

import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from stf_jax.data.clips import (
    UNIFORM,
    Clip,
    ClipError,
    FrameSampling,
    encode_frame,
    open_clip,
    place_in_turns,
)
from stf_jax.data.encoding import EncodedConversation, encode_conversation
from stf_jax.data.forms import FormError, find_markers, read_clips, read_form, shorten
from stf_jax.data.images import MAX_BYTES, ImageError, ImageProcessor, load_image, open_header
from stf_jax.data.sources import RawExample
from stf_jax.data.templates import IMAGE_MARKER, Template
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID, Tokenizer
from stf_jax.util.files import read_bytes

Kind = Literal[
    "entry", "conversation", "missing image", "bad image", "marker", "nothing to learn",
    "other extension", "empty reply", "strict mask", "layout", "special token", "missing clip",
    "bad clip",
]  # fmt: skip

# Tried in this order where an image is not there under its own name.
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
      length: tokens, an image counting as one; 0 if it cannot be encoded.
      images: how many it has, frames of clips among them.
      clips: how many of these it has.
      frames: of all clips together.
      longest_clip: frames of the longest.
      first_supervised: where the first supervised token stands, -1 if there is none.
      images_before: images in front of that token, frames among them.
      clips_before: clips in front of it.
      frames_before: their frames.
      mismatch: the PyTorch reference's labels would mask it whole.
    """

    length: int = 0
    images: int = 0
    clips: int = 0
    frames: int = 0
    longest_clip: int = 0
    first_supervised: int = -1
    images_before: int = 0
    clips_before: int = 0
    frames_before: int = 0
    mismatch: bool = False

    def tokens(self, tokens_per_image: int) -> int:
        """Tokens with images expanded."""
        return self.length + self.images * (tokens_per_image - 1)

    def place(self, tokens_per_image: int) -> int:
        """Where the first supervised token stands with images expanded."""
        return self.first_supervised + self.images_before * (tokens_per_image - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """The result of an inspection.

    Attributes:
      id: the example's.
      problems: why it cannot be trained on; none if it can.
      notes: what is odd and does no harm.
      measures: of an example without problems.
      conversation: its turns as JSON.
      num_images: image files read to their end, and frames of clips.
      image_bytes: what is in them, and the frames of clips, in the order of their markers.
      visuals: where there are clips: frames of each clip, 0 for an image beside them.
    """

    id: str
    problems: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    measures: Measures = Measures()
    conversation: str = ""
    num_images: int = 0
    image_bytes: tuple[bytes, ...] = ()
    visuals: tuple[int, ...] = ()


class _Unfit(Exception):
    def __init__(self, kind: Kind, reason: str):
        super().__init__(reason)
        self.kind: Kind = kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspector:
    """Looks into examples; the same for `check` and for `build`.

    Attributes:
      images: the folder that the entries' image paths start from; None if they have no images.
      tokenizer: of the model to be trained.
      template: to be trained with.
      image_processor: its pad or crop must be able to take each image.
      sampling: which frames of a clip are kept.
      timestamps: whether the text says when they are.
    """

    images: str | None
    tokenizer: Tokenizer
    template: Template
    image_processor: ImageProcessor
    sampling: FrameSampling = UNIFORM
    timestamps: bool = False

    def __call__(self, raw: RawExample) -> Inspection:
        """Reads the images and encodes the conversation; all problems are found, none raised."""
        problems: list[Finding] = []
        notes: list[Finding] = []

        def finding(kind: Kind, reason: str) -> Finding:
            # Half a surrogate could be neither printed nor stored.
            reason = reason.encode(errors="replace").decode()
            return Finding(kind=kind, id=raw.id, where=raw.where, reason=reason)

        if raw.unreadable is not None:
            return Inspection(id=raw.id, problems=(finding("entry", raw.unreadable),))
        try:
            turns, names = read_form(raw.content)
            clip_names = read_clips(raw.content)
            json.dumps(turns, ensure_ascii=False).encode()
        except FormError as error:
            return Inspection(id=raw.id, problems=(finding("entry", str(error)),))
        except UnicodeEncodeError as error:
            reason = f"its text is no Unicode ({error.reason}); leave out half a surrogate"
            return Inspection(id=raw.id, problems=(finding("conversation", reason),))
        if raw.note is not None:
            notes.append(finding("layout", raw.note))
        contents = []
        for name in names:
            try:
                data, note = self._read_image(name)
            except _Unfit as error:
                problems.append(finding(error.kind, str(error)))
                continue
            contents.append(data)
            if note:
                notes.append(finding("other extension", note))
        visuals: tuple[int, ...] = ()
        clips: list[Clip] = []
        for name in clip_names:
            try:
                clips.append(self._open_clip(name))
            except _Unfit as error:
                problems.append(finding(error.kind, str(error)))
        measures = Measures()
        try:
            seen: list[bytes] = contents
            if clips and not problems:
                turns, shown = place_in_turns(turns, contents, clips, timestamps=self.timestamps)
                seen = [data for one in shown for data in self._encode(one)]
                visuals = tuple(one.count if isinstance(one, Clip) else 0 for one in shown)
            measures = measure(
                turns,
                tokenizer=self.tokenizer,
                template=self.template,
                num_images=len(seen) if visuals else len(names),
                visuals=visuals,
            )
        except ImageError as error:
            # The images have been read before; what is found now is a frame.
            problems.append(finding("bad clip", str(error)))
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
            for number, marker, asks in find_markers(turns) if not names and not clip_names else ():
                if asks:
                    problems.append(
                        finding(
                            "marker",
                            f"turn {number} has {marker}, but the entry names no image; name it "
                            "under 'image', or drop the example",
                        )
                    )
                else:
                    notes.append(finding("marker", f"turn {number} has {marker} as a word"))
            for number, token in self._find_special_tokens(turns):
                notes.append(
                    finding("special token", f"turn {number} has {token}, which is read as a token")
                )
            if measures.mismatch and not problems:
                notes.append(finding("strict mask", "strict labels would mask it whole"))
        return Inspection(
            id=raw.id,
            problems=tuple(problems),
            notes=tuple(notes),
            measures=measures,
            conversation=json.dumps(turns, ensure_ascii=False),
            num_images=len(seen),
            image_bytes=tuple(seen),
            visuals=visuals,
        )

    def _open_clip(self, name: str) -> Clip:
        if fault := _name_fault(name):
            raise _Unfit("bad clip", fault)
        if self.images is None:
            raise _Unfit("missing clip", f"{name}: no folder of images and clips was given")
        path = Path(self.images, name)
        if not path.exists():
            raise _Unfit("missing clip", f"{path}: no such file or folder of frames; fetch it")
        try:
            return open_clip(path, self.sampling)
        except ClipError as error:
            raise _Unfit("bad clip", str(error)) from error

    def _read_image(self, name: str) -> tuple[bytes, str | None]:
        if fault := _name_fault(name):
            raise _Unfit("bad image", fault)
        if self.images is None:
            raise _Unfit("missing image", f"{name}: no folder of images was given")
        file = find_image(self.images, name)
        if file is None:
            raise _Unfit(
                "missing image",
                f"{Path(self.images, name)}: no such file, nor with another extension; fetch it",
            )
        note = (
            None
            if file.name == Path(name).name
            else (f"{name} is there as {file.name}, which is used")
        )
        try:
            data = read_bytes(file, most=MAX_BYTES)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise _Unfit("bad image", f"{file}: cannot be read ({reason})") from error
        try:
            check_image(data, name=str(file), image_processor=self.image_processor)
        except ImageError as error:
            raise _Unfit("bad image", str(error)) from error
        return data, note

    def _encode(self, shown: bytes | Clip) -> list[bytes]:
        """An image's bytes, or those of a clip's frames."""
        if isinstance(shown, bytes):
            return [shown]
        frames = shown.load()
        self.image_processor.check_size(*frames[0].size)
        return [encode_frame(frame) for frame in frames]

    def _find_special_tokens(self, turns: Sequence[Mapping[str, str]]) -> Iterator[tuple[int, str]]:
        """Special tokens that somebody typed, and their turns; training reads them as tokens."""
        tokens = self.tokenizer.special_tokens - {IMAGE_MARKER}
        for number, turn in enumerate(turns, start=1):
            yield from ((number, token) for token in sorted(tokens) if token in turn["value"])

    def identify(self, examples: Sequence[RawExample]) -> list[str]:
        """Identifies the images of examples by name, size and time of change; opens none of them.

        A later call that finds the same has the same images.
        """
        identities = []
        for raw in examples:
            try:
                _, names = read_form(raw.content)
                clips = read_clips(raw.content)
            except FormError:
                continue
            for name in clips:
                path = None if self.images is None else Path(self.images, name)
                files = [] if path is None or _name_fault(name) else _files_of(path)
                stamps = [
                    f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files
                ]
                identities.append(" ".join([name, *stamps]))
            for name in names:
                path = None
                if self.images is not None and not _name_fault(name):
                    path = find_image(self.images, name)
                stat = None if path is None else os.stat(path)
                known = "" if stat is None else f"{stat.st_size} {stat.st_mtime_ns}"
                identities.append(f"{name} {known}")
        return identities


def find_image(folder: str, name: str) -> Path | None:
    """The file that is meant: of that name, or of the same with another extension."""
    path = Path(folder, name)
    others = (path.with_suffix(end) for end in EXTENSIONS if end != path.suffix)
    return next((candidate for candidate in (path, *others) if candidate.is_file()), None)


def _files_of(path: Path) -> list[Path]:
    """A file, or those of a folder."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    return [path] if path.is_file() else []


def _name_fault(name: str) -> str | None:
    """The reason why a name cannot be a file's; None if it can."""
    if name.startswith("data:"):
        return f"{shorten(name)}: an image in base64 is not read; write it to a file, and its path"
    if name.startswith(("http://", "https://")):
        return f"{shorten(name)}: nothing is downloaded; fetch it into the folder of images"
    encoded = os.fsencode(name.encode(errors="replace").decode())
    if b"\0" in encoded:
        return f"{shorten(name)!r} has a zero byte; it must be a path"
    if len(encoded) > 4096 or max(map(len, encoded.split(b"/"))) > 255:
        return (
            f"{shorten(name)}: too long for a file's name; if it is the image itself in base64, "
            "write it to a file, and its path here"
        )
    if not Path(name).name:
        return f"{name!r} is a folder; it must be an image's path"
    return None


def check_image(data: bytes, *, name: str, image_processor: ImageProcessor) -> None:
    """Reads an image file to its end; ImageError if training could not use it."""
    # Damage shows at an eighth of the size just as well, in a fraction of the time.
    load_image(data, name=name, min_edge=1)
    with open_header(io.BytesIO(data)) as header:
        try:
            image_processor.check_size(*header.size)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None


def measure(
    conversation: list[dict[str, str]],
    *,
    tokenizer: Tokenizer,
    template: Template,
    num_images: int,
    visuals: Sequence[int] = (),
) -> Measures:
    """Encodes a conversation to see how long it is.

    Frames of clips count as images; `visuals` says which they are.

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
    before = int(np.count_nonzero(encoded.ids[: max(first, 0)] == IMAGE_TOKEN_ID))
    ends = np.cumsum([max(frames, 1) for frames in visuals], dtype=int)
    in_front = [frames for frames, end in zip(visuals, ends, strict=True) if end <= before]
    return Measures(
        length=len(encoded.ids),
        images=num_images,
        clips=sum(frames > 0 for frames in visuals),
        frames=sum(visuals),
        longest_clip=max(visuals, default=0),
        first_supervised=first,
        images_before=before,
        clips_before=sum(frames > 0 for frames in in_front),
        frames_before=sum(in_front),
        mismatch=strict.mismatch,
    )


def _find_supervision(encoded: EncodedConversation) -> int:
    # A segment's first token has nothing before it that could predict it.
    supervised = np.flatnonzero(encoded.labels[1:] != IGNORED_LABEL) + 1
    return int(supervised[0]) if len(supervised) else -1


def _is_empty_reply(turn: Mapping[str, str]) -> bool:
    return turn["from"] == "gpt" and not turn["value"].strip()
