"""`evaluate`: a model on one benchmark or on all of them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from stf_jax.data.clips import UNIFORM, FrameSampling
from stf_jax.eval.benchmark import Benchmark
from stf_jax.eval.generation import ModelAnswerer
from stf_jax.eval.registry import BENCHMARKS, get_benchmark
from stf_jax.eval.runner import Prepared, Result, ask, prepare
from stf_jax.infer.model import Model

ALL = "all"


def evaluate(
    benchmark: str,
    model: Model,
    *,
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    paths: Mapping[str, Path] | None = None,
    limit: int | None = None,
    slots: int = 16,
    tokens: int | None = None,
    sampling: FrameSampling = UNIFORM,
    model_id: str = "model",
) -> list[Result]:
    """Asks a model every question of a benchmark, and scores its answers.

    Answers are kept as they come: after a kill, the same call continues.

    Args:
        benchmark: one of `stf_jax.eval.registry.BENCHMARKS`, or "all".
        model: from `stf_jax.load`.
        out: a folder; each benchmark gets one of its own in it.
        data: the folder in which LLaVA's instructions lay out the benchmarks.
        paths: by role, what lies elsewhere; for one benchmark only.
        limit: ask only the first so many.
        slots: how many answers are generated at a time.
        tokens: an image, where the system has several budgets; by default its most.
        sampling: which frames of a clip are shown.
        model_id: the model's name in the answer files.

    Raises:
        ValueError: an unknown benchmark, files that are missing or do not fit one another, or an
            `out` that holds answers of another model or protocol.
    """
    chosen = choose(benchmark, paths)
    prepared = prepare_all(chosen, data=data, paths=paths, limit=limit)
    dtype = jax.tree.leaves(model.engine.program.weights)[0].dtype.name
    answerer = ModelAnswerer(
        model, model_id=model_id, slots=slots, tokens=tokens, sampling=sampling, dtype=dtype
    )
    return [ask(ready, answerer, out=Path(out) / ready.benchmark.name) for ready in prepared]


def choose(benchmark: str, paths: Mapping[str, Path] | None) -> list[Benchmark]:
    """One benchmark, or all.

    Raises:
        ValueError: there is none of that name, or `paths` are given for all.
    """
    if benchmark != ALL:
        return [get_benchmark(benchmark)]
    if paths:
        raise ValueError("--path is for one benchmark; with 'all' lay the files out under --data")
    return list(BENCHMARKS.values())


def prepare_all(
    benchmarks: Sequence[Benchmark],
    *,
    data: str | os.PathLike[str] | None,
    paths: Mapping[str, Path] | None = None,
    limit: int | None = None,
) -> list[Prepared]:
    """Reads and checks the files of several benchmarks, before a model is loaded.

    Raises:
        ValueError: lists what is wrong with each.
    """
    prepared, problems = [], []
    for item in benchmarks:
        try:
            folder = None if data is None else Path(data)
            prepared.append(prepare(item, data=folder, paths=paths, limit=limit))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return prepared
