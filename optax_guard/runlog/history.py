"""A record of what happened in a run: numbers of every step, a picture, a summary. Host side."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from optax_guard._core.checks import check_count, shown
from optax_guard.reading.find import refuse_traced, refuse_tracers
from optax_guard.reading.names import NamedLeaf, gradient_leaves
from optax_guard.runlog import file as _file
from optax_guard.runlog.fetch import (
    FAULT_LEAVES,
    LEAF_NORMS,
    STEP,
    Layout,
    Pending,
    Record,
    find_layout,
    keys_of_arrays,
    outline,
)
from optax_guard.runlog.log import Log, as_sinks
from optax_guard.runlog.scalars import check_step, split_scalars
from optax_guard.runlog.summary import summarize


class History:
    """Records what every state of this library says, step after step, and draws it.

    ``append`` copies the scalars that :func:`metrics` finds, and the norms of all layers that the
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

    A record is a dict of ``step``, the keys of :func:`metrics`, the scalars given by name and, if
    there is a guard, ``leaf_norms``: a list, with None for what was not measured (an unused
    gradient, a guard not called yet). After a fault it has ``fault_leaves``, the indices of the
    leaves that were not finite. Steps are numbered as ``append`` is told, and :func:`explain`
    counts from 0: the same in a loop over ``range()``. With several processes only the first one
    records.

    Args:
      path: file to write, by custom ``*.jsonl``, or None. Its folder is made.
      every: record a step if it is divisible by this.
      sinks: where else each record goes: objects with ``add_scalar(name, value, step)``, such as
        the writers of TensorBoard, or callables ``(dict, step)``, such as
        ``lambda row, step: wandb.log(row, step=step)``. They get the norm of each layer under
        ``layers/<name>``, too. What they raise is raised by the ``append`` or ``flush`` that called
        them.
      params: the parameters, or a tree of their structure, for the names of the leaves.

    Raises:
      ValueError: if ``every`` is not positive, or ``path`` exists and holds something else.
      TypeError: if a sink is neither of the two.
      OSError: if the file cannot be opened.

    Cost: a call that records takes the host 0.1 ms (6 arrays) to 0.25 ms (148 arrays, Adam) with
    warm caches, and between the steps of a loop on two CPU cores (74 parameters) 0.5 ms, with a
    file 0.65 ms; the others 2 µs. With ``every=10`` that is 1.2 and 1.4 % of a step of 4.5 ms on
    the host, and less of the step itself where the host runs ahead of the device
    (``benchmarks/history_cost.py``). The first call compiles what later ones run.

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
        if not isinstance(path, (str, os.PathLike, type(None))):
            raise TypeError(
                f"path must be the name of a file or None, got {shown(path)}. Parameters go by "
                "name: og.History(path, params=params)."
            )
        self._every = int(every)
        self._leaves = None if params is None else _outlines(params)
        self._layouts: dict[Any, Layout] = {}
        self._known: frozenset[tuple[Any, ...]] = frozenset()
        self._is_recording = jax.process_index() == 0
        self._is_torn = False
        path = None if path is None else Path(path)
        self._log = Log(path if self._is_recording else None, as_sinks(sinks))
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
            check_step(step)
        if not self._is_recording or not (is_on_device or step % self._every == 0):
            return
        known, arrays = split_scalars(scalars)
        if is_on_device:
            arrays[STEP] = step
        else:
            known[STEP] = int(step)
        if opt_state is None:
            return self._log.add(Pending(known, arrays), self._every)
        leaves, treedef = outline(opt_state, self._known)
        layout = self._layouts.get(treedef)
        if layout is None or not layout.matches(leaves):
            refuse_tracers("History.append", opt_state)
            self._known |= keys_of_arrays(opt_state)
            leaves, treedef = outline(opt_state, self._known)
            layout = find_layout(opt_state, self._leaves, self._known)
            self._layouts[treedef] = layout
        vectors = layout.pick(leaves)
        refuse_traced("History.append", vectors)
        if layout.about.leaf_names or not self._log.about.leaf_names:
            self._log.about = layout.about
        return self._log.add(Pending(known, arrays, layout, vectors), self._every)

    @property
    def records(self) -> list[Record]:
        """All records, after a wait for those on their way; read from the file if there is one."""
        self.flush()
        return self._log.read()

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """Names of the elements of ``leaf_norms``; numbered if no parameters were given."""
        return self._log.about.leaf_names

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
        history._log.about = contents.about
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
            _file.write_all(path, self.records, self._log.about)
        return path

    def plot(self, path: str | Path) -> Path:
        """Draws the run and returns the path of the picture: PNG, SVG or PDF, by its ending.

        Above the loss, if it was recorded; then the gradient norm before any clipping, on a
        logarithmic axis, what is left of it after all clips, and marks for cuts, skips, overflows
        of a loss scale, returns and micro-batches left out; loss scale and back-off, if there are;
        below a map of the norms of all layers over time, in which many layers share lines. The norm
        after the clips is the norm times the factors of those that scale the whole gradient by one
        (a ``clip_by_norm`` is taken for such). ``threshold`` is drawn if that was recorded. With
        ``every`` above 1, what happened between two records is marked at the later one. A path
        without an ending gets ``.png``.

        Raises:
          ImportError: if matplotlib is missing.
          ValueError: if nothing was recorded.
        """
        from optax_guard.runlog.plot import draw

        path = Path(path)
        path = path if path.suffix else path.with_suffix(".png")
        if self._is_recording:
            draw(self.records, self._log.about, path)
        return path

    def report(self, path: str | Path, *, title: str = "Training run") -> Path:
        """Writes summary and picture as one HTML file and returns its path.

        The file holds all that it shows: it needs no other and no network.

        Raises:
          ImportError: if matplotlib is missing.
          ValueError: if nothing was recorded.
        """
        from optax_guard.runlog.report import write_report

        if self._is_recording:
            write_report(self.records, self._log.about, Path(path), title=title)
        return Path(path)

    def summary(self) -> str:
        """What happened in words, and tables of scalars and layers, as text.

        Skips with step, reason, condition and layers; overflows, returns, back-offs and
        micro-batches left out; how often each clip cut, with advice where that is most of the time
        (``recent_clip_rate`` above one half after 100 steps and more). Totals are of all steps.
        With rich installed the tables have lines; the numbers are the same.
        """
        return summarize(self.records, self._log.about)


def series_of(records: Sequence[Record], name: str) -> np.ndarray:
    """One number over all records; NaN where it is missing."""
    if not any(name in record for record in records):
        known = sorted({key for record in records for key in record} - {LEAF_NORMS, FAULT_LEAVES})
        raise KeyError(f"No record has {name!r}; there are {', '.join(known) or 'no records'}.")
    return np.array([record.get(name, np.nan) for record in records], dtype=float)


def _outlines(params: Any) -> list[NamedLeaf]:
    """Names and shapes of the leaves, without their memory."""
    scalar = np.zeros((), np.float32)
    return [
        NamedLeaf(name, np.broadcast_to(scalar, np.shape(leaf)))
        for name, leaf in gradient_leaves(params)
    ]
