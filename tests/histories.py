"""What the rows of a rule's history mean, to name them in tests."""

from __future__ import annotations

import types
from typing import Any

import numpy as np

_MOMENTS = {"count": 0, "mean": 1, "variance": 2}
ROWS: dict[str, dict[str, Any]] = {
    "clip_by_zscore": {
        **_MOMENTS,
        **{f"streak_{name}": 3 + row for name, row in _MOMENTS.items()},
    },
    "clip_by_ema": {"count": 0, "mean": 1},
    "clip_by_median": {"count": 0, "median": -1},
    "clip_by_percentile": {"norms": slice(0, -1), "count": -1},
    "clip_by_max_ema": {"count": 0, "value": 1},
    "normalize_and_scale": {"alpha": -1},
    "normalize_by_ema_norm": {"count": 0, "mean": 1, "rms": 2},
}


def history_of(state: Any, *, leaf: int | None = None) -> types.SimpleNamespace:
    """The rows by name, ``[..., *groups]``: of scope "global" or "leaf", or of one leaf."""
    history = np.asarray(state.history if leaf is None else state.history[leaf])
    per_leaf = state.factory in ("clip_by_max_ema", "clip_by_ema", "normalize_by_ema_norm")
    axis = -2 if leaf is None and per_leaf else -1 if leaf is None else -3
    rows = np.moveaxis(history, axis, 0)

    def take(row):
        return np.moveaxis(rows[row], 0, axis) if isinstance(row, slice) else rows[row]

    return types.SimpleNamespace(**{name: take(row) for name, row in ROWS[state.factory].items()})
