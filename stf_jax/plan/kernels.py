"""The arithmetic of Pallas kernels, which the compiler does not count."""

import re
from collections.abc import Sequence

from stf_jax.parallel.splash import visited_share

# Matmuls over query x key positions that each of splash's kernels does.
_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}
# One row has no axis of rows.
_ARRAY = re.compile(r"(?:bf16|f16|f32)\[(?:(\d+),)?(\d+),(\d+),(\d+)\]")


_POSITIONS = re.compile(r"s32\[\d+,\d+\]")


def kernel_flops(name: str, operands: Sequence[str]) -> float:
    """FLOPs of one call of splash attention, on the blocks that it visits.

    Args:
        name: of the kernel, which contains "splash_mha_fwd" or the like.
        operands: their shapes; query, key and value are the first three of [B, N, T, D], and one
            with a causal mask has positions, too, and skips the blocks above the diagonal.

    Raises:
        ValueError: another kernel.
    """
    phase = re.search(r"splash_mha_([a-z]+)", name)
    arrays = [match.groups() for operand in operands if (match := _ARRAY.match(operand))]
    if phase is None or phase.group(1) not in _MATMULS or len(arrays) < 2:
        raise ValueError(f"the kernel {name} is not known to the planner")
    rows, heads, queries, dim = (int(size or 1) for size in arrays[0])
    keys = int(arrays[1][2])
    causal = any(_POSITIONS.match(operand) for operand in operands)
    part = visited_share(queries, keys) if causal else 1.0
    return 2.0 * _MATMULS[phase.group(1)] * rows * heads * queries * keys * dim * part
