"""What the records of a run say about skips and clips."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from optax_guard.runlog.fetch import LEAF_NORMS, STEP, Record

_PREFIX = r"guard/(?:\d+/)?"  # metrics numbers the second state of a kind
_SKIP_TOTAL = re.compile(_PREFIX + r"(skipped|overflows)_total")
_SKIP_FLAG = re.compile(_PREFIX + r"last_step_(skipped|overflowed)")
_SCALE = re.compile(r"(" + _PREFIX + r"\w+)_last_scale")


class Clip(NamedTuple):
    """One clip or normaliser.

    Attributes:
      name: such as ``"norm_clip"``, numbered if there are two of a kind.
      total: float64 ``[records]``, steps in which it acted so far.
      acted: bool ``[records]``, whether it did since the record before.
      scale: float64 ``[records]``, smallest factor of the last finite step.
    """

    name: str
    total: np.ndarray
    acted: np.ndarray
    scale: np.ndarray


class Events(NamedTuple):
    """Arrays over the records, in the order of their steps.

    Attributes:
      steps: int64.
      norm: float64, gradient norm before any clipping; NaN where it is not known.
      after_clip: float64, norm times factor of the first clip where that clipped.
      threshold: float64, as the user recorded it.
      skipped: bool, whether a step was skipped since the record before.
      skipped_total: float64, skips and overflows so far.
      clips: outermost first.
      records: the records themselves.
    """

    steps: np.ndarray
    norm: np.ndarray
    after_clip: np.ndarray
    threshold: np.ndarray
    skipped: np.ndarray
    skipped_total: np.ndarray
    clips: tuple[Clip, ...]
    records: list[Record]

    @property
    def clipped(self) -> np.ndarray:
        """Whether any clip acted, bool ``[records]``."""
        acted = [clip.acted for clip in self.clips]
        return np.any([np.zeros(len(self.steps), bool), *acted], axis=0)


def find_events(records: Sequence[Record]) -> Events:
    """Reads the counters; a counter that jumps back belongs to a new run."""
    records = sorted(records, key=lambda record: record[STEP])
    keys = list(dict.fromkeys(key for record in records for key in record))
    count = len(records)

    def series(key: str) -> np.ndarray:
        return np.array([record.get(key, np.nan) for record in records], dtype=float)

    none = np.zeros(count)
    skip_totals = [series(key) for key in keys if _SKIP_TOTAL.fullmatch(key)]
    skip_flags = [series(key) == 1 for key in keys if _SKIP_FLAG.fullmatch(key)]
    now = np.any([none > 0, *skip_flags], axis=0)
    skipped = np.any([now, *(_has_risen(total) for total in skip_totals)], axis=0)
    clips = tuple(
        _clip(match[1], series, now) for match in map(_SCALE.fullmatch, keys) if match is not None
    )
    norm = series(next((key for key in ("guard/grad_norm", "grad_norm") if key in keys), ""))
    after_clip = np.full(count, np.nan)
    if clips:
        did_act = clips[0].acted & ~now & (clips[0].scale != 1)
        with np.errstate(over="ignore", invalid="ignore"):
            after_clip = np.where(did_act, norm * clips[0].scale, np.nan)
    return Events(
        steps=np.array([record[STEP] for record in records], dtype=np.int64),
        norm=norm,
        after_clip=after_clip,
        threshold=series("threshold"),
        skipped=skipped,
        skipped_total=np.sum([none, *map(np.nan_to_num, skip_totals)], axis=0),
        clips=clips,
        records=records,
    )


def _clip(stem: str, series: Callable[[str], np.ndarray], skipped_now: np.ndarray) -> Clip:
    total = np.fmax(series(f"{stem}_total"), series(f"{stem}_clipped_total"))
    scale = series(f"{stem}_last_scale")
    acted = _has_risen(total)
    acted[:1] |= (scale[:1] != 1) & (total[:1] > 0) & ~skipped_now[:1]
    return Clip(stem.removeprefix("guard/"), total, acted, scale)


def _has_risen(total: np.ndarray) -> np.ndarray:
    """Whether a counter is higher than in the record before that has it."""
    risen = np.zeros(len(total), bool)
    known = np.flatnonzero(np.isfinite(total))
    risen[known[1:]] = np.diff(total[known]) > 0
    return risen


def leaf_norms(events: Events) -> tuple[np.ndarray, np.ndarray]:
    """Steps ``[n]`` and norms ``[n, leaves]`` of the records that have as many as the last one."""
    found = [
        (step, record[LEAF_NORMS])
        for step, record in zip(events.steps, events.records, strict=True)
        if record.get(LEAF_NORMS)
    ]
    found = [(step, norms) for step, norms in found if len(norms) == len(found[-1][1])]
    steps = np.array([step for step, _ in found], dtype=np.int64)
    norms = np.array([norms for _, norms in found], dtype=float)
    return steps, norms if found else np.zeros((0, 0))
