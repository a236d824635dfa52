"""The picture of a run: norms, limits, clips and skips over time, and a map of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optax_guard.runlog.events import Events, find_events, leaf_norms
from optax_guard.runlog.fetch import Record
from optax_guard.runlog.summary import names_for

# Okabe & Ito's palette: told apart with every common form of colour blindness.
_BLUE, _ORANGE, _VERMILION, _GREEN, _GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#6B6B6B"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
_WIDTH, _DPI = 8.0, 110  # 880 pixels
_MOST_COLUMNS, _MOST_LABELS = 600, 40


def draw(records: Sequence[Record], leaf_names: Sequence[str], path: Path) -> None:
    """Writes the picture; its folder is made.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if there is nothing to draw.
    """
    if not records:
        raise ValueError("Nothing was recorded yet, so there is nothing to plot.")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "og.History.plot needs matplotlib, which is not installed. "
            "Install it with: pip install 'optax_guard[report]'"
        ) from error

    events = find_events(records)
    has_loss = any("loss" in record for record in records)
    map_steps, norms = leaf_norms(events)
    has_map = norms.size > 0
    map_height = min(5.0, 0.6 + 0.2 * norms.shape[1]) if has_map else 0.0
    heights = [1.2] * has_loss + [2.4] + [map_height] * has_map
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.6), layout="constrained")
        grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        axes = list(grid[:, 0])
        if has_loss:
            _draw_loss(axes[0], events)
        _draw_norms(axes[int(has_loss)], events)
        if has_map:
            _draw_map(figure, axes[-1], map_steps, norms, leaf_names)
        axes[-1].set_xlabel("step")
        path.parent.mkdir(parents=True, exist_ok=True)
        # No version of matplotlib inside, so that the same run gives the same file.
        metadata = {"Software": None} if path.suffix.lower() in ("", ".png") else None
        figure.savefig(path, dpi=_DPI, metadata=metadata)


def _draw_loss(axis: Any, events: Events) -> None:
    loss = np.array([record.get("loss", np.nan) for record in events.records], dtype=float)
    finite = loss[np.isfinite(loss)]
    if finite.size and finite.min() > 0 and finite.max() > 20 * finite.min():
        axis.set_yscale("log")
    axis.plot(events.steps, _finite(loss), color=_GREY, linewidth=1, marker=_marker(loss))
    axis.set_ylabel("loss")
    axis.grid(True)


def _draw_norms(axis: Any, events: Events) -> None:
    """Norm, limit, and the events as marks at the upper and the lower edge."""
    steps, norm = events.steps, _positive(events.norm)
    lines = (
        (norm, "gradient norm", {"color": _BLUE, "linewidth": 1, "marker": _marker(norm)}),
        (
            _positive(events.threshold),
            "threshold",
            {"color": _ORANGE, "linestyle": "--", "linewidth": 1.2},
        ),
        (
            _positive(events.after_clip),
            "norm × clip factor",
            {"color": _ORANGE, "linewidth": 1, "marker": ".", "markersize": 3},
        ),
    )
    for values, label, style in lines:
        if np.isfinite(values).any():
            axis.plot(steps, values, label=label, **style)
            axis.set_yscale("log")
    at_edge = {"transform": axis.get_xaxis_transform(), "linestyle": "none", "clip_on": False}
    marks = (
        (events.clipped, "clipped", 0.02, {"color": _GREEN, "marker": "|", "markersize": 5}),
        (events.skipped, "skipped", 1.03, {"color": _VERMILION, "marker": "v", "markersize": 5}),
    )
    for chosen, label, height, style in marks:
        if chosen.any():
            x = steps[chosen]
            label = f"{label} ({_count(events, label)})"
            axis.plot(x, np.full(len(x), height), label=label, **style, **at_edge)
    for step in steps[events.skipped] if events.skipped.sum() <= 100 else ():
        axis.axvline(step, color=_VERMILION, linewidth=0.6, alpha=0.5, zorder=0)
    axis.set_ylabel("gradient norm")
    axis.grid(True)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1.03), ncols=5, borderaxespad=0.2)


def _count(events: Events, kind: str) -> str:
    if kind == "skipped":
        return f"{int(events.skipped_total[-1])}"
    return f"{int(max(np.nan_to_num(clip.total[-1]) for clip in events.clips))}"


def _draw_map(
    figure: Any, axis: Any, steps: np.ndarray, norms: np.ndarray, leaf_names: Sequence[str]
) -> None:
    """One line a layer; colours are powers of ten, vermilion is NaN or Inf, white is zero."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    steps, norms = _binned(steps, norms)
    is_bad, is_zero = ~np.isfinite(norms), norms == 0
    healthy = norms[~is_bad & ~is_zero]
    low, high = (healthy.min(), healthy.max()) if healthy.size else (0.1, 1.0)
    low = max(low, high * 1e-12)  # or else a single layer takes all the colours
    colors = colormaps["viridis"].with_extremes(bad="white")
    edges, rows = _edges(steps), np.arange(norms.shape[1] + 1) - 0.5
    shown = np.ma.masked_array(norms, is_bad | is_zero).T
    scale = LogNorm(low, high if high > low else 10 * low)
    image = axis.pcolormesh(edges, rows, shown, norm=scale, cmap=colors, rasterized=True)
    bad = np.ma.masked_array(np.ones_like(norms), ~is_bad).T
    if is_bad.any():
        from matplotlib.colors import ListedColormap

        only = ListedColormap([_VERMILION])
        axis.pcolormesh(edges, rows, bad, cmap=only, rasterized=True)
    patches = [(is_bad, _VERMILION, "NaN or Inf"), (is_zero, "white", "zero")]
    handles = [
        Patch(facecolor=color, edgecolor=_GREY, linewidth=0.5, label=label)
        for chosen, color, label in patches
        if chosen.any()
    ]
    if handles:
        axis.legend(
            handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2
        )
    axis.set_title("gradient norm of each layer", loc="left")
    names = names_for(norms.shape[1], leaf_names)
    stride = -(-len(names) // _MOST_LABELS)
    axis.set_yticks(range(0, len(names), stride), [_cut(name) for name in names[::stride]])
    axis.tick_params(axis="y", length=0, labelsize=8)
    axis.invert_yaxis()
    figure.colorbar(image, ax=axis, pad=0.01, aspect=12)


def _binned(steps: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Not more columns than pixels; each shows its largest norm, NaN if there is one."""
    size = -(-len(steps) // _MOST_COLUMNS)
    starts = np.arange(0, len(steps), size)
    norms = np.where(np.isfinite(norms), norms, np.nan)
    return steps[starts], np.maximum.reduceat(norms, starts, axis=0)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders halfway between steps; repeated steps get columns without width."""
    steps = steps.astype(float)
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    first, last = steps[0] - (middle[0] - steps[0]), steps[-1] + (steps[-1] - middle[-1])
    return np.concatenate([[first], middle, [last]])


def _cut(name: str, longest: int = 28) -> str:
    """The end of a long name tells more than its beginning."""
    return name if len(name) <= longest else "…" + name[1 - longest :]


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _positive(values: np.ndarray) -> np.ndarray:
    """What a logarithmic axis can show."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _marker(values: np.ndarray) -> str | None:
    """A line needs two neighbours; a few points are shown as such."""
    return "." if len(values) <= 30 else None
