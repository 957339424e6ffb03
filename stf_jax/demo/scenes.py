"""Scenes: handwritten digits in color on a grid, and questions about them.

The scans ship inside scikit-learn (1,797 digits of 8x8 pixels, from the UCI repository). Held-out
scenes use other scans than training scenes. A cell of the grid is as large as a patch of the vision
tower, so a fused token stands for up to four digits.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

GRID = 4
CELL = 16  # pixels
SIDE = GRID * CELL
EMPTY = -1

COLORS = {
    "red": (235, 60, 50),
    "green": (60, 200, 80),
    "blue": (80, 120, 255),
    "yellow": (240, 215, 60),
}
NAMES = tuple(COLORS)

# Kinds of questions.
TEXTS = {
    "digit": "Which digit is in {}?",
    # Spelled as in the texts that the shipped language model was trained on.
    "color": "Which colour is in {}?",
    "cell": "What is in {}?",
    "pair": "What is in {}?",
    "left": "What is left of the {}?",
    "above": "What is above the {}?",
    "count": "How many digits are {}?",
}
KINDS = tuple(TEXTS)
MOST = 2  # questions of a kind about one scene

# Words, each of which the tokenizer has as one token: a small model learns from them much faster.
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS, COLUMNS = "ABCD", "WXYZ"

# The chance that a cell holds a digit.
_FILLED = 0.6


def name(row: int, column: int) -> str:
    """The name of a cell, such as "BX"."""
    return ROWS[row] + COLUMNS[column]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of an image: the digit of each cell (or `EMPTY`), and its color."""

    digits: Int[np.ndarray, "rows columns"]
    colors: Int[np.ndarray, "rows columns"]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Scene":
        """A random scene, with digits enough to ask about."""
        while True:
            filled = rng.random((GRID, GRID)) < _FILLED
            digits, colors = (rng.integers(n, size=filled.shape) for n in (10, len(NAMES)))
            scene = cls(
                digits=np.where(filled, digits, EMPTY), colors=np.where(filled, colors, EMPTY)
            )
            if all(len(scene.cells(kind)) >= MOST for kind in ("digit", "left", "above")):
                return scene

    def cells(self, kind: str) -> Int[np.ndarray, "cells 2"]:
        """Row and column of the cells that a question of a kind can be about.

        What has a cell to the left, or above, goes by its digit, which is there only once.
        """
        known = self.digits != EMPTY
        if kind in ("cell", "pair"):
            known[:] = True
        if kind in ("left", "above"):
            known &= (self.digits[..., None] == self.digits.ravel()).sum(-1) == 1
            known[(slice(None), 0) if kind == "left" else 0] = False
        return np.argwhere(known)

    def digit(self, row: int, column: int) -> str:
        """The word for the digit in a cell."""
        return DIGITS[self.digits[row, column]]

    def color(self, row: int, column: int) -> str:
        """The color of the digit in a cell."""
        return NAMES[self.colors[row, column]]

    def cell(self, row: int, column: int) -> str:
        """The content of a cell: "red seven", or "nothing"."""
        if self.digits[row, column] == EMPTY:
            return "nothing"
        return f"{self.color(row, column)} {self.digit(row, column)}"

    def left(self, row: int, column: int) -> str:
        """The cell to the left, with its content: "BX red seven"."""
        return self.named_cell(row, column - 1)

    def above(self, row: int, column: int) -> str:
        """The cell above, with its content."""
        return self.named_cell(row - 1, column)

    def named_cell(self, row: int, column: int) -> str:
        """A cell with its content: "BX red seven", or "BX nothing"."""
        return f"{name(row, column)} {self.cell(row, column)}"

    def count(self, digit: int) -> str:
        """The word for how many cells hold a digit."""
        return DIGITS[(self.digits == digit).sum()]

    def caption(self, rng: np.random.Generator) -> str:
        """The whole scene in words, cell by cell in random order."""
        cells = rng.permutation([(row, column) for row in range(GRID) for column in range(GRID)])
        return ", ".join(self.named_cell(*at) for at in cells)

    def neighbors(self, rng: np.random.Generator) -> str:
        """What is left of some digits and above some: "left eight BX red seven, above two ..."."""
        facts = [
            f"{kind} {self.digit(*at)} {getattr(self, kind)(*at)}"
            for kind in ("left", "above")
            for at in self.cells(kind)
        ]
        # As many as a caption of the cells is long.
        return ", ".join(rng.permutation(facts)[:7])

    def counts(self, rng: np.random.Generator) -> str:
        """How many cells hold each digit: "seven two, one zero, ..."."""
        return ", ".join(f"{DIGITS[digit]} {self.count(digit)}" for digit in rng.permutation(10))


