"""What is attacked: each verb through the function below it, in this process."""

import atexit
import contextlib
import functools
import io
import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from PIL import Image

import stf_jax
from stf_jax.convert import import_checkpoint
from stf_jax.convert.inspect import inspect_checkpoint
from stf_jax.convert.stored_model import load_processors, open_any
from stf_jax.data.builder import build
from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.pipeline import TrainingData
from stf_jax.data.show import show
from stf_jax.data.templates import TEMPLATES
from stf_jax.data.validator import check
from stf_jax.eval.registry import BENCHMARKS
from stf_jax.eval.runner import ask, prepare, score_file
from stf_jax.infer.config import InferenceConfig
from stf_jax.infer.engine import Engine
from stf_jax.infer.model import Request
from stf_jax.infer.sampling import Sampling
from stf_jax.store.run import open_model
from stf_jax.train.checkpoint import Checkpoints
from stf_jax.train.config import TrainConfig
from stf_jax.train.metrics import MetricsLog
from stf_jax.train.optimizer import OptimizerConfig, make_optimizer
from stf_jax.train.step import TrainState, init_state
from tests.corpus import write_corpus
from tests.fuzz.harness import Target, numbered
from tests.fuzz.mutate import VALUES, change_bytes, copy, damage, write
from tests.stf_jax.eval.miniature import Echo, make_all

Told = list[str]
REFERENCE = Path(__file__).parents[1] / "data" / "reference"


def _damage(files: Sequence[Path], rng: random.Random, told: Told) -> None:
    told.append(damage(list(files), rng))


# convert


@functools.cache
def _native() -> Path:
    folder = tempfile.mkdtemp(prefix="stf-jax-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    import_checkpoint(REFERENCE / "llava-stf", Path(folder, "native"))
    return Path(folder, "native")


def _prepare_models(base: Path) -> None:
    shutil.copytree(REFERENCE / "llava-stf", base / "llava-stf")
    shutil.copytree(REFERENCE / "vicuna", base / "vicuna")
    shutil.copytree(_native(), base / "native")


def _inspect(base: Path, place: Path, rng: random.Random, told: Told) -> str | None:
    name = rng.choice(("llava-stf", "llava-stf", "vicuna", "native"))
    copy(base / name, place / "model", link=True)
    _damage([*numbered(place / "model")], rng, told)
    report = inspect_checkpoint(place / "model", vision_tower=_tower(name))
    str(report)
    if report.problem is None and name != "vicuna":
        open_any(place / "model", vision_tower=_tower(name)).processors()
    return report.problem


def _import(base: Path, place: Path, rng: random.Random, told: Told) -> None:
    name = rng.choice(("llava-stf", "vicuna"))
    copy(base / name, place / "model", link=True)
    _damage([*numbered(place / "model")], rng, told)
    system = "stf" if name == "vicuna" else None
    tower = _tower(name)
    import_checkpoint(place / "model", place / "out", vision_tower=tower, system=system)


def _tower(name: str) -> Path | None:
    return None if name == "native" else REFERENCE / "clip"


# data


@functools.cache
def _processors() -> Any:
    return load_processors(REFERENCE / "llava-stf")


def _options() -> dict[str, Any]:
    processors = _processors()
    return {
        "tokenizer": processors.tokenizer,
        "image_processor": processors.image_processor,
        "workers": 0,
    }


def _prepare_corpus(base: Path) -> None:
    corpus = write_corpus(base, 6)
    turns = corpus.entries[0]["conversations"]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[one["from"]], "content": one["value"]} for one in turns]
    other = [{"messages": messages, "images": [corpus.entries[0]["image"]]}]
    (base / "other.json").write_text(json.dumps({"data": other}), encoding="utf-8")
    lines = "".join(json.dumps(entry) + "\n" for entry in corpus.entries)
    (base / "train.jsonl").write_text(lines, encoding="utf-8")


def _damage_corpus(base: Path, place: Path, rng: random.Random, told: Told) -> Path:
    copy(base, place / "corpus", link=True)
    file = place / "corpus" / rng.choice(("train.json", "train.jsonl", "other.json"))
    images = [*numbered(place / "corpus" / "images")]
    _damage([file] if rng.random() < 0.7 else images, rng, told)
    return file


def _check(base: Path, place: Path, rng: random.Random, told: Told) -> str | None:
    file = _damage_corpus(base, place, rng, told)
    report = check([file], images=place / "corpus" / "images", **_options())
    report.render()
    json.dumps(report.to_json())
    return None if report.clean else report.problems[0].reason


