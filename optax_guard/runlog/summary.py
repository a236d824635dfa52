"""The records of a run as text."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from optax_guard.reading.explain import reason_in_words
from optax_guard.reading.tables import Rows, plain_table
from optax_guard.runlog.events import Events, find_events, leaf_norms
from optax_guard.runlog.fetch import LEAF_NORMS, STEP, Record

_MOST_SKIPS, _MOST_LAYERS = 5, 20
# Fields of which only the counts in words are of interest.
_COUNTERS = ("guard_step", "_total", "_steps", "last_step_skipped", "skip_reason", "gave_up")
_COUNTERS += ("skipped_in_a_row", "last_step_overflowed", "last_fault_step", "last_fault_reason")


def summarize(records: Sequence[Record], leaf_names: Sequence[str]) -> str:
    """Counts in words, then a table of scalars and one of layers."""
    if not records:
        return "No records."
    events = find_events(records)
    steps = events.steps
    parts = [f"{len(steps)} records, steps {steps[0]} to {steps[-1]}"]
    parts += _skips(events) + _clips(events)
    scalars, layers = _scalar_rows(events), _layer_rows(events, leaf_names)
    columns = ("", "first", "last", "smallest", "median", "largest", "not finite")
    parts += ["", _table(columns, scalars)] if scalars else []
    shown = layers[:_MOST_LAYERS]
    columns = ("gradient norm of", "smallest", "median", "largest", "not finite")
    parts += ["", _table(columns, shown)] if shown else []
    if len(layers) > len(shown):
        parts.append(f"... and {len(layers) - len(shown)} more layers, with smaller norms")
    return "\n".join(parts)


def _is_own(row: Sequence[str]) -> bool:
    return row[0].startswith("guard/")


def _skips(events: Events) -> list[str]:
    last = events.records[-1]
    if "guard/skipped_total" not in last and not events.skipped_total.any():
        return []
    total, calls = int(events.skipped_total[-1]), last.get("guard/guard_step")
    of_steps = "" if calls is None else f" of {calls}"
    lines = [f"skipped: {total}{of_steps} steps"]
    where = np.flatnonzero(events.skipped)
    if where.size > _MOST_SKIPS:
        lines[0] += f"; the last {_MOST_SKIPS}:"
    for place in where[-_MOST_SKIPS:]:
        record, step = events.records[place], events.steps[place]
        reason = int(record.get("guard/skip_reason", 0))
        if reason:
            lines.append(f"  step {step}: {reason_in_words(reason)}")
        elif record.get("guard/last_step_overflowed"):
            lines.append(f"  step {step}: gradients overflowed at the loss scale")
        else:
            lines.append(f"  between the records of {_before(events, place)} and {step}")
    if any(record.get("guard/gave_up") for record in events.records):
        lines.append("the guard gave up: training could not recover by itself")
    return lines


def _before(events: Events, place: int) -> str:
    return f"steps {events.steps[place - 1]}" if place else "earlier steps"


def _clips(events: Events) -> list[str]:
    counts = [f"{clip.name} in {int(np.nan_to_num(clip.total[-1]))} steps" for clip in events.clips]
    return ["acted: " + ", ".join(counts)] if counts else []


def _scalar_rows(events: Events) -> Rows:
    keys = dict.fromkeys(key for record in events.records for key in record)
    rows: list[list[str]] = []
    for key in keys:
        if key in (STEP, LEAF_NORMS) or (key.startswith("guard/") and key.endswith(_COUNTERS)):
            continue
        values = np.array([record[key] for record in events.records if key in record], dtype=float)
        rows.append([key, _short(values[0]), _short(values[-1]), *_spread(values)])
    return sorted(rows, key=_is_own)  # the user's own first


def _layer_rows(events: Events, leaf_names: Sequence[str]) -> list[list[str]]:
    """Those with most non-finite norms first, then those with the largest."""
    _, norms = leaf_norms(events)
    if not norms.size:
        return []
    names = names_for(norms.shape[1], leaf_names)
    bad = (~np.isfinite(norms)).sum(axis=0)
    largest = np.max(np.where(np.isfinite(norms), norms, 0), axis=0)
    order = np.lexsort((-largest, -bad))
    return [[names[leaf], *_spread(norms[:, leaf])] for leaf in order]


def names_for(count: int, leaf_names: Sequence[str]) -> list[str]:
    """The names, if there are as many as leaves; otherwise numbers."""
    return list(leaf_names) if len(leaf_names) == count else [f"leaf {i}" for i in range(count)]


def _spread(values: np.ndarray) -> list[str]:
    """Smallest, median and largest finite number, and how many are not."""
    finite = values[np.isfinite(values)]
    spread = (finite.min(), np.median(finite), finite.max()) if finite.size else [math.nan] * 3
    count = len(values) - len(finite)
    return [*map(_short, spread), str(count) if count else "-"]


def _short(number: float) -> str:
    return f"{number:.4g}"


def _table(columns: Sequence[str], rows: Rows) -> str:
    """With lines if rich is there."""
    if importlib.util.find_spec("rich") is None:
        return plain_table(columns, rows)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        justify: Any = "right" if place else "left"
        table.add_column(column, justify=justify, no_wrap=True)
    for row in rows:
        # Names of layers may hold brackets, which are markup to rich.
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None, emoji=False).print(table)
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    return "\n".join(line for line in lines if line)
