"""Records on their way, and where they go: a file or the memory, and sinks."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optax_guard.runlog import file as _file
from optax_guard.runlog.about import About
from optax_guard.runlog.fetch import (
    FAULT_LEAVES,
    FAULT_STEPS,
    LEAF_NORMS,
    STEP,
    Pending,
    Record,
)

Sink = Callable[[Record, int], object]

_NO_SCALARS = (STEP, LEAF_NORMS, FAULT_LEAVES)

# Records that may wait for their step to finish; a kill loses no more than these.
_MOST_PENDING = 32


class Log:
    """Writes records as they arrive; outlives its :class:`History` for the last flush."""

    def __init__(self, path: Path | None, sinks: tuple[Sink, ...]):
        """Opens the file, if there is one."""
        self.path = path
        self.memory: list[Record] = []
        self.about = About()
        self.is_closed = False
        self._sinks = sinks
        self._pending: deque[tuple[Pending, int]] = deque()
        self._last_faults: list[int] | None = None
        self._writer = None if path is None else _file.LineWriter(path)
        if self._writer is not None:
            self.about = self._writer.about

    def add(self, pending: Pending, every: int) -> None:
        """Queues a record, of which only steps divisible by ``every`` are written."""
        self._pending.append((pending, every))
        self.drain(wait=False)

    def drain(self, *, wait: bool) -> None:
        """Writes what has arrived, in order; with ``wait`` everything."""
        while self._pending:
            oldest, every = self._pending[0]
            if not (wait or oldest.is_ready() or len(self._pending) > _MOST_PENDING):
                return
            self._pending.popleft()
            record = oldest.get()
            if record[STEP] % every == 0:
                self._write({STEP: record.pop(STEP)} | record)

    def _write(self, record: Record) -> None:
        faults, bad = record.pop(FAULT_STEPS, None), record.pop(FAULT_LEAVES, None)
        if faults != self._last_faults and bad:  # the states keep them until the next fault
            record[FAULT_LEAVES] = bad
        self._last_faults = faults if faults is not None else self._last_faults
        if self._writer is None:
            self.memory.append(record)
        else:
            self._writer.append(record, self.about)
        if self._sinks:
            row = record | _layers(record, self.about.leaf_names)
            row = {key: value for key, value in row.items() if key not in _NO_SCALARS}
            for sink in self._sinks:
                sink(dict(row), record[STEP])

    def read(self) -> list[Record]:
        """All records written so far."""
        if self.path is None:
            return [dict(record) for record in self.memory]
        return _file.read(self.path).records

    def close(self) -> None:
        """Writes what is left."""
        self.is_closed = True
        with contextlib.ExitStack() as stack:
            if self._writer is not None:
                stack.callback(self._writer.close)
            self.drain(wait=True)


def _layers(record: Record, leaf_names: Sequence[str]) -> Record:
    """The norm of each layer under a name of its own; none that was not measured."""
    norms = record.get(LEAF_NORMS, ())
    return {
        f"layers/{name}": norm
        for name, norm in zip(leaf_names, norms, strict=False)
        if norm is not None
    }


def as_sinks(sinks: Any) -> tuple[Sink, ...]:
    """Each sink as a function ``(record, step)``; a single one need not be in a list."""
    if callable(sinks) or hasattr(sinks, "add_scalar"):
        sinks = (sinks,)
    return tuple(_as_sink(sink) for sink in sinks)


def _as_sink(sink: Any) -> Sink:
    add_scalar = getattr(sink, "add_scalar", None)
    if callable(add_scalar):

        def write(row: Record, step: int) -> None:
            for name, value in row.items():
                add_scalar(name, value, step)

        return write
    if not callable(sink):
        raise TypeError(
            "a sink must have add_scalar(name, value, step) or be a callable (dict, step), got "
            f"{sink!r} of type {type(sink).__name__}."
        )
    return sink
