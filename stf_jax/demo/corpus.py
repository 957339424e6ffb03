"""The scenes of a run on disk: JPEG images, LLaVA's JSON for training, held-out questions."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stf_jax.demo import scenes
from stf_jax.demo.scenes import MOST, Question, Scans, Scene
from stf_jax.util.files import new_directory, read_json, write_json

IMAGES = "images"
CAPTIONS = "captions.json"
CONVERSATIONS = "conversations.json"
HELD_OUT = "held_out.json"
REQUEST = "Describe the image."


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A question about a scene that no model was trained on, with scans that none has seen."""

    image: str
    question: Question


def write_corpus(out: Path, *, train: int, held_out: int, seed: int) -> None:
    """Draws all scenes of a run into the new folder `out`, which appears when it is complete."""
    with new_directory(out) as unfinished:
        folder = Path(unfinished)
        (folder / IMAGES).mkdir()
        captions: list[dict[str, Any]] = []
        conversations: list[dict[str, Any]] = []
        rng, scans = np.random.default_rng([seed, 0]), Scans.load("train")
        for number in range(train):
            name, scene = f"train-{number:05}.jpg", Scene.draw(rng)
            _save(scene, scans, rng, folder / IMAGES / name)
            questions = scenes.questions(scene, rng, of_each=MOST)
            captions += [
                _sample(f"{name}-{kind}", name, [(REQUEST, caption(scene, rng))])
                for kind, caption in scenes.CAPTIONS.items()
            ]
            conversations.append(_sample(name, name, scenes.shuffle(questions, rng)))
        rng, scans = np.random.default_rng([seed, 1]), Scans.load("test")
        unseen: list[dict[str, Any]] = []
        for number in range(held_out):
            name, scene = f"held-out-{number:04}.jpg", Scene.draw(rng)
            _save(scene, scans, rng, folder / IMAGES / name)
            unseen += [
                {
                    "image": name,
                    "question": dataclasses.asdict(question),
                }
                for question in scenes.questions(scene, rng, of_each=2)
            ]
        for name, content in (
            (CAPTIONS, captions), (CONVERSATIONS, conversations), (HELD_OUT, unseen),
        ):  # fmt: skip
            write_json(folder / name, content, indent=1)


def read_held_out(folder: Path) -> list[HeldOut]:
    """The questions that `write_corpus` held out, scene after scene."""
    return [
        HeldOut(**entry | {"question": Question(**entry["question"])})
        for entry in read_json(folder / HELD_OUT, list)
    ]


def _sample(identity: str, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """An entry of LLaVA's JSON."""
    return {
        "id": identity,
        "image": image,
        "conversations": [*scenes.conversation(turns)],
    }


def _save(scene: Scene, scans: Scans, rng: np.random.Generator, path: Path) -> None:
    # Small colored strokes would lose their color to JPEG's usual half-resolution chroma.
    Image.fromarray(scenes.render(scene, scans, rng)).save(path, quality=95, subsampling=0)
