"""The picture of a run: norms, limits and all that happened over time, and a map of the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from optax_guard.runlog.about import About
from optax_guard.runlog.events import Events, Guard, find_events, leaf_norms, total_of
from optax_guard.runlog.fetch import Record
from optax_guard.runlog.layer_map import draw_map
from optax_guard.runlog.layers import arrange, names_for
from optax_guard.runlog.style import (
    BLUE,
    GREEN,
    GREY,
    LINES,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    finite,
    legend_columns,
    marker,
    plain,
    positive,
)

_WIDTH, _DPI = 8.0, 110  # 880 pixels
_MOST_LINES, _LONGEST_LABEL = 40, 30
_CLIPS = (GREEN, SKY, BLUE, GREY)  # as many have a row of marks of their own
_BLACK = "#222222"
_ABOVE_GRID = 1.6  # and below the lines

Panel = tuple[float, Callable[[Any], None]]  # height in inches, and what draws it


def draw(records: Sequence[Record], about: About, path: Path) -> None:
    """Writes the picture; its folder is made.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if there is nothing to draw.
    """
    figure = make_figure(records, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No version of matplotlib inside, so that the same run gives the same file.
    metadata = {"Software": None} if path.suffix.lower() == ".png" else None
    _save(figure, path, metadata=metadata)


def draw_png(records: Sequence[Record], about: About, file: BinaryIO) -> None:
    """Writes the picture as PNG into an open file."""
    _save(make_figure(records, about), file, format="png", metadata={"Software": None})


def _save(figure: Any, target: Any, **options: Any) -> None:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(target, dpi=_DPI, **options)


def make_figure(records: Sequence[Record], about: About) -> Any:
    """The picture as a figure of matplotlib."""
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

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        panels = _panels(figure, find_events(records, about), about)
        heights = [height for height, _ in panels]
        figure.set_size_inches(_WIDTH, sum(heights) + 0.6)
        grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        for axis, (_, draw_panel) in zip(grid[:, 0], panels, strict=True):
            draw_panel(axis)
        axis = grid[-1, 0]
        axis.set_xlabel("step")
        axis.ticklabel_format(axis="x", style="plain", useOffset=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
        return figure


def _panels(figure: Any, events: Events, about: About) -> list[Panel]:
    panels: list[Panel] = []
    if any("loss" in record for record in events.records):
        panels.append((1.2, lambda axis: _draw_loss(axis, events)))
    panels.append((2.4, lambda axis: _draw_norms(axis, events)))
    levels = {name: values for name, values in events.levels.items() if _changes(name, values)}
    for name, values in levels.items():
        panels.append((0.8, _level_panel(name, values, events)))
    steps, norms = leaf_norms(events)
    rows = np.flatnonzero(~np.ma.getmaskarray(norms).all(axis=0))
    if rows.size:
        faulty = np.flatnonzero((~np.isfinite(np.ma.getdata(norms)) & ~norms.mask).any(axis=0))
        names = names_for(norms.shape[1], about.leaf_names)
        bands = arrange(
            names, rows.tolist(), faulty.tolist(), most=_MOST_LINES, longest=_LONGEST_LABEL
        )
        height = min(5.5, 0.6 + 0.2 * len(bands))
        panels.append((height, lambda axis: draw_map(figure, axis, steps, norms, bands)))
    return panels


def _changes(name: str, values: np.ndarray) -> bool:
    """A back-off that was never needed is not shown; a loss scale always is."""
    return name == "loss scale" or bool(np.any(values[np.isfinite(values)] != 1))


def _level_panel(name: str, values: np.ndarray, events: Events) -> Callable[[Any], None]:
    def draw_level(axis):
        known = np.isfinite(values)
        axis.step(events.steps[known], values[known], where="post", color=GREY, linewidth=1)
        base = 2 if name == "loss scale" else 10
        axis.set_yscale("log", base=base)
        plain(axis.yaxis, base=base, most=3)
        axis.set_ylabel(name)
        axis.grid(True)

    return draw_level


def _draw_loss(axis: Any, events: Events) -> None:
    loss = np.array([record.get("loss", np.nan) for record in events.records], dtype=float)
    known = loss[np.isfinite(loss)]
    axis.plot(events.steps, finite(loss), color=GREY, linewidth=1, marker=marker(loss))
    if known.size and known.min() > 0 and known.max() > 20 * known.min():
        axis.set_yscale("log")
        plain(axis.yaxis, most=4)
    axis.set_ylabel("loss")
    axis.grid(True)


def _draw_norms(axis: Any, events: Events) -> None:
    """Norm, limit, and the events as marks at the upper and the lower edge."""
    lines = _norm_lines(events)
    for steps, values, label, style in lines:
        if np.isfinite(values).any():
            axis.plot(steps, values, label=label, linewidth=1, **style)
            axis.set_yscale("log")
    axis.margins(y=0.12)  # room for the marks at the lower edge
    if axis.get_yscale() == "log":
        plain(axis.yaxis)
    _draw_marks(axis, events)
    axis.set_ylabel("gradient norm")
    axis.grid(True)
    labels = axis.get_legend_handles_labels()[1]
    if labels:
        above = 1.1 if any(found.happened.any() for found in events.happenings) else 1.06
        place = {"loc": "lower left", "bbox_to_anchor": (-0.01, above), "borderaxespad": 0.2}
        axis.legend(ncols=legend_columns(labels), **place)


def _norm_lines(events: Events) -> list[tuple[np.ndarray, np.ndarray, str, dict[str, Any]]]:
    steps, lines = events.steps, []

    def add(values, label, color, *, guard: Guard | None = None, **style):
        # A step that did not reach the guard has no norm; a line goes on over it.
        chosen = np.ones(len(steps), bool) if guard is None else guard.is_fresh
        values = positive(values[chosen])
        style = {"color": color, "marker": marker(values), **style}
        lines.append((steps[chosen], values, label, style))

    only = events.guards[0] if len(events.guards) == 1 else None
    cut = "after the clips" if len(events.clips) > 1 else "after the clip"
    if len(events.guards) > 1:
        for guard, color in zip(events.guards, LINES * len(events.guards), strict=False):
            add(guard.norm, f"gradient norm, {guard.label or 'all'}", color, guard=guard)
    else:
        add(events.norm, "gradient norm", BLUE, guard=only)
    if events.clipped.any():
        add(_where_cut(events), cut, ORANGE, guard=only, zorder=2.1, **_points_if_few(events))
    add(events.threshold, "threshold", _BLACK, linestyle="--", marker=None, zorder=2.2)
    return lines


def _where_cut(events: Events) -> np.ndarray:
    """What the optimizer received where it differs from the gradient, and in the steps beside."""
    is_cut = np.isfinite(events.received) & (events.received != events.norm)
    near = is_cut.copy()
    near[1:] |= is_cut[:-1]
    near[:-1] |= is_cut[1:]
    return np.where(near, events.received, np.nan)


def _points_if_few(events: Events) -> dict[str, Any]:
    """A cut of a single step is hardly a line."""
    cut = np.flatnonzero(np.isfinite(events.received) & (events.received != events.norm))
    return {"marker": "o", "markersize": 2.5, "markevery": cut.tolist()} if cut.size <= 40 else {}


def _draw_marks(axis: Any, events: Events) -> None:
    at_edge = {"transform": axis.get_xaxis_transform(), "linestyle": "none", "clip_on": False}

    def mark(chosen, height, label, **style):
        x = events.steps[chosen]
        if len(x):
            axis.plot(x, np.full(len(x), height), label=label, **style, **at_edge)

    for place, clip in enumerate(events.clips[: len(_CLIPS)]):
        label, style = f"cut by {clip.label} ({total_of(clip.total, events)})", {"marker": "|"}
        mark(clip.acted, 0.02 + 0.05 * place, label, color=_CLIPS[place], markersize=5, **style)
    totals = sum(total_of(guard.skipped_total, events) for guard in events.guards)
    mark(events.skipped, 1.03, f"skipped ({totals})", color=VERMILION, marker="v", markersize=5)
    for step in events.steps[events.skipped] if events.skipped.sum() <= 100 else ():
        axis.axvline(step, color=VERMILION, linewidth=0.6, alpha=0.5, zorder=_ABOVE_GRID)
    others = (
        ("overflow", "overflow of the loss scale", {"color": PURPLE, "marker": "^"}),
        ("micro-batch", "micro-batch left out", {"color": SKY, "marker": "D", "markersize": 3.5}),
        ("zeroed", "zeroed", {"color": SKY, "marker": "x"}),
        ("rollback", "rolled back", {"color": _BLACK, "marker": "<"}),
    )
    for kind, words, style in others:
        for happening in events.has(kind):
            label = f"{words} ({total_of(happening.total, events)})"
            mark(happening.happened, 1.08, label, **{"markersize": 5, **style})
    for happening in events.has("rollback"):
        for step in events.steps[happening.happened]:
            axis.axvline(step, color=_BLACK, linewidth=0.8, linestyle=":", zorder=_ABOVE_GRID)
