"""The laptop reproduction from beginning to end, each step by the verb that a user would call.

    scenes/      images, LLaVA's JSON, held-out questions
    data/        the same as TFDS datasets, by `stf-jax data build`
    VARIANT/start    by `stf-jax convert import`: tower, new connector, language model
    VARIANT/stage1   by `stf-jax train`: the connector learns captions
    VARIANT/stage2   by `stf-jax train`: with the language model, they learn conversations
    VARIANT/answers.json
    results.json, report.md, *.png
    best/        the best variant as a PyTorch checkpoint

What is there already is not done again, so that a run that was stopped continues.
"""

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from stf_jax.convert import export_checkpoint, import_checkpoint
from stf_jax.convert.stored_model import load_processors
from stf_jax.data.builder import build
from stf_jax.data.validator import check
from stf_jax.demo.corpus import CAPTIONS, CONVERSATIONS, IMAGES, read_held_out, write_corpus
from stf_jax.demo.evaluation import answer_all, read_cost, scores
from stf_jax.demo.language import TEXT
from stf_jax.demo.pretraining import LANGUAGE, TOWER
from stf_jax.demo.results import Results, VariantResult
from stf_jax.demo.tower import VISION
from stf_jax.demo.variants import DemoVariant, all_variants
from stf_jax.store.run import METRICS, open_model
from stf_jax.train.config import TrainConfig
from stf_jax.train.loop import train
from stf_jax.util.files import read_json, read_jsonl, write_json
from stf_jax.util.progress import count_progress

