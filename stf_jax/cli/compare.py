"""The verb `stf-jax compare`."""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from stf_jax.cli.verbs import FLOATS, Verbs, add_verb, path


def add_compare(verbs: Verbs) -> None:
    """Adds `compare`."""
    summary = "a table of models: accuracy with intervals, tokens, arithmetic, cache"
    parser = add_verb(verbs, "compare", _compare, summary)
    parser.epilog = (
        "Writes comparison.csv, comparison.md and comparison.png. Answers that lie in --out are "
        "not asked for again; a comparison that was stopped continues when it is called again."
    )
    parser.add_argument("models", metavar="MODEL", type=path, nargs="*", help="as for eval")
    parser.add_argument(
        "--rows",
        metavar="FILE",
        type=lambda text: Path(path(text)),
        help="YAML, a list of models with `model`, `title`, `system`, `fields`, `tokens`, "
        "`vision_tower`; they come behind MODEL...",
    )
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="gqa, pope or textvqa and LLaVA's data folder; or any name and a JSON file of closed "
        "choices; may be given several times",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=lambda text: Path(path(text)), required=True, help="results"
    )
    parser.add_argument(
        "--baseline", metavar="TITLE", help="that the others are compared with (the first)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions (all)")
    parser.add_argument("--template", default="v1", metavar="NAME", help="of closed choices (v1)")
    parser.add_argument("--slots", type=int, default=16, metavar="N", help="answers at a time (16)")
    parser.add_argument("--dtype", choices=FLOATS, help="(float32 on CPU, else bfloat16)")
    parser.add_argument("--time", action="store_true", help="measure the time to the first token")


def _compare(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the figure needs matplotlib; pip install 'stf-jax[demo]'")
    from stf_jax.eval.compare import Row, check_rows, compare, open_benchmark, read_rows
    from stf_jax.eval.comparison import markdown, write_all
    from stf_jax.util.progress import count_progress, unwound_by_sigterm

    rows = [Row(model=model, title=Path(model).name) for model in options.models]
    rows += read_rows(options.rows) if options.rows else []
    check_rows(rows, options.baseline)
    if options.out.is_file():
        raise ValueError(f"{options.out} is a file; give --out a folder")
    if not options.benchmark:
        raise ValueError("give at least one --benchmark NAME=PATH")
    names = [text.partition("=")[0] for text in options.benchmark]
    if len({*names}) < len(names):
        raise ValueError(f"--benchmark {max(names, key=names.count)} is there twice; rename one")
    benchmarks = [
        open_benchmark(name, where, template=options.template, limit=options.limit)
        for name, where in map(_split, options.benchmark)
    ]
    with contextlib.ExitStack() as bars, unwound_by_sigterm():

        def progress(title: str) -> Callable[[int, int], None]:
            bars.close()
            return bars.enter_context(count_progress(title))

        comparison = compare(
            rows,
            benchmarks,
            out=options.out,
            baseline=options.baseline,
            dtype=options.dtype,
            slots=options.slots,
            is_timed=options.time,
            progress=progress,
        )
    write_all(comparison, options.out)
    sys.stdout.write(markdown(comparison))
    return 0


def _split(text: str) -> tuple[str, Path]:
    name, equals, where = text.partition("=")
    if not (name and equals and where):
        raise ValueError(f"--benchmark is {text!r}; write it as NAME=PATH, such as pope=DIR")
    place = Path(path(where))
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder; name its place in --benchmark {name}=")
    return name, place
