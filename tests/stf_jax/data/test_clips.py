"""Clips: files that PyAV wrote, folders and arrays; which frames, when, and what is refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stf_jax.data.clips import (
    UNIFORM,
    Clip,
    ClipError,
    FrameSampling,
    open_clip,
    order_visuals,
    place_clips,
)

av = pytest.importorskip("av")

COUNT, RATE = 20, 10  # frames of each file, and frames a second


def frames(count: int = COUNT, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """Each frame has a gray of its own."""
    grays = np.arange(count, dtype=np.uint8) * 10
    return np.broadcast_to(grays[:, None, None, None], (count, size[1], size[0], 3)).copy()


def write_video(path: Path, shown: np.ndarray, **options: str) -> Path:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.height, stream.width = shown.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in shown:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos in several containers, and their frames as files."""
    path = tmp_path_factory.mktemp("clips")
    for name in ("clip.mkv", "clip.avi"):
        write_video(path / name, frames())
    # With the table of frames in front, so that a file that is cut short still opens.
    write_video(path / "clip.mp4", frames(), movflags="faststart")
    (path / "frames").mkdir()
    for number, frame in enumerate(frames()):
        Image.fromarray(frame).save(path / "frames" / f"frame{number}.png")
    (path / "frames" / "notes.txt").write_text("no frame")
    return path


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "frames", "array"])
def test_the_chosen_frames_are_those_that_are_shown(folder: Path, name: str) -> None:
    source = frames() if name == "array" else folder / name
    clip = open_clip(source, FrameSampling(frames=4), fps=RATE)
    assert clip.times == pytest.approx((0, 0.6, 1.2, 1.9))
    assert clip.duration == pytest.approx(2)
    shown = clip.load()
    assert len(shown) == clip.count == 4
    assert {image.size for image in shown} == {(64, 48)}
    grays = [float(np.asarray(image).mean()) for image in shown]
    # A codec is off by a few.
    np.testing.assert_allclose(grays, [0, 60, 120, 190], atol=4)


def test_a_rate_takes_the_frames_of_its_ticks(folder: Path) -> None:
    clip = open_clip(folder / "clip.mp4", FrameSampling(frames=40, rate=2.5))
    assert clip.times == pytest.approx((0, 0.4, 0.8, 1.2, 1.6))
    # More than are wanted are thinned out uniformly.
    few = open_clip(folder / "clip.mp4", FrameSampling(frames=3, rate=2.5))
    assert few.times == pytest.approx((0, 0.8, 1.6))
    # A rate above the clip's own is every frame.
    every = open_clip(folder / "clip.mp4", FrameSampling(frames=40, rate=100))
    assert every.count == COUNT


def test_uniform_is_what_llava_takes() -> None:
    for count in (1, 5, 8, 9, 1000):
        expected = np.arange(count) if count < 8 else np.linspace(0, count - 1, 8, dtype=int)
        np.testing.assert_array_equal(UNIFORM.choose(count, None), expected)


