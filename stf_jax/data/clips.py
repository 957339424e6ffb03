"""Clips as frames: a file read with PyAV, a folder of frames, or an array; sampled, then decoded.

A clip reaches the model as the images of its frames. Which frames is known before any is decoded,
so that a prompt's length is known.
"""

import dataclasses
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from stf_jax.data.forms import shorten
from stf_jax.data.images import MAX_PIXELS, ImageError, ImageSource, load_image
from stf_jax.data.templates import IMAGE_MARKER, VIDEO_MARKER
from stf_jax.util.errors import first_line
from stf_jax.util.files import expand

# Containers that are read. FFmpeg knows more, and some of those open other files, or the network.
CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "gif", "mpegts", "mpeg", "asf", "flv", "ogg")
_FRAMES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_MOST_FRAMES = 4096

ClipSource = str | Path | np.ndarray
Shown = TypeVar("Shown", bound=ImageSource)


class ClipError(ImageError):
    """A clip that cannot be used; one line that names it and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a clip are shown.

    Attributes:
      frames: at most so many, spread uniformly from the first to the last, as in LLaVA.
      rate: frames a second of the clip; where that makes more than `frames`, these are spread over
        them. None is uniform.
    """

    frames: int = 8
    rate: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= _MOST_FRAMES:
            raise ValueError(f"frames is {self.frames}; give 1 to {_MOST_FRAMES}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(f"rate is {self.rate} frames a second; give more than 0")

    def choose(self, count: int, times: Sequence[float] | None) -> np.ndarray:
        """The numbers of the shown frames, ascending.

        Args:
          count: frames of the clip.
          times: of each, in seconds; needed for a rate.
        """
        chosen = np.arange(count)
        if self.rate is not None and times is not None:
            # The first frame at or after each tick.
            ticks = np.arange(0, times[-1] - times[0] + 1e-6, 1 / self.rate)
            chosen = np.unique(np.searchsorted(np.array(times) - times[0], ticks - 1e-6))
        if len(chosen) > self.frames:
            chosen = chosen[np.linspace(0, len(chosen) - 1, self.frames, dtype=int)]
        return chosen


# Eight frames from the first to the last.
UNIFORM = FrameSampling()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """The frames of a clip that are to be shown; `load` decodes them.

    Attributes:
      name: for messages.
      count: frames that are shown.
      times: of each, in seconds from the first; None where the source does not say.
      duration: of the whole clip, in seconds; None likewise.
      load: the frames as RGB images, all of one size.
    """

    name: str
    count: int
    times: tuple[float, ...] | None
    duration: float | None
    load: Callable[[], list[Image.Image]]

    def describe_times(self) -> str:
        """What LLaVA-Video says of a clip before the question.

        Raises:
          ClipError: the source has no times.
        """
        if self.times is None or self.duration is None:
            raise ClipError(
                f"{self.name}: has no times to put into the prompt; give the video file, or its "
                "frames a second"
            )
        located = ",".join(f"{time:.2f}s" for time in self.times)
        return (
            f"The video lasts for {self.duration:.2f} seconds, and {self.count} frames are "
            f"uniformly sampled from it. These frames are located at {located}."
            "Please answer the following questions related to this video."
        )


def open_clip(
    source: ClipSource,
    sampling: FrameSampling,
    *,
    name: str | None = None,
    fps: float | None = None,
) -> Clip:
    """Finds out which frames a clip has, and chooses some; decodes none.

    Args:
      source: a video file, a folder of frames, in the order of their names, or uint8
        [frames, height, width, 3].
      sampling: which frames are shown.
      name: what errors call it; default the path.
      fps: frames a second of a folder or an array, where it is known.

    Raises:
      ClipError: no such file, no video, no frames, cut short, a rate without times, or PyAV is not
        installed. `load` raises it for damage, and for frames of changing size.
    """
    if name is None:
        name = shorten(str(source)) if isinstance(source, str | Path) else "the clip"
    if isinstance(source, np.ndarray):
        return _from_array(source, sampling, name, fps)
    if not isinstance(source, str | Path):
        raise ClipError(
            f"{name}: a {type(source).__name__} is no clip; give a path, or uint8 "
            "[frames, height, width, 3] of numpy"
        )
    path = Path(expand(source))
    if path.is_dir():
        return _from_folder(path, sampling, name, fps)
    if not path.is_file():
        raise ClipError(f"{name}: no such file or folder of frames; check the path")
    return _from_file(path, sampling, name)


def _from_array(source: np.ndarray, sampling: FrameSampling, name: str, fps: float | None) -> Clip:
    if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
        raise ClipError(
            f"{name}: {source.dtype} {list(source.shape)} of numpy is no clip; give uint8 "
            "[frames, height, width, 3]"
        )

    def load(chosen: np.ndarray) -> list[Image.Image]:
        return [load_image(frame, name=name) for frame in source[chosen]]

    return _sample(len(source), _spaced(len(source), fps), sampling, name, load)


def _from_folder(path: Path, sampling: FrameSampling, name: str, fps: float | None) -> Clip:
    # 10.jpg comes behind 9.jpg.
    files = sorted(
        (file for file in path.iterdir() if file.suffix.lower() in _FRAMES),
        key=lambda file: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", file.name)],
    )

    def load(chosen: np.ndarray) -> list[Image.Image]:
        return [load_image(files[number]) for number in chosen]

    return _sample(len(files), _spaced(len(files), fps), sampling, name, load)


def _spaced(count: int, fps: float | None) -> list[float] | None:
    if fps is None:
        return None
    if not 0 < fps < float("inf"):
        raise ClipError(f"clip_fps is {fps} frames a second; give more than 0, or None")
    return [number / fps for number in range(count)]


def _sample(
    count: int,
    times: list[float] | None,
    sampling: FrameSampling,
    name: str,
    load: Callable[[np.ndarray], list[Image.Image]],
    *,
    duration: float | None = None,
) -> Clip:
    if count == 0:
        raise ClipError(f"{name}: has no frames; leave it out")
    if times is None and sampling.rate is not None:
        raise ClipError(
            f"{name}: has no times, so it cannot be sampled at a rate; give its frames a second, "
            "or sample uniformly"
        )
    chosen = sampling.choose(count, times)

    def load_chosen() -> list[Image.Image]:
        frames = load(chosen)
        sizes = list(dict.fromkeys(frame.size for frame in frames))
        if len(sizes) > 1:
            first, other = (f"{width}x{height}" for width, height in sizes[:2])
            raise ClipError(
                f"{name}: its frames change their size, from {first} to {other}; cut it there"
            )
        return frames

    shown = None if times is None else tuple(times[number] - times[0] for number in chosen)
    if times is not None and duration is None:
        step = (times[-1] - times[0]) / (count - 1) if count > 1 else 0.0
        duration = times[-1] - times[0] + step
    return Clip(name=name, count=len(chosen), times=shown, duration=duration, load=load_chosen)


def _from_file(path: Path, sampling: FrameSampling, name: str) -> Clip:
    """Packets tell the times of the frames; they are not decoded for that."""
    with _open(path, name) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        # A cut that did not encode anew leaves packets that decode to nothing.
        every = [packet for packet in container.demux(stream) if packet.size]
        packets = [packet for packet in every if not packet.is_discard]
        unit = float(stream.time_base or 0)
        stamps = [packet.pts for packet in packets]
        if packets and all(stamp is not None for stamp in stamps):
            times = sorted(stamp * unit for stamp in stamps)
        elif rate:
            times = [number / float(rate) for number in range(len(packets))]
        else:
            raise ClipError(f"{name}: says neither times nor a rate of its frames; convert it")
        step = 1 / float(rate) if rate else 0.0
        stated = _read_duration(stream.metadata.get("DURATION"))
        short = stated is not None and times and times[-1] - times[0] + 2 * step < stated
        lacks = len(every) < stream.frames or (not every and stream.duration)
        if short or lacks or (packets and packets[-1].is_corrupt):
            raise ClipError(f"{name}: cut short; fetch it again")

    def load(chosen: np.ndarray) -> list[Image.Image]:
        return _decode(path, name, chosen)

    duration = times[-1] - times[0] + step if times else None
    return _sample(len(times), times, sampling, name, load, duration=duration)


def _decode(path: Path, name: str, chosen: np.ndarray) -> list[Image.Image]:
    wanted, frames = set(chosen.tolist()), []
    with _open(path, name) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                if frame.width * frame.height > MAX_PIXELS:
                    raise ClipError(f"{name}: its frames are too large; make it smaller")
                frames.append(frame.to_image())
            if number >= chosen[-1]:
                break
    if len(frames) < len(chosen):
        raise ClipError(f"{name}: damaged, only {len(frames)} frames of it decode; fetch it again")
    return frames


@contextmanager
def _open(path: Path, name: str) -> Iterator[tuple[Any, Any]]:
    """The container, and its first stream of video; what PyAV raises becomes one line."""
    try:
        import av
    except ImportError:
        raise ClipError(
            f"{name}: a video file is read with PyAV; pip install 'stf-jax[video]', or give a "
            "folder of frames"
        ) from None
    if os.path.getsize(path) == 0:
        raise ClipError(f"{name}: the file is empty; fetch it again")
    try:
        # A file, not a path: FFmpeg takes a path for the name of a protocol.
        with path.open("rb") as file:
            whitelist = {"format_whitelist": ",".join(CONTAINERS)}
            with av.open(file, container_options=whitelist) as container:
                # The cover of a record is no video.
                covers = av.stream.Disposition.attached_pic
                streams = [s for s in container.streams.video if not s.disposition & covers]
                if not container.streams.video and not container.streams.audio:
                    # Within the table of an MP4, say.
                    raise ClipError(f"{name}: cut short; fetch it again")
                if not streams:
                    raise ClipError(f"{name}: there is no video in it; leave it out")
                yield container, streams[0]
    except (av.error.InvalidDataError, av.error.ArgumentError) as error:
        raise ClipError(
            f"{name}: no video in a container that is read ({', '.join(CONTAINERS)}), or damaged; "
            "fetch it again or convert it"
        ) from error
    except av.error.EOFError as error:
        raise ClipError(f"{name}: cut short; fetch it again") from error
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{name}: cannot be read ({first_line(error)}); fetch it again") from error


def _read_duration(text: str | None) -> float | None:
    """Seconds of Matroska's "00:01:02.5", which each of its streams states."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", text or "")
    if match is None:
        return None
    hours, minutes, seconds = match.groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def encode_frame(frame: Image.Image) -> bytes:
    """A frame as a JPEG in which no loss is seen: a tenth of the size of a PNG."""
    file = io.BytesIO()
    frame.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def order_visuals(text: str, images: Sequence[Shown], clips: Sequence[Clip]) -> list[Shown | Clip]:
    """Images and clips in the order in which the text has their markers.

    Raises:
      ValueError: more or fewer markers than there are.
    """
    markers = re.findall(f"{re.escape(IMAGE_MARKER)}|{re.escape(VIDEO_MARKER)}", text)
    for marker, count, word, option in (
        (IMAGE_MARKER, len(images), "image", "--image"),
        (VIDEO_MARKER, len(clips), "clip", "--clip"),
    ):
        marks = markers.count(marker)
        if marks != count:
            there = {0: f"is no {word}", 1: f"is 1 {word}"}.get(count, f"are {count} {word}s")
            fix = "give one for each" if count else f"give one for each ({option} FILE)"
            raise ValueError(
                f"the prompt has {marks} {marker} and there {there}; {fix}, or leave {marker} out"
            )
    rest: dict[str, Iterator[Shown | Clip]] = {
        IMAGE_MARKER: iter(images),
        VIDEO_MARKER: iter(clips),
    }
    return [next(rest[marker]) for marker in markers]


def place_clips(text: str, clips: Sequence[Clip], *, joined: bool, timestamps: bool) -> str:
    """The text with `<image>` for `<video>`: once for each frame, or once where they are joined.

    The sentence about times, where it is asked for, follows on a line of its own.
    """
    rest = iter(clips)

    def place(match: re.Match[str]) -> str:
        clip = next(rest)
        markers = IMAGE_MARKER * (1 if joined else clip.count)
        # What follows a newline already needs no second one.
        end = "" if text[match.end() :].startswith("\n") else "\n"
        return f"{markers}\n{clip.describe_times()}{end}" if timestamps else markers

    return re.sub(re.escape(VIDEO_MARKER), place, text)


def place_in_turns(
    turns: Sequence[Mapping[str, Any]],
    images: Sequence[bytes],
    clips: Sequence[Clip],
    *,
    timestamps: bool,
) -> tuple[list[dict[str, Any]], list[bytes | Clip]]:
    """A conversation with `<image>` for each frame; images and clips in their order.

    Where no turn has `<video>` and there is no image, `<image>` stands for the clip, as in
    LLaVA-Video's own files.

    Raises:
      ValueError: more or fewer markers than there are.
    """
    texts = [str(turn["value"]) for turn in turns]
    if not images and not any(VIDEO_MARKER in text for text in texts):
        texts = [text.replace(IMAGE_MARKER, VIDEO_MARKER) for text in texts]
    shown = order_visuals("".join(texts), images, clips)
    waiting, placed = list(clips), []
    for turn, text in zip(turns, texts, strict=True):
        count = text.count(VIDEO_MARKER)
        own, waiting = waiting[:count], waiting[count:]
        value = place_clips(text, own, joined=False, timestamps=timestamps)
        placed.append({**turn, "value": value})
    return placed, shown
