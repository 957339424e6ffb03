"""The loss of held-out examples, of a run as it continues and of a finished model."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from stf_jax.data.pipeline import TrainingData
from stf_jax.parallel.hosts import BatchLayout
from stf_jax.train.optimizer import Parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """The mean over all supervised tokens.

    Attributes:
        loss: in nats.
        tokens: supervised ones.
        examples: that hold them.
    """

    loss: float
    tokens: int
    examples: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4f} over {self.tokens:,} tokens of {self.examples:,} examples"


def sum_losses(
    loss: Callable[..., Any],
    parameters: tuple[Parameters, Parameters],
    data: TrainingData,
    *,
    layout: BatchLayout,
    batches: int | None = None,
    is_ended: Callable[[], bool] = lambda: False,
) -> HeldOutLoss | None:
    """The mean loss over the first epoch of some data, which holds every example once.

    Args:
        loss: compiled, from `make_loss`.
        parameters: trained and frozen.
        data: the held-out examples.
        layout: of their batches on the mesh.
        batches: the first so many only.
        is_ended: asked before each batch; the result is None where it gave True.

    Raises:
        DatasetError: too many of the examples cannot be read.
    """
    stop = min(data.steps_per_epoch, batches or data.steps_per_epoch)
    total, tokens = 0.0, 0
    steps = data.batches(stop_step=stop, rows=layout.local_rows)
    with contextlib.closing(steps):
        for step in steps:
            if is_ended():
                return None
            # Sums of a batch are float32, and those of all batches double.
            part, count = jax.device_get(loss(*parameters, layout.place(step.batch)))
            total, tokens = total + float(part), tokens + int(count)
    rows = data.planner.rows(0)
    examples = rows.offsets[min(stop * data.config.batch_size, len(rows))]
    return HeldOutLoss(loss=total / max(tokens, 1), tokens=tokens, examples=int(examples))
