"""Scenes: handwritten digits in colour on a grid, and what can be asked about them.

The scans are those that ship inside scikit-learn (1,797 digits of 8x8 pixels, from the UCI
repository). Scans of training scenes never come in held-out ones. A cell of the grid is as large
as a patch of the vision tower, so that a fused token stands for up to four digits.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

GRID = 4
CELL = 16  # pixels
SIDE = GRID * CELL
EMPTY = -1

COLOURS = {
    "red": (235, 60, 50),
    "green": (60, 200, 80),
    "blue": (80, 120, 255),
    "yellow": (240, 215, 60),
}
NAMES = tuple(COLOURS)
KINDS = ("digit", "cell", "pair")

# Words, each of which the tokenizer has as one token: a small model learns from them much faster.
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS, COLUMNS = "ABCD", "WXYZ"

# Of the cells that hold a digit.
_FILLED = 0.6


def name(row: int, column: int) -> str:
    """Of a cell: "BX"."""
    return ROWS[row] + COLUMNS[column]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows: for each cell a digit, `EMPTY` where there is none, and its colour."""

    digits: Int[np.ndarray, "G G"]
    colours: Int[np.ndarray, "G G"]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Scene":
        """A random scene."""
        shape = (GRID, GRID)
        digits, colours = rng.integers(10, size=shape), rng.integers(len(NAMES), size=shape)
        return cls(digits=np.where(rng.random(shape) < _FILLED, digits, EMPTY), colours=colours)

    def cell(self, row: int, column: int) -> str:
        """What is there: "seven", or "nothing"."""
        digit = self.digits[row, column]
        return "nothing" if digit == EMPTY else DIGITS[digit]

    def caption(self, rng: np.random.Generator) -> str:
        """The whole scene in words, cell by cell in random order."""
        cells = rng.permutation([(row, column) for row in range(GRID) for column in range(GRID)])
        return ", ".join(f"{name(*at)} {self.cell(*at)}" for at in cells)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a scene, with its answer."""

    kind: str  # one of KINDS
    text: str
    answer: str


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    """A random question of a kind."""
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    if kind == "digit":
        at = rng.choice(np.argwhere(scene.digits != EMPTY))
        text, answer = f"Which digit is in {name(*at)}?", scene.cell(*at)
    else:
        asked = rng.permutation(cells)[: 2 if kind == "pair" else 1]
        text = f"What is in {', '.join(name(*at) for at in asked)}?"
        answer = ", ".join(scene.cell(*at) for at in asked)
    return Question(kind=kind, text=text, answer=answer)


def describe(scene: Scene, rng: np.random.Generator) -> Question:
    """The question that a caption answers."""
    return Question(kind="caption", text="Describe the picture.", answer=scene.caption(rng))


def questions(scene: Scene, rng: np.random.Generator, *, of_each: int = 1) -> list[Question]:
    """So many of each kind, the kinds in turn."""
    return [ask(scene, kind, rng) for kind in KINDS * of_each]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scans:
    """Handwritten digits, ink from 0 to 1, by what they show."""

    ink: Sequence[Float[np.ndarray, "N 8 8"]]

    @classmethod
    def load(cls, split: str) -> "Scans":
        """Of "train" four fifths of scikit-learn's, of "test" the rest.

        Raises:
            ValueError: scikit-learn is not installed.
        """
        from sklearn.datasets import load_digits

        data = load_digits()
        held_out = np.arange(len(data.target)) % 5 == 0
        chosen = held_out if split == "test" else ~held_out
        images = (data.images / 16).astype(np.float32)
        return cls(ink=[images[chosen & (data.target == digit)] for digit in range(10)])


def render(scene: Scene, scans: Scans, rng: np.random.Generator) -> UInt8[np.ndarray, "S S 3"]:
    """The picture: every digit another scan, at a random size and place within its cell."""
    picture = rng.uniform(10, 50, 3) + rng.normal(0, 6, (SIDE, SIDE, 3))
    for row, column in np.argwhere(scene.digits != EMPTY):
        ink = scans.ink[scene.digits[row, column]]
        size = int(rng.integers(12, CELL, endpoint=True))
        top, left = rng.integers(0, CELL - size, size=2, endpoint=True) + CELL * np.array(
            [row, column]
        )
        scan = Image.fromarray((255 * ink[rng.integers(len(ink))]).astype(np.uint8))
        cover = np.asarray(scan.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
        colour = COLOURS[NAMES[scene.colours[row, column]]] + rng.normal(0, 12, 3)
        part = picture[top : top + size, left : left + size]
        part += cover[..., None] * (colour - part)
    return picture.clip(0, 255).astype(np.uint8)


def conversation(asked: Sequence[Question]) -> Iterator[dict[str, str]]:
    """The turns of LLaVA's JSON; the picture comes with the first."""
    for number, question in enumerate(asked):
        marker = "" if number else "<image>\n"
        yield {"from": "human", "value": marker + question.text}
        yield {"from": "gpt", "value": question.answer}
