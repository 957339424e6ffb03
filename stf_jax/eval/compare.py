"""A table of any set of models: accuracy with intervals, and what an answer costs.

    OUT/<row>/<benchmark>/           answers, protocol and scores, as `runner.ask` writes them
    OUT/comparison.csv, .md, .png    see `stf_jax.eval.comparison`

Answers that are there are not asked for again; what differs in the protocol is refused.
"""

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from stf_jax.config.parse import parse
from stf_jax.convert.stored_model import open_any
from stf_jax.data.fit import fit_template
from stf_jax.eval.answers import read_answers
from stf_jax.eval.benchmark import Credit
from stf_jax.eval.choice_file import ChoiceAnswerer, choice_benchmark, choice_paths
from stf_jax.eval.generation import ModelAnswerer
from stf_jax.eval.intervals import clustered
from stf_jax.eval.questions import Answerer
from stf_jax.eval.registry import get_benchmark
from stf_jax.eval.runner import ANSWERS, Prepared, Progress, ask, prepare
from stf_jax.infer.load import DTypeName, load
from stf_jax.infer.model import Model, Request
from stf_jax.models import flops
from stf_jax.util.files import expand, name_some, read_text

ALL = "all"
# Questions whose prompts are measured, and images of a timed call.
_MEASURED, _TIMED = 200, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A model of the table.

    Attributes:
        model: its path, as for `stf_jax.load`.
        title: in the table; all differ.
        system: another one over the same weights.
        fields: of that system.
        tokens: an image, where the system has several budgets.
        vision_tower: for a PyTorch directory that does not lead to one.
    """

    model: str
    title: str
    system: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokens: int | None = None
    vision_tower: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What opens the model, beside its path."""
        return {
            "vision_tower": None if self.vision_tower is None else expand(self.vision_tower),
            "system": self.system,
            "fields": self.fields or None,
        }

    @property
    def folder(self) -> str:
        """Of its answers, within `out`; empty where the title says nothing."""
        return re.sub(r"[^\w.+-]+", "-", self.title).lstrip(".")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a question of median length with its images, up to the first token of the answer.

    Attributes:
        prompt_tokens: images included.
        layer_tokens: vision tokens that each layer of the language model computes.
        language_flops: of the language model.
        total_flops: with tower and connector.
        cache_bytes: keys and values that stay after the prompt.
        seconds: of a question, median of five calls over several images; None if not measured.
    """

    prompt_tokens: int
    layer_tokens: tuple[int, ...]
    language_flops: float
    total_flops: float
    cache_bytes: int
    seconds: float | None

    @property
    def mean_tokens(self) -> float:
        """Vision tokens, the mean over layers."""
        return float(np.mean(self.layer_tokens))

    @property
    def layers(self) -> str:
        """Tokens by layer in few words: "196 x 8, 49 x 16"."""
        groups = itertools.groupby(self.layer_tokens)
        return ", ".join(f"{tokens} x {len([*layers])}" for tokens, layers in groups)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """The accuracy of one model in one kind of question; shares from 0 to 1.

    Attributes:
        difference: to the baseline's, question by question; None for the baseline itself.
    """

    title: str
    benchmark: str
    kind: str
    questions: int
    images: int
    accuracy: float
    interval: tuple[float, float]
    difference: float | None
    difference_interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that the table says."""

    lines: Sequence[Line]
    costs: Mapping[str, Cost]
    baseline: str


def read_rows(path: Path) -> list[Row]:
    """Rows from YAML: a list of the fields of `Row`.

    Raises:
        ValueError: no such list, or an unknown or missing key.
    """
    try:
        tree = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML; give a list of models") from error
    if not isinstance(tree, list) or not all(isinstance(entry, dict) for entry in tree):
        raise ValueError(f"{path}: give a list, with `- model: PATH` and `title: NAME` in each")
    rows = []
    for number, entry in enumerate(tree, start=1):
        if not isinstance(entry.get("model"), str):
            raise ValueError(f"{path}: entry {number} names no model; add `model: PATH`")
        try:
            rows.append(parse(Row, {"title": Path(entry["model"]).name} | entry))
        except ValueError as error:
            raise ValueError(f"{path}: entry {number}: {error}") from error
    return rows