SETTINGS, SCENES = "settings.json", "scenes"
FINETUNE_RATE = 5e-4  # the peak learning rate of stage 2, for every variant
TEMPLATES = {CAPTIONS: "plain", CONVERSATIONS: "v1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How large a run is.

    Attributes:
        variants: names, in the order of the report.
        train_scenes: images, each with a caption of every kind and a conversation.
        held_out_scenes: with two questions of each kind.
        steps: of stage 1 and of stage 2.
        rows: of a batch.
        seed: of scenes, new weights and the order of the examples.

    Raises:
        ValueError: `seed` is negative.
    """

    variants: tuple[str, ...] = ("average", "stf_mbtf")
    train_scenes: int = 2000
    held_out_scenes: int = 200
    steps: tuple[int, int] = (600, 500)
    rows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more")

    @classmethod
    def by_name(cls, size: str, *, seed: int = 0) -> "Settings":
        """The settings of size "quick", "default" or "full"."""
        if size == "quick":
            return cls(train_scenes=100, held_out_scenes=10, steps=(4, 4), seed=seed)
        if size == "full":
            return cls(variants=("llava", "average", "stf", "stf_mbtf"), seed=seed)
        return cls(seed=seed)


class DemoError(ValueError):
    """A demo that cannot begin or continue; the message names the fix."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM during training; a checkpoint is there."""


def run(settings: Settings, out: Path) -> Results:
    """Runs the experiment in the folder `out`, or continues the one that is there.

    Raises:
        DemoError: `out` holds a run of other settings.
        Interrupted: and it can be called again.
    """
    claim(out, settings)
    variants = all_variants(VISION, TEXT)
    for name in settings.variants:
        for stage in (1, 2):
            train_stage(stage, variants[name], settings, out)
    corpus = out / SCENES
    questions = read_held_out(corpus)
    results = []
    for name in settings.variants:
        answers_file = out / name / "answers.json"
        with count_progress(f"Asking {variants[name].title}") as progress:
            answers = answer_all(out / name / "stage2", questions, corpus, answers_file, progress)
        results.append(
            VariantResult(
                name=name,
                title=variants[name].title,
                scores=scores(questions, answers),
                cost=read_cost(answers_file),
                stages=tuple(read_metrics(out / name / stage) for stage in ("stage1", "stage2")),
                answers=tuple(answers),
            )
        )
    outcome = Results(settings=dataclasses.asdict(settings), variants=tuple(results))
    _export(outcome.best.name, out)
    return outcome


def train_stage(stage: int, variant: DemoVariant, settings: Settings, out: Path) -> Path:
    """Trains one stage of one variant, with all that must be there before it.

    Args:
        stage: 1 or 2.
        variant: of any name.
        settings: of the run.
        out: its folder.

    Returns:
        The folder of the training run.

    Raises:
        Interrupted: and it can be called again.
    """
    folder = out / variant.name
    _draw(out, settings)
    _import(variant, out, seed=settings.seed)
    _build(out, folder / "start")
    name, template = list(TEMPLATES.items())[stage - 1]
    run_folder = folder / f"stage{stage}"
    tree: dict[str, Any] = {
        "model": str(folder / ("start" if stage == 1 else "stage1")),
        "out": str(run_folder),
        "stage": ("pretrain", "finetune")[stage - 1],
        "steps": settings.steps[stage - 1],
        "remat": "none",
        "dtype": "float32",
        "mesh": None,
        "log_every": 50,
        "seed": settings.seed,
        "data": {
            "datasets": [{"path": str(_dataset(out, name))}],
            "template": template,
            "image_mode": "pad",
            # Four captions fit with any variant's vision tokens, so that all see the same rows.
            "sequence_length": (320, 256)[stage - 1],
            "batch_size": settings.rows,
            "images_per_row": (4, 1)[stage - 1],
            "seed": settings.seed,
            "workers": 0,
        },
        "optimizer": {"learning_rate": variant.pretrain_rate if stage == 1 else FINETUNE_RATE},
        "checkpoint": {"every": 50, "keep": 1},
    }
    file = folder / f"stage{stage}.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    show("train", file)
    if train(TrainConfig.load(file)) == "interrupted":
        raise Interrupted
    return run_folder


def claim(out: Path, settings: Any) -> None:
    """Notes the settings in a new folder; in an old one they must be the same.

    Raises:
        DemoError: it holds a run of other settings, or something else.
    """
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    if (out / SETTINGS).is_file():
        if read_json(out / SETTINGS, fix="choose another --out") != wanted:
            raise DemoError(
                f"{out} holds a demo of other settings or of an older release; choose another --out"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise DemoError(f"{out} holds something else than a demo; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SETTINGS, wanted, indent=1)


def _draw(out: Path, settings: Settings) -> None:
    if (out / SCENES).is_dir():
        return
    say(f"Drawing {settings.train_scenes} scenes to train on, {settings.held_out_scenes} not")
    write_corpus(
        out / SCENES,
        train=settings.train_scenes,
        held_out=settings.held_out_scenes,
        seed=settings.seed,
    )


def _import(variant: DemoVariant, out: Path, *, seed: int) -> None:
    start = out / variant.name / "start"
    if start.is_dir():
        return
    say(f"\n== {variant.title}")
    show("convert", "import", LANGUAGE, start, "--vision-tower", TOWER, "--dtype", "float32")
    import_checkpoint(
        LANGUAGE, start, vision_tower=TOWER, system=variant.system, seed=seed, dtype="float32"
    )


def _build(out: Path, model: Path) -> None:
    """Builds both datasets, which all variants share."""
    processors = load_processors(model)
    for name, template in TEMPLATES.items():
        dataset = _dataset(out, name)
        if dataset.is_dir():
            continue
        files, images = [out / SCENES / name], out / SCENES / IMAGES
        shared: dict[str, Any] = {
            "images": images,
            "tokenizer": processors.tokenizer,
            "image_processor": processors.image_processor,
            "tokens_per_image": processors.tokens_per_image,
            "template": template,
            "sequence_length": TEXT.max_positions,
            "workers": 1,
        }
        common: tuple[object, ...] = ("--images", images, "--model", model)
        common += ("--template", template, "--sequence-length", TEXT.max_positions, "--workers", 1)
        with count_progress(f"Checking {name}") as progress:
            show("data", "check", *files, *common)
            report = check(files, progress=progress, **shared)
        if not report.clean:
            raise DemoError(report.render())
        with count_progress(f"Building {name}") as progress:
            show("data", "build", *files, dataset, *common)
            build(files, dataset, progress=progress, **shared)


def _export(variant: str, out: Path) -> None:
    best, trained = out / "best", out / variant / "stage2"
    if best.is_dir():
        return
    layout: Any = open_model(trained).config.system.layout
    show("convert", "export", trained, best, "--layout", layout)
    export_checkpoint(trained, best, layout=layout)


def _dataset(out: Path, name: str) -> Path:
    return out / "data" / Path(name).stem


def read_metrics(run_folder: Path) -> tuple[dict[str, Any], ...]:
    """The records of every step of a training run."""
    return tuple(read_jsonl(run_folder / METRICS).values())


def command(*arguments: object) -> str:
    """A command as a user would type it here."""
    name = ["stf-jax"] if shutil.which("stf-jax") else [sys.executable, "-m", "stf_jax"]
    return shlex.join([*name, *map(str, arguments)])


def show(*arguments: object) -> None:
    """Prints a command before what it would do is done."""
    say(f"$ {command(*arguments)}")


def say(text: str) -> None:
    """A line on standard error."""
    sys.stderr.write(f"{text}\n")
