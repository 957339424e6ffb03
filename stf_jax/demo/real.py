"""The demo over real weights: CLIP and SmolLM2 out of two packages, emoji out of a third.

    pictures/        images, LLaVA's JSON, held-out questions
    data/            the same as a TFDS dataset, by `stf-jax data build`
    start            by `stf-jax convert import`: tower, language model, a new projector
    adapter          the projector that begins where the words are, see `stf_jax.demo.alignment`
    aligned          as `start`, with that projector; `shipped` has the one that this package brings
    trained          by `stf-jax train`: the projector learns; tower and language model are frozen
    *-scores.json    of each model: the likelihood of every answer to the held-out questions

What is there already is not done again, so that a run that was stopped continues.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
import yaml
from flax import nnx
from jaxtyping import Array, Float
from PIL import Image

from stf_jax.convert import import_checkpoint
from stf_jax.convert.stored_model import load_processors
from stf_jax.data.builder import build
from stf_jax.data.validator import check
from stf_jax.demo.alignment import align, word_targets, write_adapter
from stf_jax.demo.evaluation import Score
from stf_jax.demo.experiment import DemoError, Interrupted, claim, read_metrics, say, show
from stf_jax.demo.packages import IMAGES as IMAGE_CREDIT
from stf_jax.demo.packages import LANGUAGE, TOWER
from stf_jax.demo.pictures import (
    CONVERSATIONS,
    IMAGES,
    KINDS,
    WORDS,
    Question,
    read_held_out,
    write_pictures,
)
from stf_jax.eval.choices import Choice, ChoiceScorer
from stf_jax.infer.load import load
from stf_jax.infer.model import Model, Request
from stf_jax.infer.prompts import read_pixels
from stf_jax.store.run import open_model
from stf_jax.train.config import TrainConfig
from stf_jax.train.loop import train
from stf_jax.util.files import read_json, write_json
from stf_jax.util.progress import count_progress

# An adapter as LLaVA's stage 1 writes it; `docs/demo.md` says how it was made.
PROJECTOR = Path(__file__).parent / "data" / "projector"
SYSTEM, TEMPLATE = "average", "chatml"
# See `ModelScores.choose`.
How: TypeAlias = Literal["seeing", "calibrated", "blind"]
HOWS: tuple[How, ...] = ("calibrated", "seeing", "blind")

PICTURES, SCORES = "pictures", "scores.json"
RATE = 1e-3
# Of a row: 49 vision tokens, and what is asked about an image.
_LENGTH = 192
_SEEN = 8  # images that the tower sees at a time
# A vision token is so much longer than a word: it says several at once.
_SCALE = 2.5
_FIRST = 5  # answers that are shown as soon as they are there


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealSettings:
    """How large a run is.

    Attributes:
        singles: images of one emoji to train on.
        groups: images of several.
        held_out_singles: images of one to ask about.
        held_out_groups: images of several.
        steps: of training; with 0 the shipped projector answers, or the aligned one.
        rows: of a batch.
        seed: of what is shown and asked, of new weights and the order of the examples.

    Raises:
        ValueError: `seed` is negative.
    """

    singles: int = 300
    groups: int = 100
    held_out_singles: int = 100
    held_out_groups: int = 40
    steps: int = 80
    rows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more")

    @classmethod
    def by_name(cls, size: str, *, seed: int = 0) -> "RealSettings":
        """The settings of size "quick" or "default"."""
        if size == "quick":
            few = {"held_out_singles": 3, "held_out_groups": 1}
            return cls(singles=12, groups=2, steps=0, seed=seed, **few)
        return cls(seed=seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelScores:
    """What one model makes of the held-out questions.

    Attributes:
        name: of its folder.
        title: in tables and plots.
        seen: of each question, the log-likelihoods of its answers.
        blind: likewise, where every image is white.
        seconds: of a question with its image, up to the likelihoods of its answers; the time to
            compile is in it.
    """

    name: str
    title: str
    seen: Sequence[Sequence[float]]
    blind: Sequence[Sequence[float]]
    seconds: float

    def choose(self, how: How) -> list[int]:
        """The number of the answer that is chosen to each question.

        Args:
            how: "seeing" takes the most likely answer, "blind" that about a white image.
                "calibrated" takes the one that the image makes more likely than any other, so that
                answers which the model always prefers have no advantage: pointwise mutual
                information (Holtzman et al. 2021, arXiv 2104.08315).
        """
        pairs = zip(self.seen, self.blind, strict=True)
        values = {
            "seeing": lambda seen, blind: seen,
            "blind": lambda seen, blind: blind,
            "calibrated": lambda seen, blind: np.subtract(seen, blind),
        }[how]
        return [int(np.argmax(values(seen, blind))) for seen, blind in pairs]

    def scores(self, questions: Sequence[Question], how: How) -> dict[str, Score]:
        """The score of each kind of question, and of "all" questions."""
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for question, number in zip(questions, self.choose(how), strict=True):
            right[question.kind].append(question.choices[number] == question.answer)
        right["all"] = [hit for hits in right.values() for hit in hits]
        return {
            kind: Score(right=sum(hits), questions=len(hits))
            for kind, hits in right.items()
            if hits
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealResults:
    """All that the report says."""

    settings: RealSettings
    questions: Sequence[Question]
    models: Sequence[ModelScores]
    steps: Sequence[Mapping[str, Any]]  # of metrics.jsonl; none where nothing was trained


def run_real(settings: RealSettings, out: Path) -> RealResults:
    """Runs the experiment in the folder `out`, or continues the one that is there.

    Raises:
        DemoError: `out` holds a run of other settings.
        Interrupted: and it can be called again.
        ValueError: a package is not installed.
    """
    claim(out, settings)
    for credit in (LANGUAGE.credit, TOWER.credit, IMAGE_CREDIT):
        say(credit)
    draw(settings, out)
    questions = read_held_out(out / PICTURES)
    models = []
    if PROJECTOR.is_dir():
        shipped = import_start(out / "shipped", projector=PROJECTOR, seed=settings.seed)
        models.append(ask(shipped, "shipped", "trained before", questions, out))
        _show_first(models[-1], questions)
    steps: Sequence[Mapping[str, Any]] = ()
    if settings.steps or not models:
        aligned = align_projector(settings, out)
        models.append(ask(aligned, "aligned", "aligned", questions, out))
        if settings.steps:
            trained = train_projector(aligned, settings, out)
            models.append(ask(trained, "trained", "trained here", questions, out))
            steps = read_metrics(trained)
    return RealResults(settings=settings, questions=questions, models=models, steps=steps)


def _show_first(model: ModelScores, questions: Sequence[Question]) -> None:
    """Prints a model's first answers, before others are asked."""
    for question, number in [*zip(questions, model.choose("calibrated"), strict=True)][:_FIRST]:
        answer = question.choices[number]
        right = "" if answer == question.answer else f" (it is {question.answer})"
        say(f"{question.image}: {question.text} {answer}{right}")