def open_benchmark(name: str, path: Path, *, template: str, limit: int | None) -> Prepared:
    """A file of closed choices, or one of LLaVA's benchmarks under its data folder.

    Raises:
        ValueError: files that are missing or do not fit, or a benchmark in which an answer counts
            nothing by itself.
    """
    if path.is_file():
        benchmark = choice_benchmark(name, template=template)
        return prepare(benchmark, data=None, paths=choice_paths(path), limit=limit, option=None)
    benchmark = get_benchmark(name)
    if benchmark.credit is None:
        raise ValueError(
            f"{name} has no score by question, which intervals need; take gqa, pope, textvqa, or a "
            "file of closed choices"
        )
    return prepare(benchmark, data=path, limit=limit, option=None)


def check_rows(rows: Sequence[Row], baseline: str | None) -> str:
    """The baseline's title, by default the first row's.

    Raises:
        ValueError: fewer than two models, two of one title, one without, one that cannot be
            opened, or a baseline that is none of them.
    """
    if len(rows) < 2:
        raise ValueError("give two or more models to compare")
    folders = [row.folder for row in rows]
    if "" in folders:
        model = rows[folders.index("")].model
        raise ValueError(f"the model {model} has no title; give it one, with --rows FILE")
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        raise ValueError(f"two models are called {twice[0]}; give each a title, with --rows FILE")
    titles = [row.title for row in rows]
    if baseline is not None and baseline not in titles:
        raise ValueError(f"the baseline {baseline!r} is none of {name_some(titles, most=20)}")
    for row in rows:
        open_any(expand(row.model), **row.options).check_trained()
    return baseline or titles[0]


def compare(
    rows: Sequence[Row],
    benchmarks: Sequence[Prepared],
    *,
    out: Path,
    baseline: str | None = None,
    dtype: DTypeName | None = None,
    slots: int = 16,
    is_timed: bool = False,
    progress: Callable[[str], Progress | None] = lambda title: None,
) -> Comparison:
    """Asks every model every question that `out` does not answer yet, and compares.

    Args:
        rows: two models or more.
        benchmarks: from `open_benchmark`; costs are those of the first.
        out: see the head of this module.
        baseline: title of the row that the others are compared with; the first by default.
        dtype: of weights and arithmetic.
        slots: answers in the making at a time.
        is_timed: whether the time to the first token is measured.
        progress: called with a model's title, gives what is called after each answer.

    Raises:
        ValueError: what `check_rows` refuses, a model that cannot be loaded, or answers in `out` of
            another protocol or to other questions.
    """
    against = check_rows(rows, baseline)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    credits: dict[tuple[str, str], list[Credit]] = {}
    costs: dict[str, Cost] = {}
    for row in rows:
        # One model at a time is in memory.
        model = load(expand(row.model), dtype=dtype, **row.options)
        for prepared in benchmarks:
            name = prepared.benchmark.name
            folder = out / row.folder / name
            ask(
                prepared,
                _answerer(model, row, prepared, dtype=dtype, slots=slots),
                out=folder,
                progress=progress(f"{row.title}, {name}"),
            )
            answers = read_answers(folder / ANSWERS)[: prepared.limit]
            assert prepared.benchmark.credit is not None
            credits[row.title, name] = prepared.benchmark.credit(prepared.paths, answers)
        costs[row.title] = measure(model, row, benchmarks[0], is_timed=is_timed)
        del model
    lines = [
        line
        for prepared in benchmarks
        for row in rows
        for line in _lines(row.title, against, prepared, credits)
    ]
    return Comparison(lines=lines, costs=costs, baseline=against)


