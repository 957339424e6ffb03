"""TPU generations: published rates, and what the compiler itself says of a chip.

Rates are those of Google's documentation (cloud.google.com/tpu/docs, "system architecture"); the
links' one-way rates those of "How to Scale Your Model" (Austin et al. 2025, chapter 2); a chip's
part of the network between slices is that of its pod or of its host, divided by their chips. Memory
is what the compiler lets a program use, which is less than the chip has; clocks are those at which
its matrix units reach the published rate.
"""

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU generation.

    Attributes:
        name: as in a topology.
        kind: as a device names itself.
        flops: bf16 FLOPs a second.
        memory: bytes of HBM that a program may use.
        bandwidth: of HBM, bytes a second.
        link: bytes a second over one link in one direction.
        dcn: bytes a second over the data center's network, to other slices.
        clock: cycles a second.
        axes: of a slice's torus.
        ring: chips along an axis from which on it closes into a ring.
    """

    name: str
    kind: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    dcn: float
    clock: float
    axes: int
    ring: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", kind="TPU v4", flops=275e12, memory=int(30.75 * GIB), bandwidth=1.228e12,
            link=4.5e10, dcn=6.25e9, clock=1.05e9, axes=3, ring=4,
        ),
        Chip(
            name="v5e", kind="TPU v5 lite", flops=197e12, memory=int(15.75 * GIB),
            bandwidth=8.19e11, link=4.5e10, dcn=3.125e9, clock=1.5e9, axes=2, ring=16,
        ),
        Chip(
            name="v5p", kind="TPU v5", flops=459e12, memory=int(95.73 * GIB), bandwidth=2.765e12,
            link=9e10, dcn=6.25e9, clock=1.75e9, axes=3, ring=4,
        ),
        Chip(
            name="v6e", kind="TPU v6 lite", flops=918e12, memory=int(31.24 * GIB),
            bandwidth=1.64e12, link=9e10, dcn=1.25e10, clock=1.75e9, axes=2, ring=16,
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """One slice or several equal ones: their chips, and how those are laid out."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Reads "v5e:4x4", or "2xv5e:4x4" for two slices of it.

        Raises:
            ValueError: not of that form, or a generation or layout that does not exist.
        """
        match = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):(\d+(?:x\d+)*)", text)
        name, sides = (match[2], match[3]) if match else ("", "0")
        shape = tuple(map(int, sides.split("x")))
        if match is None or name not in CHIPS or 0 in shape:
            raise ValueError(
                f"topology {text!r}: write a generation ({', '.join(CHIPS)}) and its chips along "
                "each axis, such as v5e:4x4 or v4:2x2x2; 2xv5e:4x4 for two slices"
            )
        chip = CHIPS[name]
        if len(shape) != chip.axes:
            raise ValueError(
                f"topology {text!r}: a slice of {name} has {chip.axes} axes, such as "
                f"{name}:{'x'.join(['2'] * chip.axes)}"
            )
        return cls(chip=chip, shape=shape, slices=int(match[1] or 1))

    @property
    def slice(self) -> str:
        """The name of one slice, as the compiler takes it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips_per_slice(self) -> int:
        """Chips of one slice."""
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * self.chips_per_slice

    @property
    def rate(self) -> float:
        """Bytes a second that reach the worst-placed chip over all its links."""
        sides = [side for side in self.shape if side > 1]
        return self.chip.link * sum(2 if side % self.chip.ring == 0 else 1 for side in sides)

    def __str__(self) -> str:
        return self.slice if self.slices == 1 else f"{self.slices}x{self.slice}"
