"""The command line: each verb is a thin skin over one Python function."""

import argparse
import dataclasses
import glob
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

FLOATS = ("float32", "float16", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0 is success; 1 a user's mistake, in one line on stderr (argparse's own are 2); a verb may have
    others, which its help names.
    """
    tpus = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if not tpus and importlib.util.find_spec("libtpu"):
        # Installed for `plan`, libtpu would look for a TPU at length, and complain.
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if glob.glob("/dev/nvidia*") else "cpu")
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if "overrides" in options:
        options.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options) or 0
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ImportError as error:
        # fsspec's, which looks for it when a path is on gs://.
        if "gcsfs" not in str(error):
            raise
        sys.stderr.write("error: gs:// needs gcsfs: pip install 'stf-jax[gcs]'\n")
        return 1
    except (OSError, ValueError) as error:
        if not _raised_here(error):
            raise
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _raised_here(error: BaseException) -> bool:
    """Whether the message is ours, or the system's; a library's ValueError is a bug to be seen."""
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    # An error from a worker process has our class and no frame of ours.
    modules = (frame.f_globals["__name__"], type(error).__module__)
    ours = any(module.partition(".")[0] in ("stf_jax", "convert") for module in modules)
    return isinstance(error, OSError) or ours


def _parser() -> argparse.ArgumentParser:
    from stf_jax.cli_chat import add_chat
    from stf_jax.cli_data import add_data
    from stf_jax.cli_demo import add_demo
    from stf_jax.cli_eval import add_eval
    from stf_jax.cli_plan import add_plan
    from stf_jax.cli_train import add_train

    parser = argparse.ArgumentParser(
        prog="stf-jax", description="LLaVA-STF in JAX: vision-language models with few tokens."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_convert(verbs)
    _add_generate(verbs)
    add_chat(verbs)
    add_data(verbs)
    add_train(verbs)
    add_demo(verbs)
    add_eval(verbs)
    add_plan(verbs)
    return parser


Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int | None], summary: str
) -> argparse.ArgumentParser:
    """A verb that calls `run`, whose result is the exit status; None is 0."""
    parser = verbs.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    return parser


def _add_convert(verbs: Verbs) -> None:
    summary = "PyTorch checkpoints to native ones and back, bit for bit"
    convert = verbs.add_parser("convert", help=summary, description=summary)
    actions = convert.add_subparsers(required=True, metavar="import|export|inspect")

    parser = add_verb(actions, "import", _import, "PyTorch -> native")
    parser.add_argument(
        "source",
        metavar="SRC",
        help="LLaVA-STF, LLaVA-1.5, HF Llava, LLaMA, "
        "or a stage-1 adapter; a directory, for an adapter also the file",
    )
    parser.add_argument("out", metavar="OUT", help="the new directory")
    parser.add_argument("--vision-tower", metavar="DIR", help="CLIP, where SRC has none inside")
    parser.add_argument("--base", metavar="DIR", help="the language model under an adapter")
    parser.add_argument(
        "--fusion",
        choices=("stf", "llava", "average"),
        help="what a language model alone gets, with random weights (stf)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of these random weights (0)")
    parser.add_argument("--dtype", choices=FLOATS, help="of every weight (as they are)")
    parser.add_argument(
        "--vocabulary-multiple",
        type=int,
        default=1,
        metavar="N",
        help="pad the vocabulary to a multiple, so that a mesh divides it (1)",
    )

    parser = add_verb(actions, "export", _export, "native -> PyTorch")
    parser.add_argument("source", metavar="SRC", help="a native checkpoint, or a run's directory")
    parser.add_argument("out", metavar="OUT", help="the new directory")
    parser.add_argument(
        "--layout",
        required=True,
        choices=("llava-stf", "llava", "hf", "adapter", "native"),
        help="llava-stf takes models with MBTF, llava those without (LLaVA-1.5's fusion, average); "
        "hf is LLaVA-1.5 for transformers, adapter mm_projector.bin alone; "
        "native makes one checkpoint of a run and what it began with",
    )
    parser.add_argument("--dtype", choices=FLOATS, help="of every weight (as it came)")
    parser.add_argument(
        "--vocabulary",
        type=int,
        metavar="N",
        help="rows of the embedding, one a token or more (as many as came; hf: and its two tokens)",
    )

    parser = add_verb(
        actions,
        "inspect",
        _inspect,
        "what a checkpoint is, and whether it is whole; exit status 1 if it is not",
    )
    parser.add_argument("source", metavar="SRC", help="a directory or a file of weights")
    parser.add_argument("--vision-tower", metavar="DIR", help="CLIP, where SRC has none inside")
    parser.add_argument("--base", metavar="DIR", help="the language model under an adapter")


def _add_generate(verbs: Verbs) -> None:
    from stf_jax.data.conversation import TEMPLATES

    parser = add_verb(verbs, "generate", _generate, "ask a model about pictures")
    parser.add_argument(
        "model", metavar="MODEL", help="a native checkpoint, a PyTorch directory or a run's"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture; may be given several times",
    )
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="the question; <image> marks where each picture stands (first)",
    )
    parser.add_argument(
        "--template",
        default="v1",
        metavar="NAME",
        help=f"form of the prompt: {', '.join(sorted(TEMPLATES))} (v1)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="(512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is all tokens (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text that ends the answer; may be given several times",
    )
    parser.add_argument("--dtype", choices=FLOATS, help="(float32 on CPU, else bfloat16)")
    parser.add_argument("--vision-tower", metavar="DIR", help="CLIP, for a PyTorch directory")
    parser.add_argument(
        "--json", action="store_true", help="one object with text, token ids, counts"
    )


# The verbs import what they need: importing jax takes seconds that `--help` need not wait for.


def _import(options: argparse.Namespace) -> None:
    from etils import epath

    from convert import import_checkpoint
    from stf_jax.processors import extra_files, unusable

    import_checkpoint(**_arguments(options))
    out = epath.Path(options.out)
    for problem in unusable(out / "hf", extra_files(out)):
        sys.stderr.write(f"warning: no answers without this: {problem}\n")


def _export(options: argparse.Namespace) -> None:
    from convert import export_checkpoint

    export_checkpoint(**_arguments(options))


def _inspect(options: argparse.Namespace) -> int:
    from convert import inspect_checkpoint

    report = inspect_checkpoint(**_arguments(options))
    sys.stdout.write(f"{report}\n")
    return 0 if report.problem is None else 1


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "run"}


def _generate(options: argparse.Namespace) -> None:
    import stf_jax

    sampling = stf_jax.Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    if sampling.temperature == 0 and (sampling.top_p < 1 or sampling.top_k > 0):
        raise ValueError(
            "--top-p and --top-k do nothing at temperature 0, which is greedy; "
            "add --temperature 1, or leave them out"
        )
    model = stf_jax.load(options.model, dtype=options.dtype, vision_tower=options.vision_tower)

    def show(index: int, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    (answer,) = model.generate(
        [stf_jax.Request(prompt=options.prompt, images=options.image)],
        template=options.template,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop=options.stop,
        on_text=None if options.json else show,
    )
    if options.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(answer), ensure_ascii=False))
    sys.stdout.write("\n")