def draw(settings: RealSettings, out: Path) -> None:
    """Draws images and questions, unless they are there."""
    if not (out / PICTURES).is_dir():
        say("Drawing images of emoji, with questions whose answers are known")
        write_pictures(
            out / PICTURES,
            singles=settings.singles,
            groups=settings.groups,
            held_out_singles=settings.held_out_singles,
            held_out_groups=settings.held_out_groups,
            seed=settings.seed,
        )


def import_start(out: Path, *, projector: Path | None, seed: int) -> Path:
    """Imports tower and language model, with a projector that was trained or a new one."""
    if out.is_dir():
        return out
    language, tower = LANGUAGE.path, TOWER.path
    assert language is not None
    assert tower is not None
    if projector is None:
        show("convert", "import", language, out, "--vision-tower", tower, "--system", SYSTEM)
        import_checkpoint(language, out, vision_tower=tower, system=SYSTEM, seed=seed)
    else:
        show("convert", "import", projector, out, "--base", language, "--vision-tower", tower)
        import_checkpoint(projector, out, base=language, vision_tower=tower, dtype="float32")
    return out


def align_projector(settings: RealSettings, out: Path) -> Path:
    """Computes the projector that begins where the words are; the model that has it."""
    adapter, pictures = out / "adapter", out / PICTURES
    if not adapter.is_dir():
        start = import_start(out / "start", projector=None, seed=settings.seed)
        described: dict[str, list[str]] = read_json(pictures / WORDS)
        model = load(start, dtype="float32")
        with count_progress("Seeing") as progress:
            features = _see(model, [pictures / IMAGES / name for name in described], progress)
        opened = open_model(start)
        embedding, system = opened.read("text/embedding"), opened.config.system
        targets, center = word_targets([*described.values()], embedding, model.tokenizer)
        tensors = align(
            features,
            targets,
            center=center,
            width=system.projector_width,
            scale=_SCALE * float(np.sqrt(np.mean(embedding**2))),
        )
        write_adapter(adapter, tensors, system=system.to_dict())
    return import_start(out / "aligned", projector=adapter, seed=settings.seed)


