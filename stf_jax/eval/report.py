"""Scores for a terminal, beside the published ones."""

from collections.abc import Sequence

from stf_jax.eval.registry import get_benchmark
from stf_jax.eval.runner import Result
from stf_jax.util.files import name_some


def render(results: Sequence[Result]) -> str:
    """A table with a line for each result, then what is missing and what is to be submitted."""
    # Imported here: scoring to JSON does without jax.
    from stf_jax.systems import SYSTEMS

    shown = {get_benchmark(result.benchmark).name for result in results}
    systems = [system for system in SYSTEMS.values() if shown & system.published.keys()]
    titles = (system.title for system in systems)
    rows: list[tuple[str, ...]] = [("", "this model", *titles)]
    for result in results:
        benchmark = get_benchmark(result.benchmark)
        unknown = "on the server" if benchmark.submit else "-"
        ours = unknown if result.score.headline is None else f"{result.score.headline:.1f}"
        published = (system.published.get(benchmark.name) for system in systems)
        figures = ("-" if figure is None else f"{figure:.1f}" for figure in published)
        rows.append((benchmark.title, ours, *figures))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    for result in results:
        lines += _notes(result)
    return "\n".join(lines)


def _notes(result: Result) -> list[str]:
    name, score, lines = result.benchmark, result.score, []
    if result.limit is not None:
        lines.append(f"{name}: a try-out over {score.questions} questions, no score to quote")
    if score.note:
        lines.append(f"{name}: {score.note}")
    if score.missing:
        lines.append(
            f"{name}: {len(score.missing)} of {score.questions} questions have no answer and count "
            f"as wrong: {name_some(score.missing)}"
        )
    if result.submission is not None:
        lines.append(f"{name}: submit {result.submission}")
    return lines
