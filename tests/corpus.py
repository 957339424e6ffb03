"""A small training set in LLaVA's form, with every kind of example."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Corpus:
    """LLaVA's JSON and a folder of images."""

    json: Path
    images: Path
    entries: list[dict[str, Any]]


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    """Smooth colors with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-6, 7, smooth.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def entry(
    number: int, images: list[str], rng: np.random.Generator, *, longest: int
) -> dict[str, Any]:
    words = ["What", "color", "is", "the", "bus", "near", "a", "table", "on", "this", "street"]

    def text() -> str:
        return " ".join(rng.choice(words, size=int(rng.integers(1, longest + 1))))

    turns = []
    for turn in range(int(rng.integers(1, 4))):
        marks = "<image>\n" * len(images) if turn == 0 else ""
        turns += [{"from": "human", "value": marks + text()}, {"from": "gpt", "value": text()}]
    actual: dict[str, Any] = {"id": f"example-{number}", "conversations": turns}
    if images:
        actual["image"] = images[0] if len(images) == 1 else images
    return actual


def write_corpus(folder: Path, count: int, *, longest: int = 19) -> Corpus:
    """`count` examples, with turns of one word to `longest`."""
    rng = np.random.default_rng(7)
    images = folder / "images"
    images.mkdir()
    names = [f"{number}.jpg" for number in range(9)]
    for number, name in enumerate(names):
        width, height = (int(side) for side in rng.integers(40, 130, 2))
        (images / name).write_bytes(jpeg(width, height, number))
    entries = []
    for number in range(count):
        shown = list(rng.choice(names, size=[1, 1, 1, 0, 2][number % 5]))
        entries.append(entry(number, shown, rng, longest=longest))
    path = folder / "train.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return Corpus(path, images, entries)
