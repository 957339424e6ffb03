"""Training examples with clips: checked, built, and in rows, as images and joined."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stf_jax.data.batch import ClipLayout
from stf_jax.data.builder import build
from stf_jax.data.clips import FrameSampling
from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.dataset import Dataset, DatasetError
from stf_jax.data.images import ImageProcessor
from stf_jax.data.pipeline import TrainingData
from stf_jax.data.tokenizer import IGNORED_LABEL, IMAGE_TOKEN_ID, Tokenizer
from stf_jax.data.validator import check
from tests.stf_jax.data.test_clips import frames, make_bad, write_video

FOUR = FrameSampling(frames=4)
K = 5  # tokens of an image
LAYOUT = ClipLayout(frames=4, tokens=7, after_images=True)


def talk(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "It moves."}]


ENTRIES: list[dict[str, Any]] = [
    {"id": "file", "video": "clip.mp4", "conversations": talk("<video>\nWhat happens?")},
    # As LLaVA-Video's own files mark a video.
    {"id": "folder", "video": "frames", "conversations": talk("<image>\nWhat happens?")},
    {
        "id": "both",
        "video": ["short", "clip.mp4"],
        "image": "a.png",
        "conversations": talk("<video> or <image> or <video>?"),
    },
    {"id": "image", "image": "a.png", "conversations": talk("<image>\nWhat?")},
    {"id": "text", "conversations": talk("Why?")},
]
# Frames of each clip, 0 for an image.
VISUALS = {"file": (4,), "folder": (4,), "both": (2, 0, 4), "image": (), "text": ()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips")
    write_video(path / "clip.mp4", frames(), movflags="faststart")
    for name in ("clip.mkv", "clip.avi"):
        write_video(path / name, frames())
    for name, count in (("frames", 9), ("short", 2)):
        (path / name).mkdir()
        for number, frame in enumerate(frames(count)):
            Image.fromarray(frame).save(path / name / f"{number}.png")
    Image.fromarray(frames(30)[-1]).save(path / "a.png")
    (path / "train.json").write_text(json.dumps(ENTRIES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def built(folder: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dataset") / "clips"
    build(
        [folder / "train.json"],
        out,
        images=folder,
        tokenizer=tokenizer,
        sampling=FOUR,
        workers=1,
    )
    return out


def open_data(built: Path, tokenizer: Tokenizer, **options: Any) -> TrainingData:
    layout = options.pop("layout", None)
    config = {
        "datasets": (DatasetSource(path=os.fspath(built)),),
        "sequence_length": 320,
        "batch_size": 1,
        "packing": "single",
        "images_per_row": 12,
        "workers": 0,
    }
    return TrainingData(
        DataConfig(**{**config, **options}),
        tokenizer=tokenizer,
        image_processor=ImageProcessor(image_size=28, shortest_edge=28),
        tokens_per_image=K,
        layout=layout,
    )


def test_frames_are_stored_as_images(built: Path) -> None:
    dataset = Dataset(built)
    stored = {(one := dataset[number]).id: one for number in range(len(dataset))}
    assert {name: one.visuals for name, one in stored.items()} == VISUALS
    texts = {name: one.conversation[0]["value"] for name, one in stored.items()}
    assert texts["file"] == texts["folder"] == "<image><image><image><image>\nWhat happens?"
    assert texts["both"] == "<image><image> or <image> or <image><image><image><image>?"
    shown = [np.asarray(Image.open(io.BytesIO(data))) for data in stored["both"].images]
    grays = [float(image.mean()) for image in shown]
    np.testing.assert_allclose(grays, [0, 10, 34, 0, 60, 120, 190], atol=4)


def test_check_names_what_is_wrong(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One problem for each entry, in one line; frames count as images."""
    bad = make_bad(folder, tmp_path)
    (tmp_path / "frame").mkdir()
    (tmp_path / "frame" / "0.png").write_text("no image")
    bad["frame"] = (tmp_path / "frame", "0.png: no image in a format that is read")
    names = ["cut mp4", "cut mkv", "cut avi", "text", "playlist", "empty", "sound", "folder"]
    names += ["frame"]
    entries = [
        {"id": name, "video": os.fspath(bad[name][0]), "conversations": talk("<video>\nWhat?")}
        for name in names
    ]
    entries += [
        {"id": "missing", "video": "no.mp4", "conversations": talk("<video>\nWhat?")},
        {"id": "url", "video": "https://x/a.mp4", "conversations": talk("<video>\nWhat?")},
        {"id": "two", "video": "clip.mp4", "conversations": talk("<video> <video>")},
        ENTRIES[0],
    ]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    report = check([path], images=folder, tokenizer=tokenizer, sampling=FOUR, workers=1)
    assert report.fit == 1
    assert report.images == 4
    reasons = {problem.id: problem.reason for problem in report.problems}
    assert len(report.problems) == len(reasons) == len(entries) - 1
    for name in names:
        assert bad[name][1] in reasons[name]
    assert {problem.kind for problem in report.problems if problem.id in names} == {"bad clip"}
    assert "no.mp4: no such file or folder of frames; fetch it" in reasons["missing"]
    assert "nothing is downloaded" in reasons["url"]
    assert "has 2 <video> and there is 1 clip" in reasons["two"]
    assert not any("\n" in reason for reason in reasons.values())


