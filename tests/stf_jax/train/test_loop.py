"""Whole runs through `train`: the same losses however they are laid out, and when interrupted."""

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from stf_jax.data.pipeline import TrainingData, TrainingStep
from stf_jax.store.checkpoint import open_native
from stf_jax.store.run import open_model
from stf_jax.train import loop
from stf_jax.train.config import TrainConfig
from stf_jax.train.loop import TrainingError, train
from stf_jax.train.program import TrainProgram
from tests.switch import ALL

Config = Callable[..., TrainConfig]

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
# The run that is preempted below has two meshes more, and `test_step` adds up four parts.
LAYOUTS: list[dict[str, Any]] = [{"micro_batches": 2, "mesh": MESH}]
if ALL:
    LAYOUTS += [{"mesh": mesh} for mesh in (MESH, {"fsdp": 8}, {"fsdp": 2, "tensor": 4})]
    LAYOUTS += [{"micro_batches": 4}]


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(config: TrainConfig) -> list[float]:
    assert train(config) == "finished"
    return [record["loss"] for record in metrics(config)]


class Spy(TrainingData):
    """Notes the ids of every step that is taken, and may do something before one."""

    seen: list[tuple[int, tuple[tuple[str, ...], ...]]]
    before: dict[int, Callable[[], object]]

    def batches(self, **arguments: Any) -> Iterator[TrainingStep]:
        for step in super().batches(**arguments):
            self.before.get(step.step, lambda: None)()
            self.seen.append((step.step, step.example_ids))
            yield step


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> type[Spy]:
    Spy.seen, Spy.before = [], {}
    monkeypatch.setattr(loop, "TrainingData", Spy)
    return Spy


@dataclasses.dataclass
class Alone:
    """The run on one device, without a mesh: filled by the first test that needs it."""

    losses: list[float] = dataclasses.field(default_factory=list)
    seen: list[tuple[int, tuple[tuple[str, ...], ...]]] = dataclasses.field(default_factory=list)


@pytest.fixture(scope="module")
def shared() -> Alone:
    return Alone()


@pytest.fixture
def alone(config: Config, shared: Alone, spy: type[Spy]) -> Alone:
    if not shared.losses:
        shared.losses += losses(config())
        shared.seen += spy.seen
        spy.seen.clear()
        assert len(shared.losses) == 5
        assert shared.losses[-1] < 0.9 * shared.losses[0]
    return shared


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_losses_however_a_batch_is_laid_out(
    config: Config, alone: Alone, layout: dict[str, Any]
) -> None:
    np.testing.assert_allclose(losses(config(**layout)), alone.losses, rtol=1e-5)


def test_same_losses_packed_and_unpacked(config: Config) -> None:
    """All 24 examples in each global batch: 10 packed rows, or 24 rows of their own."""
    packed = config(steps=2, data={"batch_size": 10})
    single = config(steps=2, data={"batch_size": 24, "packing": "single"})
    np.testing.assert_allclose(losses(single), losses(packed), rtol=1e-5)
    fills = [metrics(run)[0]["fill"] for run in (packed, single)]
    assert fills[0] == pytest.approx(2.4 * fills[1])
    counts = [[record["supervised_tokens"] for record in metrics(run)] for run in (packed, single)]
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.portable
def test_preempted_and_resumed_on_another_mesh(
    config: Config, alone: Alone, spy: type[Spy], capsys: pytest.CaptureFixture[str]
) -> None:
    spy.before[1] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    first = config(mesh={"fsdp": 8})
    assert train(first) == "interrupted"
    assert "interrupted after step 2; start it again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert [record["step"] for record in metrics(first)] == [0, 1]
    assert {child.name for child in Path(first.out, "checkpoints").glob("[0-9]*")} == {"0", "2"}
    assert [step for step, _ in spy.seen] == [0, 1]
    spy.before.clear()
    again = config(out=first.out, mesh={"data": 4, "tensor": 2})
    np.testing.assert_allclose(losses(again), alone.losses, rtol=1e-5)
    assert "continuing at step 2 of 5" in capsys.readouterr().err
    assert spy.seen == alone.seen
    assert [step for step, _ in spy.seen] == list(range(5))


