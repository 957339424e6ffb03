"""The cost of an engine's programs: the planner's answer for inference, as JSON."""

import dataclasses
import math
from typing import Any

from stf_jax.plan.request import Cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase(Cost):
    """One program of an engine.

    Attributes:
        name: "prefill" computes the prefixes of new images, "insert" puts questions into slots,
            "decode" makes the next token of every slot.
        rows: prefixes, questions or slots at a time.
        length: positions of each that are computed, padding included.
        needed: bytes a chip that are in use at its peak, with all that the engine holds meanwhile.
        memory_seconds: the roofline: weights and cache once through HBM at its published rate.
    """

    name: str
    rows: int
    length: int
    needed: int
    memory_seconds: float

    @property
    def seconds(self) -> float:
        """The estimate of one call; the compiler's cycles leave out waiting for HBM."""
        return max(self.computed_seconds, self.memory_seconds)

    @property
    def bandwidth(self) -> float:
        """The share of HBM's published rate that a call reaches."""
        return self.memory_seconds / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferencePlan:
    """An engine with all its slots at work.

    Attributes:
        topology: as asked.
        mesh: axis by axis.
        slots: answers in the making at a time.
        context: positions of a slot.
        new_tokens: the most of an answer.
        images: of a prompt.
        dtype: of the weights.
        cache_dtype: of keys and values.
        limit: bytes that a program may use.
        weights: bytes a chip.
        cache: of all slots, bytes a chip.
        prefixes: of one call, bytes a chip.
        phases: in the order in which a question goes through them; an insert for each length.
            Where memory ran out, that program is the last.
    """

    topology: str
    mesh: dict[str, int]
    slots: int
    context: int
    new_tokens: int
    images: int
    dtype: str
    cache_dtype: str
    limit: int
    weights: int
    cache: int
    prefixes: int
    phases: tuple[Phase, ...]

    @property
    def chips(self) -> int:
        """Chips in the mesh."""
        return math.prod(self.mesh.values())

    @property
    def needed(self) -> int:
        """The largest need of a program, in bytes a chip."""
        return max(phase.needed for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether there is room for every program."""
        return self.needed <= self.limit

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second, on all chips together, with all slots full."""
        decode = self.phases[-1]
        return decode.rows / decode.seconds

    def questions_per_second(self, tokens: int) -> float:
        """Questions a second, with answers of so many tokens; the first comes with the insert.

        One question an image; questions of the longest planned length.
        """
        prefill, *_, insert, decode = self.phases
        each = prefill.seconds / prefill.rows + insert.seconds / insert.rows
        return 1 / (each + (tokens - 1) * decode.seconds / decode.rows)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON, with the figures that follow from its fields."""
        tree = dataclasses.asdict(self) | {"chips": self.chips, "needed": self.needed}
        tree["phases"] = [
            dataclasses.asdict(phase) | {"seconds": phase.seconds, "bandwidth": phase.bandwidth}
            for phase in self.phases
        ]
        tree["fits"] = self.fits
        if self.fits:
            tree["tokens_per_second"] = self.tokens_per_second
            tree["questions_per_second"] = {
                str(n): self.questions_per_second(n) for n in (1, self.new_tokens)
            }
        return tree

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "InferencePlan":
        """Reads what `to_json` wrote."""
        known = {field.name: tree[field.name] for field in dataclasses.fields(cls)}
        known["phases"] = tuple(Phase.from_json(phase) for phase in tree["phases"])
        return cls(**known)
