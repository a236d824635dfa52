"""A record of what happened in a run: numbers of every step, a picture, a summary. Host side."""

from __future__ import annotations

import contextlib
import numbers
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from optax_guard._core.checks import check_count
from optax_guard.reading.find import refuse_tracers
from optax_guard.reading.names import NamedLeaf, gradient_leaves
from optax_guard.runlog import file as _file
from optax_guard.runlog.fetch import (
    LEAF_NORMS,
    STEP,
    Layout,
    Pending,
    Record,
    find_layout,
    split_scalars,
)
from optax_guard.runlog.summary import summarize

Sink = Callable[[Record, int], object]

# Records that may wait for their step to finish; a kill loses no more than these.
_MOST_PENDING = 32


class History:
    """Records what every state of this library says, step after step, and draws it.

    ``append`` copies the scalars that :func:`metrics` finds, and the norms of all leaves that the
    outermost guards saw, into one small array on the device, starts its transfer, and returns. A
    record is written by a later call once its numbers have arrived, so that the step is not
    waited for, and a loop that donates its state does not take them away. Only when 32 records
    are on their way does ``append`` wait for the oldest. ``flush``, ``close``, the end of a
    ``with`` block and the end of the process write all that is left.

    With a ``path`` the records live in that file, one JSON object a line, each handed to the
    operating system at once: a run that is killed loses what had not arrived, and at most tears
    the last line, which is left out on reading. A file that exists is continued; where the new
    run repeats steps, as it does after a restart from a checkpoint, its records replace the
    earlier ones on reading. JSON has no NaN and no infinity (RFC 8259): they are written as the
    strings "NaN", "Infinity" and "-Infinity", and read back as numbers. Without a path, records
    are kept in memory: about 2 kB each, and 32 bytes for each leaf.

    A record is a dict of ``step``, the keys of :func:`metrics`, ``leaf_norms`` (a list, if there
    is a guard) and the scalars given by name. With several processes only the first one records.

    Args:
      path: file to write, by custom ``*.jsonl``, or None. Its folder is made.
      every: record a step if it is divisible by this.
      sinks: where else each record goes: objects with ``add_scalar(name, value, step)``, such as
        the writers of TensorBoard, or callables ``(dict, step)``, such as
        ``lambda row, step: wandb.log(row, step=step)``. They get no ``leaf_norms``. What they
        raise is raised by the ``append`` or ``flush`` that called them.
      params: the parameters, or a tree of their structure, for the names of the leaves.

    Raises:
      ValueError: if ``every`` is not positive, or ``path`` exists and holds something else.
      TypeError: if a sink is neither of the two.
      OSError: if the file cannot be opened.

    Cost: a call that records takes the host 0.1 ms (6 arrays) to 0.2 ms (148 arrays, Adam) with
    warm caches, and 0.5 ms between the steps of a loop on two CPU cores (74 arrays, with a file);
    the others 2 µs. With ``every=10`` that is 0.9 % of a step of 5 ms on the host, and less of
    the step itself where the host runs ahead of the device (``benchmarks/history_cost.py``).

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = {"w": jnp.zeros(2)}
      >>> tx = og.guard(optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> history = og.History(params=params)
      >>> for step, x in enumerate([3.0, jnp.nan, 6.0]):
      ...     _, state = tx.update({"w": jnp.array([x, 4.0])}, state)
      ...     history.append(step, state, loss=x)
      >>> history.series("guard/skipped_total")
      array([0., 1., 1.])
      >>> history.leaf_names, history.records[0]["leaf_norms"]
      (('w',), [5.0])
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        every: int = 1,
        sinks: Any = (),
        params: Any = None,
    ):
        check_count("every", every)
        self._every = int(every)
        self._leaves = None if params is None else _outlines(params)
        self._layouts: dict[Any, Layout] = {}
        self._is_recording = jax.process_index() == 0
        self._is_torn = False
        path = None if path is None else Path(path)
        self._log = _Log(path if self._is_recording else None, _as_sinks(sinks))
        self._finalizer = weakref.finalize(self, self._log.close)

    def append(self, step: int | jax.Array, opt_state: Any, **scalars: Any) -> None:
        """Records a step, if it is its turn.

        Args:
          step: its number. A device array (such as ``TrainState.step``) is fetched later, too, but
            then every call makes the copy.
          opt_state: any pytree with a state of this library in it, or None for scalars only.
          **scalars: numbers to record along, such as ``loss=loss``; arrays of the device are
            fetched later. ``loss`` is drawn, and so is ``threshold``, as the limit of the clip.

        Raises:
          ValueError: if there is no state of this library in ``opt_state``, if it is one of
            several models, if a scalar is none, or after ``close``.
          TypeError: if ``step`` is no integer, a scalar is no number, or inside ``jit``.
        """
        if self._log.is_closed:
            raise ValueError("This og.History is closed; it takes no more records.")
        is_on_device = isinstance(step, jax.Array)
        if type(step) is not int:
            refuse_tracers("History.append", step)
            _check_step(step)
        if not self._is_recording or not (is_on_device or step % self._every == 0):
            return
        known, arrays = split_scalars(scalars)
        if is_on_device:
            arrays[STEP] = step
        else:
            known[STEP] = int(step)
        names, values = list(arrays), list(arrays.values())
        if opt_state is not None:
            leaves, layout = self._look_into(opt_state)
            names += [name for name, _ in layout.metrics] + [LEAF_NORMS] * len(layout.norms)
            positions = [position for _, position in layout.metrics] + list(layout.norms)
            values += [leaves[position] for position in positions]
            refuse_tracers("History.append", values)
            self._log.leaf_names = layout.leaf_names or self._log.leaf_names
        self._log.add(Pending(names, values, known), self._every)

    def _look_into(self, opt_state: Any) -> tuple[list[Any], Layout]:
        leaves, treedef = jax.tree.flatten(opt_state)
        layout = self._layouts.get(treedef)
        if layout is None:
            layout = self._layouts[treedef] = find_layout(opt_state, self._leaves)
        return leaves, layout

    @property
    def records(self) -> list[Record]:
        """All records, after a wait for those on their way; read from the file if there is one."""
        self.flush()
        return self._log.read()

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """Names of the elements of ``leaf_norms``; numbered if no parameters were given."""
        return self._log.leaf_names or ()

    @property
    def is_torn(self) -> bool:
        """Whether the file that :meth:`load` read ended in an incomplete line, now left out."""
        return self._is_torn

    def __len__(self) -> int:
        return len(self.records)

    def series(self, name: str) -> np.ndarray:
        """One number over all records, as float64 ``[records]``; NaN where it was not recorded.

        Raises:
          KeyError: if no record has it.
        """
        return series_of(self.records, name)

    def flush(self) -> None:
        """Waits for the records on their way and writes them."""
        self._log.drain(wait=True)

    def close(self) -> None:
        """Writes what is left and closes the file. Sinks stay open: they belong to the caller."""
        self._finalizer()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Reads a file into memory; records appended to the result do not reach the file.

        Raises:
          OSError: if the file cannot be read.
          ValueError: if it is no history, with the number of the line.
        """
        contents = _file.read(Path(path))
        history = cls()
        history._log.memory = contents.records
        history._log.leaf_names = contents.leaf_names
        history._is_torn = contents.is_torn
        return history

    def save(self, path: str | Path) -> Path:
        """Writes all records to a file that :meth:`load` reads, and returns its path.

        What is at ``path`` is replaced once the new file is complete.

        Raises:
          ValueError: if ``path`` is the file that this history is still writing.
        """
        path = Path(path)
        log_path = self._log.path
        if log_path is not None and path.resolve() == log_path.resolve():
            raise ValueError(f"{path} is the file that this history writes itself; call flush().")
        if self._is_recording:
            _file.write_all(path, self.records, self.leaf_names)
        return path

    def plot(self, path: str | Path) -> Path:
        """Draws the run and returns the path of the picture: PNG, SVG or PDF, by its ending.

        Above the loss, if it was recorded; then the gradient norm before any clipping and the
        limit, on a logarithmic axis, with a mark for every clip and every skip; below a map of
        the norms of all leaves over time. The limit is ``threshold`` if that was recorded, else
        the norm times the smallest factor of the outermost clip in each step that was clipped,
        which is the limit if the clip has ``scope="global"``. With ``every`` above 1, clips and
        skips between two records are marked at the later one.

        Raises:
          ImportError: if matplotlib is missing.
          ValueError: if nothing was recorded.
        """
        from optax_guard.runlog.plot import draw

        if self._is_recording:
            draw(self.records, self.leaf_names, Path(path))
        return Path(path)

    def summary(self) -> str:
        """Counts of skips and clips, and tables of scalars and layers, as text.

        With rich installed the tables have lines; the numbers are the same.
        """
        return summarize(self.records, self.leaf_names)


