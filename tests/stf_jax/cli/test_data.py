"""`stf-jax data` as a user calls it: exit status, report, and one line for a mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stf_jax.cli.main import main
from stf_jax.data.builder import build
from stf_jax.data.images import ImageProcessor, load_image

TURNS = [
    {"from": "human", "value": "<image>\nWhat is the color of the bus?"},
    {"from": "gpt", "value": "The color of the bus is white and red."},
]
EXAMPLES = 8
# A stop falls between the first part and the last one, which takes a second.
SHARD = 512
WITH_SMALL_SHARDS = f"""
from stf_jax.cli.main import main
from stf_jax.data.builder import build

build.__kwdefaults__["examples_per_shard"] = {SHARD}
raise SystemExit(main())
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with `train.json` and `images/`."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images/0.png")
    write(
        tmp_path,
        [{"id": f"e{n}", "image": "0.png", "conversations": TURNS} for n in range(EXAMPLES)],
    )
    return tmp_path


def write(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / "train.json").write_text(json.dumps(entries), encoding="utf-8")


def spoil(folder: Path) -> None:
    """Of eight examples one has no image."""
    entries = json.loads((folder / "train.json").read_text())
    write(folder, [*entries[:-1], entries[-1] | {"image": "gone.png"}])


def command(verb: str, folder: Path, reference: Path, *more: str) -> list[str]:
    out = [str(folder / "out")] if verb == "build" else []
    return [
        "data", verb, str(folder / "train.json"), *out, "--images", str(folder / "images"),
        "--model", str(reference / "llava-stf"), "--workers", "1", *more,
    ]  # fmt: skip


def show(folder: Path, reference: Path, example: str, *more: str) -> list[str]:
    model = str(reference / "llava-stf")
    return ["data", "show", str(folder / "out"), example, "--model", model, *more]


Capture = pytest.CaptureFixture[str]


def test_check_tells_by_its_exit_status(files: Path, reference: Path, capsys: Capture) -> None:
    assert main(command("check", files, reference)) == 0
    clean = capsys.readouterr()
    assert clean.out.endswith("Clean.\n")
    assert clean.err == ""
    spoil(files)
    assert main(command("check", files, reference)) == 3
    assert "e7 (train.json entry 8)" in capsys.readouterr().out
    assert main(command("check", files, reference, "--json")) == 3
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert (report["clean"], report["examples"], report["fit"]) == (False, 8, 7)
    assert [problem["id"] for problem in report["problems"]] == ["e7"]


def test_build_then_show(files: Path, reference: Path, capsys: Capture) -> None:
    spoil(files)
    assert main(command("build", files, reference, "--json")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert (report["written"], report["skipped"]) == (7, 1)
    assert main(command("build", files, reference)) == 0
    assert "was finished before; it has 7 examples" in capsys.readouterr().out

    png = files / "seen.png"
    assert main(show(files, reference, "e2", "--png", str(png))) == 0
    text = capsys.readouterr().out
    assert "e2 (number 2)" in text
    assert "ASSISTANT:[[ The color of the bus is white and red.</s>]]" in text
    processor = ImageProcessor(image_size=56, shortest_edge=56)
    expected = processor.square(load_image(files / "images/0.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(png)), expected)
    assert main(show(files, reference, "2", "--json")) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["id"] == "e2"
    assert [span["text"] for span in shown["spans"] if span["supervised"]] == [
        " The color of the bus is white and red.</s>"
    ]
    # The middle alone, without the mean color above and below.
    assert main(show(files, reference, "2", "--png", str(png), "--image-mode", "crop")) == 0
    assert tuple(np.asarray(Image.open(png))[0, 0]) != (122, 116, 104)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--images", "nowhere"), "nowhere: no such folder of images; check the path"),
        (("--template", "v9"), "unknown template 'v9'"),
        (("--model", "nowhere"), "nowhere does not exist"),
        (("--sequence-length", "0"), "sequence_length is 0; it must be at least 2"),
        (("--workers", "-1"), "workers is -1; it must be at least 0"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "build"])
def test_a_mistake_is_one_line(
    files: Path, reference: Path, capsys: Capture, verb: str, more: tuple[str, ...], message: str
) -> None:
    assert main(command(verb, files, reference, *more)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (files / "out").exists()
    assert not (files / "out.partial").exists()


def test_show_of_what_is_not_there_is_one_line(
    files: Path, reference: Path, capsys: Capture
) -> None:
    assert main(show(files, reference, "e2")) == 1
    assert "no such folder; make it with 'stf-jax data build'" in capsys.readouterr().err
    assert main(command("build", files, reference)) == 0
    capsys.readouterr()
    for example, message in (("x", "with the id 'x'"), ("8", "no example 8; it has 0 to 7")):
        assert main(show(files, reference, example)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_build_leaves_no_process_and_goes_on(
    files: Path,
    reference: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    status: int,
) -> None:
    (entry, *_) = json.loads((files / "train.json").read_text())
    write(files, [entry | {"id": f"e{number}"} for number in range(3 * SHARD)])
    monkeypatch.setitem(build.__kwdefaults__, "examples_per_shard", SHARD)
    arguments = [*command("build", files, reference), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_SMALL_SHARDS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    records = files / "out.partial"
    deadline = time.monotonic() + 120
    while not list(records.glob("part-*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    # As a terminal sends Ctrl-C: to every process.
    send = os.killpg if name == "SIGINT" else os.kill
    send(process.pid, getattr(signal, name))
    # Workers hold these pipes too, so that this ends when the last one has.
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out, errors) == (status, b"", b"")
    finished = len(list(records.glob("part-*.json")))
    assert 0 < finished < 3
    assert not (files / "out").exists()
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["written"], report["kept_shards"]) == (3 * SHARD, finished)
