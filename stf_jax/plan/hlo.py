"""Reads what the TPU compiler made: cycles, matmul FLOPs and collectives over the whole call graph.

The text of an optimised module gives `estimated_cycles` for each fusion, once. Here every
instruction counts as often as it runs: a loop's body times the loop's trip count.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

# What goes between slices is no collective to a chip: its host sends and receives.
_BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


class UnreadableProgram(ValueError):
    """The compiler's text has changed its form."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in the module.
        shape: of the result, as text.
        opcode: what it does.
        rest: operands and attributes, as text.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    def attribute(self, name: str, pattern: str = r"%?([\w.\-]+)") -> str | None:
        """The value of an attribute."""
        found = re.search(rf"\b{name}={pattern}", self.rest)
        return found and found.group(1)

    @property
    def cycles(self) -> int:
        """The compiler's estimate, 0 where it has none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found.group(1)) if found else 0

    @property
    def operands(self) -> list[str]:
        """Names of the operands; "name#1" is the second part of a tuple."""
        return re.findall(r"%([\w.\-#]+)", self.rest[: _closing(self.rest)])

    @property
    def source(self) -> str:
        """Where in the program it comes from, loops and transforms left out."""
        name = self.attribute("op_name", r'"([^"]*)"') or self.opcode
        # In the text a quotation mark is behind a backslash.
        whole = re.sub(r"^jit\(\w+\)/", "", name.replace("\\'", "'"))
        parts = [part for part in whole.split("/") if part not in _NOISE]
        return "/".join(parts) or self.opcode


_NOISE = ("while", "body", "closed_call", "checkpoint", "rematted_computation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: of `COLLECTIVES`.
        bytes: of the whole array, in one chip's view: gathered, or before it is scattered.
        group: chips that take part.
        overlapped: whether the compiler lets other work run at the same time.
        source: where in the program it comes from.
        shape: of the result.
        dcn: whether it goes from slice to slice over the data centre's network.
    """

    kind: str
    bytes: int
    group: int
    overlapped: bool
    source: str
    shape: str
    dcn: bool = False

    @property
    def traffic(self) -> float:
        """Bytes that a chip receives, or its host for it."""
        if self.kind == "collective-permute":
            return self.bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.group - 1) / self.group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a chip does in one call, summed over the call graph.

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


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The entry computation's name, and the instructions of each computation."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header.group(1)] = []
            if line.startswith("ENTRY"):
                entry = header.group(1)
            continue
        start = _INSTRUCTION.match(line)
        opcode = start and _OPCODE.search(line, start.end() - 1)
        if start and opcode:
            shape = line[start.end() : opcode.start()]
            current.append(
                Instruction(start.group(2), shape, opcode.group(1), line[opcode.end() :])
            )
    if not entry:
        raise UnreadableProgram("the compiler's text has no entry computation")
    return entry, computations


def analyse(text: str, *, devices: int, slices: int = 1, one_turn: bool = False) -> Work:
    """Sums over the call graph of an optimised module.

    Args:
        text: `as_text()` of a compiled program.
        devices: that it runs on, in each slice.
        slices: of them.
        one_turn: sums over one turn of the program's only loop instead.

    Raises:
        UnreadableProgram: a loop whose trip count cannot be seen, or not just one.
    """
    entry, computations = parse(text)
    if one_turn:
        entry = _only_loop(computations[entry])
    cycles: Counter[tuple[str, str]] = Counter()
    kernels: Counter[tuple[Instruction, tuple[str, ...]]] = Counter()
    collectives: Counter[Collective] = Counter()
    flops = 0.0
    for computation, times in _calls(entry, computations, 1):
        instructions = computations[computation]
        shapes = _shapes(instructions)
        targets = {one.attribute("custom_call_target", '"([^"]*)"') for one in instructions}
        # An asynchronous collective appears in the fusions that start, carry and end it.
        counted = computation.find("async_collective") < 0 and "AsyncCollectiveDone" not in targets
        starts = "AsyncCollectiveStart" in targets
        for one in instructions:
            if one.cycles:
                cycles[one.source, _short(one.shape)] += one.cycles * times
            if one.opcode in ("dot", "convolution"):
                flops += times * _matmul(one, shapes)
            elif one.attribute("custom_call_target", '"([^"]*)"') == "tpu_custom_call":
                given = tuple(shapes[name] for name in one.operands if name in shapes)
                kernels[one, given] += times
            elif one.opcode.removesuffix("-start") in COLLECTIVES and (counted or starts):
                scattered = "all-reduce-scatter" in computation
                collectives[_collective(one, shapes, devices, starts, scattered)] += times
            elif one.opcode == "recv" and "xla_megascale_transfer_type" in one.rest:
                collectives[_between_slices(one, slices)] += times
    return Work(cycles=cycles, flops=flops, kernels=kernels, collectives=collectives)


def largest_gather(text: str) -> int:
    """Elements of the largest array that an all-gather makes."""
    _, computations = parse(text)
    gathers = (
        one for body in computations.values() for one in body if one.opcode.startswith("all-gather")
    )
    return max((max(_elements(one.shape), default=0) for one in gathers), default=0)


