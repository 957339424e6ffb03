"""The directory of a run, and the model that it has trained so far.

    config.yaml      the resolved config
    checkpoints/     Orbax; the trained parameters, the optimiser, the step
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

from stf_jax.checkpoint import (
    CheckpointError,
    NativeCheckpoint,
    absolute,
    host_like,
    is_native,
    load_some,
    open_native,
    place,
)
from stf_jax.models.lora import merge
from stf_jax.train.config import TrainConfig, without_free

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
LOCK = ".lock"
FILES = (CONFIG, CHECKPOINTS, METRICS, TENSORBOARD)


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
    config = TrainConfig.load(path / CONFIG)
    steps = [int(child.name) for child in (path / CHECKPOINTS).iterdir() if child.name.isdigit()]
    if not steps:
        raise CheckpointError(f"{path} has no complete checkpoint yet")
    try:
        first = open_model(config.model)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} was trained from {config.model}, which cannot be opened: {error}; "
            f"put it there again, or name its place in {path / CONFIG}"
        ) from error
    return TrainedCheckpoint(
        id=_identity(first, config, step=max(steps)),
        path=path,
        config=first.config,
        first=first,
        run=config,
        step=max(steps),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedCheckpoint(NativeCheckpoint):
    """The model of a run: what was trained at `step`, over the model that it began with.

    Shapes and dtypes are those of the first model; what was trained is float32 and is cast to what
    is asked for. Adapters are merged into the weights that they adapt.
    """

    first: NativeCheckpoint
    run: TrainConfig
    step: int

    @property
    def extras(self) -> epath.Path:
        """Tokenizer, image processor and the rest are those of the first model."""
        return self.first.extras

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter, by its path."""
        return self.first.shapes

    @functools.cached_property
    def trained(self) -> dict[str, Any]:
        """Shape and dtype of the parameters that the run trains, by path; adapters among them."""
        return dict(ocp.metadata(self._state).metadata["parameters"])

    def load(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """As the first model's, with what the run has trained."""
        trained = {name: like for name, like in wanted.items() if name in self.trained}
        adapted = {
            name: like for name, like in wanted.items() if _adapter(name, "a") in self.trained
        }
        rest = {n: like for n, like in wanted.items() if n not in trained and n not in adapted}
        return {
            **(self._load_trained(trained) if trained else {}),
            **(self.first.load(rest) if rest else {}),
            **{name: place(self._merged(name), like) for name, like in adapted.items()},
        }

    def _merged(self, kernel: str) -> np.ndarray[Any, Any]:
        """A weight [layers, ...] with its adapter, float32, in host memory."""
        shape = self.first.shapes[kernel].shape
        # Orbax may hand out an array that is not to be written to.
        merged = np.array(self.first.load({kernel: host_like(shape, np.float32)})[kernel])
        names = [_adapter(kernel, which) for which in "ab"]
        like = {name: host_like(self.trained[name].shape, np.float32) for name in names}
        a, b = (self._load_trained(like)[name] for name in names)
        for layer in range(len(merged)):
            merged[layer] = merge(merged[layer], a[layer], b[layer], config=self.run.lora)
        return merged

    def _load_trained(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        loaded: dict[str, Any] = load_some(self._state, {"parameters": dict(wanted)})["parameters"]
        return loaded

    @property
    def _state(self) -> epath.Path:
        return self.path / CHECKPOINTS / str(self.step)


def _identity(first: NativeCheckpoint, config: TrainConfig, *, step: int) -> str:
    """Of what a run has made so far, wherever it lies."""
    told = json.dumps([first.id, step, without_free(config.to_dict())], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _adapter(kernel: str, which: str) -> str:
    return f"{kernel.removesuffix('/kernel')}/lora/{which}"
