"""What a compiled program does, read off its HLO text: bytes, kernels, copies, collectives.

``compiled.cost_analysis()`` counts the dearest branch of every conditional, so a rare fallback
that reads the gradients again looks as if every step paid for it. Here the program is walked from
its entry, loop bodies as often as they run, and of each conditional only the branch that costs
least. For programs without conditionals both agree.

Bytes are those of the main memory. On a TPU an array in vector memory costs nothing, and what an
asynchronous copy brings there counts once, as read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks._hlo_text import (
    HOST_MEMORY,
    SCALAR_MEMORY,
    Instruction,
    parse,
)

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
_MAKES_NOTHING = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')


class Collective(NamedTuple):
    """One collective.

    Attributes:
      kind: such as ``"all-reduce"``.
      num_arrays: that it carries.
      size: elements in all of them.
      overlaps: whether kernels run between its start and its end.
    """

    kind: str
    num_arrays: int
    size: int
    overlaps: bool = False


@dataclasses.dataclass
class Cost:
    """What one pass through a computation does.

    Attributes:
      num_bytes: read from and written to main memory by all kernels; what stays on the chip is
        not counted.
      num_kernels: instructions that run, fused ones together as one.
      num_conditionals: at which a device has to know what it computed before it goes on.
      copies: sizes, in elements, of the arrays that are copied without any arithmetic.
      collectives: communication between devices.
      num_host_transfers: infeeds, outfeeds, callbacks to Python and buffers in host memory.
    """

    num_bytes: float = 0.0
    num_kernels: int = 0
    num_conditionals: int = 0
    copies: list[int] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    num_host_transfers: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        self.num_bytes += times * other.num_bytes
        self.num_kernels += times * other.num_kernels
        self.num_conditionals += times * other.num_conditionals
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
            cost.num_conditionals += 1
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
        if op.arrays and all(array.memory == SCALAR_MEMORY for array in op.arrays):
            return  # on the scalar unit of a TPU
        if op.opcode == "custom-call" and _MAKES_NOTHING.search(op.attributes):
            return
        kind = op.opcode.removesuffix("-start")
        operands = [body[name] for name in op.operands]
        collective = self._collective(op, kind, body)
        if collective is not None:
            cost.num_kernels += 1
            cost.collectives.append(collective)
            cost.num_bytes += 2 * sum(operand.main_bytes for operand in operands)
            return
        is_callback = op.opcode == "custom-call" and "callback" in op.attributes
        on_host = any(array.memory == HOST_MEMORY for array in op.arrays)
        cost.num_host_transfers += is_callback or on_host or op.opcode in _HOST_OPCODES
        if kind == "copy" or self._only_copies(op):
            written = op.arrays[0].main_bytes if kind != op.opcode else op.main_bytes
            read = operands[0].main_bytes
            cost.num_bytes += written + read
            if written and read:  # else it is a read ahead, or written back
                cost.num_kernels += 1
                cost.copies.append(sum(array.size for array in operands[0].arrays))
        elif kind != op.opcode:
            cost.num_bytes += _bytes_ahead(op, operands)
        else:
            cost.num_kernels += 1
            cost.num_bytes += (
                self._fusion_bytes(op, body) if kind == "fusion" else _bytes_of(op, operands)
            )

    def _collective(
        self, op: Instruction, kind: str, body: dict[str, Instruction]
    ) -> Collective | None:
        """The collective that an instruction is, or that is fused into it."""
        if kind in _COLLECTIVES:
            arrays = [array for name in op.operands for array in body[name].arrays]
            size = sum(array.size for array in arrays)
            return Collective(kind, len(arrays), size, _overlaps(op, body))
        if kind == "fusion":
            for name in op.called("calls"):
                fused = self._computations[name]
                for line in fused.values():
                    found = self._collective(line, line.opcode.removesuffix("-start"), fused)
                    if found is not None:
                        return found._replace(overlaps=_overlaps(op, body))
        return None

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
                total += min(operand.main_bytes, _bytes_read(line, fused))
        root = next(line for line in fused.values() if line.is_root)
        roots = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(roots) != len(op.arrays):
            return total + op.main_bytes
        for line, array in zip(roots, op.arrays, strict=True):
            while line.opcode == "bitcast":
                line = fused[line.operands[0]]
            is_part = line.opcode == "dynamic-update-slice"
            part = fused[line.operands[1]].num_bytes if is_part else array.num_bytes
            total += min(part, array.main_bytes)
        return total


def _overlaps(op: Instruction, body: dict[str, Instruction]) -> bool:
    """Whether kernels stand between the start and the end of an instruction."""
    if not op.opcode.endswith("-start"):
        return False
    lines = list(body.values())
    for line in lines[lines.index(op) + 1 :]:
        if op.name in line.operands and line.opcode.endswith("-done"):
            return False
        is_kernel = line.opcode not in _FREE and not line.opcode.endswith(("-start", "-done"))
        if is_kernel and any(array.memory != SCALAR_MEMORY for array in line.arrays):
            return True
    return False


def _bytes_of(op: Instruction, operands: list[Instruction]) -> int:
    """Bytes of an instruction that is not fused."""
    operand_bytes = [operand.main_bytes for operand in operands]
    if op.opcode in _READS_PART_OF_FIRST:
        return op.main_bytes + min(operand_bytes[0], op.num_bytes) + sum(operand_bytes[1:])
    if op.opcode == "dynamic-update-slice":
        return operand_bytes[1] + min(op.main_bytes, operands[1].num_bytes)
    return op.main_bytes + sum(operand_bytes)


def _bytes_ahead(op: Instruction, operands: list[Instruction]) -> int:
    """Bytes of what starts here, such as a slice that is brought on to the chip."""
    sources = sum(len(operand.arrays) for operand in operands)
    made = op.arrays[sources] if len(op.arrays) > sources else op.arrays[-1]
    read = sum(operand.main_bytes for operand in operands)
    return made.main_bytes + min(read, made.num_bytes)


def _bytes_read(parameter: Instruction, fused: dict[str, Instruction]) -> int:
    """Bytes of a fusion's parameter that are read, less than all if only slices are used."""
    total = 0
    for user in _users(parameter, fused):
        is_first = user.operands[0] == parameter.name
        if user.opcode == "bitcast":
            total += _bytes_read(user, fused)
        elif is_first and user.opcode in _READS_PART_OF_FIRST:
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
