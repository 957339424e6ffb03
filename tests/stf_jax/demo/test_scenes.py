"""Scenes and questions: the same for one seed, true, and of disjoint scans."""

from pathlib import Path

import numpy as np
import pytest

from stf_jax.demo import scenes
from stf_jax.demo.corpus import read_held_out, write_corpus
from stf_jax.demo.evaluation import Score, scores
from stf_jax.demo.scenes import GRID, KINDS, NAMES, Scene

pytest.importorskip("sklearn")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def cells(scene: Scene) -> dict[str, list[str]]:
    """What the caption says of each cell: ["red", "seven"], or ["nothing"]."""
    said = [part.split(" ") for part in scene.caption(rng()).split(", ")]
    assert len(said) == GRID**2
    return {cell: words for cell, *words in said}


def test_answers_are_true() -> None:
    """Read back from the caption by the words of the question alone."""
    random, kinds = rng(), []
    for _ in range(50):
        scene = Scene.draw(random)
        held = cells(scene)
        for question in scenes.questions(scene, random, of_each=2):
            text = question.text.rstrip("?")
            if question.kind in ("left", "above"):
                start, _, digit = text.partition(
                    {"left": " of the ", "above": " the "}[question.kind]
                )
                assert start == f"What is {question.kind}"
                ((row, column),) = [cell for cell, words in held.items() if words[-1] == digit]
                if question.kind == "left":
                    column = "WXYZ"["WXYZ".index(column) - 1]
                else:
                    row = "ABCD"["ABCD".index(row) - 1]
                assert question.answer == " ".join([row + column, *held[row + column]])
            elif question.kind == "count":
                digit = text.removeprefix("How many digits are ")
                count = sum(words[-1] == digit for words in held.values())
                assert question.answer == scenes.DIGITS[count]
            else:
                start, _, about = text.partition(" in ")
                said = [held[cell] for cell in about.split(", ")]
                part = {"Which digit is": slice(1, 2), "Which colour is": slice(0, 1)}.get(start)
                assert len(said) == (2 if question.kind == "pair" else 1)
                words = [" ".join(words_of_cell[part or slice(2)]) for words_of_cell in said]
                assert question.answer == ", ".join(words)
            kinds.append(question.kind)
    assert kinds == [*KINDS] * 100


def test_who_has_no_neighbor_is_not_asked_about() -> None:
    """Nor a digit that comes twice, which no question could name."""
    digits = np.array([[1, 2, -1, 2], [3, -1, 4, 5], [-1, 6, 7, 8], [9, 0, 0, -1]])
    scene = Scene(digits=digits, colors=np.where(digits < 0, -1, 0))
    assert [digits[*at] for at in scene.cells("left")] == [4, 5, 6, 7, 8]
    assert [digits[*at] for at in scene.cells("above")] == [3, 4, 5, 6, 7, 8, 9]


def test_no_question_comes_twice() -> None:
    random = rng()
    questions = scenes.questions(Scene.draw(random), random, of_each=scenes.MOST)
    texts = [question.text for question in questions]
    assert len(set(texts)) == len(texts) == len(KINDS) * scenes.MOST


def test_any_kind_comes_first_in_a_conversation() -> None:
    random = rng()
    first = {
        scenes.shuffle(scenes.questions(Scene.draw(random), random, of_each=1), random)[0][0][:7]
        for _ in range(50)
    }
    assert first == {"Which d", "Which c", "What is", "How man"}


def test_captions_name_every_cell() -> None:
    scene = Scene.draw(rng())
    held = cells(scene)
    for row, column in np.ndindex(GRID, GRID):
        digit, color = scene.digits[row, column], scene.colors[row, column]
        said = held["ABCD"[row] + "WXYZ"[column]]
        assert said == (["nothing"] if digit < 0 else [NAMES[color], scenes.DIGITS[digit]])


def test_captions_say_what_questions_ask() -> None:
    """Neighbors and counts, by the answers that `test_answers_are_true` has read back."""
    random = rng()
    for _ in range(20):
        scene = Scene.draw(random)
        known = {
            kind: {
                question.text: question.answer
                for question in scenes.ask(scene, kind, random, count=len(scene.cells(kind)))
            }
            for kind in ("left", "above")
        }
        said = scene.neighbors(random).split(", ")
        assert len(said) == min(7, sum(map(len, known.values())))
        for kind, digit, neighbor in (fact.split(" ", 2) for fact in said):
            assert known[kind][scenes.TEXTS[kind].format(digit)] == neighbor
        counted = dict(fact.split(" ") for fact in scene.counts(random).split(", "))
        questions = scenes.ask(scene, "count", random, count=10)
        assert {scenes.TEXTS["count"].format(digit): counted[digit] for digit in counted} == {
            question.text: question.answer for question in questions
        }


def test_images_show_the_colors_of_their_cells() -> None:
    scene = Scene(
        digits=np.full((GRID, GRID), 8), colors=np.arange(GRID**2).reshape(GRID, GRID) % len(NAMES)
    )
    image = scenes.render(scene, scenes.Scans.load("test"), rng()).astype(float)
    cells = image.reshape(GRID, scenes.CELL, GRID, scenes.CELL, 3).max((1, 3))
    palette = np.array([*scenes.COLORS.values()])
    nearest = ((cells[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(nearest, scene.colors)


def test_images_show_the_digits_of_their_cells() -> None:
    """With scans that are blank but for those of one digit."""
    scene = Scene.draw(rng())
    for digit in range(10):
        ink = [np.full((1, 8, 8), float(number == digit), np.float32) for number in range(10)]
        image = scenes.render(scene, scenes.Scans(ink=ink), rng())
        cells = image.reshape(GRID, scenes.CELL, GRID, scenes.CELL, 3).max((1, 3, 4))
        np.testing.assert_array_equal(cells > 150, scene.digits == digit)


def test_scans_are_disjoint_and_complete() -> None:
    train, test = (scenes.Scans.load(split).ink for split in ("train", "test"))
    sizes = [sum(len(ink) for ink in split) for split in (train, test)]
    assert sizes == [1437, 360]
    for seen, unseen in zip(train, test, strict=True):
        known = {ink.tobytes() for ink in seen}
        assert not any(ink.tobytes() in known for ink in unseen)


def test_one_seed_gives_one_corpus(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_corpus(tmp_path / name, train=4, held_out=2, seed=seed)
    contents = {
        name: {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in "abc"
    }
    assert contents["a"] == contents["b"] != contents["c"]
    questions = read_held_out(tmp_path / "a")
    count = 4 * len(KINDS)
    assert [item.question.kind for item in questions] == [*KINDS] * 4
    assert scores(questions, [item.question.answer for item in questions])["all"] == Score(
        right=count, questions=count
    )
    assert scores(questions, ["x"] * count)["all"].accuracy == 0


def test_wilson_interval() -> None:
    """Against the table of Wilson's interval for 8 of 10: (0.4902, 0.9433)."""
    low, high = Score(right=8, questions=10).interval
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
