"""The report over real weights: what was asked, what was answered, and what nobody had to see."""

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from stf_jax.demo.evaluation import Score
from stf_jax.demo.packages import IMAGES as IMAGE_CREDIT
from stf_jax.demo.packages import LANGUAGE, TOWER
from stf_jax.demo.pictures import IMAGES, KINDS, Question
from stf_jax.demo.real import HOWS, PICTURES, RATE, ModelScores, RealResults
from stf_jax.demo.report import with_interval
from stf_jax.store.run import open_model
from stf_jax.util.files import write_json
from stf_jax.util.machine import machine
from stf_jax.util.markdown import markdown_table

REPORT = "report.md"
# Wong 2011: the color-blind can distinguish them.
_COLORS = {
    "shipped": "#0072B2", "aligned": "#E69F00", "trained": "#56B4E9", "blind": "#999999",
}  # fmt: skip
_SHOWN = 8  # images in the figure with answers

_TEXT = """# Real weights, real images: {tokens} vision tokens

{verdict}

{table}

Right answers in per cent, with their 95 % interval (Wilson). Every question is a closed choice of
two or four answers; chance is one in so many. "Seeing" takes the answer that the model finds most
likely, and "blind" that about a white image in place of the real one. "Calibrated" takes the answer
that the image makes more likely, beside the white one, than any other. "Most common" always gives
the answer that is right most often among the held-out questions of a kind.

![Accuracy](accuracy.png)

![Answers](answers.png)

## What was done

- Language model: {language}.
- Vision tower: {tower}.
- Images: {images}.

Tower and language model stay as their makers trained them. Only the projector between them is new:
AvgPool's, which shows an image in {tokens} tokens instead of {patches}. It begins where the words
are, by ridge regression to the embeddings of the words that describe an image ("aligned").
{training}
Held-out images have names of which no image was trained on.

| kind | for example |
| --- | --- |
{examples}

{loss}## Where it ran

{machine}. Seed {seed}. `results.json` has the numbers of the table, and
`*-scores.json` has every answer.
"""


_TRAINING = """"Trained here" continues for {steps} steps of {rows}
conversations, at a peak learning rate of {rate:g}, about {singles} images of one emoji and up to
{groups} of several."""


def write_real_report(results: RealResults, out: Path) -> None:
    """Writes results.json, report.md and its figures into the folder of the run."""
    settings, config = results.settings, open_model(out / results.models[0].name).config
    write_json(out / "results.json", to_json(results), indent=1)
    for name, figure in (
        ("accuracy", _draw_accuracy(results)),
        ("answers", _draw_answers(results, out)),
        *([("loss", _draw_loss(results))] if results.steps else []),
    ):
        figure.savefig(out / f"{name}.png", dpi=120)
    text = _TEXT.format(
        verdict=verdict(results),
        table=markdown_table(*table(results)),
        tokens=config.tokens_per_image,
        patches=config.vision.patches,
        language=LANGUAGE.credit,
        tower=TOWER.credit,
        images=IMAGE_CREDIT,
        training=_TRAINING.format(rate=RATE, **dataclasses.asdict(settings))
        if results.steps
        else "Nothing was trained in this run.",
        loss="![Loss](loss.png)\n\n" if results.steps else "",
        examples="\n".join(f"| {kind} | {_example(results, kind)} |" for kind in _kinds(results)),
        machine=machine(),
        seed=settings.seed,
    )
    (out / REPORT).write_text(text, encoding="utf-8")


def verdict(results: RealResults) -> str:
    """Of the best model: which kinds it answers better than it does without seeing, and chance."""
    best = find_best(results)
    seen, blind = (best.scores(results.questions, how) for how in (HOWS[0], HOWS[-1]))
    shown = [
        kind
        for kind in _kinds(results)
        if seen[kind].interval[0]
        > max(
            blind[kind].accuracy,
            chance(results.questions, kind),
            most_common(results.questions, kind),
        )
    ]
    rest = [kind for kind in _kinds(results) if kind not in shown]
    ours = seen["all"]
    text = (
        f'The model "{best.title}" answers {100 * ours.accuracy:.1f} % of {ours.questions} '
        f"questions about images that nothing was trained on; blind it answers "
        f"{100 * blind['all'].accuracy:.1f} %."
    )
    if shown:
        text += f" It beats chance, the most common answer and itself blind on {_join(shown)},"
        text += " by more than the interval."
    if rest:
        text += f" Of {_join(rest)} nothing is shown."
    return text


def example(results: RealResults, out: Path) -> tuple[Path, str, Path]:
    """A held-out image, a question about it, and the model that answers most."""
    question = results.questions[0]
    return out / PICTURES / IMAGES / question.image, question.text, out / find_best(results).name


def find_best(results: RealResults) -> ModelScores:
    """The model with the most right answers."""
    return max(
        results.models, key=lambda model: model.scores(results.questions, HOWS[0])["all"].right
    )


def chance(questions: Sequence[Question], kind: str) -> float:
    """The expected share of right answers for one that is drawn among those given."""
    return float(
        np.mean([1 / len(question.choices) for question in questions if question.kind == kind])
    )


def most_common(questions: Sequence[Question], kind: str) -> float:
    """The share of the most common answer."""
    answers = Counter(question.answer for question in questions if question.kind == kind)
    return max(answers.values()) / sum(answers.values())


