"""The verb `stf-jax demo`."""

import argparse
import importlib.util
import sys
from pathlib import Path

from stf_jax.cli.train import INTERRUPTED
from stf_jax.cli.verbs import Verbs, add_verb, path

_NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def add_demo(verbs: Verbs) -> None:
    """Adds `demo`."""
    summary = "the paper's claim at laptop scale: train, ask, compare"
    parser = add_verb(verbs, "demo", _demo, summary)
    parser.epilog = (
        "A demo that has been stopped continues when it is called again. Exit status: 0, or "
        f"{INTERRUPTED} when it was interrupted during training."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_const", dest="size", const="quick", default="default",
        help="two variants for a minute: shows that everything runs, and nothing else",
    )  # fmt: skip
    size.add_argument(
        "--full", action="store_const", dest="size", const="full",
        help="all four variants of the paper; the default is two of them, in about ten minutes",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", type=lambda text: Path(path(text)), help="(out/demo-SIZE)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and order (0)")


def _demo(options: argparse.Namespace) -> int:
    missing = [package for module, package in _NEEDED.items() if not _is_installed(module)]
    if missing:
        raise ValueError(
            f"the demo needs {' and '.join(missing)}: pip install 'stf-jax[demo]', "
            "or pip install -e '.[demo]' in a clone"
        )
    from stf_jax.demo.corpus import read_held_out
    from stf_jax.demo.experiment import Interrupted, Settings, command, run
    from stf_jax.demo.report import example_question, show_table, write_report

    out = options.out or Path("out", f"demo-{options.size}")
    try:
        results = run(Settings.by_name(options.size, seed=options.seed), out)
    except Interrupted:
        return INTERRUPTED
    questions = read_held_out(out / "scenes")
    write_report(results, questions, out)
    show_table(results)
    sys.stdout.write(f"\n{results.verdict}\nThe report is {out / 'report.md'}.\n")
    image, question = example_question(questions, out)
    asking = command("generate", out / "best", "--image", image, "--prompt", question)
    sys.stdout.write(f"Ask {results.best.title} about this image or one of yours:\n  {asking}\n")
    return 0


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
