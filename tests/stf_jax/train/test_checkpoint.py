"""A run that stops and continues is the run that never stopped, on whatever mesh it continues."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from stf_jax.models.llava import Llava
from stf_jax.parallel.sharding import BATCH_AXES, ShardingRules, make_mesh
from stf_jax.store.arrays import flatten
from stf_jax.train.checkpoint import Checkpoints
from stf_jax.train.optimizer import OptimizerConfig, make_optimizer, split_trained
from stf_jax.train.step import TrainState, init_state, make_step
from stf_jax.util.errors import CheckpointError

CONFIG = {"optimizer": {"learning_rate": 1e-3, "taps": (1, 2)}, "training": {"log_every": 1}}


class Run:
    """Stage 1 of the reference's model on its own batch."""

    def __init__(self, source, weights, batch, *, on_mesh: bool = False):
        rules = ShardingRules.default() if on_mesh else ShardingRules.none()
        model = Llava.abstract(source.config, rules=rules)
        like = flatten(nnx.to_pure_dict(nnx.state(model)))
        placed = {path: jax.device_put(weights[path], leaf.sharding) for path, leaf in like.items()}
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), steps=20)
        trained, self._frozen = split_trained(placed, "pretrain")
        batch = jax.tree.map(lambda leaf: leaf[None], batch)
        self._batch = jax.device_put(batch, PartitionSpec(None, BATCH_AXES)) if on_mesh else batch
        self.state = init_state(trained, optimizer)
        self._step = make_step(model, optimizer)

    def go(self, steps: int, checkpoints: Checkpoints | None = None):
        losses = []
        for _ in range(steps):
            if checkpoints is not None and checkpoints.due(int(self.state.step)):
                checkpoints.save(int(self.state.step), self.state)
            self.state, metrics = self._step(self.state, self._frozen, self._batch)
            losses.append(float(metrics.loss))
        return losses


def same(left: TrainState, right: TrainState) -> None:
    for first, second in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.fixture
def run(source, weights, reference_batch) -> Callable[..., Run]:
    return lambda **options: Run(source, weights, reference_batch(multiple=8), **options)


def test_resumed_is_bit_identical(run: Callable[..., Run], tmp_path: Path):
    alone = run()
    losses = alone.go(6)
    first = run()
    with Checkpoints(tmp_path / "run", config=CONFIG, every=2, keep=2) as checkpoints:
        assert checkpoints.latest is None
        # Each state is donated to the next step while it is being written.
        assert first.go(5, checkpoints) == losses[:5]
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()) == [
        "2",
        "4",
    ]
    second = run()
    with Checkpoints(tmp_path / "run", config=CONFIG, every=2, keep=2) as checkpoints:
        assert checkpoints.latest == 4
        second.state = checkpoints.restore(second.state, report=pytest.fail)
        assert int(second.state.step) == 4
        assert second.go(2) == losses[4:]
    same(second.state, alone.state)


def test_restored_on_another_mesh(run: Callable[..., Run], tmp_path: Path):
    with jax.set_mesh(make_mesh(fsdp=8)):
        first = run(on_mesh=True)
        first.go(2)
        with Checkpoints(tmp_path / "run", config=CONFIG, every=100, keep=1) as checkpoints:
            checkpoints.save(2, first.state)
        expected = jax.device_get(first.state)
        losses = first.go(2)
    for axes in ({"fsdp": 2, "tensor": 4}, None):
        with Checkpoints(tmp_path / "run", config=CONFIG, every=100, keep=1) as checkpoints:
            if axes is None:
                other = run()
                other.state = checkpoints.restore(other.state, report=pytest.fail)
                same(other.state, expected)
                actual = other.go(2)
            else:
                with jax.set_mesh(make_mesh(**axes)):
                    other = run(on_mesh=True)
                    before = other.state.parameters["connector/projector/linear_1/kernel"].sharding
                    other.state = checkpoints.restore(other.state, report=pytest.fail)
                    kernel = other.state.parameters["connector/projector/linear_1/kernel"]
                    assert kernel.sharding == before
                    assert kernel.addressable_shards[0].data.shape == (64, 128)
                    same(other.state, expected)
                    actual = other.go(2)
        np.testing.assert_allclose(actual, losses, rtol=1e-5)


def test_another_config_is_refused_with_every_difference(run: Callable[..., Run], tmp_path: Path):
    with Checkpoints(tmp_path / "run", config=CONFIG, every=1, keep=1) as checkpoints:
        checkpoints.save(0, run().state)
    other = {
        "optimizer": {"learning_rate": 2e-3, "taps": (1, 2), "clip_norm": 1.0},
        "training": {"log_every": 5},
    }
    free = ("training",)
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path / "run", config=other, every=1, keep=1, free=free)
    assert str(caught.value).splitlines()[1:] == [
        "  optimizer.clip_norm: None there, 1.0 here",
        "  optimizer.learning_rate: 0.001 there, 0.002 here",
    ]
    # What an older release did not know was as it is by default.
    newer = {**CONFIG, "data": {"features": "computed"}}
    with Checkpoints(
        tmp_path / "run", config=newer, every=1, keep=1, free=free, defaults=newer
    ) as checkpoints:
        assert checkpoints.latest == 0
    other = CONFIG | {"training": {"log_every": 5}}
    with Checkpoints(tmp_path / "run", config=other, every=1, keep=1, free=free) as checkpoints:
        assert checkpoints.latest == 0


def test_an_unfinished_checkpoint_is_none(run: Callable[..., Run], tmp_path: Path):
    with Checkpoints(tmp_path / "run", config=CONFIG, every=1, keep=3) as checkpoints:
        checkpoints.save(0, run().state)
    (complete,) = (path for path in (tmp_path / "run").iterdir() if path.name == "0")
    # What a kill leaves: a directory under its temporary name.
    complete.rename(complete.with_name("1.orbax-checkpoint-tmp"))
    with Checkpoints(tmp_path / "run", config=CONFIG, every=1, keep=3) as checkpoints:
        assert checkpoints.latest is None
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            checkpoints.restore(run().state, report=pytest.fail)
