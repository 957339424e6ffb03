"""The TPU compiler asked as a user asks it."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stf_jax.cli.main import main
from stf_jax.models.layers import parameter_count
from stf_jax.models.llava import Llava
from stf_jax.plan import client as asking
from stf_jax.plan.chips import Topology
from stf_jax.plan.kernels import kernel_flops
from stf_jax.systems import tiny_config
from tests.stf_jax.plan.asked import Compiler
from tests.switch import ALL

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

INFERENCE = """
stage: inference
architecture: tiny
slots: 16
mesh: {data: 1, fsdp: 1, tensor: -1}
workload: {question_tokens: [20, 40], max_new_tokens: 30}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


Ask = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    started = Compiler(tmp_path_factory.mktemp("asked"))
    yield started
    started.close()


@pytest.fixture
def ask(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, ask_anew: Ask) -> Ask:
    """`stf-jax plan` in this process; the compiler's has imported everything before."""
    monkeypatch.setattr(asking, "subprocess", compiler)
    return ask_anew


@pytest.fixture
def ask_anew(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ask:
    """The compiler's process is a new one; what it writes is captured as well."""
    # The kernel takes bfloat16 at its own precision only; the tests' is for float32.
    monkeypatch.delenv("JAX_DEFAULT_MATMUL_PRECISION")
    # The tests' flags are for the CPU's compiler.
    monkeypatch.delenv("XLA_FLAGS")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        status = main(["plan", *arguments])
        return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())

    return run


@pytest.fixture
def inference(tmp_path: Path) -> str:
    path = tmp_path / "inference.yaml"
    path.write_text(INFERENCE)
    return str(path)


