"""The figures of the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from stf_jax.demo.corpus import PICTURES, HeldOut
from stf_jax.demo.results import Results
from stf_jax.demo.scenes import COLUMNS, GRID, KINDS, ROWS, SIDE

# Wong 2011, told apart by the colour-blind.
COLOURS = {"llava": "#999999", "average": "#E69F00", "stf": "#56B4E9", "stf_mbtf": "#0072B2"}


def draw_all(results: Results, asked: Sequence[HeldOut], out: Path) -> None:
    """Writes accuracy.png, loss.png, prefill.png and scene.png into `out`."""
    for name, figure in (
        ("accuracy", _accuracy(results)),
        ("loss", _loss(results)),
        ("prefill", _prefill(results)),
        ("scene", _scene(results, asked, out)),
    ):
        figure.savefig(out / f"{name}.png", dpi=120)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _accuracy(results: Results) -> Figure:
    figure, (axes,) = _figure(9, 4.2)
    kinds = [*KINDS, "all"]
    width = 0.8 / len(results.arms)
    for number, arm in enumerate(results.arms):
        found = [arm.scores[kind] for kind in kinds]
        heights = np.array([100 * score.accuracy for score in found])
        ends = 100 * np.array([score.interval for score in found]).T
        places = np.arange(len(kinds)) + (number - (len(results.arms) - 1) / 2) * width
        # Wilson's interval may lie on one side of 0 % or 100 %.
        axes.bar(
            places,
            heights,
            width,
            yerr=np.abs(ends - heights),
            capsize=3,
            color=COLOURS[arm.name],
            label=f"{arm.title}, {arm.cost.vision_tokens} tokens",
        )
    axes.set(
        title="Held-out questions answered, by kind",
        xlabel="kind of question",
        ylabel="exact match (%), with 95 % interval",
        ylim=(0, 105),
    )
    axes.set_xticks(range(len(kinds)), kinds)
    figure.legend(loc="outside lower center", ncols=len(results.arms), frameon=False)
    return figure


def _loss(results: Results) -> Figure:
    figure, axes = _figure(9, 4, columns=2)
    titles = ("Stage 1: captions, language model frozen", "Stage 2: conversations")
    for stage, (one, title) in enumerate(zip(axes, titles, strict=True)):
        for arm in results.arms:
            losses = [record["loss"] for record in arm.stages[stage]]
            one.plot(
                range(1, len(losses) + 1),
                losses,
                color=COLOURS[arm.name],
                label=arm.title if stage == 0 else None,
                linewidth=1.2,
            )
        one.set(title=title, xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=len(results.arms), frameon=False)
    return figure


def _prefill(results: Results) -> Figure:
    figure, axes = _figure(9, 3.2, columns=2)
    titles = [f"{arm.title} ({arm.cost.vision_tokens})" for arm in results.arms]
    colours = [COLOURS[arm.name] for arm in results.arms]
    bars = (
        ("Work of the language model", "MFLOP a question",
         [arm.cost.language_flops / 1e6 for arm in results.arms]),
        ("Time to the first token", "milliseconds a question",
         [1000 * arm.cost.seconds for arm in results.arms]),
    )  # fmt: skip
    for one, (title, label, lengths) in zip(axes, bars, strict=True):
        drawn = one.barh(titles, lengths, color=colours)
        one.bar_label(drawn, fmt="%.2f", padding=3)
        one.set(title=title, xlabel=label, xlim=(0, 1.2 * max(lengths)))
        one.invert_yaxis()
    axes[0].set_ylabel("arm (tokens an image)")
    return figure


def _scene(results: Results, asked: Sequence[HeldOut], out: Path) -> Figure:
    """The scene about which the arms disagree most, with their answers to one question a kind."""
    by_picture: dict[str, list[int]] = {}
    for number, one in enumerate(asked):
        asked_already = by_picture.setdefault(one.picture, [])
        if len(asked_already) < len(KINDS):
            asked_already.append(number)

    def disagreement(numbers: list[int]) -> int:
        return sum(len({arm.answers[number] for arm in results.arms}) for number in numbers)

    picture, numbers = max(by_picture.items(), key=lambda item: disagreement(item[1]))
    answers = 1 + len(results.arms)
    figure = Figure(figsize=(7.4 + 1.6 * answers, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(4.9, 2.5 + 1.6 * answers))
    _draw_picture(left, out / "scenes" / PICTURES / picture)
    right.axis("off")
    right.set_title("Questions about it, and answers (wrong ones in red)")
    questions = [asked[number].question for number in numbers]
    said = [[arm.answers[number] for arm in results.arms] for number in numbers]
    table = right.table(
        [
            [question.text, *(answer.replace(", ", ",\n") for answer in [question.answer, *line])]
            for question, line in zip(questions, said, strict=True)
        ],
        colLabels=["question", "answer", *(arm.title for arm in results.arms)],
        colWidths=[2.5, *[1.6] * answers],
        cellLoc="left",
        colLoc="left",
        bbox=(0, 0, 1, 1),
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9.5)
    for row, question in enumerate(questions, 1):
        for column in range(2, 2 + len(results.arms)):
            if said[row - 1][column - 2] != question.answer:
                table[row, column].set_text_props(color="#D55E00", weight="bold")
    return figure


def _draw_picture(axes: Axes, path: Path) -> None:
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