def table(results: RealResults) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each model seeing and blind, chance, and the most common answer."""
    kinds, questions = _kinds(results), results.questions
    rows = []
    for model in results.models:
        for how in HOWS:
            scores = model.scores(questions, how)
            cells = (with_interval(scores[kind]) for kind in [*kinds, "all"])
            rows.append([f"{model.title}, {how}", *cells])
    for title, share in (("chance", chance), ("most common", most_common)):
        shares = [share(questions, kind) for kind in kinds]
        counts = [sum(question.kind == kind for question in questions) for kind in kinds]
        mean = float(np.average(shares, weights=counts))
        rows.append([title, *(f"{100 * value:.1f}" for value in [*shares, mean])])
    return ["model", *kinds, "all"], rows


def to_json(results: RealResults) -> dict[str, object]:
    """Every number of the table."""
    questions, kinds = results.questions, _kinds(results)

    def describe(model: ModelScores) -> dict[str, object]:
        scores = {how: model.scores(questions, how) for how in HOWS}
        return {"title": model.title, "seconds": model.seconds} | {
            how: {kind: score.to_json() for kind, score in of_kind.items()}
            for how, of_kind in scores.items()
        }

    return {
        "verdict": verdict(results),
        "settings": dataclasses.asdict(results.settings),
        "models": {model.name: describe(model) for model in results.models},
        "chance": {kind: chance(questions, kind) for kind in kinds},
        "most_common": {kind: most_common(questions, kind) for kind in kinds},
        "losses": [step["loss"] for step in results.steps],
    }


def _kinds(results: RealResults) -> list[str]:
    present = {question.kind for question in results.questions}
    return [kind for kind in KINDS if kind in present]


def _join(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _example(results: RealResults, kind: str) -> str:
    question = next(question for question in results.questions if question.kind == kind)
    return f"{question.text} {question.answer}"


def _draw_accuracy(results: RealResults) -> Figure:
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    kinds = [*_kinds(results), "all"]
    best = find_best(results)
    bars: list[tuple[str, str, dict[str, Score]]] = [
        (model.title, _COLORS[model.name], model.scores(results.questions, HOWS[0]))
        for model in results.models
    ]
    blind = best.scores(results.questions, "blind")
    bars.append((f"{best.title}, blind", _COLORS["blind"], blind))
    width = 0.8 / len(bars)
    for number, (title, color, scores) in enumerate(bars):
        heights = np.array([100 * scores[kind].accuracy for kind in kinds])
        ends = 100 * np.array([scores[kind].interval for kind in kinds]).T
        places = np.arange(len(kinds)) + (number - (len(bars) - 1) / 2) * width
        axes.bar(
            places, heights, width, yerr=np.abs(ends - heights), capsize=3, color=color, label=title
        )
    for place, kind in enumerate(kinds[:-1]):
        level = 100 * chance(results.questions, kind)
        label = "chance" if place == 0 else None
        axes.plot([place - 0.45, place + 0.45], [level] * 2, color="black", ls="--", label=label)
    axes.set(
        title="Closed choices about held-out images",
        xlabel="kind of question",
        ylabel="right answers (%), with 95 % interval",
        ylim=(0, 105),
    )
    axes.set_xticks(range(len(kinds)), kinds)
    figure.legend(loc="outside lower center", ncols=len(bars) + 1, frameon=False)
    return figure


def _draw_loss(results: RealResults) -> Figure:
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    losses = [step["loss"] for step in results.steps]
    axes.plot(range(1, len(losses) + 1), losses, color=_COLORS["trained"], linewidth=1.2)
    axes.set(
        title="The projector learns; tower and language model are frozen",
        xlabel="step",
        ylabel="loss (nats a token)",
        ylim=(0, None),
    )
    return figure


def _draw_answers(results: RealResults, out: Path) -> Figure:
    """Some held-out images, and what the best model answers to a question about each."""
    model, first = find_best(results), dict[str, int]()
    answers = model.choose(HOWS[0])
    for number, question in enumerate(results.questions):
        first.setdefault(question.image, number)
    # As many of each kind as can be.
    by_kind = [
        [number for number in first.values() if results.questions[number].kind == kind]
        for kind in _kinds(results)
    ]
    turns = max(map(len, by_kind), default=0)
    mixed = [numbers[turn] for turn in range(turns) for numbers in by_kind if turn < len(numbers)]
    chosen = mixed[:_SHOWN]
    columns = min(4, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.9 * columns, 3.9 * lines))
    figure.set_layout_engine("constrained", h_pad=0.15)
    grid = figure.subplots(lines, columns, squeeze=False)
    figure.suptitle(f'Held-out images, answers of the model "{model.title}" (wrong ones in red)')
    for axes in grid.flat[len(chosen) :]:
        axes.axis("off")
    for axes, number in zip(grid.flat, chosen, strict=False):
        _draw_answer(axes, results.questions[number], answers[number], out)
    return figure


def _draw_answer(axes: Axes, question: Question, chosen: int, out: Path) -> None:
    with Image.open(out / PICTURES / IMAGES / question.image) as image:
        axes.imshow(image)
    # What has a place of its own in the layout cannot lie over the next image.
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(textwrap.fill(question.text, 36), fontsize=8)
    answer = question.choices[chosen]
    is_right = answer == question.answer
    said = answer if is_right else f"{answer} (it is {question.answer})"
    axes.set_xlabel(textwrap.fill(said, 30), color="black" if is_right else "#D55E00")