def _answerer(model: Model, row: Row, prepared: Prepared, *, dtype: str, slots: int) -> Answerer:
    answerer = ModelAnswerer(
        model, model_id=Path(row.model).name, slots=slots, tokens=row.tokens, dtype=dtype
    )
    if "choices" not in prepared.questions[0].extra:
        return answerer
    template = prepared.benchmark.decoding.template
    return ChoiceAnswerer(model, answerer, template=template, tokens=row.tokens)


def _lines(
    title: str,
    baseline: str,
    prepared: Prepared,
    credits: Mapping[tuple[str, str], Sequence[Credit]],
) -> Iterator[Line]:
    name = prepared.benchmark.name
    images = [question.images for question in prepared.questions[: prepared.limit]]
    kinds = [credit.kind for credit in credits[title, name]]
    right, other = (
        np.array([credit.right for credit in credits[row, name]], np.float64)
        for row in (title, baseline)
    )
    for kind in [ALL, *(sorted({*kinds}) if any(kinds) else ())]:
        at = [n for n, each in enumerate(kinds) if kind in (ALL, each)]
        shown = [images[n] for n in at]
        gaps = right[at] - other[at]
        is_baseline = title == baseline
        yield Line(
            title=title,
            benchmark=name,
            kind=kind,
            questions=len(at),
            images=len({*shown}),
            accuracy=float(right[at].mean()),
            interval=clustered(right[at], shown),
            difference=None if is_baseline else float(gaps.mean()),
            difference_interval=None if is_baseline else clustered(gaps, shown),
        )


def measure(model: Model, row: Row, prepared: Prepared, *, is_timed: bool) -> Cost:
    """The cost of a question of median length."""
    config, program = model.config, model.engine.program
    questions = prepared.questions[: prepared.limit][:_MEASURED]
    template = fit_template(prepared.benchmark.decoding.template, model.tokenizer)
    requests = [Request(prompt=q.prompt, images=q.images) for q in questions]
    prompts = model.make_prompts(requests, template=template, tokens=row.tokens)
    order = np.argsort([len(prompt.ids) for prompt in prompts], kind="stable")
    middle = int(order[len(order) // 2])
    prompt, images = prompts[middle], len(questions[middle].images)
    length, each = len(prompt.ids), config.choose_budget(row.tokens)
    lengths = config.system.layer_lengths(config.vision, config.text, length=length, images=images)
    work = flops.forward(config, rows=1, length=length, images=images)
    cache, held = program.abstract_cache(), config.system.held(prompt.ids, config.vision)
    slots = [held[group] for group in cache.layer_groups]
    return Cost(
        prompt_tokens=length,
        layer_tokens=tuple(max(layer - (length - images * each), 0) for layer in lengths),
        language_flops=work.text,
        total_flops=work.total,
        cache_bytes=sum(
            slots[layer] * _slot_bytes((cache.keys[layer], cache.values[layer]))
            for layer in range(len(slots))
        ),
        seconds=_time(model, row, prepared) if is_timed else None,
    )


def _slot_bytes(stored: Any) -> int:
    """Of one slot of one layer, from arrays [B, G, S, D]."""
    return sum(
        math.prod(leaf.shape) // (leaf.shape[0] * leaf.shape[2]) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(stored)
    )


def _time(model: Model, row: Row, prepared: Prepared) -> float:
    """Seconds to the first token, images decoded and encoded; each question is about another."""
    firsts = {question.images: question for question in reversed(prepared.questions)}
    timed = [*firsts.values()][-_TIMED:]
    requests = [Request(prompt=question.prompt, images=question.images) for question in timed]
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        model.generate(
            requests,
            template=prepared.benchmark.decoding.template,
            max_new_tokens=1,
            tokens=row.tokens,
        )
        seconds.append(time.perf_counter() - start)
    # The first one compiles.
    return float(np.median(seconds[1:])) / len(timed)
