"""How the language model's weights are stored as integers: every scheme, and what it covers.

`int8`      8 bits, one scale an output channel
`int4`      4 bits, one scale for 32 inputs of an output channel
`int4-N`    the same for N inputs, a power of two

Integers are symmetric: weight = integer * scale. A scheme covers the seven projections of each
decoder layer. The embedding, the head, norms, the connector and the vision tower stay as they are:
docs/quantization.md has what each would save and cost.
"""

import dataclasses
import re

# Of `int4`: what llama.cpp's Q4_0 has.
_GROUP = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """Integers of so many bits, and which of them share a scale.

    Attributes:
        bits: 8, or 4.
        group: inputs that share a scale; None is all of an output channel.
    """

    bits: int
    group: int | None

    @property
    def dtype(self) -> str:
        """Of the integers."""
        return f"int{self.bits}"

    @property
    def scale_dtype(self) -> str:
        """Of the scales: rounding them is an error as large as int8's own, and small beside int4's.

        There are few for a whole channel, and many for groups.
        """
        return "float32" if self.group is None else "bfloat16"

    def inputs_per_scale(self, inputs: int) -> int:
        """How many of the last input axis share a scale: no more than there are."""
        return inputs if self.group is None else min(self.group, inputs)


def parse_scheme(name: str) -> Scheme:
    """The scheme of a name.

    Raises:
        ValueError: there is none of that name; lists them.
    """
    if name == "int8":
        return Scheme(bits=8, group=None)
    match = re.fullmatch(r"int4(?:-([1-9]\d{0,5}))?", name)
    group = int(match[1] or _GROUP) if match else 0
    if group < 2 or group & (group - 1):
        raise ValueError(
            f"quantization {name!r} is unknown; choose int8, int4, or int4-N for groups of N, a "
            "power of two such as 128"
        )
    return Scheme(bits=4, group=group)


def check_scheme(name: str, sizes: dict[str, int]) -> None:
    """Refuses a scheme that does not divide a model.

    Args:
        name: of the scheme.
        sizes: the input axes of its projections, by name.

    Raises:
        ValueError: there is no such scheme, or what does not divide, and a group that does.
    """
    scheme = parse_scheme(name)
    wrong = [
        f"{label} {size}" for label, size in sizes.items() if size % scheme.inputs_per_scale(size)
    ]
    if not wrong:
        return
    fits = scheme.group or 1
    while any(size % min(fits, size) for size in sizes.values()):
        fits //= 2
    fix = f"choose int4-{fits}" if fits > 1 else "choose int8"
    raise ValueError(
        f"quantization {name}: groups of {scheme.group} do not divide {', '.join(wrong)}; {fix}"
    )


def check_named(scheme: str | None, architecture: str | None) -> None:
    """Refuses a scheme without a named size, which nothing would read.

    Raises:
        ValueError: names both ways out.
    """
    if scheme is not None and architecture is None:
        raise ValueError(
            f"quantization {scheme} is that of a named size, which is missing; add architecture, "
            "or leave quantization out: a model on disk knows its own"
        )
