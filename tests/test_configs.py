"""The shipped configs: each loads, divides its slices, and says of itself what `plan` said."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stf_jax.config import LlavaConfig
from stf_jax.parallel.sharding import check_divisible
from stf_jax.plan.asking import plan
from stf_jax.plan.chips import Topology
from stf_jax.plan.report import headline
from stf_jax.train.config import MeshConfig, TrainConfig
from stf_jax.train.distributed import BatchLayout

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_configs", ROOT / "scripts/plan_configs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_divides_its_slices(path: Path) -> None:
    config, topologies = TrainConfig.load(path), script().slices(path.read_text())
    if not topologies:
        return
    assert config.architecture is not None
    model = LlavaConfig.named(config.architecture)
    assert config.data.sequence_length <= model.text.max_positions
    for topology in topologies:
        sizes = (config.mesh or MeshConfig(fsdp=1)).sizes(Topology.parse(topology).chips)
        mesh: Any = SimpleNamespace(shape=sizes)
        check_divisible(model, mesh)
        BatchLayout(mesh=mesh, rows=config.data.batch_size, micro_batches=config.micro_batches)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipe(path: Path) -> None:
    """FACTS of the paper's table: rates, templates and pictures of each stage."""
    config = TrainConfig.load(path)
    if not script().slices(path.read_text()):
        return
    first = config.stage == "pretrain"
    assert (config.data.template, config.data.image_mode) == (
        ("plain", "crop") if first else ("v1", "pad")
    )
    rates = {"pretrain": 1e-3, "finetune": 2e-5, "lora": 1e-4}
    assert config.optimizer.learning_rate == rates[config.stage]
    assert config.data.sequence_length == 2048
    assert dataclasses.asdict(config.lora) == {"rank": 128, "alpha": 256.0, "dropout": 0.05}


def test_the_table_is_what_the_configs_say() -> None:
    text = (ROOT / "docs" / "tpu.md").read_text()
    assert script().table() in text


def test_a_headline_replaces_the_older_one_of_its_slice() -> None:
    module = script()
    text = "# For a test.\n# topologies: v5e:4x4 v4:2x2x2\n\nmodel: x\n"
    for line in ("v4:2x2x2: b", "v5e:4x4: a", "v4:2x2x2: c"):
        text = module.with_plan(text, line)
    assert text == (
        "# For a test.\n# topologies: v5e:4x4 v4:2x2x2\n# plan: v5e:4x4: a\n# plan: v4:2x2x2: c\n"
        "\nmodel: x\n"
    )


# Minutes of two cores: run by hand after a change to the step or to `plan`, and not by CI.
@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.skipif("STF_JAX_PLAN_7B" not in os.environ, reason="takes minutes: STF_JAX_PLAN_7B=1")
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)
def test_stage_2_of_7b_as_it_is_shipped() -> None:
    """Fits as it says, and no stacked parameter is ever whole on a chip."""
    path = ROOT / "configs" / "stf-7b-finetune.yaml"
    made = plan(str(path), topology="v5e:4x4")
    assert made.fits
    assert made.peak < 0.98 * made.limit
    # One layer's matrix or the head at a time, never the stack of a kind.
    text = LlavaConfig.llava_stf_7b().text
    assert made.largest_gather == text.padded_vocab_size * text.width
    assert headline(made) in script().planned(path.read_text())
