"""Training files as other tools write them: read, or reported; never trained on as another."""

import codecs
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stf_jax.data.conversation import render_conversation
from stf_jax.data.forms import FormError, read_form
from stf_jax.data.sources import read_examples
from stf_jax.data.templates import get_template
from stf_jax.data.tokenizer import Tokenizer
from stf_jax.data.validator import CheckReport, check

ASK, REPLY = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}
TURNS = [ASK, REPLY]
TEXT = [{"from": "human", "value": "What?"}, REPLY]
IMAGE_PART = {"type": "image"}
TEXT_PART = {"type": "text", "text": "What?"}


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(4800, dtype=np.uint32).astype(np.uint8).reshape(40, 40, 3)).save(
        file, "PNG"
    )
    return file.getvalue()


Run = Callable[..., CheckReport]


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Run:
    def run(*entries: Any, data: bytes | None = None, name: str = "train.json") -> CheckReport:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        (images / "a.png").write_bytes(png())
        (images / "b.png").write_bytes(png())
        path = tmp_path / name
        path.write_bytes(json.dumps(entries).encode() if data is None else data)
        return check([path], images=images, tokenizer=tokenizer, workers=1)

    return run


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "A bus."}]


@pytest.mark.parametrize(
    "entry",
    [
        {"images": ["a.png"], "conversations": TURNS},
        {"image_path": "a.png", "conversations": TURNS},
        {"images": [{"path": "a.png", "bytes": None}], "conversations": TURNS},
        {"image": "a.png", "images": ["a.png"], "conversations": TURNS},
        {"images": ["a.png"], "messages": user(IMAGE_PART, TEXT_PART)},
        {"messages": user({"type": "image", "image": "a.png"}, TEXT_PART)},
        {"messages": user({"type": "image_url", "image_url": {"url": "a.png"}}, "What?")},
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": "<image>\nWhat?"},
                {"role": "assistant", "content": "A bus."},
            ],
        },
        {
            "image": "a.png",
            "conversations": [{"from": "user", "value": "<image>\nWhat?"}, REPLY],
        },
    ],
)
def test_an_image_under_another_key_is_the_same_example(entry: Any, run: Run) -> None:
    assert read_form(entry) == read_form({"image": "a.png", "conversations": TURNS})
    report = run(entry)
    assert report.clean
    assert (report.images, report.text_only) == (1, 0)


def test_images_in_parts_stay_where_they_are() -> None:
    turns, names = read_form(
        {"images": ["a.png", "b.png"], "messages": user(IMAGE_PART, TEXT_PART, IMAGE_PART)}
    )
    assert turns[0]["value"] == "<image>\nWhat?\n<image>"
    assert names == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"audio": "a.mp3", "conversations": TURNS}, "'audio' is not read, only images and videos"),
        (
            {"audios": ["a.wav"], "conversations": TURNS},
            "'audios' is not read, only images and videos are",
        ),
        ({"messages": user({"type": "video", "video": "a.mp4"})}, "a part of type 'video'"),
        ({"messages": user({"text": "What?"})}, "a part of type None is not read"),
        ({"messages": user({"type": "text", "text": 3})}, "a part of type 'text' holds 3"),
        ({"images": [""], "conversations": TURNS}, "'images' has an empty name; leave the key out"),
        ({"image": "", "conversations": TURNS}, "'image' has an empty name; leave the key out"),
        ({"images": [3], "conversations": TURNS}, "'images' is 3; it must be a path or a list"),
        ({"images": [{"bytes": "x"}], "conversations": TURNS}, "holds an image's bytes; write"),
        ({"image": "a.png", "images": ["b.png"], "conversations": TURNS}, "name different files"),
        ({"prompt": "What?", "answer": "A bus."}, "and there are prompt, answer; write LLaVA's"),
        ({"messages": {"role": "user"}}, "'messages' must be a list of objects; write LLaVA's"),
    ],
)
def test_what_is_not_read_is_named(entry: Any, reason: str, run: Run) -> None:
    with pytest.raises(FormError) as caught:
        read_form(entry)
    assert reason in str(caught.value)
    report = run(entry, {"image": "a.png", "conversations": TURNS})
    assert (report.examples, report.fit) == (2, 1)
    (finding,) = report.problems
    assert reason in finding.reason
    assert "\n" not in finding.reason


@pytest.mark.parametrize(
    "text", ["<image>\nWhat?", "What?\n<image>", "<image> What?", "<video>\nA"]
)
@pytest.mark.parametrize("key", ["picture_file", "img"])
def test_a_marker_without_an_image_is_a_problem(text: str, key: str, run: Run) -> None:
    report = run({key: "a.png", "conversations": [{"from": "human", "value": text}, REPLY]})
    (finding,) = report.problems
    assert finding.kind == "marker"
    assert "turn 1 has <" in finding.reason
    assert "the entry names no image; name it under 'image', or drop" in finding.reason


@pytest.mark.parametrize("text", ["What does the tag <image> in SVG do?", "a <b><image></b> c"])
def test_a_marker_as_a_word_is_noted(text: str, run: Run) -> None:
    report = run({"conversations": [{"from": "human", "value": text}, REPLY]})
    assert report.clean
    (note,) = report.notes
    assert (note.kind, note.reason) == ("marker", "turn 1 has <image> as a word")


# How a file is laid out.

