"""The figures of the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from stf_jax.demo.corpus import IMAGES, HeldOut
from stf_jax.demo.results import Results
from stf_jax.demo.scenes import COLUMNS, GRID, KINDS, ROWS, SIDE

# Wong 2011: the color-blind can distinguish them.
COLORS = {"llava": "#999999", "average": "#E69F00", "stf": "#56B4E9", "stf_mbtf": "#0072B2"}


def draw_all(results: Results, held_out: Sequence[HeldOut], out: Path) -> None:
    """Writes accuracy.png, loss.png, prefill.png and scene.png into `out`."""
    for name, figure in (
        ("accuracy", _accuracy(results)),
        ("loss", _loss(results)),
        ("prefill", _prefill(results)),
        ("scene", _scene(results, held_out, out)),
    ):
        figure.savefig(out / f"{name}.png", dpi=120)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _accuracy(results: Results) -> Figure:
    figure, (axes,) = _figure(9, 4.2)
    kinds = [*KINDS, "all"]
    width = 0.8 / len(results.variants)
    for number, variant in enumerate(results.variants):
        scores = [variant.scores[kind] for kind in kinds]
        heights = np.array([100 * score.accuracy for score in scores])
        ends = 100 * np.array([score.interval for score in scores]).T
        places = np.arange(len(kinds)) + (number - (len(results.variants) - 1) / 2) * width
        # Wilson's interval may lie on one side of 0 % or 100 %.
        axes.bar(
            places,
            heights,
            width,
            yerr=np.abs(ends - heights),
            capsize=3,
            color=COLORS[variant.name],
            label=f"{variant.title}, {variant.cost.vision_tokens} tokens",
        )
    axes.set(
        title="Held-out questions answered, by kind",
        xlabel="kind of question",
        ylabel="exact match (%), with 95 % interval",
        ylim=(0, 105),
    )
    axes.set_xticks(range(len(kinds)), kinds)
    figure.legend(loc="outside lower center", ncols=len(results.variants), frameon=False)
    return figure


def _loss(results: Results) -> Figure:
    figure, axes = _figure(9, 4, columns=2)
    titles = ("Stage 1: captions, language model frozen", "Stage 2: conversations")
    for stage, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for variant in results.variants:
            losses = [record["loss"] for record in variant.stages[stage]]
            axis.plot(
                range(1, len(losses) + 1),
                losses,
                color=COLORS[variant.name],
                label=variant.title if stage == 0 else None,
                linewidth=1.2,
            )
        axis.set(title=title, xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=len(results.variants), frameon=False)
    return figure


def _prefill(results: Results) -> Figure:
    figure, axes = _figure(9, 3.2, columns=2)
    titles = [f"{variant.title} ({variant.cost.vision_tokens})" for variant in results.variants]
    colors = [COLORS[variant.name] for variant in results.variants]
    bars = (
        ("Work of the language model", "MFLOP a question",
         [variant.cost.language_flops / 1e6 for variant in results.variants]),
        ("Time to the first token", "milliseconds a question",
         [1000 * variant.cost.seconds for variant in results.variants]),
    )  # fmt: skip
    for axis, (title, label, lengths) in zip(axes, bars, strict=True):
        drawn = axis.barh(titles, lengths, color=colors)
        axis.bar_label(drawn, fmt="%.2f", padding=3)
        axis.set(title=title, xlabel=label, xlim=(0, 1.2 * max(lengths)))
        axis.invert_yaxis()
    axes[0].set_ylabel("variant (tokens an image)")
    return figure


def _scene(results: Results, held_out: Sequence[HeldOut], out: Path) -> Figure:
    """The scene that the variants disagree about most; their answers to a question a kind."""
    by_image: dict[str, list[int]] = {}
    for number, item in enumerate(held_out):
        numbers = by_image.setdefault(item.image, [])
        if len(numbers) < len(KINDS):
            numbers.append(number)

    def disagreement(numbers: list[int]) -> int:
        return sum(
            len({variant.answers[number] for variant in results.variants}) for number in numbers
        )

    name, numbers = max(by_image.items(), key=lambda item: disagreement(item[1]))
    answers = 1 + len(results.variants)
    figure = Figure(figsize=(7.4 + 1.6 * answers, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(4.9, 2.5 + 1.6 * answers))
    _draw_image(left, out / "scenes" / IMAGES / name)
    right.axis("off")
    right.set_title("Questions about it, and answers (wrong ones in red)")
    questions = [held_out[number].question for number in numbers]
    said = [[variant.answers[number] for variant in results.variants] for number in numbers]
    table = right.table(
        [
            [question.text, *(answer.replace(", ", ",\n") for answer in [question.answer, *line])]
            for question, line in zip(questions, said, strict=True)
        ],
        colLabels=["question", "answer", *(variant.title for variant in results.variants)],
        colWidths=[2.5, *[1.6] * answers],
        cellLoc="left",
        colLoc="left",
        bbox=(0, 0, 1, 1),
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9.5)
    for row, question in enumerate(questions, 1):
        for column in range(2, 2 + len(results.variants)):
            if said[row - 1][column - 2] != question.answer:
                table[row, column].set_text_props(color="#D55E00", weight="bold")
    return figure


def _draw_image(axes: Axes, path: Path) -> None:
    with Image.open(path) as image:
        axes.imshow(image, extent=(0, SIDE, SIDE, 0), interpolation="nearest")
    for place in np.linspace(0, SIDE, GRID + 1):
        axes.axhline(place, color="white", linewidth=0.5, alpha=0.5)
        axes.axvline(place, color="white", linewidth=0.5, alpha=0.5)
    for place in np.linspace(0, SIDE, GRID // 2 + 1):
        axes.axhline(place, color="white", linewidth=2.5)
        axes.axvline(place, color="white", linewidth=2.5)
    middles = (np.arange(GRID) + 0.5) * SIDE / GRID
    axes.set_xticks(middles, list(COLUMNS))
    axes.set_yticks(middles, list(ROWS))
    axes.set(
        title="A held-out scene\nthin lines: patches; thick lines: fused tokens",
        xlabel="column",
        ylabel="row",
    )
