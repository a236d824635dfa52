"""What a compiled program does, read off its HLO text: bytes, kernels, copies, collectives.

``compiled.cost_analysis()`` counts the dearest branch of every conditional, so a rare fallback
that reads the gradients again looks as if every step paid for it. Here the program is walked from
its entry, loop bodies as often as they run, and of each conditional only the branch that costs
least. For programs without conditionals both agree.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_BITS_OF_ODD_TYPES = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
# fmt: off
_FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
    "add-dependency", "partition-id", "replica-id", "domain",
))
_COLLECTIVES = frozenset((
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
))
# fmt: on
_READS_PART_OF_FIRST = frozenset(("slice", "dynamic-slice", "gather"))
_HOST_OPCODES = frozenset(("infeed", "outfeed", "send", "recv"))


class Array(NamedTuple):
    """One array type, such as ``f32[128,64]``."""

    element: str
    shape: tuple[int, ...]

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
        found = re.findall(r"\b([a-z]+[0-9a-z]*)\[([\d,<=]*)\]", self.type_text)
        return tuple(
            Array(element, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d))
            for element, dims in found
        )

    @property
    def num_bytes(self) -> int:
        return sum(array.num_bytes for array in self.arrays)

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


class Collective(NamedTuple):
    """One collective: its kind, how many arrays it carries and how many elements in all."""

    kind: str
    num_arrays: int
    size: int


@dataclasses.dataclass
class Cost:
    """What one pass through a computation does.

    Attributes:
      num_bytes: read and written by all kernels; what stays in registers is not counted.
      num_kernels: instructions that run, fused ones together as one.
      copies: sizes, in elements, of the arrays that are copied without any arithmetic.
      collectives: communication between devices.
      num_host_transfers: infeeds, outfeeds, callbacks to Python and buffers in host memory.
    """

    num_bytes: float = 0.0
    num_kernels: int = 0
    copies: list[int] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    num_host_transfers: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        self.num_bytes += times * other.num_bytes
        self.num_kernels += times * other.num_kernels
        self.copies += times * other.copies
        self.collectives += times * other.collectives
        self.num_host_transfers += times * other.num_host_transfers


class Program:
    """A compiled program.

    Attributes:
      hot: cost when every conditional takes its cheapest branch.
      dear: cost when every conditional takes its dearest branch.
      num_conditionals: in the whole program.
    """

    def __init__(self, text: str):
        self._computations, self._entry = parse(text)
        self._costs: dict[tuple[str, bool], Cost] = {}
        self.hot = self._cost(self._entry, True)
        self.dear = self._cost(self._entry, False)
        every = [op for body in self._computations.values() for op in body.values()]
        self.num_conditionals = sum(op.opcode == "conditional" for op in every)

    def _cost(self, name: str, is_hot: bool) -> Cost:
        if (name, is_hot) not in self._costs:
            cost = Cost()
            body = self._computations[name]
            for instruction in body.values():
                self._add(cost, instruction, body, is_hot)
            self._costs[name, is_hot] = cost
        return self._costs[name, is_hot]

    def _add(self, cost: Cost, op: Instruction, body: dict[str, Instruction], is_hot: bool) -> None:
        if op.opcode in _FREE or op.opcode.endswith("-done"):
            return
        if op.opcode == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            branches = [self._cost(name, is_hot) for name in op.called(*keys)]
            choose = min if is_hot else max
            cost.add(choose(branches, key=lambda branch: branch.num_bytes))
        elif op.opcode == "while":
            for name in op.called("body", "condition"):
                cost.add(self._cost(name, is_hot), times=self._num_trips(op))
        elif op.opcode in ("call", "async-start"):
            for name in op.called("to_apply", "calls", "called_computations"):
                cost.add(self._cost(name, is_hot))
        else:
            self._add_kernel(cost, op, body)

    def _num_trips(self, op: Instruction) -> int:
        """How often a loop runs; once if it is not known."""
        match = re.search(r'"known_trip_count":\{"n":"?(\d+)', op.attributes)
        if match:
            return int(match[1])
        # Without the annotation: a counter compared with the only integer in the condition.
        (condition,) = op.called("condition")
        lines = self._computations[condition].values()
        bounds = [line.attributes for line in lines if line.opcode == "constant"]
        is_count = len(bounds) == 1 and re.fullmatch(r"\d+", bounds[0])
        return int(bounds[0]) if is_count else 1

    def _add_kernel(self, cost: Cost, op: Instruction, body: dict[str, Instruction]) -> None:
        cost.num_kernels += 1
        kind = op.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            arrays = [array for name in op.operands for array in body[name].arrays]
            size = sum(array.size for array in arrays)
            cost.collectives.append(Collective(kind, len(arrays), size))
            cost.num_bytes += 2 * sum(array.num_bytes for array in arrays)
            return
        is_callback = op.opcode == "custom-call" and "callback" in op.attributes
        on_host = "S(5)" in op.type_text
        cost.num_host_transfers += is_callback or on_host or op.opcode in _HOST_OPCODES
        if kind == "copy" or self._only_copies(op):
            copied = body[op.operands[0]]
            cost.copies.append(sum(array.size for array in copied.arrays))
            cost.num_bytes += 2 * copied.num_bytes
        elif op.opcode == "fusion":
            cost.num_bytes += self._fusion_bytes(op, body)
        else:
            cost.num_bytes += _bytes_of(op, [body[name].num_bytes for name in op.operands])

    def _only_copies(self, op: Instruction) -> bool:
        if op.opcode != "fusion":
            return False
        (name,) = op.called("calls")
        fused = {line.opcode for line in self._computations[name].values()}
        return "copy" in fused and fused <= {"parameter", "copy", "bitcast"}

    def _fusion_bytes(self, op: Instruction, body: dict[str, Instruction]) -> int:
        (name,) = op.called("calls")
        fused = self._computations[name]
        total = 0
        for line in fused.values():
            if line.opcode == "parameter":
                operand = body[op.operands[int(line.attributes)]]
                total += min(operand.num_bytes, _bytes_read(line, fused))
        root = next(line for line in fused.values() if line.is_root)
        if root.opcode == "dynamic-update-slice":
            return total + fused[root.operands[1]].num_bytes
        return total + op.num_bytes


def _bytes_of(op: Instruction, operand_bytes: list[int]) -> int:
    """Bytes of an instruction that is not fused."""
    if op.opcode in _READS_PART_OF_FIRST:
        return 2 * op.num_bytes + sum(operand_bytes[1:])
    if op.opcode == "dynamic-update-slice":
        return 2 * operand_bytes[1]
    return op.num_bytes + sum(operand_bytes)


def _bytes_read(parameter: Instruction, fused: dict[str, Instruction]) -> int:
    """Bytes of a fusion's parameter that are read, less than all if only slices are used."""
    total = 0
    for user in _users(parameter, fused):
        is_first = user.operands[0] == parameter.name
        if is_first and user.opcode in _READS_PART_OF_FIRST:
            total += user.num_bytes
        elif is_first and user.opcode == "dynamic-update-slice":
            continue
        else:
            return parameter.num_bytes
    return total


def _users(op: Instruction, fused: dict[str, Instruction]) -> Iterator[Instruction]:
    return (line for line in fused.values() if op.name in line.operands)


def analyze(compiled: Any) -> Program:
    """The program behind ``jax.jit(f).lower(...).compile()``."""
    return Program(compiled.as_text())
