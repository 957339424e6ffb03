"""What the verbs share.

A verb imports what it needs when it runs: importing jax takes seconds that `--help` need not wait
for.
"""

import argparse
from collections.abc import Callable
from typing import TypeAlias

FLOATS = ("float32", "float16", "bfloat16")

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def path(text: str) -> str:
    """The type of an argument that is a path; see `expand`."""
    from stf_jax.util.files import expand

    return expand(text)


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int | None], summary: str
) -> argparse.ArgumentParser:
    """A verb that calls `run`, whose result is the exit status; None is 0."""
    parser = verbs.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    return parser
