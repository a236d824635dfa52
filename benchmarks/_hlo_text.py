"""The text of a compiled program, as objects: computations, instructions and array types."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

_BITS_OF_ODD_TYPES = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
# Memory spaces as layouts write them, ``S(1)``: what is on the chip of a TPU (1 its vector memory,
# 2 and 6 flags and scalars) is not read from the main memory.
_MAIN_MEMORY, HOST_MEMORY, SCALAR_MEMORY = 0, 5, 6


class Array(NamedTuple):
    """One array type, such as ``f32[128,64]``."""

    element: str
    shape: tuple[int, ...]
    memory: int = _MAIN_MEMORY

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        if self.element in _BITS_OF_ODD_TYPES:
            bits = _BITS_OF_ODD_TYPES[self.element]
        else:
            bits = int(re.findall(r"\d+", self.element)[0])  # f32, s4, f8e4m3fn
        return math.ceil(self.size * bits / 8)

    @property
    def main_bytes(self) -> int:
        """Bytes that pass the bus to the main memory, or the host's, when all of it is read."""
        return self.num_bytes if self.memory in (_MAIN_MEMORY, HOST_MEMORY) else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    type_text: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The result; several arrays if it is a tuple."""
        found = re.findall(
            r"\b([a-z]+[0-9a-z]*)\[([\d,<=]*)\](?:\{[^}]*?S\((\d+)\)[^}]*\})?", self.type_text
        )
        return tuple(
            Array(
                element,
                tuple(int(d.lstrip("<=")) for d in dims.split(",") if d),
                int(memory or _MAIN_MEMORY),
            )
            for element, dims, memory in found
        )

    @property
    def num_bytes(self) -> int:
        return sum(array.num_bytes for array in self.arrays)

    @property
    def main_bytes(self) -> int:
        return sum(array.main_bytes for array in self.arrays)

    def called(self, *keys: str) -> list[str]:
        """Names of the computations given by these attributes, in order."""
        names = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            if match:
                names += re.findall(r"[\w.\-]+", match[1])
        return names


Computations = dict[str, dict[str, Instruction]]


def _balanced(text: str, start: int) -> int:
    """Position after the bracket that closes the one at ``start``."""
    depth = 0
    for position in range(start, len(text)):
        if text[position] in "([{":
            depth += 1
        elif text[position] in ")]}":
            depth -= 1
            if depth == 0:
                return position + 1
    raise ValueError(f"unbalanced brackets in HLO: {text[:200]}")


def _parse_instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    type_text, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _balanced(rest, len(opcode))
    inside, attributes = rest[len(opcode) : end], rest[end:]
    is_literal = opcode in ("constant", "parameter")
    operands = () if is_literal else tuple(re.findall(r"%([\w.\-]+)", inside))
    if is_literal:
        attributes = inside[1:-1]
    return Instruction(match[2], opcode, type_text, operands, attributes, bool(match[1]))


def parse(text: str) -> tuple[Computations, str]:
    """All computations of a module by name, and the name of its entry."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = _parse_instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("no entry computation: is this the text of a compiled program?")
    return computations, entry
