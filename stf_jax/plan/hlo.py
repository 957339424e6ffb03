"""Reads the text of a program that XLA has compiled: its computations, and their instructions."""

import dataclasses
import math
import re

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
        match = re.search(rf"\b{name}={pattern}", self.rest)
        return match and match.group(1)

    @property
    def cycles(self) -> int:
        """The compiler's estimate of cycles; 0 where it has none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(match.group(1)) if match else 0

    @property
    def operands(self) -> list[str]:
        """Names of the operands; "name#1" is the second part of a tuple."""
        return re.findall(r"%([\w.\-#]+)", self.rest[: _closing(self.rest)])

    @property
    def source(self) -> str:
        """The place in the program, without loops and transforms."""
        name = self.attribute("op_name", r'"([^"]*)"') or self.opcode
        # In the text a quotation mark is behind a backslash.
        whole = re.sub(r"^jit\(\w+\)/", "", name.replace("\\'", "'"))
        parts = [part for part in whole.split("/") if part not in _NOISE]
        return "/".join(parts) or self.opcode


_NOISE = ("while", "body", "closed_call", "checkpoint", "rematted_computation", "eval_jaxpr")


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


def shapes_of(instructions: list[Instruction]) -> dict[str, str]:
    """The shape of each result, by its name as an operand, and of each part of a tuple."""
    shapes = {instruction.name: instruction.shape for instruction in instructions}
    for instruction in instructions:
        parts = _parts(instruction.shape) if instruction.shape.startswith("(") else []
        shapes |= {f"{instruction.name}#{index}": part for index, part in enumerate(parts)}
    return shapes


def _parts(shape: str) -> list[str]:
    """The shapes in a tuple."""
    shape = re.sub(r"/\*.*?\*/", "", shape)
    parts, depth, start = [], 0, 1
    for index, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 or (depth == 1 and character == ","):
            parts.append(shape[start:index].strip())
            start = index + 1
    return parts


def _closing(text: str) -> int:
    """The index at which the operands end."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return index
    return len(text)


def byte_count(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    return sum(
        math.ceil(_bits(dtype) * math.prod(int(n) for n in sizes.split(",") if n) / 8)
        for dtype, sizes in _SHAPE.findall(shape)
    )


def _bits(dtype: str) -> int:
    match = re.search(r"\d+", dtype)
    return _BITS.get(dtype, int(match.group()) if match else 0)


def element_counts(shape: str) -> list[int]:
    """Elements of each array of a tuple."""
    return [math.prod(int(n) for n in sizes.split(",") if n) for _, sizes in _SHAPE.findall(shape)]


def dimensions(shape: str) -> list[int]:
    """The sizes of an array; of a tuple, those of the first."""
    match = _SHAPE.search(shape)
    return [int(n) for n in match.group(2).split(",") if n] if match else []


def short(shape: str) -> str:
    """A shape without its layout; of a tuple, the first."""
    match = _SHAPE.search(shape)
    return match.group() if match else shape