def _build(base: Path, place: Path, rng: random.Random, told: Told) -> None:
    file = _damage_corpus(base, place, rng, told)
    build([file], place / "out", images=place / "corpus" / "images", **_options())


def _prepare_dataset(base: Path) -> None:
    corpus = write_corpus(base, 6)
    build([corpus.json], base / "dataset", images=corpus.images, **_options())


def _read_dataset(base: Path, place: Path, rng: random.Random, told: Told) -> None:
    copy(base / "dataset", place / "dataset", link=True)
    _damage([*numbered(place / "dataset")], rng, told)
    processors = _processors()
    show(place / "dataset", 0, tokenizer=processors.tokenizer)
    config = DataConfig(
        datasets=(DatasetSource(path=str(place / "dataset")),),
        sequence_length=384,
        batch_size=2,
        workers=0,
    )
    data = TrainingData(
        config,
        tokenizer=processors.tokenizer,
        image_processor=processors.image_processor,
        tokens_per_image=processors.tokens_per_image,
    )
    with contextlib.closing(data.batches(stop_step=1)) as batches:
        next(batches)


# generate


@functools.cache
def model() -> stf_jax.Model:
    """The reference's, whose devices draw tokens at random: what is attacked is around them."""
    loaded = stf_jax.load(REFERENCE / "llava-stf")
    loaded.engine.run = functools.partial(_run, loaded.engine)  # type: ignore[method-assign]
    return loaded


def _run(
    engine: Engine,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    sampling: Any,
    slots: int,
    every: int,
    take: Any,
) -> Iterator[int]:
    most, rng = engine._check(prompts, max_new_tokens), np.random.default_rng(len(prompts))
    for number, prompt in enumerate(prompts):
        prompt.load()
        take(number, rng.integers(0, engine.config.text.vocab_size, min(most, 30)))
        yield number


_WORDS = (
    *["What is this?", "停🙂é", "USER:", "ASSISTANT:", "</s>", "<|im_end|>", "▁", "<0x0A>"] * 3,
    "<image>", "<s>", "<unk>", "\n", " ", "", "\ud800", "\0", "x" * 100_000, "\u2028",
)  # fmt: skip


def _generate(base: Path, place: Path, rng: random.Random, told: Told) -> None:
    requests = [
        Request(
            prompt="".join(rng.choices(_WORDS, k=rng.randrange(1, 5))),
            images=_images(place, rng),
        )
        for _ in range(rng.choice((1, 1, 2)))
    ]
    options: dict[str, Any] = {}
    odd: dict[str, Any] = {
        "template": [*TEMPLATES, "v2", ""],
        "max_new_tokens": [1, 0, -1, 10**30, True, 1.5],
        "stop": ["", "a", ["\n", "</s>"], [""], "\ud800"],
        "slots": [1, 0, -1, 10**9],
    }
    for name, values in odd.items():
        if rng.random() < 0.1:
            options[name] = rng.choice(values)
    told.append(f"{requests!r:.300}, {options!r:.200}")
    if rng.random() < 0.2:
        # Of the right types, which the tests check.
        whole: dict[str, Any] = {rng.choice(("top_k", "seed")): rng.choice((0, -1, 2, 10**30))}
        number = rng.choice((0.0, -1.0, 0.5, math.nan, 1e308))
        chosen = rng.choice((whole, {rng.choice(("temperature", "top_p")): number}))
        told.append(f"{chosen}")
        options["sampling"] = Sampling(**chosen)
    model().generate(requests, **options)


def _images(place: Path, rng: random.Random) -> Any:
    """Paths, bytes and arrays: right ones, damaged ones, and what is none."""
    file = io.BytesIO()
    kind = rng.choice(("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"))
    Image.fromarray(np.full((20, 30, 3), rng.randrange(256), np.uint8)).save(file, kind)
    data = file.getvalue()
    path = place / f"{rng.randrange(10**9)}.png"
    path.write_bytes(data)
    match rng.choice((0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8)):
        case 0:
            return None
        case 1:
            return path
        case 2:
            write(path, change_bytes(data, rng))
            return [path]
        case 3:
            return change_bytes(data, rng)
        case 4:
            return [data, rng.choice(VALUES)]
        case 5:
            shape = rng.choice(((3, 4, 3), (0, 4, 3), (3, 4), (1, 1, 4), (10_000, 1, 3)))
            return np.zeros(shape, rng.choice((np.uint8, np.float32)))
        case 6:
            damage([path], rng)
            return str(path)
        case 7:
            return rng.choice(
                ("data:image/png;base64,AAAA", "http://127.0.0.1/a.png", "", "x" * 999)
            )
        case _:
            return [data] * rng.choice((0, 1, 2, 200))


