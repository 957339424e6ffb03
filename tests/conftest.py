"""Eight virtual CPU devices and float32 arithmetic for every test, and the reference's files."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile
from pathlib import Path

# Before jax is imported: the number of devices is fixed then.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# These compile four times as fast. Programs run slower, but each runs a few times only; the
# operations are the same, and LLVM optimizes less. With STF_JAX_TEST_XLA=default a session compiles
# as users do; the test of the wheel does so for the reference's answers and one of its curves.
if os.environ.get("STF_JAX_TEST_XLA") != "default":
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0"
        " --xla_llvm_disable_expensive_passes=true"
        " --xla_cpu_parallel_codegen_split_count=1"
    )
    # Later releases have one way only to emit a loop, and abort at a flag that they do not know.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    # Each operation's line of source would be looked up, and carried through the compiler.
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# PyTorch's threads wait for each other in a loop, and the workers of the tests need the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# In the background of a shell Ctrl-C is ignored, and would be by all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests read local files only; a library that tries the network should fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# What several tests, test workers or subprocesses need is compiled once in a session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="stf-jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import importlib.util

from jaxtyping import install_import_hook

# Shapes and types of these modules are checked at every call, which is when a program is traced.
# Left out are modules whose dataclasses also hold specs, shapes and broadcast views: batches, marks
# and caches. The environment of the wheel has no checker.
if importlib.util.find_spec("beartype"):
    models = (
        "attention",
        "clip",
        "clustering",
        "connector",
        "layers",
        "llama",
        "llava",
        "loop",
        "lora",
        "pruning",
        "quantization",
    )
    checked = ["stf_jax.systems", *(f"stf_jax.models.{name}" for name in models)]
    install_import_hook([*checked, "stf_jax.infer.sampling"], "beartype.beartype")

import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import stf_jax
from stf_jax.convert import Source, import_checkpoint, open_source
from stf_jax.data.batch import Batch
from stf_jax.data.tokenizer import IMAGE_TOKEN_ID

# `STF_JAX_REFERENCE=DIR make test ARGS="-k reference"` checks another folder of the same form: a
# test with `reference` in its name takes every size, count and id from the folder's own files.
REFERENCE = Path(
    os.environ.get("STF_JAX_REFERENCE") or Path(__file__).parent / "data" / "reference"
).resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests come first, so that the workers end together, with short ones."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Freezes what is imported, and collects less often: tracing makes much that stays."""
    _settle()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(autouse=True, scope="module")
def settled() -> Iterator[None]:
    """After each module, freezes what it leaves: jax's caches live until the end."""
    yield
    _settle()


def _settle() -> None:
    """Collects, then freezes the rest, which no later collection visits.

    There are many: each epoch of data ends with one.
    """
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each template, and for each answer, that the reference's files hold."""
    if "reference_template" in metafunc.fixturenames:
        text = (REFERENCE / "tokenization.json").read_text(encoding="utf-8")
        metafunc.parametrize("reference_template", sorted(json.loads(text)["training"]))
    if "reference_answer" in metafunc.fixturenames:
        cases = json.loads((REFERENCE / "generation.json").read_text(encoding="utf-8"))
        metafunc.parametrize("reference_answer", cases, ids=range(len(cases)))


@pytest.fixture(scope="session")
def compiler_options() -> dict[str, bool | int]:
    """For `jax.jit`: what users compile with, where the order of a sum is to be theirs."""
    defaults: dict[str, bool | int] = {
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
        "xla_cpu_parallel_codegen_split_count": 32,
        "xla_cpu_use_fusion_emitters": True,
    }
    return {name: value for name, value in defaults.items() if name in os.environ["XLA_FLAGS"]}


@pytest.fixture(scope="session")
def reference() -> Path:
    """Checkpoints, images and tensors that the PyTorch reference computed; see its README."""
    return REFERENCE


@pytest.fixture(scope="session")
def reference_answers(reference: Path) -> list[dict[str, Any]]:
    """Its questions, each with the template and the greedy tokens, of which the first is BOS."""
    return json.loads((reference / "generation.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def source(reference: Path) -> Source:
    """The reference's LLaVA-STF, opened."""
    return open_source(reference / "llava-stf")


@pytest.fixture(scope="session")
def native(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's LLaVA-STF as a native checkpoint, its vocabulary padded for eight devices."""
    path = tmp_path_factory.mktemp("model") / "native"
    import_checkpoint(reference / "llava-stf", path, vocabulary_multiple=8)
    return path


@pytest.fixture(scope="session")
def model(reference: Path) -> stf_jax.Model:
    """It, loaded: what one test has compiled serves the others."""
    return stf_jax.load(reference / "llava-stf")


@pytest.fixture(scope="session")
def weights(source: Source) -> dict[str, np.ndarray]:
    """Its parameters by path, in host memory."""
    return {leaf.path: leaf.read() for leaf in source.leaves()}


@pytest.fixture(scope="session")
def reference_batch(reference: Path, source: Source) -> Callable[..., Batch]:
    """The reference's batch, and `empty` rows or more, up to a multiple of `multiple`."""
    tensors = load_file(reference / "tensors.safetensors")
    size, tokens = source.config.vision.image_size, source.config.tokens_per_image

    def make(*, multiple: int = 1, empty: int = 0) -> Batch:
        count, length = tensors["spliced.labels"].shape
        rows = -(-(count + empty) // multiple) * multiple
        shape = (rows, length)
        ids, labels = np.zeros(shape, np.int32), np.full(shape, -100, np.int32)
        segments, slots = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        pixels = np.zeros((rows, 1, size, size, 3), np.float32)
        labels[:count] = tensors["spliced.labels"]
        segments[:count] = tensors["spliced.attention_mask"]
        pixels[:count, 0] = tensors["batch.images"].transpose(0, 2, 3, 1)
        for row in range(count):
            text = tensors["batch.input_ids"][row][tensors["batch.attention_mask"][row] > 0]
            expanded = np.repeat(text, np.where(text == IMAGE_TOKEN_ID, tokens, 1))
            ids[row, : len(expanded)] = expanded
            at = np.flatnonzero(expanded == IMAGE_TOKEN_ID)
            slots[row, at] = range(len(at))
        return Batch(
            ids=ids,
            labels=labels,
            positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
            segments=segments,
            image_slots=slots,
            pixels=pixels,
        )

    return make


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """An entry for each program that XLA compiles while the test runs."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)