def _see(
    model: Model, images: Sequence[Path], progress: Callable[[int, int], None]
) -> Float[np.ndarray, "images K C"]:
    """What the projector takes of each image."""
    graph, state = nnx.split((model.network.vision, model.network.connector))

    @jax.jit
    def reduce(state: nnx.State, pixels: Array) -> Array:
        vision, connector = nnx.merge(graph, state)
        reduced: Array = connector.reduce(vision(pixels))
        return reduced

    features = []
    for start in range(0, len(images), _SEEN):
        chunk = [*images[start : start + _SEEN]]
        padded = chunk + chunk[:1] * (_SEEN - len(chunk))
        pixels = read_pixels(padded, model.image_processor, upright=True)
        features.append(np.asarray(reduce(state, pixels))[: len(chunk)])
        progress(start + len(chunk), len(images))
    return np.concatenate(features)


def train_projector(start: Path, settings: RealSettings, out: Path) -> Path:
    """Trains the projector alone; the folder of the run.

    Raises:
        Interrupted: and it can be called again.
    """
    dataset, trained = out / "data", out / "trained"
    _build(dataset, start, out)
    tree: dict[str, Any] = {
        "model": str(start),
        "out": str(trained),
        "stage": "pretrain",
        "steps": settings.steps,
        "remat": "none",
        "dtype": "float32",
        "mesh": None,
        "log_every": 10,
        "seed": settings.seed,
        "data": {
            "datasets": [{"path": str(dataset)}],
            "template": TEMPLATE,
            "image_mode": "pad",
            "features": "cached",
            "sequence_length": _LENGTH,
            "batch_size": settings.rows,
            "images_per_row": 1,
            "packing": "single",
            "seed": settings.seed,
            "workers": 0,
        },
        "optimizer": {"learning_rate": RATE},
        "checkpoint": {"every": 50, "keep": 1},
    }
    file = out / "train.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    show("train", file)
    if train(TrainConfig.load(file)) == "interrupted":
        raise Interrupted
    return trained


def ask(path: Path, name: str, title: str, questions: Sequence[Question], out: Path) -> ModelScores:
    """Asks a model all questions, seeing and blind; `out`/NAME-scores.json keeps what it finds."""
    file = out / f"{name}-{SCORES}"
    if not file.is_file():
        model = load(path, dtype="float32")
        scorer = ChoiceScorer(model, template=TEMPLATE)
        images = out / PICTURES / IMAGES
        start = time.perf_counter()
        with count_progress(f"Asking the model {title}") as progress:
            seen = _score(scorer, questions, lambda name: images / name, progress)
        seconds = (time.perf_counter() - start) / len(questions)
        white = Image.new("RGB", (model.config.image_size,) * 2, "white")
        with count_progress("Asking it about a white image") as progress:
            blind = _score(scorer, questions, lambda _: white, progress)
        write_json(file, {"seen": seen, "blind": blind, "seconds": seconds})
    return ModelScores(name=name, title=title, **read_json(file))


def _score(
    scorer: ChoiceScorer,
    questions: Sequence[Question],
    find: Callable[[str], Path | Image.Image],
    progress: Callable[[int, int], None],
) -> list[list[float]]:
    choices = [
        Choice(
            request=Request(prompt=question.text, images=find(question.image)),
            answers=question.choices,
        )
        for question in questions
    ]
    return [score.tolist() for score in scorer.score(choices, progress=progress)]


def _build(dataset: Path, model: Path, out: Path) -> None:
    if dataset.is_dir():
        return
    processors = load_processors(model)
    files, images = [out / PICTURES / CONVERSATIONS], out / PICTURES / IMAGES
    shared: dict[str, Any] = {
        "images": images,
        "tokenizer": processors.tokenizer,
        "image_processor": processors.image_processor,
        "tokens_per_image": processors.tokens_per_image,
        "template": TEMPLATE,
        "sequence_length": _LENGTH,
        "workers": 1,
    }
    common: tuple[object, ...] = ("--images", images, "--model", model, "--template", TEMPLATE)
    common += ("--sequence-length", _LENGTH, "--workers", 1)
    with count_progress("Checking") as progress:
        show("data", "check", *files, *common)
        report = check(files, progress=progress, **shared)
    if not report.clean:
        raise DemoError(report.render())
    with count_progress("Building") as progress:
        show("data", "build", *files, dataset, *common)
        build(files, dataset, progress=progress, **shared)
