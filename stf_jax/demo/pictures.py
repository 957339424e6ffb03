"""Questions about real images whose answers are known, in the project's ordinary data form.

Every question is a closed choice. What is held out is held out by name: no image of a dog is in
training if one is in the test.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stf_jax.demo.emoji import CATEGORIES, COLORS, Emoji, compose, read_emoji
from stf_jax.demo.scenes import conversation
from stf_jax.util.files import new_directory, read_json, write_json

IMAGES, CONVERSATIONS, HELD_OUT = "images", "conversations.json", "held_out.json"
WORDS = "words.json"  # of each training image of one emoji: its name, category and color
NUMBERS = ("one", "two", "three", "four")
KINDS = ("name", "category", "color", "side", "count")
# Answers to choose from, by kind: chance is one in so many.
CHOICES = {"name": 4, "category": 4, "color": 4, "side": 2, "count": 4}

_COUNT = "How many things are there:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A closed choice about an image.

    Attributes:
        image: the name of its file.
        kind: one of `KINDS`.
        text: with the answers in it, in the order of `choices`.
        answer: one of `choices`.
        choices: in random order.
    """

    image: str
    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]


def ask_about(
    shown: Sequence[Emoji], image: str, pool: Sequence[Emoji], rng: np.random.Generator
) -> list[Question]:
    """All questions about an image of one to four emoji; wrong answers come out of the pool."""

    def make(kind: str, lead: str, answer: str, others: Sequence[str]) -> Question:
        wrong = [other for other in dict.fromkeys(others) if other != answer]
        chosen = [answer, *rng.permutation(wrong)[: CHOICES[kind] - 1].tolist()]
        choices = tuple(rng.permutation(chosen).tolist())
        text = f"{lead} {', '.join(choices[:-1])} or {choices[-1]}?"
        return Question(image=image, kind=kind, text=text, answer=answer, choices=choices)

    first = shown[0]
    if len(shown) == 1:
        names = [other.name for other in pool if other.name is not None]
        questions = [make("category", "What kind of thing is it:", first.category, CATEGORIES)]
        if first.name is not None:
            questions.append(make("name", "Which is it:", first.name, names))
        if first.color is not None:
            questions.append(make("color", "What is its main color:", first.color, [*COLORS]))
        if rng.random() < 1 / 4:
            questions.append(make("count", _COUNT, NUMBERS[0], NUMBERS))
        return questions
    questions = [make("count", _COUNT, NUMBERS[len(shown) - 1], NUMBERS)]
    if len(shown) == 2 and first.name and shown[1].name and first.name != shown[1].name:
        left = int(rng.integers(2))
        side = ("left", "right")[left]
        questions.append(
            make("side", f"What is on the {side}:", str(shown[left].name), [str(first.name),
                 str(shown[1].name)])
        )  # fmt: skip
    return questions


def write_pictures(
    out: Path, *, singles: int, groups: int, held_out_singles: int, held_out_groups: int, seed: int
) -> None:
    """Images and questions in the new folder `out`, which appears when it is complete.

    Args:
        out: the folder.
        singles: images of one emoji to train on; at most as many as there are.
        groups: images of two to four, likewise.
        held_out_singles: images of one that nothing is trained on.
        held_out_groups: likewise of two to four.
        seed: of what is shown together and asked. What is held out does not depend on it.

    Raises:
        ValueError: the packages with the images are not installed.
    """
    emoji = read_emoji()
    with new_directory(out) as unfinished:
        folder = Path(unfinished)
        (folder / IMAGES).mkdir()
        conversations: list[dict[str, Any]] = []
        words: dict[str, list[str]] = {}
        for image, group, questions in _draw(
            folder,
            "train",
            [each for each in emoji if not each.held_out],
            singles,
            groups,
            [seed, 0],
        ):
            turns = [(question.text, question.answer) for question in questions]
            conversations.append(
                {"id": image, "image": image, "conversations": [*conversation(turns)]}
            )
            if len(group) == 1:
                known = (group[0].name, group[0].category, group[0].color)
                words[image] = [word for word in known if word is not None]
        unseen = [
            dataclasses.asdict(question)
            for _, _, questions in _draw(
                folder,
                "held-out",
                [each for each in emoji if each.held_out],
                held_out_singles,
                held_out_groups,
                [seed, 1],
            )
            for question in questions
        ]
        write_json(folder / CONVERSATIONS, conversations, indent=1)
        write_json(folder / WORDS, words, indent=1)
        write_json(folder / HELD_OUT, unseen, indent=1)


def read_held_out(folder: Path) -> list[Question]:
    """The questions that `write_pictures` held out, image after image."""
    return [
        Question(**entry | {"choices": tuple(entry["choices"])})
        for entry in read_json(folder / HELD_OUT, list)
    ]


def _draw(
    folder: Path,
    split: str,
    pool: Sequence[Emoji],
    singles: int,
    groups: int,
    seed: Sequence[int],
) -> list[tuple[str, list[Emoji], list[Question]]]:
    """Draws images of a split; their names, what they show, and questions in random order."""
    rng = np.random.default_rng(seed)
    shown = [[pool[number]] for number in rng.permutation(len(pool))[:singles]]
    for number in range(groups):
        # Half of them are pairs, of which sides can be asked, too.
        count = 2 if number % 2 else int(rng.choice([3, 4]))
        shown.append([pool[at] for at in rng.choice(len(pool), size=count, replace=False)])
    drawn = []
    for number, group in enumerate(shown):
        image = f"{split}-{number:04}.png"
        compose([emoji.path for emoji in group]).save(folder / IMAGES / image)
        questions = ask_about(group, image, pool, rng)
        shuffled = [questions[at] for at in rng.permutation(len(questions))]
        drawn.append((image, group, shuffled))
    return drawn