THREE = [{"id": str(n), "image": "a.png", "conversations": TURNS} for n in range(3)]
LINES = "\n".join(map(json.dumps, THREE))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(THREE),
        json.dumps(THREE, indent=2),
        LINES,
        LINES + "\n\n",
        LINES.replace("\n", "\r\n"),
        json.dumps({"data": THREE}),
        json.dumps({"data": THREE}, indent=1),
        json.dumps({"version": "1", "tags": ["a"], "examples": THREE}, indent=1),
        "\n".join(json.dumps(one, indent=2) for one in THREE),
    ],
)
@pytest.mark.parametrize("pack", ["plain", "mark", "gzip"])
def test_layouts_of_the_same_examples(text: str, pack: str, tmp_path: Path) -> None:
    data = text.encode()
    data = {
        "plain": data,
        "mark": codecs.BOM_UTF8 + data,
        "gzip": gzip.compress(data, mtime=0),
    }[pack]
    path = tmp_path / "train.json"
    path.write_bytes(data)
    found = read_examples([path])
    assert [one.content for one in found] == THREE
    assert [one.id for one in found] == ["0", "1", "2"]


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e"])
def test_only_a_newline_ends_a_line(letter: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    entries = [{"id": n, "conversations": f"a{letter}b"} for n in "xy"]
    path.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in entries), "utf-8")
    if letter < " ":
        # JSON has no such letter unescaped; it is one finding a line, not two.
        path.write_text("\n".join(map(json.dumps, entries)), "utf-8")
    assert [one.content for one in read_examples([path])] == entries


def test_one_example_alone(tmp_path: Path) -> None:
    for indent in (None, 2):
        path = tmp_path / "single.json"
        path.write_text(json.dumps(THREE[0], indent=indent))
        assert [one.content for one in read_examples([path])] == THREE[:1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            '{\n "a": 1\n}',
            "one JSON object where a list of examples, or one example a line",
        ),
        ('{"train": [{}], "test": [{}]}', "(lists under 'train', 'test'); write the list alone"),
        ('{\n "data": [\n  {"id": 1},\n  {"id"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("id,image\n1,a.png\n", "neither a JSON list nor JSON lines; convert it"),
        (b"PAR1\0\0PAR1", "Parquet is not read; make JSON lines of it: pip install pandas pyarrow"),
        (gzip.compress(b"[]" * 1000, mtime=0)[:-20], "a damaged gzip file"),
        (b"\x1f\x8b\x08garbage", "a damaged gzip file"),
        (gzip.compress(b"[" + b" " * 2**27, mtime=0), "unpacks to more than 200 times its size"),
        (b'[{"id": 1}]\0', "not UTF-8 (zero bytes)"),
        ('[{"id": 1}]'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_one_line(text: str | bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError) as caught:
        read_examples([path])
    assert reason in str(caught.value)
    assert "train.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_first_line_that_is_broken_is_one_of_many(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"id": \n' + LINES)
    found = read_examples([path])
    assert [one.unreadable is None for one in found] == [False, True, True, True]


# Names that are none.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("data:image/png;base64," + "iVBORw0KGgo/" * 2000, "an image in base64 is not read; write"),
        ("iVBORw0KGgo/" * 2000, "too long for a file's name; if it is the image itself in base64"),
        ("x" * 300, "too long for a file's name"),
        ("https://example.org/a.png", "nothing is downloaded; fetch it"),
        ("a\0.png", "has a zero byte; it must be a path"),
        ("/", "is a folder; it must be an image's path"),
        (".", "is a folder; it must be an image's path"),
    ],
)
def test_a_name_that_is_none(name: str, reason: str, run: Run) -> None:
    good = {"id": "good", "image": "a.png", "conversations": TURNS}
    report = run(good, {"id": "bad", "image": name, "conversations": TURNS})
    (finding,) = report.problems
    assert (finding.id, finding.kind, report.fit) == ("bad", "bad image", 1)
    assert reason in finding.reason
    assert len(finding.reason) < 250
    assert len(report.render()) < 2000


@pytest.mark.parametrize("where", ["id", "image", "value"])
def test_half_a_surrogate_is_reported(where: str, run: Run) -> None:
    half = "\ud800"
    entry: dict[str, Any] = {
        "id": f"x{half}" if where == "id" else "x",
        "image": f"{half}.png" if where == "image" else "a.png",
        "conversations": [ASK, {"from": "gpt", "value": half if where == "value" else "A bus."}],
    }
    report = run(entry)
    report.render().encode()
    json.dumps(report.to_json(), ensure_ascii=False).encode()
    assert report.clean == (where == "id")


# System turns.


def test_a_system_turn_takes_the_place_of_the_templates(run: Run) -> None:
    system = {"from": "system", "value": "Be brief."}
    template = get_template("v1")
    pieces = render_conversation([system, *TEXT], template=template, num_images=0)
    assert "".join(piece.text for piece in pieces) == "Be brief. USER: What? ASSISTANT: A bus.</s>"
    own = render_conversation(
        [{"from": "system", "value": template.system}, *TEXT], template=template, num_images=0
    )
    assert own == render_conversation(TEXT, template=template, num_images=0)
    assert run({"conversations": [system, *TEXT]}).clean
    assert run({"messages": [{"role": "system", "content": "Be brief."}, *user("What?")]}).clean


def test_a_system_turn_without_a_place() -> None:
    system = {"from": "system", "value": "Be brief."}
    with pytest.raises(ValueError, match="has no place for a turn from 'system'; drop it"):
        render_conversation(
            [system, *TEXT], template=get_template("mistral_instruct"), num_images=0
        )
    with pytest.raises(ValueError, match="turn 3: 'from' is 'system'"):
        render_conversation([*TEXT, system], template=get_template("v1"), num_images=0)
