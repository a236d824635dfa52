"""Colours and axes of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Okabe & Ito's palette: told apart with every common form of colour blindness.
BLUE, ORANGE, VERMILION, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#6B6B6B"
LINES = (BLUE, PURPLE, SKY, GREEN)
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.4,
}


def plain(axis: Any, *, base: int = 10, most: int = 8) -> None:
    """Numbers as one would write them, at most about so many, on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    powers = np.log(high / low) / np.log(base) if 0 < low < high else 1.0
    if base == 10 and powers < 0.7:
        axis.set_major_locator(MaxNLocator(min(5, most)))
    elif base == 10 and 3 * powers < most:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    else:
        axis.set_major_locator(LogLocator(base, numticks=most))
    if most < 8 or powers < 2.5:
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _written(value)))


def _written(value: float) -> str:
    return f"{value:.6g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def legend_columns(labels: Sequence[str], *, room: int = 92) -> int:
    """In how many columns they fit, with ``room`` for so many characters in a line."""
    for columns in range(len(labels), 1, -1):
        # As matplotlib fills them: one after the other, the first ones longer.
        ends = np.cumsum([len(labels[start::columns]) for start in range(columns)])
        stacks = np.split(np.array([len(label) for label in labels]), ends[:-1])
        if sum(stack.max() + 6 for stack in stacks) <= room:
            return columns
    return 1


def finite(values: np.ndarray) -> np.ndarray:
    """NaN, which a line leaves out, for what is not finite."""
    return np.where(np.isfinite(values), values, np.nan)


def positive(values: np.ndarray) -> np.ndarray:
    """What a logarithmic axis can show."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def marker(values: np.ndarray) -> str | None:
    """A line needs two neighbours; a few points are shown as such."""
    return "." if len(values) <= 30 else None