def test_other_frames_are_another_dataset(folder: Path, built: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DatasetError, match="begun with other values of the frames of clips"):
        build(
            [folder / "train.json"],
            built,
            images=folder,
            tokenizer=tokenizer,
            sampling=FrameSampling(frames=3),
            workers=1,
        )


def test_times_are_in_the_question(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(ENTRIES[:1]), encoding="utf-8")
    build(
        [path], tmp_path / "out", images=folder, tokenizer=tokenizer, sampling=FOUR,
        timestamps=True, workers=1,
    )  # fmt: skip
    question = Dataset(tmp_path / "out")[0].conversation[0]["value"]
    assert "<image>\nThe video lasts for 2.00 seconds, and 4 frames" in question
    assert question.endswith("this video.\nWhat happens?")


def test_frames_are_images_in_rows(built: Path, tokenizer: Tokenizer) -> None:
    data = open_data(built, tokenizer)
    for step in data.batches(stop_step=data.steps_per_epoch):
        ((name,),) = step.example_ids
        images = sum(max(n, 1) for n in VISUALS[name]) or int(name == "image")
        assert step.batch.clips is None
        slots = step.batch.image_slots[0]
        np.testing.assert_array_equal(slots[slots >= 0], np.arange(images * K))


@pytest.mark.parametrize("after_images", [True, False])
def test_joined_clips_in_rows(built: Path, tokenizer: Tokenizer, after_images: bool) -> None:
    """By hand: tokens of each clip and image, its slots, its frames; lengths as planned."""
    layout = ClipLayout(frames=4, tokens=7, after_images=after_images)
    data = open_data(built, tokenizer, layout=layout, clip_frames=4)
    plain = {}
    for step in open_data(built, tokenizer).batches(stop_step=len(ENTRIES)):
        plain[step.example_ids[0][0]] = step.batch
    lengths = {}
    for step in data.batches(stop_step=data.steps_per_epoch):
        ((name,),), batch = step.example_ids, step.batch
        assert not step.lost
        slots = batch.image_slots[0]
        offset = 12 * K if after_images else 0
        alone = list(range(K)) if after_images else list(range(7))
        image = list(range(2 * K, 3 * K)) if after_images else list(range(7, 14))
        last = offset + (7 if after_images else 14)
        expected = {
            "file": [*range(offset, offset + 7)],
            "folder": [*range(offset, offset + 7)],
            "both": [*range(offset, offset + 7), *image, *range(last, last + 7)],
            "image": alone,
            "text": [],
        }[name]
        assert slots[slots >= 0].tolist() == expected
        clips = {
            "file": [[0, 1, 2, 3]],
            "folder": [[0, 1, 2, 3]],
            "both": [[0, 1, -1, -1], [3, 4, 5, 6]],
            "image": [],
            "text": [],
        }[name]
        if not after_images and name in ("both", "image"):
            clips.insert(len(clips) // 2, [2 if name == "both" else 0, -1, -1, -1])
        assert batch.clips.tolist() == [clips + [[-1] * 4] * (3 - len(clips))]
        np.testing.assert_array_equal(batch.pixels, plain[name].pixels)
        # The text is what it is without clips.
        both = [one for one in (batch, plain[name])]
        texts = [one.ids[0][(one.segments[0] > 0) & (one.ids[0] != IMAGE_TOKEN_ID)] for one in both]
        np.testing.assert_array_equal(*texts)
        learned = [one.labels[0][one.labels[0] != IGNORED_LABEL] for one in both]
        np.testing.assert_array_equal(*learned)
        lengths[name] = int((batch.segments[0] > 0).sum())
    planned = dict(zip(Dataset(built).ids(), data.planner.lengths.tolist(), strict=True))
    assert lengths == planned


def test_a_cut_leaves_out_clips_whole(built: Path, tokenizer: Tokenizer) -> None:
    """The last clip would be cut through; what stands before it stays."""
    data = open_data(built, tokenizer, layout=LAYOUT, clip_frames=4)
    whole = {s.example_ids[0][0]: s.batch for s in data.batches(stop_step=len(ENTRIES))}["both"]
    slots = whole.image_slots[0]
    last = int(np.flatnonzero(slots == slots.max())[0])
    maker = data._maker
    stored = next(one for one in map(Dataset(built).__getitem__, range(5)) if one.id == "both")
    short = type(maker)(**{**vars(maker), "sequence_length": last})
    encoded, visuals = short._encode(stored)
    assert visuals == (2, 0)
    assert encoded.num_images == 3
    assert encoded.truncated
    np.testing.assert_array_equal(encoded.ids, whole.ids[0][: last - 6])


def test_a_system_that_joins_says_what_it_needs(built: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"the datasets have clips, .* set data.clip_frames"):
        open_data(built, tokenizer, layout=LAYOUT)
    with pytest.raises(ValueError, match="clip_frames is 13, and images_per_row 12 has no room"):
        open_data(built, tokenizer, layout=LAYOUT, clip_frames=13)
    # A clip of more frames than that is left out.
    few = ClipLayout(frames=3, tokens=7, after_images=True)
    data = open_data(built, tokenizer, layout=few, clip_frames=3)
    assert data.plan().too_many_images == 3
