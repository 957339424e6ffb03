"""Requests to the compiler's process, and its answers: plain values, as JSON."""

import dataclasses
import math
from typing import Any, Self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A config and a slice to plan.

    Attributes:
        config: path of a config for training or for inference.
        overrides: `--section.key=value`.
        topology: such as "v5e:4x4".
    """

    config: str
    overrides: tuple[str, ...]
    topology: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind in a program, in one chip's view.

    Attributes:
        kind: such as "all-gather"; those between slices begin with "DCN".
        count: how many run.
        bytes: that the chip receives in all.
        exposed: of these bytes, those that no computation runs beside; between slices all.
        largest: bytes of the largest array, and what it is.
        what: its shape and source.
    """

    kind: str
    count: int
    bytes: float
    exposed: float
    largest: int
    what: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one program; sizes in bytes a chip, times in seconds.

    Every time is an estimate.

    Attributes:
        arguments: what goes in.
        temporaries: what it needs besides.
        peak: the most that is in use at a time.
        hardware_flops: of a chip: matmuls as compiled, what is computed again included, and
            kernels.
        cycles_seconds: the compiler's cycles over the call graph, at the chip's clock.
        kernel_seconds: Pallas kernels, for which the compiler has no cycles: their matmuls at half
            the published rate.
        matmul_seconds: the roofline: `hardware_flops` at the published rate.
        collective_seconds: all collectives' bytes within a slice at the links' rate.
        exposed_seconds: of those, the ones that nothing overlaps.
        dcn_seconds: what goes between slices, at the rate of the network.
        traffic: by kind.
        largest_gather: elements of the largest array gathered from several chips.
        top: the most expensive instructions: seconds, source and shape.
        compile_seconds: that the compiler took.
    """

    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    hardware_flops: float = 0.0
    cycles_seconds: float = 0.0
    kernel_seconds: float = 0.0
    matmul_seconds: float = 0.0
    collective_seconds: float = 0.0
    exposed_seconds: float = 0.0
    dcn_seconds: float = 0.0
    traffic: tuple[Traffic, ...] = ()
    largest_gather: int = 0
    top: tuple[tuple[float, str, str], ...] = ()
    compile_seconds: float = 0.0

    @property
    def computed_seconds(self) -> float:
        """Seconds of computation and of the collectives that it cannot hide.

        No less than those within a slice take by themselves; what goes between slices is added
        whole, since nothing shows how much of it is hidden.
        """
        computed = self.cycles_seconds + self.kernel_seconds
        return max(computed + self.exposed_seconds, self.collective_seconds) + self.dcn_seconds

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """Reads what `dataclasses.asdict` made, or more."""
        known = {field.name: tree[field.name] for field in dataclasses.fields(cls)}
        known["traffic"] = tuple(Traffic(**item) for item in tree["traffic"])
        known["top"] = tuple(tuple(item) for item in tree["top"])
        return cls(**known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Cost):
    """The plan of a training step.

    `fits` is false where memory ran out; then `needed` is all that is known besides FLOPs.

    Attributes:
        topology: as asked.
        mesh: axis by axis.
        rows: of the global batch.
        length: tokens in a row.
        model_flops: of a step, on all chips, by part of the model.
        peak_flops: of a chip, bf16 FLOPs a second as published.
        fits: whether the compiler found room.
        needed: where it did not, the bytes that it wanted.
        limit: that a program may use.
        memory_seconds: the roofline: arguments read and written once, temporaries written and read.
        padding: the part of a size that is padding to whole tiles, where there is any.
    """

    topology: str
    mesh: dict[str, int]
    rows: int
    length: int
    model_flops: dict[str, float]
    peak_flops: float
    limit: int
    fits: bool
    needed: int = 0
    memory_seconds: float = 0.0
    padding: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def chips(self) -> int:
        """Chips in the mesh."""
        return math.prod(self.mesh.values())

    @property
    def step_seconds(self) -> float:
        """The estimate of a step."""
        return self.computed_seconds

    @property
    def ideal_seconds(self) -> float:
        """The model's FLOPs at the published rate of all chips."""
        return sum(self.model_flops.values()) / self.peak_flops / self.chips

    @property
    def mfu(self) -> float:
        """Estimated model FLOPs utilization."""
        return self.ideal_seconds / self.step_seconds if self.step_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON, with the figures that follow from its fields."""
        derived = ("chips", "step_seconds", "ideal_seconds", "mfu")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}