# eval


def _evaluate(base: Path, place: Path, rng: random.Random, told: Told) -> None:
    name = rng.choice([*BENCHMARKS])
    benchmark = BENCHMARKS[name]
    folder = base / benchmark.paths["questions"].partition("/")[0]
    copy(folder, place / "data" / folder.name, link=True)
    out = place / "out"
    if rng.random() < 0.5:
        _damage([*numbered(place / "data")], rng, told)
        ask(prepare(benchmark, data=place / "data"), Echo(), out=out)
        return
    prepared = prepare(benchmark, data=place / "data")
    with contextlib.suppress(KeyboardInterrupt):
        ask(prepared, Echo(stop_after=rng.choice((1, 100))), out=out)
    _damage([*numbered(out)], rng, told)
    if rng.random() < 0.5:
        ask(prepared, Echo(), out=out)
    else:
        score_file(benchmark, out / "answers.jsonl", data=place / "data")


# train


_ARRAYS = {
    "text/norm/scale": np.random.default_rng(0).standard_normal(64, np.float32),
    "connector/projector/linear_1/bias": np.random.default_rng(1).standard_normal(8, np.float32),
}


def _state(step: int) -> TrainState:
    optimizer = make_optimizer(OptimizerConfig(), steps=20)
    trained = {name: jax.numpy.asarray(array + step) for name, array in _ARRAYS.items()}
    return init_state(trained, optimizer)


def _checkpoints(path: Path) -> Checkpoints:
    return Checkpoints(path, config={"model": "x"}, every=1, keep=3)


def _prepare_run(base: Path) -> None:
    shutil.copytree(_native(), base / "native")
    with _checkpoints(base / "run" / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _state(step))
    lines = ({"step": step, "loss": 1.0, "grad_norm": 0.5} for step in range(4))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (base / "run" / "metrics.jsonl").write_text(text, encoding="utf-8")
    config = TrainConfig(model=str(base / "native"), out=str(base / "run")).to_dict()
    plain = json.loads(json.dumps(config))
    (base / "run" / "config.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")


def _resume(base: Path, place: Path, rng: random.Random, told: Told) -> None:
    run = place / "run"
    copy(base / "run", run, link=False)
    likely = [run / "metrics.jsonl", run / "config.yaml"]
    _damage(likely if rng.random() < 0.5 else [*numbered(run)], rng, told)
    TrainConfig.load(run / "config.yaml")
    opened = open_model(run)
    opened.load({"text/norm/scale": np.zeros(64, np.float32)})
    with _checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.restore(_state(0), report=told.append)
    log = MetricsLog(run, start=2, stop=4, every=1, flops=0.0, writes=True)
    log.close()


def _prepare_configs(base: Path) -> None:
    shutil.copytree(REFERENCE.parents[2] / "configs", base / "configs")


def _config(base: Path, place: Path, rng: random.Random, told: Told) -> None:
    copy(base / "configs", place / "configs", link=True)
    file = rng.choice(sorted((place / "configs").glob("*.yaml")))
    _damage([file], rng, told)
    kind = InferenceConfig if "inference" in file.name else TrainConfig
    value = json.dumps(rng.choice(VALUES))
    overrides = [f"--{rng.choice(('seed', 'data.seed', 'mesh'))}={value:.50}"]
    kind.load(file, overrides if rng.random() < 0.2 else ())


TARGETS = (
    Target(name="inspect", prepare=_prepare_models, run=_inspect, cases=15),
    Target(name="import", prepare=_prepare_models, run=_import, cases=5, all_or_nothing=("out",)),
    Target(name="check", prepare=_prepare_corpus, run=_check, cases=40),
    Target(name="build", prepare=_prepare_corpus, run=_build, cases=10, all_or_nothing=("out",)),
    Target(name="dataset", prepare=_prepare_dataset, run=_read_dataset, cases=10),
    Target(name="generate", prepare=lambda base: model() and None, run=_generate, cases=60),
    Target(name="eval", prepare=make_all, run=_evaluate, cases=40),
    Target(name="resume", prepare=_prepare_run, run=_resume, cases=4),
    Target(name="config", prepare=_prepare_configs, run=_config, cases=20),
)
