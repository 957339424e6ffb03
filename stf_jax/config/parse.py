"""A config dataclass from plain values."""

import functools
from collections.abc import Mapping
from typing import Any

import jsonargparse

from stf_jax.config.yaml import plain


def parse(cls: type, tree: Mapping[str, Any]) -> Any:
    """A config dataclass from plain values, strictly.

    Raises:
        ValueError: an unknown or mistyped key, or a value that does not fit.
    """
    parser = _parser_of(cls)
    try:
        parsed = parser.parse_object({"config": dict(tree)})
        return parser.instantiate(parsed)["config"]
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ValueError(plain(str(error).replace("config.", ""))) from error
    except ValueError as error:
        # An optional section's own refusal comes wrapped.
        raise ValueError(str(error.__cause__ or error)) from error


@functools.cache
def _parser_of(cls: type) -> jsonargparse.ArgumentParser:
    """Making one takes as long as parsing with it."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "config")
    return parser