# The captions of a scene: together they say what can be asked.
CAPTIONS = {"cells": Scene.caption, "neighbors": Scene.neighbors, "counts": Scene.counts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a scene, with its answer."""

    kind: str  # one of KINDS
    text: str
    answer: str


def ask(scene: Scene, kind: str, rng: np.random.Generator, *, count: int) -> list[Question]:
    """Random questions of a kind, no two about the same cell or digit.

    Any scene that is drawn has enough of them for a `count` of `MOST`.
    """
    if kind == "count":
        return [
            Question(kind=kind, text=TEXTS[kind].format(DIGITS[digit]), answer=scene.count(digit))
            for digit in rng.permutation(10)[:count]
        ]
    of_each = 2 if kind == "pair" else 1
    cells = rng.permutation(scene.cells(kind))[: of_each * count].reshape(count, of_each, 2)
    called = scene.digit if kind in ("left", "above") else name
    say = scene.cell if kind == "pair" else getattr(scene, kind)
    return [
        Question(
            kind=kind,
            text=TEXTS[kind].format(", ".join(called(*at) for at in about)),
            answer=", ".join(say(*at) for at in about),
        )
        for about in cells
    ]


def questions(scene: Scene, rng: np.random.Generator, *, of_each: int) -> list[Question]:
    """Questions of all kinds, `of_each` of each kind."""
    by_kind = [ask(scene, kind, rng, count=of_each) for kind in KINDS]
    return [question for turn in zip(*by_kind, strict=True) for question in turn]


def shuffle(questions: Sequence[Question], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions and answers of a conversation: any kind may come first, as when one is asked."""
    return [
        (questions[number].text, questions[number].answer)
        for number in rng.permutation(len(questions))
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scans:
    """Handwritten digits, ink from 0 to 1, by what they show."""

    ink: Sequence[Float[np.ndarray, "scans 8 8"]]

    @classmethod
    def load(cls, split: str) -> "Scans":
        """Of "train" four fifths of scikit-learn's, of "test" the rest.

        Raises:
            ValueError: scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ValueError("the demo needs scikit-learn: pip install 'stf-jax[demo]'") from error

        data = load_digits()
        held_out = np.arange(len(data.target)) % 5 == 0
        chosen = held_out if split == "test" else ~held_out
        images = (data.images / 16).astype(np.float32)
        return cls(ink=[images[chosen & (data.target == digit)] for digit in range(10)])


def render(
    scene: Scene, scans: Scans, rng: np.random.Generator, *, tilt: float = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """The image: every digit another scan, at a random size and place within its cell.

    With `tilt` it is turned, too, by up to so many degrees.
    """
    image = rng.uniform(10, 50, 3) + rng.normal(0, 6, (SIDE, SIDE, 3))
    for row, column in np.argwhere(scene.digits != EMPTY):
        ink = scans.ink[scene.digits[row, column]]
        size = int(rng.integers(12, CELL, endpoint=True))
        top, left = rng.integers(0, CELL - size, size=2, endpoint=True) + CELL * np.array(
            [row, column]
        )
        scan = Image.fromarray((255 * ink[rng.integers(len(ink))]).astype(np.uint8))
        scan = scan.resize((size, size), Image.Resampling.BICUBIC)
        if tilt:
            scan = scan.rotate(rng.uniform(-tilt, tilt), Image.Resampling.BICUBIC)
        cover = np.asarray(scan, np.float32) / 255
        color = COLORS[NAMES[scene.colors[row, column]]] + rng.normal(0, 12, 3)
        part = image[top : top + size, left : left + size]
        part += cover[..., None] * (color - part)
    return image.clip(0, 255).astype(np.uint8)


def conversation(turns: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """The turns of LLaVA's JSON, from questions and answers; the image comes with the first."""
    for number, (question, answer) in enumerate(turns):
        marker = "" if number else "<image>\n"
        yield {"from": "human", "value": marker + question}
        yield {"from": "gpt", "value": answer}
