"""The lower part of the picture: one line a layer, one column a step."""

from __future__ import annotations

from typing import Any

import numpy as np

from optax_guard.runlog.layers import Band
from optax_guard.runlog.style import GREY, VERMILION, plain

_MOST_COLUMNS = 600  # there are no more pixels
_BAR_WIDTH = 0.16  # inches


def draw_map(figure: Any, axis: Any, steps: np.ndarray, norms: Any, bands: list[Band]) -> None:
    """Colours are powers of ten, vermilion is NaN or Inf, white is zero or nothing measured.

    A line for several layers shows the largest of their norms. The label of a line that was ever
    not finite is marked.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    steps, values = _binned(steps, _of_bands(norms, bands))
    is_missing = np.ma.getmaskarray(values)
    data = values.filled(0.0)
    is_bad = ~np.isfinite(data)
    edges, lines = _edges(steps), np.arange(data.shape[1] + 1) - 0.5
    shown = np.ma.masked_array(data, is_bad | (data == 0)).T
    colors = colormaps["viridis"].with_extremes(bad="white")
    options = {"norm": _scale(shown), "cmap": colors, "rasterized": True}
    image = axis.pcolormesh(edges, lines, shown, **options)
    if is_bad.any():
        bad = np.ma.masked_array(np.ones_like(data), ~is_bad).T
        axis.pcolormesh(edges, lines, bad, cmap=ListedColormap([VERMILION]), rasterized=True)
    _draw_key(axis, is_bad, (data == 0) & ~is_missing)
    folded = any(len(band.rows) > 1 for band in bands)
    title = "gradient norm of each layer" + ("; of a group (how many) the largest" * folded)
    axis.set_title(title, loc="left")
    _label(axis, bands, np.asarray(is_bad.any(axis=0)))
    # As wide in a high picture as in a low one.
    bar = figure.colorbar(image, ax=axis, pad=0.01, aspect=0.2 * len(bands) / _BAR_WIDTH + 4)
    plain(bar.ax.yaxis)


def _of_bands(norms: np.ma.MaskedArray, bands: list[Band]) -> np.ma.MaskedArray:
    """The largest norm of each; NaN if there is one."""
    data = np.ma.getdata(norms)
    bad = np.where(np.isfinite(data), data, np.nan)
    bad[np.ma.getmaskarray(norms)] = -np.inf  # below every norm
    largest = np.stack([bad[:, list(band.rows)].max(axis=1) for band in bands], axis=1)
    return np.ma.masked_equal(largest, -np.inf)


def _binned(steps: np.ndarray, norms: np.ma.MaskedArray) -> tuple[np.ndarray, np.ma.MaskedArray]:
    """Not more columns than pixels; each shows its largest norm, NaN if there is one."""
    size = -(-len(steps) // _MOST_COLUMNS)
    starts = np.arange(0, len(steps), size)
    largest = np.maximum.reduceat(norms.filled(-np.inf), starts, axis=0)
    return steps[starts], np.ma.masked_equal(largest, -np.inf)


def _scale(shown: np.ma.MaskedArray) -> Any:
    from matplotlib.colors import LogNorm

    healthy = shown.compressed()
    low, high = (healthy.min(), healthy.max()) if healthy.size else (0.1, 1.0)
    low = max(low, high * 1e-12)  # or else a single layer takes all the colours
    return LogNorm(low, high if high > low else 10 * low)


def _draw_key(axis: Any, is_bad: np.ndarray, is_zero: np.ndarray) -> None:
    from matplotlib.patches import Patch

    patches = [(is_bad, VERMILION, "NaN or Inf"), (is_zero, "white", "zero")]
    handles = [
        Patch(facecolor=color, edgecolor=GREY, linewidth=0.5, label=label)
        for chosen, color, label in patches
        if chosen.any()
    ]
    if handles:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
        axis.legend(handles=handles, ncols=2, **place)


def _label(axis: Any, bands: list[Band], is_faulty: np.ndarray) -> None:
    marks = ["✕ " * bool(faulty) for faulty in is_faulty]
    labels = [mark + band.label for mark, band in zip(marks, bands, strict=True)]
    axis.set_yticks(range(len(bands)), labels)
    for text, faulty in zip(axis.get_yticklabels(), is_faulty, strict=True):
        text.set_color(VERMILION if faulty else "black")
    axis.tick_params(axis="y", length=0, labelsize=8)
    axis.invert_yaxis()


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders halfway between steps; repeated steps get columns without width."""
    steps = steps.astype(float)
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    first, last = steps[0] - (middle[0] - steps[0]), steps[-1] + (steps[-1] - middle[-1])
    return np.concatenate([[first], middle, [last]])
