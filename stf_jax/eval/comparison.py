"""A comparison as CSV, as Markdown and as a figure, which needs matplotlib (the extra `demo`)."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stf_jax.eval.compare import ALL, Comparison, Cost, Line
from stf_jax.util.files import write_text
from stf_jax.util.machine import machine
from stf_jax.util.markdown import markdown_table

NAME = "comparison"
# Wong 2011: the color-blind can distinguish them; beyond these, markers tell rows apart.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def write_all(comparison: Comparison, out: Path) -> list[Path]:
    """Writes comparison.csv, comparison.md and comparison.png into `out`."""
    paths = [out / f"{NAME}.{ending}" for ending in ("csv", "md", "png")]
    write_csv(comparison, paths[0])
    write_text(paths[1], markdown(comparison))
    draw(comparison).savefig(paths[2], dpi=120)
    return paths


def write_csv(comparison: Comparison, path: Path) -> None:
    """A line for each model, benchmark and kind."""
    lines = [_columns(comparison, line) for line in comparison.lines]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*lines[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())


def _columns(comparison: Comparison, line: Line) -> dict[str, Any]:
    cost = comparison.costs[line.title]
    least, most = line.difference_interval or (None, None)
    return {
        "model": line.title,
        "benchmark": line.benchmark,
        "kind": line.kind,
        "questions": line.questions,
        "images": line.images,
        "accuracy": line.accuracy,
        "low": line.interval[0],
        "high": line.interval[1],
        "baseline": comparison.baseline,
        "difference": line.difference,
        "difference_low": least,
        "difference_high": most,
        "layer_tokens": cost.layers,
        "mean_layer_tokens": cost.mean_tokens,
        "prompt_tokens": cost.prompt_tokens,
        "language_flops": cost.language_flops,
        "total_flops": cost.total_flops,
        "cache_bytes": cost.cache_bytes,
        "prefill_seconds": cost.seconds,
    }


def markdown(comparison: Comparison) -> str:
    """A table for each benchmark, then what an answer costs."""
    parts = []
    for benchmark in dict.fromkeys(line.benchmark for line in comparison.lines):
        lines = [line for line in comparison.lines if line.benchmark == benchmark]
        kinds = [*dict.fromkeys(line.kind for line in lines)]
        counts = {line.kind: line.questions for line in lines}
        rows = []
        for title in comparison.costs:
            of = {line.kind: line for line in lines if line.title == title}
            rows.append([title, *(_share(of[kind]) for kind in kinds), _difference(of[ALL])])
        header = [f"{kind} ({counts[kind]:,})" for kind in kinds]
        parts += [
            f"## {benchmark}",
            markdown_table(["model", *header, f"all, beside {comparison.baseline}"], rows),
            "Right answers in per cent, with the 95 % interval of a bootstrap over the "
            f"{max(line.images for line in lines):,} images; the number of questions in brackets. "
            "The last column is the difference in points, question by question, with the same "
            "interval.",
        ]
    costs = comparison.costs.items()
    is_timed = any(cost.seconds is not None for _, cost in costs)
    header = ["model", "vision tokens x layers", "mean over layers", "prompt tokens"]
    header += ["LLM GFLOP", "all GFLOP", "cache MB", *(["prefill ms"] if is_timed else [])]
    note = (
        "Of a question of median length with its image, up to the first token of the answer. The "
        "cache is what stays of the prompt."
    )
    if is_timed:
        note += f" Prefill, with the image decoded and encoded, was measured on {machine()}."
    parts += [
        "## What an answer costs",
        markdown_table(header, [[title, *_cost(cost)] for title, cost in costs]),
        note,
    ]
    return "\n\n".join(parts) + "\n"


def draw(comparison: Comparison) -> Figure:
    """Accuracy beside vision tokens and arithmetic: a row of panels for each benchmark."""
    benchmarks = [*dict.fromkeys(line.benchmark for line in comparison.lines)]
    columns = min(5, len(comparison.costs))
    legend = -(-len(comparison.costs) // columns)
    size = 12, 4 * len(benchmarks) + 0.3 * legend
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(benchmarks), 2, squeeze=False)
    costs = comparison.costs.items()
    tokens = {title: cost.mean_tokens for title, cost in costs}
    work = {title: cost.total_flops / 1e9 for title, cost in costs}
    for row, benchmark in enumerate(benchmarks):
        lines = {
            line.title: line
            for line in comparison.lines
            if line.benchmark == benchmark and line.kind == ALL
        }
        _scatter(panels[row, 0], lines, tokens, is_labeled=row == 0)
        _scatter(panels[row, 1], lines, work)
        panels[row, 0].set_xlabel("vision tokens of a prompt (mean over layers, log scale)")
        panels[row, 1].set_xlabel("arithmetic of a prefill (GFLOP, log scale)")
        for panel in panels[row]:
            panel.set(title=benchmark, ylabel="right answers (%), with 95 % interval")
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _scatter(
    axes: Axes, lines: dict[str, Line], places: dict[str, float], *, is_labeled: bool = False
) -> None:
    """One point a model; ticks at the true values, beside which equal ones stand."""
    # Without an image there are no tokens, and no logarithm of them.
    values = np.log2([max(places[title], 0.5) for title in lines])
    span = float(np.ptp(values)) or 1.0
    moved = spread(values, gap=span / 60)
    for number, (title, line) in enumerate(lines.items()):
        ends = 100 * np.abs(np.array(line.interval) - line.accuracy)
        axes.errorbar(
            [moved[number]],
            [100 * line.accuracy],
            yerr=ends[:, None],
            color=_COLORS[number % len(_COLORS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linestyle="none",
            capsize=2,
            label=title if is_labeled else None,
        )
    ticks: list[float] = []
    for value in np.unique(values):
        if not ticks or value - ticks[-1] > span / 12:
            ticks.append(float(value))
    axes.set_xticks(ticks, [f"{2**tick:.3g}" for tick in ticks])
    axes.set_xlim(min(moved) - span / 20, max(moved) + span / 20)
    axes.spines[["top", "right"]].set_visible(False)


def spread(values: np.ndarray, *, gap: float) -> np.ndarray:
    """Places at least `gap` apart, in the same order, as near to the values as that allows.

    What is moved together keeps its mean (isotonic regression by pooling adjacent violators).
    """
    order = np.argsort(values, kind="stable")
    blocks: list[list[float]] = []
    for number, value in enumerate(values[order]):
        blocks.append([float(value) - number * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    fitted = np.concatenate([np.full(len(block), np.mean(block)) for block in blocks])
    places = np.empty(len(values))
    places[order] = fitted + np.arange(len(values)) * gap
    return places


def _share(line: Line) -> str:
    low, high = line.interval
    return f"{100 * line.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _difference(line: Line) -> str:
    if line.difference is None or line.difference_interval is None:
        return "baseline"
    low, high = line.difference_interval
    return f"{100 * line.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _cost(cost: Cost) -> list[str]:
    cells = [
        cost.layers,
        f"{cost.mean_tokens:.1f}",
        f"{cost.prompt_tokens:,}",
        f"{cost.language_flops / 1e9:,.2f}",
        f"{cost.total_flops / 1e9:,.2f}",
        f"{cost.cache_bytes / 1e6:,.3f}",
    ]
    return cells if cost.seconds is None else [*cells, f"{1000 * cost.seconds:,.1f}"]
