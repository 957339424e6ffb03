"""The TPU compiler asked as a user asks it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stf_jax.cli import main
from stf_jax.plan import asking
from stf_jax.plan.chips import Topology
from stf_jax.plan.kernels import kernel_flops

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)

CONFIG = """
architecture: tiny
model: nowhere
out: nowhere
data: {batch_size: 8, images_per_row: 1, sequence_length: 256}
mesh: {fsdp: -1}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The kernel takes bfloat16 at its own precision only; the tests' is for float32.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DEFAULT_MATMUL_PRECISION"}
    return subprocess.run(
        [sys.executable, "-m", "stf_jax", "plan", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@needs_compiler
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2"])
def test_a_small_model_on_each_generation(config: str, topology: str) -> None:
    done = ask(config, "--topology", topology, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert 0 < plan["arguments"] < plan["peak"] < 2**28 < plan["limit"]
    assert 0 < plan["mfu"] < 0.1
    assert plan["hardware_flops"] * 4 > sum(plan["model_flops"].values())
    kinds = {one["kind"] for one in plan["traffic"]}
    assert "all-gather" in kinds
    assert kinds & {"all-reduce", "reduce-scatter"}


@needs_compiler
@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("topology", "more", "message"),
    [
        ("v5e:2x2", ["--mesh.fsdp=8"], "the mesh data 1 x fsdp 8 x tensor 1 does not fit 4 dev"),
        ("v5e:2x2", ["--mesh.tensor=3"], "the mesh data 1 x fsdp -1 x tensor 3 does not fit 4"),
        ("v5e:4x4", [], "data.batch_size 8 does not divide into 1 micro-batches over 16 dev"),
        ("v5e:3x5", [], "there is no slice v5e:3x5"),
    ],
)
def test_one_line_for_each_mistake(
    config: str, topology: str, more: list[str], message: str
) -> None:
    done = ask(config, "--topology", topology, *more)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "topology 'v9:2x2': write a generation (v4, v5e, v5p, v6e)"),
        ("v5e", "topology 'v5e': write a generation"),
        ("v5e:4x", "topology 'v5e:4x': write a generation"),
        ("v5e:4x4x4", "topology 'v5e:4x4x4': a slice of v5e has 2 axes, such as v5e:2x2"),
        ("v4:2x2", "topology 'v4:2x2': a slice of v4 has 3 axes, such as v4:2x2x2"),
    ],
)
def test_a_topology_that_cannot_be(
    config: str, topology: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", config, "--topology", topology]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_without_the_compiler(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(asking, "find_spec", lambda name: None)
    assert main(["plan", config, "--topology", "v5e:2x2"]) == 1
    assert capsys.readouterr().err == (
        "error: the TPU compiler is not installed; pip install libtpu\n"
    )


def test_rates_of_a_slice() -> None:
    """A chip in the corner of an open grid has two links, one in a closed torus all six."""
    assert Topology.parse("v5e:4x4").rate == 2 * 4.5e10
    assert Topology.parse("v5e:16x16").rate == 4 * 4.5e10
    assert Topology.parse("v4:4x4x4").rate == 6 * 4.5e10
    assert Topology.parse("v5p:2x2x1").rate == 2 * 9e10


def test_arithmetic_of_the_attention_kernel() -> None:
    shapes = ["s8[1,4,4]{2,1,0}", *["bf16[2,32,2048,128]{3,2,1,0}"] * 3, "s32[2,2048,128]{2,1,0}"]
    pairs = 2 * 32 * 2048 * 2048 * 128
    assert kernel_flops("splash_mha_fwd_segmented.1", shapes) == 4 * pairs
    # Ten of sixteen blocks lie on the diagonal or below it.
    causal = [*shapes, "s32[2048,128]{1,0}"]
    assert kernel_flops("splash_mha_dkv_segmented.1", causal) == 8 * pairs * 10 / 16
    with pytest.raises(ValueError, match="flash"):
        kernel_flops("flash", shapes)