def test_an_epoch_has_every_example_once(config: Config, spy: type[Spy]) -> None:
    losses(config(steps=None, epochs=2, data={"batch_size": 5}))
    ids = [name for _, rows in spy.seen for row in rows for name in row]
    half = len(ids) // 2
    assert len(ids) == 48
    assert len({*ids[:half]}) == len({*ids[half:]}) == 24
    assert ids[:half] != ids[half:]


def test_second_stage_on_the_first(config: Config, native: Path, tmp_path: Path) -> None:
    """The frozen model is written in neither run, and both are models."""
    first = config(stage="pretrain", steps=2)
    train(first)
    second = config(model=first.out, steps=2)
    train(second)
    for run in (first, second):
        written = {
            path.parent.name if path.name == ".zarray" else path.name
            for path in Path(run.out, "checkpoints").rglob("*")
        }
        assert not any("vision" in name for name in written)
    models = [open_model(path) for path in (native, first.out, second.out)]
    names = models[0].shapes
    for name, *arrays in zip(names, *(model.read_each(names) for model in models), strict=True):
        changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(arrays)]
        part = name.partition("/")[0]
        assert changed == [part == "connector", part != "vision"], name


def test_adapters_are_merged(config: Config, native: Path, spy: type[Spy]) -> None:
    """Halfway, the run as a model has the loss that the run itself has next."""
    whole = {"data": {"batch_size": 10}, "optimizer": {"learning_rate": 1e-2}}
    run = config(stage="lora", lora={"rank": 4, "alpha": 8.0, "dropout": 0.0}, **whole)
    spy.before[2] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert train(run) == "interrupted"
    spy.before.clear()
    assert set(open_model(run.out).shapes) == set(open_native(native).shapes)
    (merged,) = losses(config(model=run.out, steps=1, **whole))
    actual = losses(run)
    np.testing.assert_allclose(merged, actual[3], rtol=1e-5)
    assert abs(actual[3] - actual[2]) > 1e-3


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_loss_that_is_not_finite(
    config: Config,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compile_step = TrainProgram.compile

    def spoiled(program: TrainProgram) -> Any:
        step, numbers = compile_step(program), itertools.count()

        def run(state: Any, frozen: dict[str, jax.Array], batch: Any) -> Any:
            if next(numbers) == 3:
                frozen = {path: leaf * np.nan for path, leaf in frozen.items()}
            return step(state, frozen, batch)

        run.memory_analysis = step.memory_analysis  # type: ignore[attr-defined]
        return run

    monkeypatch.setattr(TrainProgram, "compile", spoiled)
    run = config(nonfinite=mode, checkpoint={"every": 2, "keep": 5})
    if mode == "stop":
        with pytest.raises(TrainingError, match=r"step 3: the loss is nan .*example-\d+"):
            train(run)
        assert [record["loss"] is None for record in metrics(run)] == [False] * 3 + [True]
        names = {child.name for child in Path(run.out, "checkpoints").glob("[0-9]*")}
        assert names == {"0", "2"}
    else:
        assert train(run) == "finished"
        assert [record["loss"] is None for record in metrics(run)] == [False] * 3 + [True, False]
        assert "skipped" in capsys.readouterr().err
        model = open_model(run.out)
        assert all(np.isfinite(array).all() for array in model.read_each(model.shapes))


def test_bfloat16_goes_down_too_and_a_profile_is_taken(config: Config) -> None:
    run = config(dtype="bfloat16", remat="full", profile=[1, 2])
    actual = losses(run)
    assert actual[-1] < 0.9 * actual[0]
    assert list(Path(run.out, "tensorboard").rglob("*.xplane.pb"))
    assert list(Path(run.out, "tensorboard").glob("events.out.tfevents.*"))


def test_devices_are_those_of_the_mesh(config: Config) -> None:
    assert jax.device_count() == 8
    with pytest.raises(ValueError, match=r"mesh data 1 x fsdp 3 x tensor 1 does not fit 8 devices"):
        train(config(mesh={"fsdp": 3}))
