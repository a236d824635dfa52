"""What the records of a run say: skips, cuts, overflows, returns, and the norms between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from optax_guard.reading.clips import with_scope
from optax_guard.reading.metrics import label_of
from optax_guard.runlog.about import About
from optax_guard.runlog.fetch import LEAF_NORMS, STEP, Record
from optax_guard.runlog.happenings import PREFIX, Happening, Series, find_happenings, has_risen


class Guard(NamedTuple):
    """One guard; arrays over the records.

    Attributes:
      place: of its metrics, such as ``"guard/embed/"``.
      label: ``"embed"``, of the group that it watches; empty for one that watches all.
      calls: float64, so far.
      skipped_total: float64, so far.
      skipped: bool, whether a call was skipped since the record before.
      is_fresh: bool, whether it was called since then.
      norm: float64, gradient norm before any clipping; NaN where it is not known or not fresh.
    """

    place: str
    label: str
    calls: np.ndarray
    skipped_total: np.ndarray
    skipped: np.ndarray
    is_fresh: np.ndarray
    norm: np.ndarray


class Clip(NamedTuple):
    """One clip or normaliser; arrays over the records.

    Attributes:
      place: of its metrics.
      label: such as ``"clip_by_norm"``, with its group and number if it has one, and its scope if
        that is not the usual one.
      factory: its name.
      scope: ``"global"``, ``"leaf"`` or ``"unit"``.
      steps: float64, finite ones so far.
      total: float64, steps in which it acted so far.
      acted: bool, whether it did since the record before.
      scale: float64, smallest factor of the last finite step.
      recent_rate: float64, share of steps cut of the last 100 or so.
      recent_scale: float64, mean of the smallest factors over them.
    """

    place: str
    label: str
    factory: str
    scope: str
    steps: np.ndarray
    total: np.ndarray
    acted: np.ndarray
    scale: np.ndarray
    recent_rate: np.ndarray
    recent_scale: np.ndarray


class Events(NamedTuple):
    """A run. Arrays over the records, in the order of their steps.

    Attributes:
      steps: int64.
      records: the records themselves.
      guards: the outer ones first.
      clips: outermost first.
      happenings: everything else.
      levels: the loss scale and the factor of a back-off, by their names.
      norm: float64, gradient norm of the only guard, or as the user recorded it.
      received: float64, the norm after all clips whose factor is that of the whole gradient.
      threshold: float64, as the user recorded it.
    """

    steps: np.ndarray
    records: list[Record]
    guards: tuple[Guard, ...]
    clips: tuple[Clip, ...]
    happenings: tuple[Happening, ...]
    levels: dict[str, np.ndarray]
    norm: np.ndarray
    received: np.ndarray
    threshold: np.ndarray

    @property
    def skipped(self) -> np.ndarray:
        """Whether any guard skipped a call since the record before, bool ``[records]``."""
        return _any([guard.skipped for guard in self.guards], len(self.steps))

    @property
    def clipped(self) -> np.ndarray:
        """Whether any clip acted since the record before, bool ``[records]``."""
        return _any([clip.acted for clip in self.clips], len(self.steps))

    def has(self, kind: str) -> list[Happening]:
        """The happenings of a kind."""
        return [happening for happening in self.happenings if happening.kind == kind]


def find_events(records: Sequence[Record], about: About | None = None) -> Events:
    """Reads the counters; a counter that jumps back belongs to a new run."""
    about = about or About()
    records = sorted(records, key=lambda record: record[STEP])
    steps = np.array([record[STEP] for record in records], dtype=np.int64)

    def series(key: str) -> np.ndarray:
        return np.array([record.get(key, np.nan) for record in records], dtype=float)

    fields = _fields_of_places(records)
    guards = tuple(_guard(place, series) for place in fields if "skipped_in_a_row" in fields[place])
    now = _any([series(guard.place + "last_step_skipped") == 1 for guard in guards], len(steps))
    clips = tuple(
        _clip(place, about.scopes.get(place, "global"), series, now)
        for place in fields
        if "recent_clip_rate" in fields[place]
    )
    norm = guards[0].norm if len(guards) == 1 else series("grad_norm")
    return Events(
        steps=steps,
        records=records,
        guards=guards,
        clips=clips,
        happenings=tuple(find_happenings(fields, series)),
        levels=_levels(fields, series),
        norm=norm,
        received=_received(norm, now, clips, about),
        threshold=series("threshold"),
    )


def _fields_of_places(records: Sequence[Record]) -> dict[str, set[str]]:
    """For each state, by the place of its metrics, what it has recorded."""
    fields: dict[str, set[str]] = {}
    for key in dict.fromkeys(key for record in records for key in record):
        if key.startswith(PREFIX):
            place, _, field = key.rpartition("/")
            fields.setdefault(place + "/", set()).add(field)
    return fields


def _guard(place: str, series: Series) -> Guard:
    calls, total = series(place + "guard_step"), series(place + "skipped_total")
    is_fresh = has_risen(calls)
    is_fresh[:1] = calls[:1] > 0
    is_fresh[1:] |= calls[1:] < calls[:-1]  # another run
    flag = series(place + "last_step_skipped") == 1
    skipped = has_risen(total)
    skipped[:1] |= flag[:1]
    norm = np.where(is_fresh, series(place + "grad_norm"), np.nan)
    return Guard(place, label_of(place.removeprefix(PREFIX)), calls, total, skipped, is_fresh, norm)


def _clip(place: str, scope: str, series: Series, skipped_now: np.ndarray) -> Clip:
    total, scale = series(place + "clipped_total"), series(place + "last_scale")
    acted = has_risen(total)
    acted[:1] |= (scale[:1] != 1) & (total[:1] > 0) & ~skipped_now[:1]
    factory = [part for part in place.split("/") if part and not part.isdigit()][-1]
    label = label_of(place.removeprefix(PREFIX))
    return Clip(
        place,
        with_scope(label, factory, scope),
        factory,
        scope,
        series(place + "steps"),
        total,
        acted,
        scale,
        series(place + "recent_clip_rate"),
        series(place + "recent_scale"),
    )


def _received(
    norm: np.ndarray, skipped: np.ndarray, clips: Sequence[Clip], about: About
) -> np.ndarray:
    """What came out of the clips, in steps that were not skipped.

    Where parts of a gradient were cut by factors of their own nobody has measured it.
    """
    uniform = [clip.scale for clip in clips if clip.place in about.uniform]
    partial = [clip.scale for clip in clips if clip.place in about.partial]
    if not any(np.any(scale != 1) for scale in uniform):
        return np.full(len(norm), np.nan)
    is_unknown = skipped | _any(
        [np.nan_to_num(scale, nan=1.0) != 1 for scale in partial], len(norm)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        factor = np.prod([np.nan_to_num(scale, nan=1.0) for scale in uniform], axis=0)
        return np.where(is_unknown, np.nan, norm * factor)


def _levels(fields: dict[str, set[str]], series: Series) -> dict[str, np.ndarray]:
    names = (("loss_scale", "loss scale"), ("factor", "step factor"))
    return {
        title: series(place + field)
        for field, title in names
        for place in fields
        if field in fields[place]
    }


def total_of(counter: np.ndarray, events: Events) -> int:
    """The last value of a counter, and what it had reached before it jumped back.

    It starts from zero in another run, and where it was earlier after a return to a snapshot.
    """
    known = np.isfinite(counter)
    if not known.any():
        return 0
    values = counter[known]
    went_back = _any([found.happened for found in events.has("rollback")], len(counter))[known]
    steps = np.diff(values)
    steps = np.where(steps >= 0, steps, np.where(went_back[1:], 0, values[1:]))
    return int(values[0] + steps.sum())


def _any(flags: Sequence[np.ndarray], count: int) -> np.ndarray:
    return np.any([np.zeros(count, bool), *flags], axis=0)


def leaf_norms(events: Events) -> tuple[np.ndarray, np.ma.MaskedArray]:
    """Steps ``[n]`` and norms ``[n, leaves]``, masked where none was measured.

    Of the records that have as many as the last one, and in which a guard was called.
    """
    fresh = np.ones(len(events.steps), bool)
    if events.guards:
        fresh = _any([guard.is_fresh for guard in events.guards], len(events.steps))
    found = [
        (step, record[LEAF_NORMS])
        for step, record, is_fresh in zip(events.steps, events.records, fresh, strict=True)
        if is_fresh and record.get(LEAF_NORMS)
    ]
    found = [(step, norms) for step, norms in found if len(norms) == len(found[-1][1])]
    steps = np.array([step for step, _ in found], dtype=np.int64)
    if not found:
        return steps, np.ma.zeros((0, 0))
    rows = [norms for _, norms in found]
    is_missing = np.array([[norm is None for norm in norms] for norms in rows])
    return steps, np.ma.masked_array(np.array(rows, dtype=float), is_missing)
