"""Adapters over quantized weights: trained, continued, answered with, handed out."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import stf_jax
from stf_jax.convert import export_checkpoint
from stf_jax.models.marks import Marks
from stf_jax.store.run import TrainedCheckpoint, open_model
from stf_jax.train.config import TrainConfig
from stf_jax.train.loop import TrainingError, train
from stf_jax.util.errors import CheckpointError

Config = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def quantized(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's LLaVA-STF in 4 bits."""
    path = tmp_path_factory.mktemp("quantized") / "int4"
    export_checkpoint(native, path, layout="native", quantize="int4-8")
    return path


def logits(path: epath.PathLike) -> np.ndarray:
    """Of the language model as it is loaded."""
    text = stf_jax.load(path).network.text
    ids = jnp.arange(3, 9, dtype=jnp.int32)[None]
    marks = Marks.text(ids - 3, jnp.ones_like(ids))
    return np.asarray(text.logits(text(text.embed(ids), marks=marks)))


def test_adapters_over_integers(config: Config, quantized: Path, tmp_path: Path) -> None:
    keys = {
        "model": str(quantized),
        "stage": "lora",
        "lora": {"rank": 4, "alpha": 8},
        "optimizer": {"learning_rate": 0.01},
        "checkpoint": {"every": 1},
        "steps": 2,
        "data": {"batch_size": 4, "images_per_row": 1},
    }
    whole, halves = config(**keys), config(**keys)
    assert train(whole) == "finished"
    # As if it had been cut after a step, and continued: the same to the bit.
    shutil.copytree(whole.out, halves.out)
    shutil.rmtree(Path(halves.out, "checkpoints", "2"))
    assert train(halves) == "finished"
    trained, again = open_model(whole.out), open_model(halves.out)
    assert isinstance(trained, TrainedCheckpoint)
    assert isinstance(again, TrainedCheckpoint)
    assert any("/lora/" in name for name in trained.trained)
    for name in trained.trained:
        assert trained.read_trained(name).tobytes() == again.read_trained(name).tobytes(), name
    assert trained.read_trained("text/layers/mlp/up/lora/b").any()

    # It answers with the adapters beside the integers as with both in plain numbers.
    plain = tmp_path / "plain"
    export_checkpoint(whole.out, plain, layout="native", dequantize=True)
    found, expected = (logits(path) for path in (whole.out, plain))
    np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max(), rtol=0)

    with pytest.raises(CheckpointError, match=r"cannot take in the adapters .* --layout lora"):
        export_checkpoint(whole.out, tmp_path / "merged", layout="native")
    with pytest.raises(TrainingError, match=r"LoRA run over int4-8 weights.* --dequantize"):
        train(config(**keys | {"model": whole.out}))


def test_what_would_change_integers_is_refused(config: Config, quantized: Path) -> None:
    with pytest.raises(TrainingError, match=r"has int4-8 weights, .* choose --stage=lora"):
        train(config(model=str(quantized)))
