"""The loss of held-out examples: what it is, and that it changes nothing."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from stf_jax.cli.main import main
from stf_jax.convert.stored_model import load_processors, open_any
from stf_jax.data import features
from stf_jax.data.config import DataConfig, DatasetSource
from stf_jax.data.features import ImageFeatures
from stf_jax.data.pipeline import TrainingData, TrainingStep
from stf_jax.models.llava import Llava
from stf_jax.train import loop
from stf_jax.train.config import TrainConfig
from stf_jax.train.loop import train
from tests.stf_jax.train.conftest import SEQUENCE_LENGTH, build_dataset

Config = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def held_out(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty examples, more than one batch of packed rows holds."""
    folder = tmp_path_factory.mktemp("held_out")
    return build_dataset(native, folder, examples=30, workers=0)


def records(config: TrainConfig) -> tuple[list[float], dict[int, float]]:
    """The losses of the steps, and those of the held-out examples by step."""
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return (
        [record["loss"] for record in found if "loss" in record],
        {record["step"]: record["validation_loss"] for record in found if "loss" not in record},
    )


def interrupt(
    monkeypatch: pytest.MonkeyPatch, held_out: Path, *, step: int, validation: int | None = None
) -> None:
    """Sends SIGTERM when a step's batch is made: of the training data, or of a validation.

    Validations are counted from 0 in each start.
    """
    begun = [0]

    class Interrupted(TrainingData):
        def batches(self, **arguments: Any) -> Iterator[TrainingStep]:
            held = self.config.datasets[0].path == str(held_out)
            number = begun[0] if held else None
            begun[0] += held
            for made in super().batches(**arguments):
                if made.step == step and number == validation:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield made

    monkeypatch.setattr(loop, "TrainingData", Interrupted)


def interrupt_features(monkeypatch: pytest.MonkeyPatch, *, part: int) -> None:
    """Sends SIGTERM when a part is begun."""
    write = ImageFeatures.write

    def begin(self: ImageFeatures, number: int) -> Any:
        if number == part:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, number)

    monkeypatch.setattr(ImageFeatures, "write", begin)


def mean_by_hand(path: Path | str, held_out: Path) -> float:
    """From the logits of one example at a time, in double precision."""
    processors, opened = load_processors(path), open_any(path)
    config = DataConfig(
        datasets=(DatasetSource(path=str(held_out)),),
        sequence_length=SEQUENCE_LENGTH,
        batch_size=1,
        packing="single",
        workers=0,
    )
    data = TrainingData(
        config,
        tokenizer=processors.tokenizer,
        image_processor=processors.image_processor,
        tokens_per_image=processors.tokens_per_image,
    )
    network = Llava.abstract(opened.config)
    nnx.update(network, opened.restore(nnx.to_pure_dict(nnx.state(network))))
    forward = nnx.jit(lambda network, batch: network(batch))
    total, count = 0.0, 0
    for step in data.batches(stop_step=data.steps_per_epoch):
        pixels = processors.image_processor.normalize(step.batch.pixels)
        batch = dataclasses.replace(step.batch, pixels=pixels)
        logits = np.asarray(forward(network, batch), np.float64)[0, :-1]
        labels = np.asarray(batch.labels)[0, 1:]
        at = np.flatnonzero(labels != -100)
        chosen = logits[at, labels[at]]
        total += (np.logaddexp.reduce(logits[at], axis=1) - chosen).sum()
        count += len(at)
    return total / count


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    """What `whole` has made: once in each process of the tests."""
    return {}


