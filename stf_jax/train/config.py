"""What a run is: the training config, read from YAML with keys overridden on the command line."""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jsonargparse
import yaml

from stf_jax.config import LlavaConfig
from stf_jax.data.config import DataConfig
from stf_jax.models.layers import Remat
from stf_jax.models.lora import LoRAConfig
from stf_jax.train.optimizer import OptimizerConfig, Stage
from stf_jax.train.step import Normalization

# In these a resumed run may differ: they change where and how it runs, not what it computes. Model
# and examples are known by what they are, not by where they lie.
FREE = (
    "model", "out", "mesh", "remat", "nonfinite", "checkpoint", "log_every", "profile",
    "data.workers", "data.max_lost", "data.datasets",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are laid out; one of the sizes may be -1, for all the devices that are left.

    Attributes:
        data: replicas of the parameters.
        fsdp: parts into which parameters, optimiser and rows of the batch are split.
        tensor: parts into which heads and hidden channels are split.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh {sizes}: each size is 1 or more, and one of them may be -1")

    def sizes(self, devices: int) -> dict[str, int]:
        """The axes with -1 filled in.

        Raises:
            ValueError: the mesh does not fit the devices.
        """
        sizes = dataclasses.asdict(self)
        known = 1
        for size in sizes.values():
            known *= max(size, 1)
        if -1 in sizes.values() and devices % known == 0:
            sizes = {name: devices // known if n == -1 else n for name, n in sizes.items()}
            known = devices
        if known != devices:
            axes = " x ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"the mesh {axes} does not fit {devices} devices; change mesh")
        return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Steps between checkpoints, and how many of the latest are kept."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("checkpoint.every and checkpoint.keep must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of one stage. Defaults: stage 2 of LLaVA-STF-7B.

    Attributes:
        model: what is trained on: a native checkpoint, or the directory of an earlier run.
        out: directory of this run; a run that is there already goes on.
        stage: "pretrain" trains fusion and projector, "finetune" also the language model, "lora"
            adapters of the language model in place of its weights.
        architecture: a named size, such as "llava_stf_7b", that the model must have; what
            `stf-jax plan` reads where there are no weights yet.
        epochs: passes over the data.
        steps: of the whole run, in place of epochs.
        micro_batches: parts of a batch whose gradients are added up one after the other.
        normalization: the loss is the mean over all supervised "tokens" of a batch, or the mean of
            its "micro_batches"' means, as in the PyTorch reference.
        remat: what the backward pass computes again: "none", "dots" (all but matmuls),
            "attention" (all but attention), "full".
        dtype: of the forward and backward pass; trained parameters are float32 all the same.
        nonfinite: what a step does whose loss or gradient is not finite: "stop" the run, or "skip"
            the update and go on.
        log_every: steps between lines where the output is no terminal.
        profile: first step to trace for TensorBoard's profiler, and one after the last.
        seed: of adapters and dropout; `data.seed` decides the order of the examples.
        lora: read in stage "lora" only.
        mesh: null for one device without a mesh.
    """

    model: str
    out: str
    stage: Stage = "finetune"
    architecture: str | None = None
    epochs: int = 1
    steps: int | None = None
    micro_batches: int = 1
    normalization: Normalization = "tokens"
    remat: Remat = "full"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    nonfinite: Literal["stop", "skip"] = "stop"
    log_every: int = 10
    profile: tuple[int, int] | None = None
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    mesh: MeshConfig | None = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        least = ("epochs", "micro_batches", "log_every")
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in least
            if getattr(self, name) < 1
        ]
        if self.steps is not None and self.steps < 1:
            problems.append(f"steps is {self.steps}; give 1 or more, or null for whole epochs")
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1]:
            problems.append(
                f"profile is {self.profile}; give the first step, and one after the last"
            )
        if self.data.batch_size % self.micro_batches:
            problems.append(
                f"data.batch_size {self.data.batch_size} does not divide into "
                f"{self.micro_batches} micro-batches"
            )
        if problems:
            raise ValueError("; ".join(problems))
        if self.architecture is not None:
            LlavaConfig.named(self.architecture)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads YAML, with `--section.key=value` on top.

        Raises:
            ValueError: no such file, an unknown key, or a value that does not fit.
        """
        path = Path(path)
        try:
            tree: Any = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise ValueError(f"{path}: cannot be read ({reason})") from error
        if not isinstance(tree, Mapping):
            raise ValueError(f"{path}: not a config; see configs/ for some")
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        parser.add_argument("--config", action="config")
        known = _keys(cls)
        given = [*_tree_keys(tree), *(_override_key(one) for one in overrides)]
        unknown = [key for key in given if key not in known]
        flat = [key for key in _sections(cls) if not isinstance(tree.get(key, {}), Mapping | None)]
        if flat:
            raise ValueError(f"{path}: {flat[0]} is {tree[flat[0]]!r}; it is a section of keys")
        if unknown:
            raise ValueError("\n".join(_unknown(key, known, path) for key in unknown))
        try:
            parsed = parser.parse_args([f"--config={path}", *overrides])
            del parsed["config"]
            return cls(**vars(parser.instantiate(parsed)))
        except (jsonargparse.ArgumentError, TypeError) as error:
            raise ValueError(f"{path}: {_plain(str(error))}") from error
        except ValueError as error:
            # An optional section's own refusal comes wrapped.
            raise ValueError(f"{path}: {error.__cause__ or error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for YAML."""
        return dataclasses.asdict(self)


def without_free(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as plain values, but for `FREE` keys."""
    data = {key: value for key, value in config["data"].items() if f"data.{key}" not in FREE}
    return {key: value for key, value in config.items() if key not in FREE} | {"data": data}


def _plain(message: str) -> str:
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
    return " ".join(re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).split())


class _Loader(yaml.SafeLoader):
    """YAML's own would let the last of two equal keys win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice")
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _sections(cls: Any) -> list[str]:
    fields: Any = dataclasses.fields(cls)
    return [one.name for one in fields if dataclasses.is_dataclass(one.default_factory)]


def _keys(cls: Any) -> set[str]:
    """Every dotted key of a config, sections included; below a list there is no key."""
    keys: set[str] = set()
    for field in dataclasses.fields(cls):
        keys.add(field.name)
        section: Any = field.default_factory
        if dataclasses.is_dataclass(section):
            keys |= {f"{field.name}.{key}" for key in _keys(section)}
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


def _unknown(key: str, known: set[str], path: Path) -> str:
    # A last part that is right in another section is what was meant, more than a similar word.
    last = key.rpartition(".")[2]
    near = [one for one in sorted(known) if one.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    return f"{path}: there is no key {key!r}; the nearest is {near[0]!r}"
