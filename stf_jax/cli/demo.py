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
    summary = "real weights answer about real images, and learn; and the paper's claim in miniature"
    parser = add_verb(verbs, "demo", _demo, summary)
    parser.epilog = (
        "A demo that has been stopped continues when it is called again. Exit status: 0, or "
        f"{INTERRUPTED} when it was interrupted during training."
    )
    parser.add_argument(
        "--scenes", action="store_true",
        help="the second experiment: drawn scenes, a stress test in which neighboring patches "
        "share nothing; it also runs where the real weights are not installed",
    )  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_const", dest="size", const="quick", default="default",
        help="both experiments, in a minute or two: shows that everything runs, and nothing else",
    )  # fmt: skip
    size.add_argument(
        "--full", action="store_const", dest="size", const="full",
        help="with --scenes: all four variants of the paper; the default is two of them",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", type=lambda text: Path(path(text)), help="(out/demo-SIZE)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of images, weights and order (0)")


def _demo(options: argparse.Namespace) -> int:
    missing = [package for module, package in _NEEDED.items() if not _is_installed(module)]
    if missing:
        raise ValueError(
            f"the demo needs {' and '.join(missing)}: pip install 'stf-jax[demo]', "
            "or pip install -e '.[demo]' in a clone"
        )
    if options.size == "full" and not options.scenes:
        raise ValueError("--full is about the drawn scenes; add --scenes, or leave it out")
    from stf_jax.demo.experiment import Interrupted
    from stf_jax.demo.packages import missing as missing_weights

    out = options.out or Path("out", f"demo-{options.size}")
    command = None if options.scenes else missing_weights()
    if command is not None:
        sys.stderr.write(f"No real weights here ({command}); these are the drawn scenes.\n")
    try:
        if not options.scenes and command is None:
            _run_real(options, out / "real")
            if options.size != "quick":
                return 0
        _run_scenes(options, out / "drawn")
    except Interrupted:
        return INTERRUPTED
    return 0


def _run_real(options: argparse.Namespace, out: Path) -> None:
    from stf_jax.demo.experiment import command
    from stf_jax.demo.real import TEMPLATE, RealSettings, run_real
    from stf_jax.demo.real_report import example, table, verdict, write_real_report
    from stf_jax.demo.report import show_rows

    results = run_real(RealSettings.by_name(options.size, seed=options.seed), out)
    write_real_report(results, out)
    show_rows(*table(results))
    sys.stdout.write(f"\n{verdict(results)}\nThe report is {out / 'report.md'}.\n")
    image, question, model = example(results, out)
    asking = command(
        "generate", model, "--template", TEMPLATE, "--image", image, "--prompt", question
    )
    sys.stdout.write(f"Ask about this image or one of yours:\n  {asking}\n")


def _run_scenes(options: argparse.Namespace, out: Path) -> None:
    from stf_jax.demo.corpus import read_held_out
    from stf_jax.demo.experiment import Settings, command, run
    from stf_jax.demo.report import example_question, show_table, write_report

    results = run(Settings.by_name(options.size, seed=options.seed), out)
    questions = read_held_out(out / "scenes")
    write_report(results, questions, out)
    show_table(results)
    sys.stdout.write(f"\n{results.verdict}\nThe report is {out / 'report.md'}.\n")
    image, question = example_question(questions, out)
    asking = command("generate", out / "best", "--image", image, "--prompt", question)
    sys.stdout.write(f"Ask {results.best.title} about this image or one of yours:\n  {asking}\n")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