class _Log:
    """Records on their way and where they go; outlives its :class:`History` for the last flush."""

    def __init__(self, path: Path | None, sinks: tuple[Sink, ...]):
        self.path = path
        self.memory: list[Record] = []
        self.leaf_names: tuple[str, ...] | None = None
        self.is_closed = False
        self._sinks = sinks
        self._pending: deque[tuple[Pending, int]] = deque()
        self._writer = None if path is None else _file.LineWriter(path)
        if self._writer is not None:
            self.leaf_names = self._writer.leaf_names

    def add(self, pending: Pending, every: int) -> None:
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
        if self._writer is None:
            self.memory.append(record)
        else:
            self._writer.append(record, self.leaf_names)
        row = {key: value for key, value in record.items() if key not in (STEP, LEAF_NORMS)}
        for sink in self._sinks:
            sink(dict(row), record[STEP])

    def read(self) -> list[Record]:
        if self.path is None:
            return [dict(record) for record in self.memory]
        return _file.read(self.path).records

    def close(self) -> None:
        self.is_closed = True
        with contextlib.ExitStack() as stack:
            if self._writer is not None:
                stack.callback(self._writer.close)
            self.drain(wait=True)


def series_of(records: Sequence[Record], name: str) -> np.ndarray:
    """One number over all records; NaN where it is missing."""
    if not any(name in record for record in records):
        known = sorted({key for record in records for key in record} - {LEAF_NORMS})
        raise KeyError(f"No record has {name!r}; there are {', '.join(known) or 'no records'}.")
    return np.array([record.get(name, np.nan) for record in records], dtype=float)


def _check_step(step: Any) -> None:
    is_integer = isinstance(step, numbers.Integral) and not isinstance(step, bool)
    if isinstance(step, (jax.Array, np.ndarray)) and np.ndim(step) == 0:
        is_integer = np.issubdtype(step.dtype, np.integer)
    if not is_integer:
        raise TypeError(f"step must be an integer, got {step!r} of type {type(step).__name__}.")


def _as_sinks(sinks: Any) -> tuple[Sink, ...]:
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


def _outlines(params: Any) -> list[NamedLeaf]:
    """Names and shapes of the leaves, without their memory."""
    scalar = np.zeros((), np.float32)
    return [
        NamedLeaf(name, np.broadcast_to(scalar, np.shape(leaf)))
        for name, leaf in gradient_leaves(params)
    ]