@needs_compiler
@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    "topology", ["v5p:2x2x1", "v6e:2x2", *(["v5e:2x2", "v4:2x2x1"] if ALL else [])]
)
def test_a_small_model_on_each_generation(ask: Ask, config: str, topology: str) -> None:
    done = ask(config, "--topology", topology, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert 0 < plan["arguments"] < plan["peak"] < 2**28 < plan["limit"]
    assert 0 < plan["mfu"] < 0.1
    assert plan["hardware_flops"] * 4 > sum(plan["model_flops"].values())
    traffic = {item["kind"]: item for item in plan["traffic"]}
    assert traffic.keys() & {"all-reduce", "reduce-scatter"}
    gathers = traffic["all-gather"]
    # v6e leaves them to its SparseCore, and has other work meanwhile.
    assert gathers["exposed"] < gathers["bytes"] or not topology.startswith("v6e")


@needs_compiler
@pytest.mark.tpu_compiler
def test_two_slices(ask_anew: Ask, config: str) -> None:
    """Replicas, one a slice, add their gradients up over the slower network, and only those."""
    done = ask_anew(config, "--topology", "2xv5e:2x2", "--mesh.data=2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert (plan["topology"], plan["chips"]) == ("2xv5e:2x2", 8)
    assert plan["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    between = {item["kind"]: item for item in plan["traffic"] if item["kind"].startswith("DCN")}
    assert between.keys() == {"DCN all-reduce"}
    # A quarter of each gradient in bfloat16; those of norms and biases are whole, and in float32.
    parameters = parameter_count(Llava.abstract(tiny_config()))
    trained = parameters - parameter_count(Llava.abstract(tiny_config()).vision)
    assert trained * 2 / 4 < between["DCN all-reduce"]["bytes"] < trained * 4
    assert plan["dcn_seconds"] == pytest.approx(between["DCN all-reduce"]["bytes"] / 3.125e9)
    assert plan["step_seconds"] > plan["dcn_seconds"]
    assert any(item["kind"] == "all-gather" for item in plan["traffic"])


@needs_compiler
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v6e:1x1", "v5e:2x2"])
def test_the_programs_that_answer(ask: Ask, inference: str, topology: str) -> None:
    done = ask(inference, "--topology", topology, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    chips = plan["chips"]
    assert plan["mesh"] == {"data": 1, "fsdp": 1, "tensor": chips}
    # 4 tokens an image, 36 before it and 20 or 40 behind it, 30 new ones: 110 positions at most.
    assert (plan["slots"], plan["context"]) == (16, 128)
    phases = [(phase["name"], phase["rows"], phase["length"]) for phase in plan["phases"]]
    assert phases == [("prefill", 4, 64), ("insert", 4, 24), ("insert", 4, 48), ("decode", 16, 1)]
    text = tiny_config().text
    vectors = 2 * text.layers * text.kv_heads * text.head_dim
    # Besides keys and values in bfloat16 a slot has 64 tokens and a few numbers.
    cache = 16 * 128 * vectors * 2
    # Every chip has the marks of every slot: position, segment, kind and image.
    marks = 16 * 128 * 4 * 4
    assert cache / chips + marks < plan["cache"] < cache / chips + marks + 16 * 4 * 76
    for phase in plan["phases"]:
        assert plan["weights"] + plan["cache"] < phase["needed"] < 2**28 < plan["limit"]
        assert phase["seconds"] >= phase["memory_seconds"] > 0
        assert phase["hardware_flops"] > 0
        assert phase["kernel_seconds"] > 0 if phase["name"] == "prefill" else True
        assert any(part["kind"] == "all-reduce" for part in phase["traffic"]) == (chips > 1)
    # Decoding does a matmul with every weight of the language model for each slot.
    parameters = parameter_count(Llava.abstract(tiny_config()).text)
    matmuls = 2 * 16 * (parameters - text.padded_vocab_size * text.width) / chips
    # And two for each slot's keys and values, eight rows at a time.
    matmuls += 2 * 2 * 16 * 8 * 128 * vectors / 2 / chips
    assert matmuls * 0.9 < plan["phases"][-1]["hardware_flops"] < matmuls * 1.3


@needs_compiler
@pytest.mark.tpu_compiler
def test_beside_a_process_that_has_the_compiler(ask_anew: Ask, config: str) -> None:
    """That the other one runs, on the TPU maybe, is no reason to refuse."""
    holds = "from jax.experimental import topologies as t; t.get_topology_desc('v5e:2x2', 'tpu'); "
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    for _ in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", f"{holds} print('here', flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        ) as other:
            assert other.stdin is not None
            assert other.stdout is not None
            # While a test beside this one has the compiler, it cannot be had.
            if other.stdout.readline() == "here\n":
                done = ask_anew(config, "--topology", "v5e:3x5")
                other.stdin.close()
                break
    else:
        raise AssertionError("the compiler was never free")
    assert done.stderr.startswith("error: there is no slice v5e:3x5")


@needs_compiler
@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("topology", "more", "message"),
    [
        (
            "v5e:2x4",
            ["--mesh.fsdp=1", "--mesh.tensor=8"],
            "the mesh does not divide the model: text.kv_heads 4 by tensor 8, vision.heads 4 by "
            "tensor 8",
        ),
        ("2xv5e:2x2", [], "data 1 is not a multiple of the 2 slices: only replicas may lie on"),
        ("v5e:2x2", ["--mesh.fsdp=8"], "the mesh data 1 x fsdp 8 x tensor 1 does not fit 4 dev"),
        ("v5e:2x2", ["--mesh.tensor=3"], "the mesh data 1 x fsdp -1 x tensor 3 does not fit 4"),
        ("v5e:4x4", [], "data.batch_size 8 does not divide into 1 micro-batches over 16 dev"),
        ("v5e:2x2", ["--mesh=null"], "the config has no mesh, which is for one device; for the 4"),
    ],
)
def test_one_line_for_each_mistake(
    ask: Ask, config: str, topology: str, more: list[str], message: str
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
        ("0xv5e:2x2", "topology '0xv5e:2x2': write a generation"),
        ("v5e:0x2", "topology 'v5e:0x2': write a generation"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: inference\n", "{path} has no architecture; add --architecture=llava_stf_7b"),
        ("stage: inference\nslot: 4\n", "{path}: there is no key 'slot'; the nearest is 'slots'"),
        ("stage: inference\nslots: 0\n", "{path}: slots is 0; give 1 or more"),
        (
            "stage: inference\narchitecture: tiny\nworkload: {max_new_tokens: 5000}\n",
            "the workload makes 5104 positions; tiny has",
        ),
    ],
)
@needs_compiler
@pytest.mark.tpu_compiler
def test_a_mistake_in_a_config_for_inference(
    ask: Ask, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    done = ask(str(path), "--topology", "v6e:1x1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message.format(path=path)}")
    assert done.stderr.count("\n") == 1


def test_no_sweep_of_inference(inference: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", inference, "--topology", "v6e:1x1", "--sweep"]) == 1
    assert capsys.readouterr().err.startswith("error: --sweep is for training")


def test_rates_of_a_slice() -> None:
    """A chip in the corner of an open grid has two links, one in a closed torus all six."""
    assert Topology.parse("v5e:4x4").rate == 2 * 4.5e10
    assert Topology.parse("v5e:16x16").rate == 4 * 4.5e10
    assert Topology.parse("v4:4x4x4").rate == 6 * 4.5e10
    assert Topology.parse("v5p:2x2x1").rate == 2 * 9e10
    two = Topology.parse("2xv5e:16x16")
    assert (two.rate, two.chips, str(two)) == (4 * 4.5e10, 512, "2xv5e:16x16")


def test_arithmetic_of_the_attention_kernel() -> None:
    shapes = ["s8[1,4,4]{2,1,0}", *["bf16[2,32,2048,128]{3,2,1,0}"] * 3, "s32[2,2048,128]{2,1,0}"]
    pairs = 2 * 32 * 2048 * 2048 * 128
    assert kernel_flops("splash_mha_fwd_segmented.1", shapes) == 4 * pairs
    # Ten of sixteen blocks lie on the diagonal or below it.
    causal = [*shapes, "s32[2048,128]{1,0}"]
    assert kernel_flops("splash_mha_dkv_segmented.1", causal) == 8 * pairs * 10 / 16
    with pytest.raises(ValueError, match="flash"):
        kernel_flops("flash", shapes)
