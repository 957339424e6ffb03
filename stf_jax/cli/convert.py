"""`stf-jax convert`: PyTorch checkpoints to native ones and back."""

import argparse
import sys
from typing import Any

from stf_jax.cli.verbs import FLOATS, Verbs, add_field, add_verb, path, read_fields


def add_convert(verbs: Verbs) -> None:
    """Adds the verb."""
    summary = "PyTorch checkpoints to native ones and back, bit for bit"
    convert = verbs.add_parser("convert", help=summary, description=summary)
    actions = convert.add_subparsers(required=True, metavar="import|export|inspect")

    parser = add_verb(actions, "import", _import, "PyTorch -> native")
    parser.add_argument(
        "source",
        metavar="SRC",
        type=path,
        help="LLaVA-STF, LLaVA-1.5, HF Llava, LLaMA, a stage-1 adapter or a LoRA adapter; "
        "a directory, for a stage-1 adapter also the file; or a GGUF file of a LLaMA",
    )
    parser.add_argument("out", metavar="OUT", type=path, help="the new directory")
    parser.add_argument(
        "--vision-tower",
        metavar="PATH",
        type=path,
        help="CLIP, where SRC has none inside: a directory, or an ONNX file",
    )
    parser.add_argument(
        "--base", metavar="DIR", type=path, help="the model that an adapter was trained on"
    )
    parser.add_argument(
        "--system",
        metavar="NAME",
        help="what a language model alone gets, with random weights (stf); for a whole model, "
        "another system that its weights fit",
    )
    # What it was called before systems had names.
    parser.add_argument("--fusion", dest="system", help=argparse.SUPPRESS)
    parser.add_argument(
        "--taps",
        metavar="N,N",
        type=_numbers,
        help="the tower's hidden states that this system reads, the last first (of 12 layers, "
        "stf reads 11,9,6,3)",
    )
    parser.add_argument(
        "--window", metavar="N", type=int, help="side of the square of patches that is a token (2)"
    )
    parser.add_argument(
        "--mbtf-width",
        metavar="N",
        type=int,
        help="between the two layers that mix the taps (4 times the tower's)",
    )
    parser.add_argument(
        "--projector-width",
        metavar="N",
        type=int,
        help="between the two layers of the projector (as published)",
    )
    add_field(parser)
    parser.add_argument("--seed", type=int, default=0, help="of these random weights (0)")
    parser.add_argument("--dtype", choices=FLOATS, help="of every weight (as they are)")
    parser.add_argument(
        "--vocabulary-multiple",
        type=int,
        default=1,
        metavar="N",
        help="pad the vocabulary to a multiple, so that a mesh divides it (1)",
    )
    _add_quantize(parser)

    parser = add_verb(actions, "export", _export, "native -> PyTorch")
    parser.add_argument(
        "source", metavar="SRC", type=path, help="a native checkpoint, or a run's directory"
    )
    parser.add_argument("out", metavar="OUT", type=path, help="the new directory")
    parser.add_argument(
        "--layout",
        required=True,
        choices=("llava-stf", "llava", "hf", "hf-code", "adapter", "lora", "gguf", "native"),
        help="llava-stf takes models with MBTF, llava all others; "
        "hf is LLaVA-1.5 for transformers, adapter mm_projector.bin alone, lora the adapter of a "
        "LoRA run as LLaVA and PEFT read it, gguf what llama.cpp runs; "
        "native makes one checkpoint of a run and what it began with",
    )
    parser.add_argument("--dtype", choices=FLOATS, help="of every weight (as it came)")
    parser.add_argument(
        "--vocabulary",
        type=int,
        metavar="N",
        help="rows of the embedding, one a token or more (as many as came; hf: and its two tokens)",
    )
    _add_quantize(parser, where="; for --layout native")
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="write quantized weights as plain numbers, with a run's adapters merged into them",
    )

    parser = add_verb(
        actions,
        "inspect",
        _inspect,
        "what a checkpoint is, and whether it is whole; exit status 1 if it is not",
    )
    parser.add_argument("source", metavar="SRC", type=path, help="a directory or a file of weights")
    parser.add_argument(
        "--vision-tower",
        metavar="PATH",
        type=path,
        help="CLIP, where SRC has none inside: a directory, or an ONNX file",
    )
    parser.add_argument(
        "--base", metavar="DIR", type=path, help="the model that an adapter was trained on"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every array, and hold it against the checksum written with it",
    )


def _add_quantize(parser: argparse.ArgumentParser, *, where: str = "") -> None:
    parser.add_argument(
        "--quantize",
        metavar="SCHEME",
        help="store the language model's weights as int8, int4, or int4-N with a scale for N "
        f"inputs{where} (as they are)",
    )


def _import(options: argparse.Namespace) -> None:
    from etils import epath

    from stf_jax.convert import import_checkpoint
    from stf_jax.data.processors import unusable
    from stf_jax.store.checkpoint import extra_files

    arguments = _arguments(options)
    width = arguments.pop("mbtf_width")
    fields = {name: arguments.pop(name) for name in ("taps", "window", "projector_width")}
    fields["mbtf"] = None if width is None else {"mlp_width": width}
    given = {name: value for name, value in fields.items() if value is not None}
    given |= read_fields(arguments.pop("field"))
    import_checkpoint(fields=given, **arguments)
    out = epath.Path(options.out)
    for problem in unusable(out / "hf", extra_files(out)):
        sys.stderr.write(f"warning: no answers without this: {problem}\n")


def _export(options: argparse.Namespace) -> None:
    from stf_jax.convert import export_checkpoint

    export_checkpoint(**_arguments(options))


def _inspect(options: argparse.Namespace) -> int:
    from stf_jax.convert import inspect_checkpoint

    report = inspect_checkpoint(**_arguments(options))
    sys.stdout.write(f"{report}\n")
    return 0 if report.problem is None else 1


def _numbers(text: str) -> list[int]:
    """The type of whole numbers with commas between them."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of whole numbers, such as 11,9,6,3"
        ) from None


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "run"}