def _calls(
    name: str, computations: dict[str, list[Instruction]], times: int
) -> Iterator[tuple[str, int]]:
    """Every computation that runs, and how often, once for each place it is called from."""
    yield name, times
    for one in computations[name]:
        if one.opcode == "while":
            body, condition = one.attribute("body"), one.attribute("condition")
            if body is None or condition is None:
                raise UnreadableProgram(f"the loop {one.name} has no body")
            yield from _calls(body, computations, times * _trips(one, condition, computations))
        elif one.opcode == "conditional":
            # One of them runs; which is not known, and all are counted.
            names = re.findall(r"(?:_computation=|computations=\{|, )%([\w.\-]+)", one.rest)
            for branch in {name for name in names if name in computations}:
                yield from _calls(branch, computations, times)
        else:
            called = one.attribute("calls") or (
                one.attribute("to_apply") if one.opcode == "call" else None
            )
            if called:
                yield from _calls(called, computations, times)


def _only_loop(instructions: list[Instruction]) -> str:
    """The body of the only loop of a computation."""
    loops = [one for one in instructions if one.opcode == "while"]
    body = loops[0].attribute("body") if len(loops) == 1 else None
    if body is None:
        raise UnreadableProgram(f"one loop is expected; the program has {len(loops)}")
    return body


def _trips(loop: Instruction, condition: str, computations: dict[str, list[Instruction]]) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known.group(1))
    constants = [
        int(found.group(1))
        for name, _ in _calls(condition, computations, 1)
        for one in computations[name]
        if one.opcode == "constant" and (found := re.match(r"(\d+)\)", one.rest))
    ]
    if not constants:
        raise UnreadableProgram(f"the trip count of the loop {loop.name} cannot be seen")
    return max(constants)


def _collective(
    one: Instruction, shapes: dict[str, str], devices: int, starts: bool, scattered: bool
) -> Collective:
    kind = one.opcode.removesuffix("-start")
    size = _bytes(one.shape)
    if one.opcode == "collective-permute-start":
        size //= 2
    elif one.opcode.endswith("-start"):
        size -= sum(_bytes(shapes.get(name, "")) for name in one.operands)
    if kind == "reduce-scatter":
        size *= _group(one, devices)
    return Collective(
        kind="reduce-scatter" if scattered and kind == "all-reduce" else kind,
        bytes=size,
        group=_group(one, devices),
        overlapped=starts or one.opcode.endswith("-start"),
        source=one.source,
        shape=_short(one.shape),
    )


def _between_slices(one: Instruction, slices: int) -> Collective:
    found = one.attribute("_xla_megascale_transfer_type", r'"(\w+)"')
    if found not in _BETWEEN_SLICES:
        raise UnreadableProgram(f"{one.name} goes between slices in an unknown way, {found}")
    kind, shape = _BETWEEN_SLICES[found], _short(one.shape)
    scattered = slices if kind == "reduce-scatter" else 1
    return Collective(
        kind=kind,
        bytes=_bytes(shape) * scattered,
        group=slices,
        overlapped=False,
        source=one.source,
        shape=shape,
        dcn=True,
    )


def _group(one: Instruction, devices: int) -> int:
    """Chips in a group, in whichever of its three forms it is written."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", one.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", one.rest):
        return int(found.group(1))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", one.rest):
        return found.group(1).count(",") + 1
    return devices


def _matmul(one: Instruction, shapes: dict[str, str]) -> float:
    """FLOPs of a dot or of a convolution, which is how the TPU compiler writes a dot."""
    if one.opcode == "dot":
        left = _dimensions(shapes[one.operands[0]])
        axes = one.attribute("lhs_contracting_dims", r"\{([\d,]*)\}") or ""
        contracted = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
        return 2.0 * contracted * math.prod(_dimensions(one.shape))
    left, kernel = (_dimensions(shapes[name]) for name in one.operands[:2])
    out = _dimensions(one.shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if labels is None:
        raise UnreadableProgram(f"the convolution {one.name} has no labels")
    inputs, kernels, outputs = labels.groups()
    result = 2.0 * out[outputs.index("b")] * out[outputs.index("f")] * kernel[kernels.index("i")]
    window = one.attribute("window", r"\{([^}]*)\}") or ""
    settings = dict(part.split("=") for part in window.split())
    for axis in range(len(inputs) - 2):
        label = str(axis)
        result *= _pairs(
            left[inputs.index(label)],
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


def _shapes(instructions: list[Instruction]) -> dict[str, str]:
    """Of each result by its name as an operand, and of each part of a tuple."""
    shapes = {one.name: one.shape for one in instructions}
    for one in instructions:
        parts = _parts(one.shape) if one.shape.startswith("(") else []
        shapes |= {f"{one.name}#{index}": part for index, part in enumerate(parts)}
    return shapes


def _parts(shape: str) -> list[str]:
    """The shapes that a tuple is made of."""
    shape = re.sub(r"/\*.*?\*/", "", shape)
    parts, depth, start = [], 0, 1
    for index, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 or (depth == 1 and character == ","):
            parts.append(shape[start:index].strip())
            start = index + 1
    return parts


def _closing(text: str) -> int:
    """Where the operands end."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return index
    return len(text)


def _bytes(shape: str) -> int:
    return sum(
        math.ceil(_bits(dtype) * math.prod(int(n) for n in sizes.split(",") if n) / 8)
        for dtype, sizes in _SHAPE.findall(shape)
    )


def _bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)
    return _BITS.get(dtype, int(found.group()) if found else 0)


def _elements(shape: str) -> list[int]:
    return [math.prod(int(n) for n in sizes.split(",") if n) for _, sizes in _SHAPE.findall(shape)]


def _dimensions(shape: str) -> list[int]:
    found = _SHAPE.search(shape)
    return [int(n) for n in found.group(2).split(",") if n] if found else []


def _short(shape: str) -> str:
    """Without layouts; of a tuple the first."""
    found = _SHAPE.search(shape)
    return found.group() if found else shape
