"""The first screen of `stf-jax train`: a summary of the run before it begins."""

import math
from typing import Any

import jax
from etils import epath

from stf_jax.data.pipeline import DataPlan, TrainingData
from stf_jax.models.lora import is_adapter
from stf_jax.store.checkpoint import NativeCheckpoint
from stf_jax.store.run import CHECKPOINTS, TrainedCheckpoint
from stf_jax.train.config import TrainConfig
from stf_jax.train.features import CachedFeatures
from stf_jax.train.optimizer import Parameters
from stf_jax.train.program import TrainProgram

_GIB = 2**30


def first_screen(
    config: TrainConfig,
    first: NativeCheckpoint,
    data: TrainingData,
    held_out: TrainingData | None,
    features: CachedFeatures | None,
    program: TrainProgram,
    compiled: Any,
    *,
    steps: int,
    start: int,
) -> str:
    """The summary of a run, by name of the line."""
    plan = data.plan()
    checkpoints = epath.Path(config.out) / CHECKPOINTS
    lines = {
        "run": f"{config.out}, " + (f"continuing at step {start} of {steps}" if start else "new"),
        "model": _model(config, first),
        "trained": _count(program.state.parameters),
        "frozen": _count(program.frozen),
        "data": _data(plan),
        "left out": _left_out(plan),
        "validation": "" if held_out is None else _validation(config, held_out),
        "features": "" if features is None else features.describe(),
        "batch": _batch(config, plan),
        "steps": f"{steps:,}" + ("" if config.steps else f", {config.epochs} epoch(s)"),
        "mesh": _mesh(program),
        "memory": _memory(compiled),
        "checkpoints": f"every {config.checkpoint.every} steps, the last {config.checkpoint.keep} "
        f"are kept, in {checkpoints}",
    }
    width = max(len(name) for name in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items() if text)


def _model(config: TrainConfig, first: NativeCheckpoint) -> str:
    step = f" at step {first.step}" if isinstance(first, TrainedCheckpoint) else ""
    return (
        f"{config.model}{step}, {first.config.tokens_per_image} tokens an image; "
        f"stage {config.stage}, computed in {config.dtype}"
    )


def _count(parameters: Parameters) -> str:
    """Parameters by part of the model, and in what dtype."""
    parts: dict[str, int] = {}
    for path, leaf in parameters.items():
        part = "adapters" if is_adapter(path) else path.partition("/")[0]
        parts[part] = parts.get(part, 0) + math.prod(leaf.shape)
    dtypes = sorted({str(leaf.dtype) for leaf in parameters.values()})
    listed = ", ".join(f"{part} {count:,}" for part, count in sorted(parts.items()))
    return f"{sum(parts.values()):,} parameters in {', '.join(dtypes) or 'none'} ({listed})"


def _data(plan: DataPlan) -> str:
    return (
        f"{plan.examples_per_epoch:,} examples an epoch in {plan.rows:,} rows, "
        f"{100 * plan.fill:.1f} % full, {plan.tokens:,} tokens"
    )


def _validation(config: TrainConfig, held_out: TrainingData) -> str:
    section, plan = config.validation, held_out.plan()
    assert section is not None
    most = f", of them the first {section.batches}" if section.batches else ""
    return (
        f"every {section.every} steps, {plan.examples:,} held-out examples in {plan.steps:,} "
        f"batches{most}"
    )


def _left_out(plan: DataPlan) -> str:
    reasons = {
        "too long": plan.too_long,
        "too many images for a row": plan.too_many_images,
        "unfit for the template": plan.unfit,
        "masked by strict labels": plan.masked,
        "cut to the sequence length (kept)": plan.truncated,
    }
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)


def _batch(config: TrainConfig, plan: DataPlan) -> str:
    examples = config.data.batch_size * plan.examples_per_epoch / plan.rows
    micro = f" in {config.micro_batches} micro-batches" if config.micro_batches > 1 else ""
    return (
        f"{config.data.batch_size} rows of {config.data.sequence_length} tokens{micro}, "
        f"about {examples:,.0f} examples; up to {config.data.images_per_row} images a row"
    )


def _mesh(program: TrainProgram) -> str:
    mesh = program.layout.mesh
    kind = jax.devices()[0].device_kind
    if mesh is None:
        return f"none; one {kind} device"
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    hosts = jax.process_count()
    return f"{axes}: {mesh.size} {kind} devices on {hosts} host{'s' * (hosts > 1)}"


def _memory(compiled: Any) -> str:
    """Memory of each device, as the compiler planned it."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return ""
    held, temporary = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    available = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return (
        f"{(held + temporary) / _GIB:.2f} GiB a device, of which {held / _GIB:.2f} parameters, "
        f"optimizer and batch" + (f"; it has {available / _GIB:.2f}" if available else "")
    )
