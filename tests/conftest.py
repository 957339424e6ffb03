"""Eight virtual CPU devices and float32 arithmetic for every test, and the reference's files."""

import os
from pathlib import Path

# Before jax is imported: the number of devices is fixed then.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# Tests read local files only; a library that tries the network should fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def reference() -> Path:
    """Checkpoints, pictures and tensors that the PyTorch reference computed; see its README."""
    return DATA / "reference"
