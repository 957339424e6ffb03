"""Training against the reference's own curves: 20 steps of each stage, every loss and norm."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from stf_jax.data.batch import Batch
from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import BATCH_AXES, ShardingRules, make_mesh
from stf_jax.store.arrays import flatten
from stf_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule, split_trained
from stf_jax.train.step import init_state, make_step
from tests.switch import ALL

# The learning rates of the tests that compare one way of training with another.
PEAK = {"pretrain": 1e-3, "finetune": 2e-4}
MESHES = {
    "one device": None,
    "fsdp 8": {"fsdp": 8},
    "fsdp 2 x tensor 4": {"fsdp": 2, "tensor": 4},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def curves(reference: Path) -> dict:
    return json.loads((reference / "training.json").read_text())


def run(
    source,
    weights,
    batch: Batch,
    stage: str,
    *,
    steps: int = 20,
    peak: float | None = None,
    total: int = 20,
    on_mesh: bool = False,
    **options,
):
    """(losses, gradient norms, last state) of the first steps of a run of `total`."""
    rate = PEAK[stage] if peak is None else peak
    optimizer = make_optimizer(OptimizerConfig(learning_rate=rate), steps=total)
    rules = ShardingRules.default() if on_mesh else ShardingRules.none()
    model = Llava.abstract(source.config, rules=rules)
    like = flatten(nnx.to_pure_dict(nnx.state(model)))
    placed = {path: jax.device_put(weights[path], leaf.sharding) for path, leaf in like.items()}
    trained, frozen = split_trained(placed, stage)
    if on_mesh:
        batch = jax.device_put(batch, PartitionSpec(None, BATCH_AXES))
    state, step = init_state(trained, optimizer), make_step(model, optimizer, **options)
    losses, norms = [], []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    return losses, norms, state


@pytest.mark.parametrize(
    ("stage", "mesh"),
    [
        pytest.param(stage, mesh, marks=pytest.mark.portable if stage == "finetune" else ())
        for stage in ("pretrain", "finetune")
        for mesh in MESHES
        # `test_loop` has whole runs on meshes, and `test_sharding` gradients on all of them.
        if ALL or mesh in ("one device", "data 2 x fsdp 2 x tensor 2")
    ],
)
def test_curves_of_the_reference(reference_batch, source, weights, curves, stage: str, mesh: str):
    axes = MESHES[mesh]
    expected = curves[stage]
    length, peak = len(expected["loss"]), max(expected["learning_rate"])
    batch = reference_batch(multiple=1 if axes is None else 8)
    batch = jax.tree.map(lambda leaf: leaf[None], batch)
    run_all = functools.partial(
        run, source, weights, batch, stage, steps=length, total=length, peak=peak
    )
    if axes is None:
        losses, norms, state = run_all()
    else:
        with jax.set_mesh(make_mesh(**axes)):
            losses, norms, state = run_all(on_mesh=True)
            for path, moment in state.optimizer[1].mu.items():
                assert moment.sharding == state.parameters[path].sharding, path
    np.testing.assert_allclose(losses, expected["loss"], rtol=1e-4)
    np.testing.assert_allclose(norms, expected["grad_norm"], rtol=1e-4)
    assert sum(leaf.size for leaf in state.parameters.values()) == expected["trainable"]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_learning_rates_of_the_reference(curves, stage: str):
    expected = curves[stage]["learning_rate"]
    rates = schedule(max(expected), steps=len(expected), warmup_ratio=0.03)
    actual = [float(rates(step)) for step in range(len(expected))]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 0.99])
def test_the_shortest_runs_train_at_a_rate_above_zero(warmup_ratio: float) -> None:
    """Transformers' schedule, but for a single step, all of which would be warm-up."""
    for steps in (1, 2, 3, 7):
        rates = schedule(1e-3, steps=steps, warmup_ratio=warmup_ratio)
        found = [float(rates(step)) for step in range(steps)]
        warmup = math.ceil(warmup_ratio * steps)
        expected = [
            step / warmup
            if step < warmup
            else (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
            for step in range(steps)
        ]
        assert max(found) > 0
        np.testing.assert_allclose(
            found, [1e-3] if steps == 1 else np.multiply(1e-3, expected), rtol=1e-5
        )


def test_accumulation_changes_nothing(reference_batch, source, weights):
    """Two supervised rows apiece or all at once: the mean over the tokens of the whole batch."""
    batch = reference_batch()
    whole = jax.tree.map(lambda leaf: leaf[None], batch)
    four = jax.tree.map(lambda leaf: leaf[:, None], batch)
    once = run(source, weights, whole, "finetune", steps=3)
    added = run(source, weights, four, "finetune", steps=3)
    np.testing.assert_allclose(added[0], once[0], rtol=1e-5)
    np.testing.assert_allclose(added[1], once[1], rtol=1e-5)


def test_mean_of_micro_batches(reference_batch, source, weights):
    """Each micro-batch counts alike; one without a supervised token counts 0 and spoils nothing."""
    batch = jax.tree.map(lambda leaf: leaf[2:], reference_batch(empty=1))
    alone = [
        run(
            source,
            weights,
            jax.tree.map(lambda leaf, row=row: leaf[row : row + 1][None], batch),
            "pretrain",
            steps=1,
        )[0][0]
        for row in (0, 1)
    ]
    micro = jax.tree.map(lambda leaf: leaf[:, None], batch)
    (loss,), (norm,), _ = run(
        source, weights, micro, "pretrain", steps=1, loss_normalization="micro_batches"
    )
    np.testing.assert_allclose(loss, sum(alone) / 3, rtol=1e-5)
    assert np.isfinite(norm)
    assert abs(alone[0] - alone[1]) > 1e-3


@pytest.fixture(scope="module")
def stored(reference_batch, source, weights):
    """Three steps with every activation stored."""
    batch = jax.tree.map(lambda leaf: leaf[None], reference_batch())
    return run(source, weights, batch, "finetune", steps=3)


@pytest.mark.parametrize("remat", ["attention", "dots", "full"])
def test_remat_changes_nothing(reference_batch, source, weights, stored, remat: str):
    batch = jax.tree.map(lambda leaf: leaf[None], reference_batch())
    again = run(source, weights, batch, "finetune", steps=3, remat=remat)
    np.testing.assert_allclose(again[0], stored[0], rtol=1e-6)
    np.testing.assert_allclose(again[1], stored[1], rtol=1e-5)


def test_unknown_remat_is_an_error(reference_batch, source, weights):
    batch = jax.tree.map(lambda leaf: leaf[None], reference_batch())
    # The checker of types, where there is one, is asked before.
    with pytest.raises(
        (ValueError, TypeError),
        match=r"remat is 'fulll'; choose one of none, dots, attention, full|remat: Literal",
    ):
        run(source, weights, batch, "finetune", steps=1, remat="fulll")


def test_two_learning_rates(reference_batch, source, weights):
    """Adam's first step is as long as the learning rate of each group."""
    config = OptimizerConfig(learning_rate=1e-4, projector_learning_rate=3e-4, warmup_ratio=0.0)
    optimizer = make_optimizer(dataclasses.replace(config, clip_norm=None), steps=100)
    parameters = {"text/norm/scale": jnp.ones(3), "connector/projector/linear_1/bias": jnp.ones(3)}
    gradient = jax.tree.map(jnp.ones_like, parameters)
    updates, _ = optimizer.update(gradient, optimizer.init(parameters), parameters)
    np.testing.assert_allclose(updates["text/norm/scale"], -1e-4, rtol=1e-5)
    np.testing.assert_allclose(updates["connector/projector/linear_1/bias"], -3e-4, rtol=1e-5)


def test_weight_decay_spares_biases_and_norms():
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5, warmup_ratio=0.0)
    optimizer = make_optimizer(config, steps=100)
    names = (
        "text/norm/scale",
        "connector/projector/linear_1/bias",
        "text/head/kernel",
        "text/embedding",
    )
    parameters = {name: jnp.ones(3) for name in names}
    still = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = optimizer.update(still, optimizer.init(parameters), parameters)
    for name in names:
        decayed = -1e-2 * 0.5 if name.endswith(("kernel", "embedding")) else 0.0
        np.testing.assert_allclose(updates[name], decayed, atol=1e-9)
