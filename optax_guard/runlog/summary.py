"""The records of a run as text: what happened in words, then tables of scalars and layers."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from optax_guard.reading.tables import Rows, plain_table
from optax_guard.runlog.about import About
from optax_guard.runlog.events import Events, find_events, leaf_norms
from optax_guard.runlog.fetch import FAULT_LEAVES, LEAF_NORMS, STEP, Record
from optax_guard.runlog.layers import names_for, ordered
from optax_guard.runlog.words import say_events

_MOST_LAYERS = 20
# Fields of our own that are worth a row; the counters are told in words.
_OWN_ROWS = ("grad_norm", "last_scale", "loss_scale", "factor", "microbatch_norm")


def summarize(records: Sequence[Record], about: About) -> str:
    """Counts in words, then a table of scalars and one of layers."""
    if not records:
        return "No records."
    events = find_events(records, about)
    steps = events.steps
    parts = [f"{len(steps)} records, steps {steps[0]} to {steps[-1]}"]
    parts += say_events(events, about)
    scalars, (layers, more) = scalar_rows(events), layer_rows(events, about)
    parts += ["", table(SCALAR_COLUMNS, scalars)] if scalars else []
    parts += ["", table(LAYER_COLUMNS, layers)] if layers else []
    if more:
        parts.append(f"... and {more} more layers, with smaller norms")
    return "\n".join(parts)


SCALAR_COLUMNS = ("", "first", "last", "smallest", "median", "largest", "not finite")
LAYER_COLUMNS = ("gradient norm of", "smallest", "median", "largest", "not finite")


def _is_own(row: Sequence[str]) -> bool:
    return row[0].startswith("guard/")


def scalar_rows(events: Events) -> Rows:
    """First, last, smallest, median and largest of each number; the user's own first."""
    keys = dict.fromkeys(key for record in events.records for key in record)
    rows: list[list[str]] = []
    for key in keys:
        is_counter = key.startswith("guard/") and key.rpartition("/")[2] not in _OWN_ROWS
        if key in (STEP, LEAF_NORMS, FAULT_LEAVES) or is_counter:
            continue
        values = _measured(key, events)
        if not values.size:
            continue
        rows.append([key, _short(values[0]), _short(values[-1]), *_spread(values)])
    return sorted(rows, key=_is_own)


def _measured(key: str, events: Events) -> np.ndarray:
    """The values of a number; of a guard's norm only those of steps that reached the guard."""
    chosen = next(
        (guard.is_fresh for guard in events.guards if key == guard.place + "grad_norm"),
        np.ones(len(events.records), bool),
    )
    pairs = zip(events.records, chosen, strict=True)
    values = [record[key] for record, is_fresh in pairs if is_fresh and key in record]
    return np.array(values, dtype=float)


def layer_rows(events: Events, about: About) -> tuple[list[list[str]], int]:
    """Layers in the order of the network, and how many are left out.

    Of many those are shown that were not finite most often, then those with the largest norms.
    """
    _, norms = leaf_norms(events)
    measured = np.flatnonzero(~np.ma.getmaskarray(norms).all(axis=0))
    if not measured.size:
        return [], 0
    names = names_for(norms.shape[1], about.leaf_names)
    columns = [norms[:, leaf].compressed() for leaf in measured]
    bad = [int((~np.isfinite(column)).sum()) for column in columns]
    largest = [np.max(column[np.isfinite(column)], initial=0) for column in columns]
    worst = np.lexsort((-np.array(largest), -np.array(bad)))[:_MOST_LAYERS]
    shown = ordered(names, measured[worst].tolist())
    rows = [[names[leaf], *_spread(norms[:, leaf].compressed())] for leaf in shown]
    return rows, len(measured) - len(rows)


def _spread(values: np.ndarray) -> list[str]:
    """Smallest, median and largest finite number, and how many are not."""
    finite = values[np.isfinite(values)]
    spread = (finite.min(), np.median(finite), finite.max()) if finite.size else [math.nan] * 3
    count = len(values) - len(finite)
    return [*map(_short, spread), str(count) if count else "-"]


def _short(number: float) -> str:
    return f"{number:.4g}"


def table(columns: Sequence[str], rows: Rows) -> str:
    """With lines if rich is there."""
    if importlib.util.find_spec("rich") is None:
        return plain_table(columns, rows)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        justify: Any = "right" if place else "left"
        made.add_column(column, justify=justify, no_wrap=True)
    for row in rows:
        # Names of layers may hold brackets, which are markup to rich.
        made.add_row(*(cell.replace("[", "\\[") for cell in row))
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None, emoji=False).print(made)
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    return "\n".join(line for line in lines if line)
