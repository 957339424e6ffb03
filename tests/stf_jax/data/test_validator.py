"""What `check` finds in training files, and that it names each offender."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stf_jax.data import images as images_module
from stf_jax.data.sources import read_examples
from stf_jax.data.tokenizer import Tokenizer
from stf_jax.data.validator import CheckReport, check

QUESTION = {"from": "human", "value": "<image>\nWhat is this?"}
TEXT_QUESTION = {"from": "human", "value": "What is this?"}
REPLY = {"from": "gpt", "value": "A bus."}


def image_bytes(kind: str = "JPEG", size: tuple[int, int] = (60, 40)) -> bytes:
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(file, kind)
    return file.getvalue()


Run = Callable[..., CheckReport]


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Run:
    def run(entries: Any, files: dict[str, bytes] | None = None, **options: Any) -> CheckReport:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        for name, data in (files or {}).items():
            (images / name).write_bytes(data)
        path = tmp_path / "train.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        arguments = {"images": images, "tokenizer": tokenizer, "workers": 1} | options
        return check([path], **arguments)

    return run


def test_special_tokens_that_somebody_typed_are_noted(run: Run) -> None:
    reply = {"from": "gpt", "value": "It is <s>struck</s>, as HTML."}
    report = run([{"id": "web", "conversations": [TEXT_QUESTION, reply]}])
    assert report.clean
    assert [(note.kind, note.reason) for note in report.notes if note.kind != "strict mask"] == [
        ("special token", "turn 2 has </s>, which is read as a token"),
        ("special token", "turn 2 has <s>, which is read as a token"),
    ]


def test_a_clean_corpus(corpus: Any, tokenizer: Tokenizer) -> None:
    report = check(
        [corpus.json], images=corpus.images, tokenizer=tokenizer, workers=1, tokens_per_image=4
    )
    assert report.clean
    assert report.problems == ()
    assert report.examples == report.fit == len(corpus.entries)
    assert report.text_only == sum("image" not in entry for entry in corpus.entries)
    named = [entry.get("image", []) for entry in corpus.entries]
    assert report.images == sum(len(one) if isinstance(one, list) else 1 for one in named)
    assert sum(bar.count for bar in report.histogram) == report.fit
    assert report.render().endswith("Clean.")
    assert json.loads(json.dumps(report.to_json()))["clean"] is True


def test_processes_find_the_same(corpus: Any, tokenizer: Tokenizer) -> None:
    arguments: Any = {"images": corpus.images, "tokenizer": tokenizer}
    done: list[tuple[int, int]] = []
    entries = corpus.entries * 3  # more than one chunk
    path = corpus.json.with_name("more.json")
    path.write_text(json.dumps([*entries, {"id": "bad"}]), encoding="utf-8")
    report = check([path], workers=2, progress=lambda *at: done.append(at), **arguments)
    assert report == check([path], workers=1, **arguments)
    assert [finding.id for finding in report.problems] == ["bad"]
    assert done[-1] == (len(entries) + 1, len(entries) + 1)


def test_lengths_are_those_of_training(run: Run, tokenizer: Tokenizer) -> None:
    entries = [{"id": 1, "image": "a.jpg", "conversations": [QUESTION, REPLY]}]
    one, many = (run(entries, {"a.jpg": image_bytes()}, tokens_per_image=k) for k in (1, 144))
    assert many.tokens - one.tokens == 143
    cut = run(entries, tokens_per_image=144, sequence_length=many.tokens - 1)
    assert (cut.cut, cut.cut_to_nothing) == (1, 0)
    nothing = run(entries, tokens_per_image=144, sequence_length=150)
    assert (nothing.cut, nothing.cut_to_nothing) == (1, 1)


@pytest.mark.parametrize(
    ("entry", "kind", "reason"),
    [
        ("text", "entry", "a str, not an object"),
        ({"conversations": "x"}, "entry", "must be a list of objects"),
        ({"conversations": [QUESTION, REPLY], "image": 3}, "entry", "'image' is 3"),
        ({"conversations": [{"from": "tool", "value": "?"}, REPLY]}, "conversation", "'tool'"),
        ({"conversations": [TEXT_QUESTION, TEXT_QUESTION]}, "conversation", "must alternate"),
        ({"conversations": [TEXT_QUESTION]}, "conversation", "add the reply"),
        ({"conversations": [REPLY]}, "conversation", "no turn from 'human'"),
        (
            {"conversations": [TEXT_QUESTION, REPLY], "image": "a.jpg"},
            "conversation",
            "0 <image> in the conversation but 1 images",
        ),
        (
            {"conversations": [TEXT_QUESTION, {"from": "gpt", "value": " "}]},
            "nothing to learn",
            "no reply has any text",
        ),
        (
            {"conversations": [QUESTION, REPLY], "image": "none.jpg"},
            "missing image",
            "none.jpg: no such file, nor with another extension",
        ),
    ],
)
def test_an_unfit_entry_is_named(run: Run, entry: Any, kind: str, reason: str) -> None:
    if isinstance(entry, dict):
        entry = {"id": "bad", **entry}
    good = {"id": "good", "image": "a.jpg", "conversations": [QUESTION, REPLY]}
    report = run([good, entry], {"a.jpg": image_bytes()})
    assert not report.clean
    assert (report.examples, report.fit) == (2, 1)
    (finding,) = report.problems
    assert finding.kind == kind
    assert reason in finding.reason
    assert finding.id == ("bad" if isinstance(entry, dict) else "train.json entry 2")
    assert finding.where == "train.json entry 2"
    assert reason in report.render()
    assert report.render().endswith("Not clean.")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image", "no image in a format"),
        (image_bytes()[:-400], "damaged"),
        (image_bytes("PNG")[:-900], "damaged"),
        (image_bytes(size=(14000, 2)), "too long and thin"),
    ],
)
def test_a_bad_image_is_named(run: Run, data: bytes, reason: str) -> None:
    report = run([{"id": 7, "image": "a.jpg", "conversations": [QUESTION, REPLY]}], {"a.jpg": data})
    (finding,) = report.problems
    assert (finding.id, finding.kind) == ("7", "bad image")
    assert reason in finding.reason
    assert "a.jpg" in finding.reason


def test_a_decompression_bomb_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MAX_PIXELS", 1000)
    report = run(
        [{"id": 7, "image": "a.jpg", "conversations": [QUESTION, REPLY]}], {"a.jpg": image_bytes()}
    )
    (finding,) = report.problems
    assert "too large (60x40 pixels" in finding.reason


def test_every_problem_of_an_entry_is_found(run: Run) -> None:
    entry = {"id": 1, "image": ["x.jpg", "y.jpg"], "conversations": [QUESTION]}
    kinds = [finding.kind for finding in run([entry]).problems]
    assert kinds == ["missing image", "missing image", "conversation"]


def test_another_extension_is_used_and_noted(run: Run) -> None:
    report = run(
        [{"id": 1, "image": "a.jpg", "conversations": [QUESTION, REPLY]}],
        {"a.gif": image_bytes("GIF")},
    )
    assert report.clean
    (note,) = report.notes
    assert (note.kind, note.reason) == (
        "other extension",
        "a.jpg is there as a.gif, which is used",
    )


def test_some_empty_replies_are_noted(run: Run) -> None:
    empty = {"from": "gpt", "value": ""}
    turns = [TEXT_QUESTION, empty, TEXT_QUESTION, REPLY]
    report = run([{"id": 1, "conversations": turns}])
    assert report.clean
    # The reference cannot cut a text with an empty reply, so it would mask all of it.
    assert [note.kind for note in report.notes] == ["empty reply", "strict mask"]
    assert report.strict_drops == 1


def test_text_only_data_needs_no_folder(run: Run) -> None:
    assert run([{"id": 1, "conversations": [TEXT_QUESTION, REPLY]}], images=None).clean
    report = run([{"id": 1, "image": "a.jpg", "conversations": [QUESTION, REPLY]}], images=None)
    assert "no folder of images was given" in report.problems[0].reason


def test_the_template_decides(run: Run) -> None:
    entries = [{"id": 1, "conversations": [TEXT_QUESTION, REPLY]}]
    assert run(entries).clean
    assert "use 'v1' for this" in run(entries, template="plain").problems[0].reason
    with pytest.raises(ValueError, match="unknown template 'v9'"):
        run(entries, template="v9")


def test_a_missing_folder_is_an_error(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder of images"):
        run([], images=tmp_path / "nowhere")


def test_json_lines_with_a_bad_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "train.jsonl"
    good = json.dumps({"id": "a", "conversations": [TEXT_QUESTION, REPLY]})
    path.write_text(f'{good}\n\n{{"id": \n{good}\n', encoding="utf-8")
    report = check([path], images=None, tokenizer=tokenizer, workers=1)
    assert (report.examples, report.fit) == (3, 2)
    assert report.problems[0].id == report.problems[0].where == "train.jsonl line 3"


def test_ids_are_made_unique(tmp_path: Path) -> None:
    files = []
    for name in ("one.json", "two.json"):
        files.append(tmp_path / name)
        files[-1].write_text('[{"id": "a"}, {"id": 5}, {}, {"id": "a"}]', encoding="utf-8")
    assert [example.id for example in read_examples(files)] == [
        *("a", "5", "one.json entry 3", "a#2"),
        *("a#3", "5#2", "two.json entry 3", "a#4"),
    ]


def test_unreadable_files_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("[{", encoding="utf-8")
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    names = ["broken.json", "empty.json", "latin.json", "missing.json"]
    with pytest.raises(ValueError) as caught:
        read_examples([tmp_path / name for name in names])
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    for line, name, reason in zip(
        lines, names, ["not valid JSON", "no examples", "not UTF-8", "cannot be read"], strict=True
    ):
        assert name in line
        assert reason in line
    with pytest.raises(ValueError, match="no training file is given"):
        read_examples([])
