"""The directory of a run, and the model that it has trained so far.

    config.yaml      the resolved config
    checkpoints/     Orbax; the trained parameters, the optimizer, the step
    metrics.jsonl    an object a step
    tensorboard/     the same for TensorBoard, and profiles

A run is a model like any other: its trained parameters lie over the model that it began with, so
the frozen ones are never written again.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from stf_jax.config.yaml import read_yaml
from stf_jax.models.lora import LoRAConfig, is_adapter, merge
from stf_jax.store.arrays import host_like, load_and_check, load_some, place
from stf_jax.store.checkpoint import NativeCheckpoint, is_native, open_native
from stf_jax.store.checksum import checksums, name_leaves
from stf_jax.store.quiet import quiet_failures
from stf_jax.systems.older import is_older, older_path, upgrade_path
from stf_jax.util.errors import CheckpointError, first_line
from stf_jax.util.files import absolute, check_files

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
LOCK = ".lock"
# In a checkpoint: what was trained, and a checksum of each array, in the order of their names.
PARAMETERS = "parameters"
CHECKSUMS = "checksums"
FILES = (CONFIG, CHECKPOINTS, METRICS, TENSORBOARD)

# In these a resumed run may differ: they change where and how it runs, not what it computes. Model
# and examples are known by what they are, not by where they lie.
FREE = (
    "model", "out", "mesh", "remat", "nonfinite", "checkpoint", "log_every", "profile",
    "validation", "data.workers", "data.max_lost", "data.datasets",
    "data.features_directory",
)  # fmt: skip


def is_run(path: epath.PathLike) -> bool:
    """Whether `path` is the directory of a run."""
    path = epath.Path(path)
    return (path / CONFIG).is_file() and (path / CHECKPOINTS).is_dir()


def open_model(path: epath.PathLike) -> NativeCheckpoint:
    """Opens a native checkpoint, or the model of a run at its newest checkpoint.

    Raises:
        CheckpointError: neither, damaged, or a run whose first model has gone.
    """
    path = absolute(path)
    if not is_run(path):
        if path.exists() and not is_native(path):
            raise CheckpointError(
                f"{path} is neither a native checkpoint nor a run; import it first: "
                f"stf-jax convert import {path} OUT"
            )
        return open_native(path)
    run = _read_config(path / CONFIG)
    steps = [int(child.name) for child in (path / CHECKPOINTS).iterdir() if child.name.isdigit()]
    if not steps:
        raise CheckpointError(f"{path} has no complete checkpoint yet")
    try:
        first = open_model(run["model"])
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} was trained from {run['model']}, which cannot be opened: {error}; "
            f"put it there again, or name its place in {path / CONFIG}"
        ) from error
    return TrainedCheckpoint(
        id=_identity(first, run, step=max(steps)),
        path=path,
        config=first.config,
        version=first.version,
        first=first,
        lora=run["lora"],
        template=(run.get("data") or {}).get("template"),
        step=max(steps),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedCheckpoint(NativeCheckpoint):
    """The model of a run: what was trained at `step`, over the model that it began with.

    Shapes and dtypes are those of the first model; what was trained is float32 and is cast to what
    is asked for. Adapters are merged into the weights that they adapt; into integers they cannot
    be, and stay beside them.
    """

    first: NativeCheckpoint
    lora: LoRAConfig
    # Of the conversations that it was trained on.
    template: str | None
    step: int

    @property
    def extras(self) -> epath.Path:
        """Tokenizer, image processor and the rest are those of the first model."""
        return self.first.extras

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter, by its path."""
        if self.adapters is None:
            return self.first.shapes
        beside = {path: leaf for path, leaf in self.trained.items() if is_adapter(path)}
        return self.first.shapes | {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in beside.items()
        }

    @property
    def adapters(self) -> LoRAConfig | None:
        """Of the adapters beside quantized weights, as they answer: without dropout."""
        if self.first.config.text.quantization is None or not any(map(is_adapter, self.trained)):
            return None
        return dataclasses.replace(self.lora, dropout=0.0)

    @functools.cached_property
    def trained(self) -> dict[str, Any]:
        """Shape and dtype of the parameters that the run trains, by path; adapters among them."""
        return {upgrade_path(path): leaf for path, leaf in self._stored.items()}

    @property
    def _stored(self) -> Mapping[str, Any]:
        """The same, by the paths in the run's checkpoint, which may be an older one."""
        stored: Mapping[str, Any] = self._described[PARAMETERS]
        return stored

    @functools.cached_property
    def _described(self) -> Mapping[str, Any]:
        """Shape and dtype of everything in the run's checkpoint."""
        return describe(self._state)

    @functools.cached_property
    def _recorded(self) -> Mapping[str, int]:
        return read_checksums(self._state, self._described)

    def load(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Loads the first model's parameters, with those that the run has trained."""
        trained = {name: like for name, like in wanted.items() if name in self.trained}
        adapted = {
            name: like for name, like in wanted.items() if adapter_path(name, "a") in self.trained
        }
        rest = {n: like for n, like in wanted.items() if n not in trained and n not in adapted}
        return {
            **(self._load_trained_leaves(trained) if trained else {}),
            **(self.first.load(rest) if rest else {}),
            **{name: place(self._merge_adapter(name), like) for name, like in adapted.items()},
        }

    def _merge_adapter(self, kernel: str) -> np.ndarray[Any, Any]:
        """A weight [layers, ...] with its adapter, float32, in host memory."""
        shape = self.first.shapes[kernel].shape
        # Orbax may hand out an array that is not to be written to.
        merged = np.array(self.first.load({kernel: host_like(shape, np.float32)})[kernel])
        names = [adapter_path(kernel, which) for which in "ab"]
        like = {name: host_like(self.trained[name].shape, np.float32) for name in names}
        a, b = (self._load_trained_leaves(like)[name] for name in names)
        for layer in range(len(merged)):
            merged[layer] = merge(merged[layer], a[layer], b[layer], scale=self.lora.scale)
        return merged

    def _load_trained_leaves(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        prefix = f"{PARAMETERS}/"
        older = is_older(self._stored)
        loaded = load_and_check(
            lambda some: load_some(self._state, {PARAMETERS: dict(some)})[PARAMETERS],
            {older_path(path) if older else path: like for path, like in wanted.items()},
            stored=self._stored,
            recorded={
                name.removeprefix(prefix): number
                for name, number in self._recorded.items()
                if name.startswith(prefix)
            },
            damaged=lambda reason: _damage_error(self._state, reason),
        )
        return {upgrade_path(path): leaf for path, leaf in loaded.items()}

    def read_trained(self, name: str) -> np.ndarray[Any, Any]:
        """One of `trained` as it was trained, in host memory; also a part of an adapter."""
        leaf = self.trained[name]
        loaded = self._load_trained_leaves({name: host_like(leaf.shape, leaf.dtype)})
        array: np.ndarray[Any, Any] = loaded[name]
        return array

    def verify(self) -> None:
        """Verifies the run's newest checkpoint, and the model that it began with."""
        self.first.verify()
        if not self._recorded:
            raise CheckpointError(f"{self._state} has no checksums; an older release wrote it")
        like = jax.tree.map(lambda leaf: host_like(leaf.shape, leaf.dtype), self._described)
        try:
            sums = checksums(name_leaves(load_some(self._state, like)))
        except Exception as error:  # Orbax and its storage raise bare ones, too
            raise _damage_error(self._state, first_line(error)) from error
        changed = [name for name, number in self._recorded.items() if sums.get(name) != number]
        if changed:
            raise _damage_error(self._state, f"{changed[0]} is not what was written")

    @property
    def _state(self) -> epath.Path:
        return self.path / CHECKPOINTS / str(self.step)


def _damage_error(path: epath.Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({reason}); move it away, and the one before is used"
    )


def describe(path: epath.Path) -> dict[str, Any]:
    """Shape and dtype of the arrays in a run's checkpoint, in nested dictionaries and lists.

    Raises:
        CheckpointError: what describes it is damaged.
    """
    try:
        check_files(path)
        with quiet_failures():
            described = ocp.metadata(path).metadata
    except Exception as error:  # Orbax raises bare ones, too
        raise _damage_error(path, first_line(error)) from error
    if not isinstance(described, Mapping) or PARAMETERS not in described:
        raise _damage_error(path, "nothing describes its arrays")
    return dict(described)


def read_checksums(path: epath.Path, described: Mapping[str, Any]) -> dict[str, int]:
    """The checksum of each array of a run's checkpoint, by path; none of an older release's."""
    if CHECKSUMS not in described:
        return {}
    like = described[CHECKSUMS]
    numbers = load_some(path, {CHECKSUMS: host_like(like.shape, like.dtype)})[CHECKSUMS]
    names = name_leaves({key: value for key, value in described.items() if key != CHECKSUMS})
    if len(numbers) != len(names):
        raise _damage_error(path, f"{len(numbers)} checksums of {len(names)} arrays")
    return dict(zip(names, map(int, numbers), strict=True))


def _read_config(path: epath.Path) -> dict[str, Any]:
    """The config of a run, whose `lora` is made a `LoRAConfig`.

    What else the keys must be is checked by `stf_jax.train`, which wrote them.
    """
    run = dict(read_yaml(path))
    lora = run.get("lora", {})
    if not isinstance(run.get("model"), str) or not isinstance(lora, Mapping):
        raise CheckpointError(f"{path} is no config of a run; copy the run's directory again")
    try:
        return run | {"lora": LoRAConfig(**lora)}
    except TypeError as error:
        raise CheckpointError(f"{path}: lora does not fit ({error}); copy it again") from error


def without_free(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as plain values, without the `FREE` keys."""
    data = {
        key: value for key, value in config.get("data", {}).items() if f"data.{key}" not in FREE
    }
    return {key: value for key, value in config.items() if key not in FREE} | {"data": data}


def _identity(first: NativeCheckpoint, run: Mapping[str, Any], *, step: int) -> str:
    """Identifies the weights of a run at a step, wherever its directory lies."""
    content = without_free(run) | {"lora": dataclasses.asdict(run["lora"])}
    fingerprint = json.dumps([first.id, step, content], sort_keys=True)
    return hashlib.sha256(fingerprint.encode()).hexdigest()


def adapter_path(kernel: str, which: str) -> str:
    """Where "a" or "b" of a weight's adapter lies."""
    return f"{kernel.removesuffix('/kernel')}/lora/{which}"
