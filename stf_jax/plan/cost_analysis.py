"""Totals of a compiled program: cycles, matmul FLOPs and collectives over the whole call graph.

The text of an optimized module gives `estimated_cycles` for each fusion, once. Here every
instruction counts as often as it runs: a loop's body times the loop's trip count.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from stf_jax.plan.collectives import COLLECTIVES, Collective, between_slices, collective
from stf_jax.plan.hlo import (
    Instruction,
    UnreadableProgram,
    dimensions,
    element_counts,
    parse,
    shapes_of,
    short,
)

_IN_BRACES = r"\{%?([\w.\-]+)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostAnalysis:
    """Totals of one call on a chip, summed over the call graph.

    Attributes:
        cycles: by where an instruction comes from and the shape of its result.
        flops: of matmuls outside kernels.
        kernels: calls of Pallas kernels, by the instruction and its operands' shapes.
        collectives: and how often each runs.
    """

    cycles: Counter[tuple[str, str]]
    flops: float
    kernels: Counter[tuple[Instruction, tuple[str, ...]]]
    collectives: Counter[Collective]


def analyze(
    text: str, *, devices: int, slices: int = 1, one_iteration: bool = False
) -> CostAnalysis:
    """Sums over the call graph of an optimized module.

    Args:
        text: `as_text()` of a compiled program.
        devices: that it runs on, in each slice.
        slices: of them.
        one_iteration: sums over one iteration of the program's only loop instead.

    Raises:
        UnreadableProgram: a loop whose trip count cannot be seen, or not just one.
    """
    entry, computations = parse(text)
    if one_iteration:
        entry = _only_loop(computations[entry])
    cycles: Counter[tuple[str, str]] = Counter()
    kernels: Counter[tuple[Instruction, tuple[str, ...]]] = Counter()
    collectives: Counter[Collective] = Counter()
    flops = 0.0
    for computation, times in _calls(entry, computations, 1):
        instructions = computations[computation]
        shapes = shapes_of(instructions)
        targets = {
            instruction.attribute("custom_call_target", '"([^"]*)"') for instruction in instructions
        }
        # An asynchronous collective appears in the fusions that start, carry and end it.
        counted = computation.find("async_collective") < 0 and "AsyncCollectiveDone" not in targets
        starts = "AsyncCollectiveStart" in targets
        for instruction in instructions:
            if instruction.cycles:
                cycles[instruction.source, short(instruction.shape)] += instruction.cycles * times
            if instruction.opcode in ("dot", "convolution"):
                flops += times * _matmul(instruction, shapes)
            elif instruction.attribute("custom_call_target", '"([^"]*)"') == "tpu_custom_call":
                given = tuple(shapes[name] for name in instruction.operands if name in shapes)
                kernels[instruction, given] += times
            elif instruction.opcode.removesuffix("-start") in COLLECTIVES and (counted or starts):
                scattered = "all-reduce-scatter" in computation
                item = collective(instruction, shapes, devices, starts=starts, scattered=scattered)
                collectives[item] += times
            elif instruction.opcode == "recv" and "xla_megascale_transfer_type" in instruction.rest:
                collectives[between_slices(instruction, slices)] += times
        for item in _offload(instructions, computations, devices):
            collectives[item] += times
    return CostAnalysis(cycles=cycles, flops=flops, kernels=kernels, collectives=collectives)


def largest_gather(text: str) -> int:
    """Elements of the largest array that an all-gather makes."""
    _, computations = parse(text)
    gathers = (
        instruction
        for body in computations.values()
        for instruction in body
        if instruction.opcode.startswith("all-gather")
    )
    return max(
        (max(element_counts(instruction.shape), default=0) for instruction in gathers), default=0
    )


def _calls(
    name: str, computations: dict[str, list[Instruction]], times: int
) -> Iterator[tuple[str, int]]:
    """Every computation that runs, and how often, once for each place it is called from."""
    yield name, times
    for instruction in computations[name]:
        if instruction.opcode == "while":
            body, condition = instruction.attribute("body"), instruction.attribute("condition")
            if body is None or condition is None:
                raise UnreadableProgram(f"the loop {instruction.name} has no body")
            yield from _calls(
                body, computations, times * _trips(instruction, condition, computations)
            )
        elif instruction.opcode == "conditional":
            # One of them runs; which is not known, and all are counted.
            names = re.findall(r"(?:_computation=|computations=\{|, )%([\w.\-]+)", instruction.rest)
            for branch in {name for name in names if name in computations}:
                yield from _calls(branch, computations, times)
        else:
            called = instruction.attribute("calls") or (
                instruction.attribute("to_apply") if instruction.opcode == "call" else None
            )
            if called:
                yield from _calls(called, computations, times)


def _offload(
    instructions: list[Instruction], computations: dict[str, list[Instruction]], devices: int
) -> Iterator[Collective]:
    """The collectives that a computation leaves to the SparseCore, which takes one at a time."""
    clock, begun = 0, dict[str, tuple[str, int]]()
    for instruction in instructions:
        clock += instruction.cycles
        if instruction.opcode == "async-start":
            begun[instruction.name] = instruction.attribute("calls") or "", clock
        elif instruction.opcode in ("async-update", "async-done"):
            if instruction.operands[0] not in begun:
                raise UnreadableProgram(f"where {instruction.name} was started cannot be seen")
            called, at = begun[instruction.operands[0]]
            if instruction.opcode == "async-update":
                # Only now it has its operands.
                begun[instruction.name] = called, clock
            else:
                for item in _inside(called, computations, devices):
                    yield dataclasses.replace(item, beside=clock - at)


def _inside(
    called: str, computations: dict[str, list[Instruction]], devices: int
) -> Iterator[Collective]:
    """The collectives of an asynchronous computation."""
    for call in computations.get(called, ()):
        body = computations.get(call.attribute("called_computations", _IN_BRACES) or "", [])
        shapes = shapes_of(body)
        for instruction in body:
            if instruction.opcode in COLLECTIVES:
                yield collective(instruction, shapes, devices, starts=False, scattered=False)


def _only_loop(instructions: list[Instruction]) -> str:
    """The body of the only loop of a computation."""
    loops = [instruction for instruction in instructions if instruction.opcode == "while"]
    body = loops[0].attribute("body") if len(loops) == 1 else None
    if body is None:
        raise UnreadableProgram(f"one loop is expected; the program has {len(loops)}")
    return body


def _trips(loop: Instruction, condition: str, computations: dict[str, list[Instruction]]) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known.group(1))
    constants = [
        int(match.group(1))
        for name, _ in _calls(condition, computations, 1)
        for instruction in computations[name]
        if instruction.opcode == "constant" and (match := re.match(r"(\d+)\)", instruction.rest))
    ]
    if not constants:
        raise UnreadableProgram(f"the trip count of the loop {loop.name} cannot be seen")
    return max(constants)


def _matmul(instruction: Instruction, shapes: dict[str, str]) -> float:
    """FLOPs of a dot or of a convolution, which is how the TPU compiler writes a dot."""
    if instruction.opcode == "dot":
        lhs = dimensions(shapes[instruction.operands[0]])
        axes = instruction.attribute("lhs_contracting_dims", r"\{([\d,]*)\}") or ""
        contracted = math.prod(lhs[int(axis)] for axis in axes.split(",") if axis)
        return 2.0 * contracted * math.prod(dimensions(instruction.shape))
    lhs, kernel = (dimensions(shapes[name]) for name in instruction.operands[:2])
    out = dimensions(instruction.shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        raise UnreadableProgram(f"the convolution {instruction.name} has no labels")
    inputs, kernels, outputs = labels.groups()
    result = 2.0 * out[outputs.index("b")] * out[outputs.index("f")] * kernel[kernels.index("i")]
    window = instruction.attribute("window", r"\{([^}]*)\}") or ""
    settings = dict(part.split("=") for part in window.split())
    for axis in range(len(inputs) - 2):
        label = str(axis)
        result *= _pairs(
            lhs[inputs.index(label)],
            kernel[kernels.index(label)],
            out[outputs.index(label)],
            {name: value.split("x")[axis] for name, value in settings.items()},
        )
    return result


def _pairs(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """How many products one spatial axis has; padding and the holes of a dilation have none."""
    stride, dilation = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    holes = int(window.get("lhs_dilate", 1))
    low = int(window.get("pad", "0_0").split("_")[0])
    at = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None, :] * dilation
    return int(((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)).sum())
