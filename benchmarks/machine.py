"""What the machine of a benchmark can do at most, beside which its ratios are to be read.

    python benchmarks/machine.py [--rows 640 --width 1024 --mlp-width 2752]

A matrix product of the benchmark's size bounds prefill and training. How fast a matrix that fits no
cache is read, as it multiplies a vector, bounds decoding. Both libraries compute both, in turn.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch

# Instructions that decide how fast matrices are multiplied, the oldest first.
_ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
_ROUNDS = 5
# No cache of a CPU holds it: 256 MiB of float32.
_READ = 8192


def describe() -> str:
    """The CPU, its cores, and its instructions for matrices; a GPU's or TPU's name."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind}, {jax.device_count()} devices"
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = (line.partition(":") for line in text.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    name = fields.get("model name", "unknown CPU")
    return f"{name}, {os.cpu_count()} cores, {' '.join(isa for isa in _ISA if isa in flags)}"


def print_ceilings(*, rows: int, width: int, mlp_width: int) -> None:
    """Prints the machine, and what both libraries reach at a layer's largest product.

    Args:
        rows: positions of all rows together.
        width: of the language model.
        mlp_width: of its MLP.
    """
    print(describe())
    print(f"{'ceilings':<44}{'JAX':>8}{'PyTorch':>9}")
    flops = 2 * rows * width * mlp_width / 1e9
    for dtype in ("float32", "bfloat16"):
        ours, theirs = _time_product(rows, width, mlp_width, dtype)
        title = f"{dtype} [{rows}, {width}] x [{width}, {mlp_width}], GFLOP/s"
        print(f"{title:<44}{flops / ours:8.0f}{flops / theirs:9.0f}")
    ours, theirs = _time_product(1, _READ, _READ, "float32")
    gigabytes = 4 * _READ**2 / 1e9
    print(f"{'float32 matrix read for a vector, GB/s':<44}{gigabytes / ours:8.1f}", end="")
    print(f"{gigabytes / theirs:9.1f}\n", flush=True)


def _time_product(rows: int, inputs: int, outputs: int, dtype: str) -> tuple[float, float]:
    """Median seconds of JAX and PyTorch."""
    x, w = jnp.ones((rows, inputs), dtype), jnp.ones((inputs, outputs), dtype)
    product: Any = jax.jit(lambda x, w: jnp.dot(x, w))
    kind = getattr(torch, dtype)
    # As PyTorch keeps the weights of a linear layer.
    theirs_x, theirs_w = (
        torch.ones(rows, inputs, dtype=kind),
        torch.ones(outputs, inputs, dtype=kind),
    )
    return _in_turn(
        lambda: product(x, w).block_until_ready(),
        lambda: torch.nn.functional.linear(theirs_x, theirs_w),
    )


def _in_turn(*tasks: Callable[[], Any]) -> Any:
    seconds: list[list[float]] = [[] for _ in tasks]
    for round_ in range(_ROUNDS + 1):
        for task, times in zip(tasks, seconds, strict=True):
            start = time.perf_counter()
            task()
            if round_:
                times.append(time.perf_counter() - start)
    return tuple(statistics.median(times) for times in seconds)


def main() -> None:
    """Prints the ceilings alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--mlp-width", type=int, default=2752)
    args = parser.parse_args()
    with torch.inference_mode():
        print_ceilings(rows=args.rows, width=args.width, mlp_width=args.mlp_width)


if __name__ == "__main__":
    main()
