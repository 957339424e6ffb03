"""The communication of chips, from the text of a compiled program."""

import dataclasses
import math
import re

from stf_jax.plan.hlo import Instruction, UnreadableProgram, byte_count, short

# What goes between slices is no collective to a chip: its host sends and receives.
_BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: of `COLLECTIVES`.
        bytes: of the whole array, in one chip's view: gathered, or before it is scattered.
        group: chips that take part.
        beside: cycles of other work that the compiler runs meanwhile; infinite where it says only
            that there is some.
        source: where in the program it comes from.
        shape: of the result.
        dcn: whether it goes from slice to slice over the data center's network.
    """

    kind: str
    bytes: int
    group: int
    beside: float
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

    def exposure(self, seconds: float, clock: float) -> float:
        """Seconds that the chip waits for the collective."""
        return max(0.0, seconds - self.beside / clock)


def collective(
    instruction: Instruction, shapes: dict[str, str], devices: int, *, starts: bool, scattered: bool
) -> Collective:
    """The collective that an instruction stands for.

    Args:
        instruction: of the program; its opcode is one of `COLLECTIVES`, or starts one.
        shapes: of its operands.
        devices: of a slice.
        starts: its computation only starts it.
        scattered: its computation keeps a part of what is summed.
    """
    kind = instruction.opcode.removesuffix("-start")
    size = byte_count(instruction.shape)
    if instruction.opcode == "collective-permute-start":
        size //= 2
    elif instruction.opcode.endswith("-start"):
        size -= sum(byte_count(shapes.get(name, "")) for name in instruction.operands)
    if kind == "reduce-scatter":
        size *= _group(instruction, devices)
    return Collective(
        kind="reduce-scatter" if scattered and kind == "all-reduce" else kind,
        bytes=size,
        group=_group(instruction, devices),
        beside=math.inf if starts or instruction.opcode.endswith("-start") else 0,
        source=instruction.source,
        shape=short(instruction.shape),
    )


def between_slices(instruction: Instruction, slices: int) -> Collective:
    """The collective of a `recv` that waits for another slice.

    Raises:
        UnreadableProgram: its kind is not known.
    """
    transfer = instruction.attribute("_xla_megascale_transfer_type", r'"(\w+)"')
    if transfer not in _BETWEEN_SLICES:
        raise UnreadableProgram(
            f"{instruction.name} goes between slices in an unknown way, {transfer}"
        )
    kind, shape = _BETWEEN_SLICES[transfer], short(instruction.shape)
    scattered = slices if kind == "reduce-scatter" else 1
    return Collective(
        kind=kind,
        bytes=byte_count(shape) * scattered,
        group=slices,
        beside=0,
        source=instruction.source,
        shape=shape,
        dcn=True,
    )


def _group(instruction: Instruction, devices: int) -> int:
    """Chips in a group; the text has three forms of it."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", instruction.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.rest):
        return int(match.group(1))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.rest):
        return match.group(1).count(",") + 1
    return devices
