"""The computer that something was measured on."""

import os
import platform
from pathlib import Path

import jax


def machine() -> str:
    """A description of this computer."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return (
        f"{processor}, {os.cpu_count()} cores, {platform.system()}; "
        f"Python {platform.python_version()}, JAX {jax.__version__} on {jax.default_backend()}"
    )
