"""Every system learns, and what a run draws at random follows from the number of the step.

Gradient descent is compiled in half of AdamW's time, which the reference's curves compare.
`STF_JAX_STEPS=50` takes as many steps in each stage; 8 are enough to see the loss fall.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stf_jax.models.llava import Llava
from stf_jax.store.arrays import flatten
from stf_jax.systems import SYSTEMS
from stf_jax.train.optimizer import split_trained
from stf_jax.train.step import TrainState, init_state, make_step
from tests.stf_jax.systems.conftest import batch_of, build, config_of

STEPS = int(os.environ.get("STF_JAX_STEPS", "8"))
RATE = 0.1
STAGES = ("pretrain", "finetune") if "STF_JAX_STEPS" in os.environ else ("finetune",)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_loss_falls_and_a_run_continues_to_the_bit(name: str, stage: Any) -> None:
    config = config_of(name)
    parameters = flatten(nnx.to_pure_dict(nnx.state(build(config, seed=3), nnx.Param)))
    trained, frozen = split_trained(parameters, stage)
    # With a moment, which has to be there again, too.
    optimizer = optax.sgd(RATE, momentum=0.5)
    step = make_step(Llava.abstract(config, training=True), optimizer)
    # One micro-batch.
    batch = jax.tree.map(lambda array: array[None], batch_of(config))
    assert int((np.asarray(batch.labels) >= 0).sum()) > 0

    def run(state: TrainState, steps: int) -> tuple[TrainState, list[float]]:
        losses = []
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics.loss))
        return state, losses

    start = init_state(jax.tree.map(jnp.copy, trained), optimizer)
    middle, before = run(start, STEPS // 2)
    saved = jax.device_get(middle)
    end, after = run(middle, STEPS - STEPS // 2)
    assert np.mean(after[-2:]) < np.mean(before[:2])
    again, repeated = run(jax.tree.map(jnp.asarray, saved), STEPS - STEPS // 2)
    assert repeated == after
    jax.tree.map(np.testing.assert_array_equal, again.parameters, end.parameters)
