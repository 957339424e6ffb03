"""The report of a run: a table on the terminal, and report.md with its figures."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from stf_jax.demo.corpus import IMAGES, HeldOut
from stf_jax.demo.evaluation import BATCH, Score
from stf_jax.demo.experiment import FINETUNE_RATE
from stf_jax.demo.language import TEXT
from stf_jax.demo.plots import draw_all
from stf_jax.demo.rates import RATES
from stf_jax.demo.results import Results
from stf_jax.demo.scenes import GRID, KINDS
from stf_jax.demo.tower import VISION
from stf_jax.demo.variants import all_variants
from stf_jax.util.machine import machine
from stf_jax.util.markdown import markdown_table

_TEXT = """# A quarter of the vision tokens: what is lost, and what is not

{verdict}

{table}

The figures are exact matches in per cent, with their 95 % interval (Wilson). The most common answer
of each kind, given without looking, reaches {guessed:.1f}. Prefill is one question about one image,
up to the first token of the answer. It has three columns: the arithmetic of tower, connector and
language model, the arithmetic of the language model (LLM) alone, and the measured time, which
includes the reading of the image, in batches of {batch}.
Training time is that of all steps.

![Accuracy](accuracy.png)

## What was done

Scenes of {grid} cells with handwritten digits (scikit-learn's) in four colors, digits everywhere
of other size and place. A patch of the tower covers one cell, a fused token four.
{train:,} scenes to train on; {held_out:,} held out, composed of other scans. Every variant has the
same tower, language model, data, seed and steps. Stage 1 has {steps[0]} steps (captions of each
scene's cells, neighbors and counts; the language model is frozen). Stage 2 has {steps[1]}
(conversations).
The questions:

| kind | for example |
| --- | --- |
{examples}

![A scene](scene.png)

Pooling has the hardest case here. Neighboring patches of such a scene have nothing in common; the
tower has learned to say in every patch what is in it, and an average keeps what is in four of them
better than which is where; and the language model's pretraining was with codes that keep the four
places apart, as STF's tokens can and an average cannot. In photographs neighbors are alike, and
the paper's gap is about one point (its table 3).

The peak learning rate of stage 1 is each variant's own, since projectors of {narrow} (LLaVA-1.5's,
AvgPool's) and of {wide:,} (STF's) want different ones: of {choice}, the one
with the lowest loss on scenes of another seed (`stf_jax.demo.rates`): {rates}.
In stage 2 it is {finetune:g} for all.

![Losses](loss.png)

![Prefill](prefill.png)

## Where it ran

{machine}. Seed {seed}. `results.json` has the numbers of the table.
`VARIANT/stage1/metrics.jsonl` and `VARIANT/stage2/metrics.jsonl` have every step, and
`VARIANT/answers.json` has every answer.
"""


def write_report(results: Results, questions: Sequence[HeldOut], out: Path) -> None:
    """Writes results.json, report.md and its figures."""
    results.save(out / "results.json")
    draw_all(results, questions, out)
    settings, variants = results.settings, all_variants(VISION, TEXT)
    text = _TEXT.format(
        verdict=results.verdict,
        table=markdown_table(*_cells(results)),
        examples=_examples(questions),
        guessed=100 * _chance(questions),
        narrow=TEXT.width,
        wide=variants["stf_mbtf"].system.projector_width,
        choice=", ".join(f"{rate:g}" for rate in RATES),
        rates=", ".join(
            f"{variants[variant.name].pretrain_rate:g} for {variant.title}"
            for variant in results.variants
        ),
        finetune=FINETUNE_RATE,
        grid=f"{GRID}x{GRID}",
        batch=BATCH,
        train=settings["train_scenes"],
        held_out=settings["held_out_scenes"],
        steps=settings["steps"],
        seed=settings["seed"],
        machine=machine(),
    )
    (out / "report.md").write_text(text, encoding="utf-8")


def show_table(results: Results) -> None:
    """The table of the report, on the terminal."""
    show_rows(*_cells(results))


def show_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal, whose first column names what the others are about."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in header:
        heading = name.replace(" ", "\n")
        table.add_column(heading, justify="left" if name == header[0] else "right")
    for row in rows:
        table.add_row(*row)
    # In a pipe, where it takes 80 characters for the width, rich would cut the columns.
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, needed)).print(table)


def _cells(results: Results) -> tuple[list[str], list[list[str]]]:
    costs = ["prefill MFLOP", "LLM MFLOP", "prefill ms", "training s"]
    header = ["variant", "tokens", *KINDS, "all", *costs]
    rows = [
        [
            variant.title,
            str(variant.cost.vision_tokens),
            *(f"{100 * variant.scores[kind].accuracy:.1f}" for kind in KINDS),
            with_interval(variant.scores["all"]),
            f"{variant.cost.total_flops / 1e6:.1f}",
            f"{variant.cost.language_flops / 1e6:.1f}",
            f"{1000 * variant.cost.seconds:.2f}",
            f"{variant.training_seconds:.0f}",
        ]
        for variant in results.variants
    ]
    return header, rows


def with_interval(score: Score) -> str:
    """In per cent, with its interval."""
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _chance(questions: Sequence[HeldOut]) -> float:
    """The share of questions whose answer is the most common of their kind."""
    by_kind: dict[str, Counter[str]] = {}
    for held_out in questions:
        by_kind.setdefault(held_out.question.kind, Counter())[held_out.question.answer] += 1
    return sum(max(answers.values()) for answers in by_kind.values()) / len(questions)


def _examples(questions: Sequence[HeldOut]) -> str:
    """A row for each kind of question: those about the first image."""
    return "\n".join(
        f"| {held_out.question.kind} | {held_out.question.text} {held_out.question.answer} |"
        for held_out in questions[: len(KINDS)]
    )


def example_question(questions: Sequence[HeldOut], out: Path) -> tuple[Path, str]:
    """A held-out image, and a question about it."""
    return out / "scenes" / IMAGES / questions[0].image, questions[0].question.text
