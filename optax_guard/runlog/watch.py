"""A run that is going on, in the terminal: read again and shown anew every few seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optax_guard.runlog.about import About
from optax_guard.runlog.events import Events, find_events, leaf_norms
from optax_guard.runlog.fetch import Record
from optax_guard.runlog.file import read
from optax_guard.runlog.layers import names_for, shorten
from optax_guard.runlog.words import say_events

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH, _MOST_LINES, _MOST_LAYERS = 60, 12, 8


def watch(path: Path, *, seconds: float = 2.0, console: Any = None, frames: int = 0) -> None:
    """Shows the run until Ctrl-C.

    Args:
      path: the file that :class:`History` writes; it may still be missing.
      seconds: between two looks at it; it is read only where it has grown.
      console: of rich, to print on.
      frames: looks after which to stop; 0 for never.

    Raises:
      ImportError: if rich is missing.
      ValueError: if the file is no history.
    """
    try:
        from rich.live import Live
    except ImportError as error:
        raise ImportError(
            "--watch needs rich, which is not installed. "
            "Install it with: pip install 'optax_guard[report]'"
        ) from error

    size, shown = -1, 0
    with Live(_waiting(path), console=console, auto_refresh=False) as live:
        while True:
            found = path.stat().st_size if path.exists() else 0
            if found != size and found:
                contents = read(path)
                if contents.records:
                    live.update(frame(contents.records, contents.about), refresh=True)
            size, shown = found, shown + 1
            if shown == frames:
                return
            time.sleep(seconds)


def _waiting(path: Path) -> str:
    return f"{path} holds no record yet; waiting for one."


def frame(records: Sequence[Record], about: About) -> Any:
    """What the terminal shows of these records."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    events = find_events(records, about)
    lines = say_events(events, about)
    more = [f"... and {len(lines) - _MOST_LINES} more lines"] * (len(lines) > _MOST_LINES)
    parts = [_numbers(events), Panel(Text("\n".join(lines[:_MOST_LINES] + more)), title="events")]
    worst = _worst_layers(events, about)
    parts += ["largest layer norms", worst] if worst is not None else []
    return Group(Text(f"step {events.steps[-1]}, {len(records)} records", style="bold"), *parts)


def _numbers(events: Events) -> Any:
    """The last value of each number that is drawn, and its course."""
    from rich.table import Table

    loss = np.array([record.get("loss", np.nan) for record in events.records], dtype=float)
    rows = [("loss", loss)]
    if len(events.guards) > 1:
        rows += [(f"gradient norm, {guard.label or 'all'}", guard.norm) for guard in events.guards]
    else:
        rows.append(("gradient norm", events.norm))
    rows += [(f"{clip.label}: share cut", clip.recent_rate) for clip in events.clips]
    rows += list(events.levels.items())
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, values in rows:
        known = values[~np.isnan(values)]
        if known.size:
            table.add_row(name, f"{known[-1]:.4g}", sparkline(values))
    return table


def sparkline(values: np.ndarray) -> str:
    """Bars for the last numbers, ``!`` for one that is not finite; logarithmic if all are > 0."""
    values = values[-_WIDTH:]
    finite = np.isfinite(values)
    if not finite.any():
        return "!" * len(values)
    scale = np.log(values, where=finite & (values > 0), out=np.full(len(values), np.nan))
    heights = scale if np.all(values[finite] > 0) else values
    low, high = heights[finite].min(), heights[finite].max()
    places = (heights - low) / (high - low) if high > low else np.zeros(len(values))
    last = len(_BARS) - 1
    return "".join(
        _BARS[round(float(place) * last)] if good else "!"
        for place, good in zip(places, finite, strict=True)
    )


def _worst_layers(events: Events, about: About) -> Any:
    """Layers that are not finite now, then those with the largest norms."""
    from rich.table import Table
    from rich.text import Text

    _, norms = leaf_norms(events)
    if not norms.size:
        return None
    last = norms[-1]
    known = np.flatnonzero(~np.ma.getmaskarray(last))
    data = np.ma.getdata(last)
    is_finite = np.isfinite(data[known])
    order = known[np.lexsort((-np.where(is_finite, data[known], 0), is_finite))]
    labels = shorten(names_for(norms.shape[1], about.leaf_names), 40)
    table = Table(box=None, pad_edge=False, show_header=False)
    for leaf in order[:_MOST_LAYERS]:
        course = norms[:, leaf].compressed()
        style = "" if np.isfinite(data[leaf]) else "bold red"
        table.add_row(Text(labels[leaf], style=style), f"{data[leaf]:.4g}", sparkline(course))
    return table
