"""The shipped configs: each loads, divides its slices, and says of itself what `plan` said."""

import dataclasses
import importlib.util
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from etils.epath.testing import mock_epath
from jax.sharding import AbstractMesh

from stf_jax.infer.config import InferenceConfig, is_inference
from stf_jax.parallel.hosts import BatchLayout
from stf_jax.parallel.mesh import MeshConfig
from stf_jax.plan.chips import Topology
from stf_jax.plan.client import plan
from stf_jax.plan.request import Plan
from stf_jax.systems import named_config
from stf_jax.systems.mesh import check_divisible
from stf_jax.train.config import TrainConfig

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TRAINING = [path for path in CONFIGS if not is_inference(path)]
INFERENCE = [path for path in CONFIGS if is_inference(path)]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_configs", ROOT / "scripts/plan_configs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_run_that_is_promised() -> None:
    """Slices of 16, 8, 4 and 8 chips for 7B, of 32 and 16 for 13B, and what answers."""
    slices_of = {path.stem: set(script().slices(path.read_text())) for path in CONFIGS}
    for stage in ("pretrain", "finetune"):
        assert slices_of[f"stf-7b-{stage}"] >= {"v5e:4x4", "v4:2x2x2", "v5p:2x2x1", "v6e:2x4"}
        assert slices_of[f"stf-13b-{stage}"] >= {"v5e:4x8", "v4:2x2x4"}
    assert "v5e:2x4" in slices_of["stf-7b-lora"]
    assert {"v6e:1x1", "v5e:2x2"} <= slices_of["stf-7b-inference"]


def test_one_for_the_other() -> None:
    """In a line, rather than with the nearest key to each."""
    with pytest.raises(ValueError, match=r"^\S+: stage inference is for 'plan' and .*, not a run$"):
        TrainConfig.load(ROOT / "configs/stf-7b-inference.yaml")
    with pytest.raises(
        ValueError, match=r"^\S+: stage finetune is for training; for answers see c"
    ):
        InferenceConfig.load(ROOT / "configs/tiny.yaml")


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_weights_and_data_in_the_clone_are_ignored(path: Path) -> None:
    """What git does not ignore is sent to every worker by `launch`."""
    config = TrainConfig.load(path)
    places = [config.model, config.out, *(dataset.path for dataset in config.data.datasets)]
    names = [f"{place}/file" for place in places]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == names


@pytest.mark.parametrize("path", INFERENCE, ids=lambda path: path.stem)
def test_it_divides_its_chips(path: Path) -> None:
    config, topologies = InferenceConfig.load(path), script().slices(path.read_text())
    assert topologies
    assert path.stem.endswith("-inference")
    assert config.architecture is not None
    model = named_config(config.architecture)
    for topology in topologies:
        sizes = (config.mesh or MeshConfig(fsdp=1)).sizes(Topology.parse(topology).chips)
        mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        check_divisible(model, mesh)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_it_divides_its_slices(path: Path) -> None:
    config, topologies = TrainConfig.load(path), script().slices(path.read_text())
    if not topologies:
        return
    assert config.architecture is not None
    model = named_config(config.architecture)
    assert config.data.sequence_length <= model.text.max_positions
    for topology in topologies:
        sizes = (config.mesh or MeshConfig(fsdp=1)).sizes(Topology.parse(topology).chips)
        mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        check_divisible(model, mesh)
        BatchLayout(mesh=mesh, rows=config.data.batch_size, micro_batches=config.micro_batches)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_no_more_images_than_a_row_can_hold(path: Path) -> None:
    """Each one beyond is blank in every row, and encoded."""
    config = TrainConfig.load(path)
    if config.architecture is None:
        return
    model, data = named_config(config.architecture), config.data
    layout = model.clip_layout(data.clip_frames) if data.clip_frames else None
    each, tokens = (1, model.tokens_per_image) if layout is None else (layout.frames, layout.tokens)
    assert data.images_per_row // each * tokens <= data.sequence_length


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_the_recipe(path: Path) -> None:
    """LLaVA-1.5's rates, templates and images of each stage, and what a system's paper changes."""
    config = TrainConfig.load(path)
    if not script().slices(path.read_text()):
        return
    first = config.stage == "pretrain"
    # QueCC reads the question, which a caption's template has not.
    plain = first and not path.stem.startswith("quecc")
    assert config.data.template == ("plain" if plain else "v1")
    assert config.data.image_mode == ("crop" if first else "pad")
    rates = {"pretrain": 1e-3, "finetune": 2e-5, "lora": 1e-4}
    own = {"prumerge-7b-lora": 2e-4, "proxyv-7b-pretrain": 3e-4, "proxyv-7b-finetune": 4e-5}
    own |= {"vqtoken-7b-finetune": 1e-5}
    assert config.optimizer.learning_rate == own.get(path.stem, rates[config.stage])
    assert config.data.sequence_length == 2048
    assert dataclasses.asdict(config.lora) == {"rank": 128, "alpha": 256.0, "dropout": 0.05}


