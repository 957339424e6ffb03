"""The loss of a model on held-out examples: `stf-jax eval loss MODEL --data DIR`."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from stf_jax.convert.stored_model import StoredModel, open_any
from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.images import Mode
from stf_jax.data.pipeline import TrainingData
from stf_jax.infer.load import DTypeName
from stf_jax.models.llava import Llava
from stf_jax.parallel.hosts import BatchLayout
from stf_jax.parallel.sharding import BATCH_AXES, ShardingRules
from stf_jax.store.arrays import flatten
from stf_jax.store.run import CONFIG, is_run
from stf_jax.systems.base import System
from stf_jax.systems.mesh import check_divisible
from stf_jax.train.config import TrainConfig
from stf_jax.train.step import make_loss
from stf_jax.train.validation import HeldOutLoss, sum_losses
from stf_jax.util.errors import explain_memory
from stf_jax.util.files import expand

# Without a run's own config: the most positions of a row, and the rows of each device.
_LENGTH, _ROWS = 2048, 4


def held_out_loss(
    path: epath.PathLike,
    dataset: epath.PathLike,
    *,
    template: str | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeName | None = None,
    vision_tower: epath.PathLike | None = None,
    workers: int | None = None,
    system: str | System | None = None,
    fields: Mapping[str, Any] | None = None,
) -> HeldOutLoss:
    """The mean loss over the supervised tokens of a dataset, as `train` validates with it.

    Args:
        path: a model, as for `stf_jax.load`. A run's config says how examples become rows.
        dataset: folder made by `stf-jax data build`.
        template: of the conversations; by default the run's, or "v1".
        mesh: from `make_mesh`; one device by default.
        dtype: of weights and arithmetic; by default float32 on CPU and bfloat16 elsewhere.
        vision_tower: a directory with CLIP, for a PyTorch directory that does not lead to one.
        workers: processes that decode images; with 0 it is done between the batches. By default
            the run's, or eight.
        system: another one over the same weights; see `stf_jax.load`.
        fields: of that system.

    Raises:
        ValueError: a model or dataset that is missing, damaged, or does not fit the other.
    """
    opened = open_any(path, vision_tower=vision_tower, system=system, fields=fields)
    opened.check_trained()
    processors = opened.processors()
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    config = _data_config(path, opened, mode=processors.image_processor.mode)
    data = TrainingData(
        dataclasses.replace(
            config,
            datasets=(DatasetSource(path=os.fspath(dataset)),),
            template=template or config.template,
            batch_size=_ROWS * parts,
            packing="packed",
            workers=config.workers if workers is None else workers,
        ),
        tokenizer=processors.tokenizer,
        image_processor=processors.image_processor,
        tokens_per_image=processors.tokens_per_image,
        question_length=processors.question_length,
        layout=processors.clip_layout(config.clip_frames),
    )
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    rules = ShardingRules.none() if mesh is None else ShardingRules.default()
    layout = BatchLayout(mesh=mesh, rows=data.config.batch_size, micro_batches=1)
    shortage = "the model does not fit into the memory of a device; use a larger mesh"
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            check_divisible(opened.config, mesh)
            stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(explain_memory(shortage))
        network = Llava.abstract(
            opened.config, rules=rules, dtype=jnp.dtype(dtype), lora=opened.adapters
        )
        weights = flatten(opened.restore(nnx.to_pure_dict(nnx.state(network))))
        loss = make_loss(
            network,
            dtype=jnp.dtype(dtype),
            normalize_pixels=processors.image_processor.normalize,
        )
        result = sum_losses(loss, ({}, weights), data, layout=layout)
        assert result is not None
        return result


def _data_config(path: epath.PathLike, opened: StoredModel, *, mode: Mode) -> DataConfig:
    """How examples become rows: as in the run that made the model, where it is one."""
    path = epath.Path(expand(path))
    if is_run(path):
        return TrainConfig.load(path / CONFIG).data
    length = min(_LENGTH, opened.config.text.max_positions)
    return DataConfig(image_mode=mode, sequence_length=length)
