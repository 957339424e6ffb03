"""The verb `stf-jax search`."""

import argparse
import importlib.util
import sys
from pathlib import Path

from stf_jax.cli.verbs import FLOATS, Verbs, add_verb, path


def add_search(verbs: Verbs) -> None:
    """Adds `search`."""
    summary = "how many tokens of an image each layer needs: G-Search, or P-Sigmoid under a budget"
    parser = add_verb(verbs, "search", _search, summary)
    parser.epilog = (
        "Nothing is trained. Use what is found with --system gsearch --field schedule=@FILE. A "
        "search that was stopped continues when it is called again."
    )
    parser.add_argument("model", metavar="MODEL", type=path, help="a LLaVA-1.5")
    parser.add_argument(
        "--calibration",
        metavar="DIR",
        type=path,
        required=True,
        help="a folder made by stf-jax data build, whose prompts the schedule is for",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=lambda text: Path(path(text)),
        required=True,
        help="YAML; a journal and a plot lie beside it",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SHARE",
        help="P-Sigmoid: the mean share of tokens over all layers, such as 0.4 (G-Search, which "
        "has none)",
    )
    parser.add_argument(
        "--criterion",
        choices=("agree", "ce", "lambda"),
        help="what G-Search accepts: the same next tokens, a cross entropy within --tolerance, or "
        "the best sum of both with --weight (ce)",
    )
    parser.add_argument(
        "--tolerance", type=float, metavar="SHARE", help="of ce, above that of all tokens (0.02)"
    )
    parser.add_argument(
        "--weight", type=float, metavar="NATS", help="of lambda, for dropping all tokens (0.15)"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="G-Search tries multiples of so many tokens (32)"
    )
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="prompts (64)")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="prompts at a time (8)")
    parser.add_argument("--template", default="v1", metavar="NAME", help="of the prompts (v1)")
    parser.add_argument("--dtype", choices=FLOATS, help="(float32 on CPU, else bfloat16)")
    parser.add_argument(
        "--vision-tower", metavar="DIR", type=path, help="CLIP, for a PyTorch directory"
    )


def _search(options: argparse.Namespace) -> None:
    names = ("criterion", "tolerance", "weight", "step")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.budget is not None and given:
        raise ValueError(
            f"--{next(iter(given))} is for G-Search; leave it out, or leave out --budget"
        )
    if options.out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out is {options.out}; give a file that ends in .yaml")
    from stf_jax.search.algorithms import Rule
    from stf_jax.search.runner import search
    from stf_jax.util.progress import count_progress, unwound_by_sigterm

    with unwound_by_sigterm(), count_progress("search") as progress:
        found = search(
            options.model,
            options.calibration,
            options.out,
            budget=options.budget,
            rule=Rule(**given),
            samples=options.samples,
            rows=options.rows,
            template=options.template,
            dtype=options.dtype,
            vision_tower=options.vision_tower,
            progress=progress,
        )
    sys.stdout.write(f"{found}\nThe schedule is {options.out}.\n")
    if importlib.util.find_spec("matplotlib") is None:
        sys.stdout.write("A plot needs matplotlib: pip install 'stf-jax[demo]'\n")
        return
    from stf_jax.search.plot import draw_schedule

    draw_schedule(found, options.out.with_suffix(".png"))