@pytest.mark.parametrize("name", ["plans", "inference plans"])
def test_the_tables_are_what_the_configs_say(name: str) -> None:
    text = (ROOT / "docs" / "tpu.md").read_text()
    assert f"<!-- {name} -->\n{script().table(name)}<!-- end of {name} -->" in text


HEAD = "# For a test.\n# topologies: v5e:4x4 v4:2x2x2\n"


def test_a_headline_replaces_the_older_one_of_its_slice() -> None:
    module, text = script(), f"{HEAD}\nmodel: x\n"
    for line in ("v4:2x2x2: b", "v5e:4x4: a", "v4:2x2x2: c"):
        more = {line.partition(": ")[0]: line}
        text = module.with_plans(text, module.read_plans(text) | more)
    assert text == f"{HEAD}# plan: v5e:4x4: a\n# plan: v4:2x2x2: c\n\nmodel: x\n"


def test_a_stopped_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is written when it is known, and not asked for again."""
    module = script()
    (tmp_path / "configs").mkdir()
    (tmp_path / "docs").mkdir()
    marks = [f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in module._TABLES]
    docs = tmp_path / "docs" / "tpu.md"
    docs.write_text("".join(marks))
    for name in ("a", "b-inference"):
        (tmp_path / "configs" / f"{name}.yaml").write_text(HEAD)
    calls: list[tuple[str, str]] = []

    def plan(config: str, *, topology: str) -> str:
        calls.append((Path(config).stem, topology))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return topology

    def headline(topology: str) -> str:
        peak = "peak 9.84 GiB of 15.75 GiB a chip; estimated "
        if calls[-1][0] == "a":
            return f"{topology}: {peak}step 1.84 s, estimated MFU 51 %"
        rest = (
            "prefill 90 ms for 12 prompts, decode 30.5 ms a step at 40 % of HBM's rate, 9 tokens/s"
        )
        return f"{topology}: 48 slots, {peak}{rest}"

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "plan", plan)
    monkeypatch.setattr(module, "headline", headline)
    monkeypatch.setattr("sys.argv", ["plan_configs.py"])
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert "| a | v5e:4x4 | 9.84 | 15.75 | 1.84 | 51 |\n" in docs.read_text()
    module.main()
    everything = [(n, t) for n in ("a", "b-inference") for t in ("v5e:4x4", "v4:2x2x2")]
    assert calls == [everything[0], everything[1], *everything[1:]]
    row = "| v4:2x2x2 | 48 | 9.84 | 15.75 | 90 | 12 | 30.5 | 40 | 9 |\n"
    assert f"| b-inference {row}" in docs.read_text()
    module.main()
    assert len(calls) == 5
    monkeypatch.setattr("sys.argv", ["plan_configs.py", "--forget", "--topology", "v4:2x2x2"])
    module.main()
    assert calls[5:] == [everything[1], everything[3]]
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        "a.yaml",
        "b-inference.yaml",
        "tpu.md",
    ]


# Minutes of two cores: run it when the model, its sharding or the compiler changes.
@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.skipif("STF_JAX_PLAN_7B" not in os.environ, reason="takes minutes: STF_JAX_PLAN_7B=1")
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)
def test_stage_2_of_7b_as_it_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits as it says, and no stacked parameter is ever whole on a chip."""
    # The tests' own, for float32; the attention kernel takes bfloat16 at its own precision only.
    monkeypatch.delenv("JAX_DEFAULT_MATMUL_PRECISION")
    monkeypatch.delenv("XLA_FLAGS")
    path = ROOT / "configs" / "stf-7b-finetune.yaml"
    estimate = plan(str(path), topology="v5e:4x4")
    assert isinstance(estimate, Plan)
    assert estimate.fits
    # AdamW in float32 holds twelve bytes a parameter; the tower has none.
    text = named_config("llava_stf_7b").text
    layers = text.layers * (4 * text.width**2 + 3 * text.width * text.mlp_width)
    assert estimate.arguments > 12 * (layers + 2 * text.padded_vocab_size * text.width) / 16
    said = re.search(r"peak (\S+) GiB", script().read_plans(path.read_text())["v5e:4x4"])
    assert said is not None
    # Another release of the compiler may differ a little.
    assert estimate.peak / 2**30 == pytest.approx(float(said[1]), rel=0.05)
    # One layer's matrix or the head at a time, never the stack of a kind.
    assert estimate.largest_gather <= text.padded_vocab_size * text.width


def test_one_in_a_bucket(tmp_path: Path) -> None:
    """A run's own config is read again when it continues and when it is a model, on gs:// too."""
    (tmp_path / "config.yaml").write_text("model: m\nout: o\ndata:\n  datasets: [{path: d}]\n")

    def opened(original: Any, path: str, mode: str = "r", **more: Any) -> Any:
        return open(path.replace("gs://bucket", str(tmp_path)), mode, **more)

    with mock_epath(open=opened):
        config = TrainConfig.load("gs://bucket/config.yaml", ["--seed=3"])
    assert (config.model, config.seed) == ("m", 3)
