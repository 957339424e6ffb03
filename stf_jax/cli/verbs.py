"""What the verbs share.

A verb imports what it needs when it runs: importing jax takes seconds that `--help` need not wait
for.
"""

import argparse
import codecs
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import yaml

FLOATS = ("float32", "float16", "bfloat16")

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def path(text: str) -> str:
    """The type of an argument that is a path; see `expand`."""
    from stf_jax.util.files import expand

    return expand(text)


def add_allow_urls(parser: argparse.ArgumentParser) -> None:
    """Adds the option that lets an image be a URL."""
    parser.add_argument(
        "--allow-urls",
        action="store_true",
        help="an image may be a URL, which is fetched; not from this machine or its network",
    )


def check_output() -> None:
    """Refuses a stdout that cannot hold every text, before a text is computed at length.

    Raises:
        ValueError: it is not UTF-8.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if not codecs.lookup(encoding).name.startswith(("utf", "gb18030")):
        raise ValueError(
            f"stdout is {encoding}, which cannot hold every text; set PYTHONIOENCODING=utf-8"
        )


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int | None], summary: str
) -> argparse.ArgumentParser:
    """A verb that calls `run`, whose result is the exit status; None is 0."""
    parser = verbs.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    return parser


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """Which frames of a clip are shown."""
    parser.add_argument(
        "--frames", type=int, default=8, metavar="N", help="of a clip, at most, spread over it (8)"
    )
    parser.add_argument(
        "--rate", type=float, metavar="N", help="frames a second of a clip, up to --frames"
    )


def add_field(parser: argparse.ArgumentParser) -> None:
    """Fields of the system that `--system` names."""
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of that system, such as ratio=0.125, or schedule=@FILE of 'stf-jax search'; may be "
        "given several times (as published)",
    )


def read_fields(options: list[str]) -> dict[str, Any]:
    """What `--field` gives, as YAML reads the values; @FILE is a YAML file that has the field.

    Raises:
        ValueError: one without a name or a value, or a file without that field.
    """
    fields = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--field {option}: give NAME=VALUE, such as ratio=0.125")
        fields[name] = _read_field(name, value[1:]) if value[0] == "@" else yaml.safe_load(value)
    return fields


def _read_field(name: str, file: str) -> Any:
    from stf_jax.util.files import read_text

    try:
        content = yaml.safe_load(read_text(path(file)))
    except yaml.YAMLError as error:
        raise ValueError(f"--field {name}: {file} is no YAML") from error
    if not isinstance(content, dict) or name not in content:
        raise ValueError(f"--field {name}: {file} has no key {name!r}")
    return content[name]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What opens a model, beside its path, and the tokens in which it sees an image."""
    parser.add_argument(
        "--vision-tower", metavar="DIR", type=path, help="CLIP, for a PyTorch directory"
    )
    parser.add_argument(
        "--system",
        metavar="NAME",
        help="another system over the same weights, such as prumerge over LLaVA-1.5's (its own)",
    )
    add_field(parser)
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="K",
        help="an image, where the system has several budgets (its most)",
    )
