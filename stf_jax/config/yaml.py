"""Configs: YAML into a frozen dataclass, strictly, with keys overridden on the command line."""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml
from etils import epath

from stf_jax.util.files import read_text

Config = TypeVar("Config")

_FIX = "see configs/ for some"
_MOST = 2**20  # bytes
_LONGEST = 500  # characters of a message, which may quote a value


def read_yaml(path: epath.PathLike) -> Mapping[str, Any]:
    """The keys of a file, local or on gs://, as they stand in it.

    Raises:
        ValueError: it cannot be read, or is no config.
    """
    text = read_text(path, fix=_FIX, most=_MOST)
    try:
        tree: Any = yaml.load(text, _Loader)
    # A number or a date may be none, too.
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({reason}); {_FIX}") from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path}: not a config; see configs/ for some")
    return tree


def load_config(cls: type[Config], path: epath.PathLike, overrides: Sequence[str] = ()) -> Config:
    """A dataclass from YAML, with `--section.key=value` on top.

    Raises:
        ValueError: no such file, an unknown key, or a value that does not fit.
    """
    tree = read_yaml(path)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    parser.add_argument("--config", action="config")
    known = _keys(cls)
    given = [*_tree_keys(tree), *(_override_key(override) for override in overrides)]
    unknown = [key for key in given if key not in known]
    flat = [key for key in _sections(cls) if not isinstance(tree.get(key, {}), Mapping | None)]
    if flat:
        raise ValueError(f"{path}: {flat[0]} is {tree[flat[0]]!r}; it is a section of keys")
    if unknown:
        raise ValueError("\n".join(_describe_unknown(key, known, path) for key in unknown))
    try:
        # The text and not its path, which may be a URL.
        text = read_text(path, fix=_FIX, most=_MOST)
        parsed = parser.parse_args([f"--config={text}", *overrides])
        del parsed["config"]
        return cls(**vars(parser.instantiate(parsed)))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ValueError(f"{path}: {plain(str(error))}") from error
    except ValueError as error:
        # An optional section's own refusal comes wrapped.
        raise ValueError(f"{path}: {error.__cause__ or error}") from error


def plain(message: str) -> str:
    """Jsonargparse's message on one line, in the words of a config rather than of Python."""
    union = re.search(r'key "(.+?)".*Subtypes: \[(.*?)\].*Given value: (.*)', message, re.DOTALL)
    if union:
        kinds = union[2].replace("<class 'NoneType'>", "null")
        message = f"{union[1]!r}: Expected {kinds}. Got value: {union[3]}"
    for theirs, ours in (
        ("Parser key ", ""),
        ("a typing.Literal", "one of "),
        ("a <class ", "<class "),
    ):
        message = message.replace(theirs, ours)
    message = message.replace("the following arguments are required:", "these keys are missing:")
    message = " ".join(re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).split())
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."


class _Loader(yaml.SafeLoader):
    """YAML's own would let the last of two equal keys win, and an alias stand for any amount."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*) is not read; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _sections(cls: Any) -> dict[str, Any]:
    """The keys whose values are dataclasses, or may be."""
    return {
        name: kind
        for name, hint in get_type_hints(cls).items()
        for kind in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
        if dataclasses.is_dataclass(kind)
    }


def _keys(cls: Any) -> set[str]:
    """Every dotted key of a config, sections included; below a list there is no key."""
    keys = {field.name for field in dataclasses.fields(cls)}
    for name, section in _sections(cls).items():
        keys |= {f"{name}.{key}" for key in _keys(section)}
    return keys


def _tree_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _tree_keys(value, f"{prefix}{key}.")


def _override_key(override: str) -> str:
    name, equals, _ = override.partition("=")
    if not name.startswith("--") or not equals:
        raise ValueError(f"{override!r} is no override; write --section.key=value")
    return name.removeprefix("--")


def _describe_unknown(key: str, known: set[str], path: epath.PathLike) -> str:
    # A last part that is right in another section is what was meant, more than a similar word.
    last = key.rpartition(".")[2]
    near = [name for name in sorted(known) if name.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    return f"{path}: there is no key {key!r}; the nearest is {near[0]!r}"
