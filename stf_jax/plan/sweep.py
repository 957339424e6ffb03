"""Plans of a config's neighbors: meshes, micro-batches, remat policies; slots, cache dtypes."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, get_args

from stf_jax.models.layers import Remat
from stf_jax.parallel.mesh import MeshConfig
from stf_jax.plan.phases import InferencePlan
from stf_jax.plan.request import Plan
from stf_jax.train.config import TrainConfig

# Overrides to the config, and what the compiler says of it; None where they do not go together.
Tried = tuple[tuple[str, ...], Plan | None]
# A config's plan with these overrides: a `Plan`, or an `InferencePlan` for inference.
Ask = Callable[[tuple[str, ...]], Any]


def sweep(config: TrainConfig, *, chips: int, ask: Ask) -> Iterator[Tried]:
    """Plans every neighbor of a config, one after the other.

    Meshes with `tensor` 1, 2 and 4, the batch in as few micro-batches as the rows allow and in
    twice as many, and each remat policy.

    Args:
        config: which is varied.
        chips: of the slice.
        ask: plans the config with overrides; takes minutes at 7B.
    """
    for tensor, parts, remat in itertools.product((1, 2, 4), (1, 2), get_args(Remat)):
        rows = config.data.batch_size
        if chips % tensor or rows % (parts * chips // tensor):
            continue
        mesh = MeshConfig(data=1, fsdp=chips // tensor, tensor=tensor)
        axes = dataclasses.asdict(mesh).items()
        overrides = (
            *(f"--mesh.{name}={size}" for name, size in axes),
            f"--micro_batches={parts}",
            f"--remat={remat}",
        )
        try:
            yield overrides, ask(overrides)
        except ValueError:
            yield overrides, None


def best(tried: list[Tried], *, count: int = 5) -> list[tuple[tuple[str, ...], Plan]]:
    """The plans that fit, the fastest first."""
    fit = [(overrides, plan) for overrides, plan in tried if plan is not None and plan.fits]
    return sorted(fit, key=lambda attempt: attempt[1].step_seconds)[:count]


def training_changes(config: TrainConfig, *, chips: int, ask: Ask) -> list[tuple[str, ...]]:
    """The first of the usual changes with which a step fits; asks the compiler about each.

    Empty if none of them does: then parameters and optimizer are too large for the slice.
    """
    changes: list[tuple[str, ...]] = []
    if config.remat != "full":
        changes.append(("--remat=full",))
    parts = config.micro_batches * 2
    while config.data.batch_size % (parts * chips) == 0:
        changes.append(("--remat=full", f"--micro_batches={parts}"))
        parts *= 2
    return next(([change] for change in changes if ask(change).fits), [])


def inference_changes(plan: InferencePlan, *, ask: Ask) -> list[tuple[str, ...]]:
    """Of the usual changes to an engine that does not fit, those with which it does.

    The most slots, halved and halved again, and all of them with an int8 cache. The compiler is
    asked about those only that would fit if all but the cache stayed as it is.
    """
    fit: list[tuple[str, ...]] = []
    part = plan.cache + plan.prefixes
    slots = plan.slots // 2
    while slots:
        if plan.needed - part * (1 - slots / plan.slots) <= plan.limit:
            change = (f"--slots={slots}",)
            if ask(change).fits:
                fit.append(change)
                break
        slots //= 2
    small = ("--cache_dtype=int8",)
    if plan.cache_dtype != "int8" and plan.needed - part / 2 <= plan.limit and ask(small).fits:
        fit.append(small)
    return fit
