"""What the command lines of several benchmarks have in common."""

import argparse


def make_parser(
    doc: str | None,
    *,
    layers: int,
    width: int,
    mlp_width: int,
    vision_layers: int = 3,
    vision_width: int = 64,
) -> argparse.ArgumentParser:
    """With the sizes of a model, and its dtype."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=layers, help="of the language model")
    parser.add_argument("--width", type=int, default=width, help="a multiple of 128")
    parser.add_argument("--mlp-width", type=int, default=mlp_width)
    parser.add_argument("--vision-layers", type=int, default=vision_layers)
    parser.add_argument("--vision-width", type=int, default=vision_width)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser


def add_questions(parser: argparse.ArgumentParser, *, questions: int, new: int) -> None:
    """Questions about a few images, and who answers them."""
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--questions", type=int, default=questions, help="about each image")
    parser.add_argument("--new", type=int, default=new, help="tokens of an answer at most")
    parser.add_argument("--slots", type=int, default=16)