def make_bad(folder: Path, path: Path) -> dict[str, tuple[Any, str]]:
    """What cannot be used, and what is said of it."""
    for name in ("clip.mp4", "clip.mkv", "clip.avi"):
        (path / name).write_bytes((folder / name).read_bytes()[:-800])
    # Its table of frames stands at the end.
    whole = write_video(path / "late.mp4", frames()).read_bytes()
    start = whole.index(b"moov") - 4
    (path / "late.mp4").write_bytes(whole[:start])
    for left in (300, 400):
        (path / f"table{left}.mp4").write_bytes(whole[: start + left])
    (path / "text.mp4").write_text("this is no video at all\n" * 20)
    (path / "playlist.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{folder / 'clip.mp4'}\n#EXT-X-ENDLIST\n"
    )
    (path / "empty.mp4").write_bytes(b"")
    (path / "none").mkdir()
    with av.open(str(path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return {
        "cut mp4": (path / "clip.mp4", "cut short; fetch it again"),
        "cut mkv": (path / "clip.mkv", "cut short; fetch it again"),
        "cut avi": (path / "clip.avi", "cut short; fetch it again"),
        "late mp4": (path / "late.mp4", "or damaged; fetch it again"),
        "no stream": (path / "table300.mp4", "table300.mp4: cut short; fetch it again"),
        "no frames": (path / "table400.mp4", "table400.mp4: cut short; fetch it again"),
        "text": (path / "text.mp4", "text.mp4: no video in a container that is read"),
        "playlist": (path / "playlist.mp4", "playlist.mp4: no video in a container"),
        "empty": (path / "empty.mp4", "the file is empty; fetch it again"),
        "sound": (path / "sound.mp4", "there is no video in it; leave it out"),
        "folder": (path / "none", "none: has no frames; leave it out"),
        "missing": (path / "there.mp4", "no such file or folder of frames; check the path"),
        "array": (frames()[:0], "the clip: has no frames"),
        "image": (frames()[0], r"uint8 \[48, 64, 3\] of numpy is no clip; give uint8 \[frames"),
        "floats": (frames() / 255, r"float64 \[20, 48, 64, 3\] of numpy is no clip"),
        "number": (3, "a int is no clip; give a path"),
    }


def test_what_is_no_clip_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    for source, message in make_bad(folder, tmp_path).values():
        with pytest.raises(ClipError, match=message) as caught:
            open_clip(source, UNIFORM)
        assert "\n" not in str(caught.value)


def test_frames_of_changing_size_are_refused(tmp_path: Path) -> None:
    """In a folder, and in a file: two videos one after the other, as a transport stream allows."""
    for number, size in enumerate([(64, 48), (48, 64)]):
        Image.fromarray(frames(1, size)[0]).save(tmp_path / f"{number}.png")
        write_video(tmp_path / f"{number}.ts", frames(5, size))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join((tmp_path / f"{n}.ts").read_bytes() for n in (0, 1)))
    for source in (tmp_path, joined):
        clip = open_clip(source, FrameSampling(frames=10))
        with pytest.raises(ClipError, match="change their size, from 64x48 to 48x64; cut it there"):
            clip.load()


def test_damage_inside_is_found_when_it_is_decoded(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "clip.mp4").read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    (tmp_path / "clip.mp4").write_bytes(data)
    clip = open_clip(tmp_path / "clip.mp4", UNIFORM)
    with pytest.raises(ClipError, match=r"clip.mp4: .*(damaged|fetch it again)"):
        clip.load()


def test_a_rate_and_times_need_frames_a_second(folder: Path) -> None:
    with pytest.raises(ClipError, match="cannot be sampled at a rate; give its frames a second"):
        open_clip(folder / "frames", FrameSampling(rate=1))
    with pytest.raises(ClipError, match="no times to put into the prompt"):
        open_clip(folder / "frames", UNIFORM).describe_times()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": 0}, "frames is 0; give 1 to"),
        ({"rate": 0.0}, "rate is 0.0 frames a second; give more than 0"),
        ({"rate": float("nan")}, "rate is nan"),
    ],
)
def test_a_sampling_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameSampling(**fields)


def test_without_pyav_a_file_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ClipError, match=r"pip install 'stf-jax\[video\]', or give a folder"):
        open_clip(folder / "clip.mp4", UNIFORM)
    assert open_clip(folder / "frames", UNIFORM).count == 8


@pytest.fixture
def clip() -> Callable[[int], Clip]:
    return lambda count: open_clip(frames(count), UNIFORM, fps=2)


def test_markers_become_frames(clip: Callable[[int], Clip]) -> None:
    text, clips = "<video>\nThen <image> and <video> end?", [clip(2), clip(3)]
    assert order_visuals(text, ["a.png"], clips) == [clips[0], "a.png", clips[1]]
    placed = place_clips(text, clips, joined=False, timestamps=False)
    assert placed == "<image><image>\nThen <image> and <image><image><image> end?"
    joined = place_clips(text, clips, joined=True, timestamps=False)
    assert joined == "<image>\nThen <image> and <image> end?"
    timed = place_clips("<video>\nWhat?", [clip(2)], joined=True, timestamps=True)
    assert timed == (
        "<image>\nThe video lasts for 1.00 seconds, and 2 frames are uniformly sampled from it. "
        "These frames are located at 0.00s,0.50s.Please answer the following questions related to "
        "this video.\nWhat?"
    )


def test_markers_and_clips_must_agree(clip: Callable[[int], Clip]) -> None:
    with pytest.raises(ValueError, match="the prompt has 2 <video> and there is 1 clip"):
        order_visuals("<video> <video>", [], [clip(1)])
    with pytest.raises(ValueError, match=r"the prompt has 1 <video> and there is no clip; give"):
        order_visuals("What is <video>?", [], [])
