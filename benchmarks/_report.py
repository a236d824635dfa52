"""Markdown tables and bar charts of benchmark rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]

# Okabe & Ito's palette: told apart with every common form of colour blindness.
_GREY, _ORANGE, _BLUE = "#6B6B6B", "#E69F00", "#0072B2"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def markdown_table(rows: Rows, columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """One line a row; ``columns`` gives titles and how to write a cell."""
    cells = [list(columns), *([write(row) for write in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    first, *others = widths
    rule = [":" + "-" * max(1, first - 1), *("-" * max(1, width - 1) + ":" for width in others)]
    padded = [
        [line[0].ljust(first), *(cell.rjust(w) for cell, w in zip(line[1:], others, strict=True))]
        for line in [cells[0], *cells[1:]]
    ]
    lines = [padded[0], rule, *padded[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratio_cell(row: dict[str, Any]) -> str:
    """Median and quartiles; a dash where nothing was timed."""
    if "ratio" not in row:
        return "-"
    return f"{row['ratio']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})"


def time_cell(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def bar_chart(panels: dict[str, Rows], path: Path, *, x_label: str) -> Path:
    """Ratios to the bare optimizer with quartiles, one panel a title, plain Optax in orange."""
    panels = {
        title: [row for row in rows if "ratio" in row or row.get("error")]
        for title, rows in panels.items()
    }
    panels = {title: rows for title, rows in panels.items() if rows}
    if not panels:
        return path
    num_columns = min(2, len(panels))
    num_lines = -(-len(panels) // num_columns)
    height = max(len(rows) for rows in panels.values()) * 0.26 + 0.7
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2 * num_columns, height * num_lines), layout="constrained")
        axes = figure.subplots(num_lines, num_columns, squeeze=False)
        for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
            _draw(axis, title, rows)
        for axis in list(axes.flat)[len(panels) :]:
            axis.remove()
        figure.supxlabel(x_label, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        # No version of matplotlib inside, so that the same numbers give the same file.
        figure.savefig(path, dpi=160, metadata={"Software": None})
    return path


def _draw(axis: Any, title: str, rows: Rows) -> None:
    for position, row in enumerate(rows):
        if row.get("error"):
            axis.text(1.02, position, "fails", va="center", color=_GREY)
            continue
        color = _GREY if row["variant"] == "bare" else _BLUE if row["is_ours"] else _ORANGE
        axis.barh(position, row["ratio"], color=color, height=0.7)
        axis.plot([row["ratio_low"], row["ratio_high"]], [position] * 2, color="black", lw=1)
        axis.text(row["ratio_high"], position, f"  {row['ratio']:.2f}", va="center", fontsize=8)
    axis.axvline(1, color=_GREY, lw=0.8, ls="--")
    axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axis.set_xlim(0, 1.15 * max(row.get("ratio_high", 1) for row in rows))
    axis.invert_yaxis()
    axis.set_title(title, loc="left")