@pytest.fixture
def whole(
    config: Config, held_out: Path, runs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """A run that validates, what it says, and its losses."""
    if not runs:
        section = {"dataset": str(held_out), "every": 2}
        run = config(validation=section)
        assert train(run) == "finished"
        shown = capsys.readouterr().err
        losses, validation = records(run)
        runs.update(run=run, section=section, losses=losses, validation=validation, shown=shown)
    return runs


def test_the_steps_of_a_run_that_validates_are_the_same_to_the_bit(
    config: Config, whole: dict[str, Any]
) -> None:
    without = config()
    assert train(without) == "finished"
    assert "every 2 steps, 30 held-out examples in 2 batches" in whole["shown"]
    assert "step 4/5  validation loss " in whole["shown"]
    assert records(without) == (whole["losses"], {})
    assert [*whole["validation"]] == [0, 2, 4, 5]
    assert len({*whole["validation"].values()}) == 4


def test_it_is_the_mean_over_every_supervised_token_of_the_model_as_it_is(
    held_out: Path, native: Path, whole: dict[str, Any]
) -> None:
    validation = whole["validation"]
    np.testing.assert_allclose(validation[0], mean_by_hand(native, held_out), rtol=1e-5)
    np.testing.assert_allclose(validation[5], mean_by_hand(whole["run"].out, held_out), rtol=1e-5)


def test_a_finished_model_has_the_loss_that_its_run_ended_with(
    held_out: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    mesh = "data=2,fsdp=2,tensor=2"
    out = whole["run"].out
    assert main(["eval", "loss", out, "--data", str(held_out), "--mesh", mesh, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(found["loss"], whole["validation"][5], rtol=1e-5)
    assert found["examples"] == 30
    assert main(["eval", "loss", out, "--data", str(held_out), "--limit", "3"]) == 1
    assert "--limit means nothing for loss; leave it out" in capsys.readouterr().err


def test_it_is_the_same_to_the_bit_after_a_resumption_with_cached_features(
    config: Config,
    held_out: Path,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To the bit for a tower of this size; one with longer sums may round otherwise."""
    place = {"features": "cached", "features_directory": str(tmp_path / "features")}
    run = config(validation=whole["section"], data=place)
    monkeypatch.setattr(features, "_MULTIPLE", 4)
    monkeypatch.setattr(features, "_PART_BYTES", 1)
    with monkeypatch.context() as patched:
        interrupt_features(patched, part=1)
        assert train(run) == "interrupted"
    said = capsys.readouterr().err
    assert "cached, 18 images of 16,400 bytes, 0.00 GB (18 to compute, 0.00 GB) in " in said
    assert "interrupted while features were computed; start it again to continue" in said
    with monkeypatch.context() as patched:
        interrupt(patched, held_out, step=0, validation=1)
        assert train(run) == "interrupted"
    assert [*records(run)[1]] == [0]
    # The checkpoint is of the step before the validation, which is done again.
    assert (Path(run.out) / "checkpoints" / "2").is_dir()
    # The first part was whole, and nothing of the second was taken for it.
    assert "(14 to compute, 0.00 GB)" in capsys.readouterr().err
    # Now all are there. Then in the last validation, before the run counts as finished.
    with monkeypatch.context() as patched:
        interrupt(patched, held_out, step=0, validation=2)
        assert train(run) == "interrupted"
    assert [*records(run)[1]] == [0, 2, 4]
    assert train(run) == "finished"
    assert records(run) == (whole["losses"], whole["validation"])


@pytest.mark.slow
def test_dropout_follows_the_step_and_is_none_in_a_validation(
    config: Config, whole: dict[str, Any]
) -> None:
    """On any mesh a step drops the same inputs."""
    keys = {
        "stage": "lora",
        "lora": {"rank": 4, "dropout": 0.5},
        "micro_batches": 2,
        "steps": 3,
        "data": {"sequence_length": 192},
    }
    alone = config(**keys)
    spread = config(
        **keys,
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        validation=whole["section"] | {"every": 3},
    )
    without = config(**keys | {"lora": {"rank": 4, "dropout": 0.0}})
    for run in (alone, spread, without):
        assert train(run) == "finished"
    expected, plain = (records(run)[0] for run in (alone, without))
    losses, validation = records(spread)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # Adapters are zero to begin with.
    assert plain[0] == pytest.approx(expected[0], rel=1e-5)
    assert abs(plain[-1] - expected[-1]) > 1e-4
    np.testing.assert_allclose(validation[0], whole["validation"][0], rtol=1e-5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"every": 0}, "validation.every is 0; it must be at least 1"),
        ({"batches": 0}, "validation.batches is 0; give 1 or more, or null for all"),
        ({"dataset": "nowhere"}, "nowhere.*no such folder"),
    ],
)
def test_it_is_refused_before_the_model_is_read(
    config: Config, section: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "make_program", None)
    with pytest.raises(ValueError, match=message):
        train(config(validation={"dataset": "here"} | section))
