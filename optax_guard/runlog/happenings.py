"""What a run counts besides skips and cuts: overflows, returns, micro-batches left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from optax_guard.reading.metrics import label_of

PREFIX = "guard/"
Series = Callable[[str], np.ndarray]  # over the records, by the key of a metric


class Happening(NamedTuple):
    """Something else that counts: an overflow, a return, a micro-batch left out.

    Attributes:
      kind: ``"overflow"``, ``"rollback"``, ``"back-off"``, ``"micro-batch"`` or ``"zeroed"``.
      label: of the state that counts it.
      happened: bool, whether it did since the record before.
      total: float64, so far.
      calls: float64, steps that the state has counted so far; NaN where it counts none.
    """

    kind: str
    label: str
    happened: np.ndarray
    total: np.ndarray
    calls: np.ndarray


def find_happenings(fields: dict[str, set[str]], series: Series) -> list[Happening]:
    """By what only states of their kind have recorded."""
    kinds = (
        ("overflow", "overflows_total", "last_step_overflowed"),
        ("rollback", "rollbacks_total", "last_step_rolled_back"),
        ("zeroed", "zeroed_steps_total", ""),
    )
    found = []
    for place, names in fields.items():
        label, calls = label_of(place.removeprefix(PREFIX)), series(place + "steps")
        for kind, total_name, flag_name in kinds:
            if total_name in names:
                total, flag = series(place + total_name), series(place + flag_name) == 1
                happened = has_risen(total)
                happened[:1] |= flag[:1]
                found.append(Happening(kind, label, happened, total, calls))
        if "steps_left" in names:  # rises with every skip
            happened = has_risen(series(place + "steps_left"))
            total = np.cumsum(happened) * 1.0
            found.append(Happening("back-off", label, happened, total, calls))
        if "microbatch_skipped" in names:
            happened = series(place + "microbatch_skipped") == 1
            counted = [name for name in names if name.endswith("_total")]
            total = series(place + counted[0]) if counted else np.cumsum(happened) * 1.0
            happened = happened | has_risen(total)
            found.append(Happening("micro-batch", label, happened, total, calls))
    return found


def has_risen(total: np.ndarray) -> np.ndarray:
    """Whether a counter is higher than in the record before that has it."""
    risen = np.zeros(len(total), bool)
    known = np.flatnonzero(np.isfinite(total))
    risen[known[1:]] = np.diff(total[known]) > 0
    return risen
