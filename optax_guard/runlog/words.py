"""What happened in a run, in words: a few lines for each guard, clip, loss scale, ..."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np

from optax_guard.reading.clips import PARTS, advice, needs_a_word
from optax_guard.runlog.about import About
from optax_guard.runlog.events import Clip, Events, Guard, total_of
from optax_guard.runlog.fetch import FAULT_LEAVES, Record
from optax_guard.runlog.happenings import Happening
from optax_guard.runlog.layers import names_for, ordered
from optax_guard.wrappers.reasons import SkipReason

_MOST_EVENTS, _MOST_NAMES = 5, 3
_WINDOWS = "windows of MultiSteps"


def say_events(events: Events, about: About) -> list[str]:
    """All of it; nothing on what did not happen, but for guards and clips."""
    lines: list[str] = []
    steps = count_steps(events, about)
    for guard in events.guards:
        lines += _say_guard(guard, events, about, steps)
    for happening in events.happenings:
        lines += _say_happening(happening, events, steps)
    for clip in events.clips:
        lines += _say_clip(clip, events, about, steps)
    return lines


def count_steps(events: Events, about: About) -> int:
    """How many steps there were, those included that were not recorded."""
    outer = [guard.calls for guard in events.guards if guard.place not in about.windows]
    scales = [found.calls for found in events.has("overflow")]
    return max((total_of(calls, events) for calls in (*outer, *scales)), default=0)


def _of_group(label: str) -> str:
    return f" ({label})" if label else ""


def _say_guard(guard: Guard, events: Events, about: About, steps: int) -> list[str]:
    is_inside = guard.place in about.windows
    calls = f"{total_of(guard.calls, events)} {_WINDOWS}" if is_inside else f"{steps} steps"
    where = np.flatnonzero(guard.skipped)
    line = f"skipped{_of_group(guard.label)}: {total_of(guard.skipped_total, events)} of {calls}"
    lines = [line + (f"; the last {_MOST_EVENTS}:" if where.size > _MOST_EVENTS else "")]
    for place in where[-_MOST_EVENTS:]:
        lines.append(f"  {_when(guard, events, place)}: {_why(guard, events, about, place)}")
    if any(record.get(guard.place + "gave_up") for record in events.records):
        lines.append("the guard gave up: training could not recover by itself")
    return lines


def _when(guard: Guard, events: Events, place: int) -> str:
    """The step of the last skip up to a record, as far as the counters tell."""
    record, step = events.records[place], int(events.steps[place])
    since_fault = guard.calls[place] - record.get(guard.place + "last_fault_step", math.nan)
    if place == 0:
        return f"step {step}"
    before = int(events.steps[place - 1])
    number = int(guard.skipped_total[place] - np.nan_to_num(guard.skipped_total[place - 1]))
    between = f"between the records of steps {before} and {step}"
    # One call a step: else its count does not tell the number of the step.
    if not since_fault >= 0 or guard.calls[place] - guard.calls[place - 1] != step - before:
        is_next = step - before == 1
        return f"step {step}" if is_next else between + (f" ({number} skips)" * (number > 1))
    found = f"step {step - int(since_fault)}"
    return found + (f" ({number - 1} more {between})" if number > 1 else "")


def _why(guard: Guard, events: Events, about: About, place: int) -> str:
    record = events.records[place]
    reason = SkipReason(int(record.get(guard.place + "last_fault_reason", 0)))
    words = reason.words
    names = about.conditions.get(guard.place, ())
    index = int(record.get(guard.place + "last_fault_condition", -1))
    if reason & SkipReason.CONDITION and 0 <= index < len(names):
        named = f"rejected by the condition {names[index]}"
        words = words.replace(SkipReason.CONDITION.words, named)
    return words + _where(record, about)


def _where(record: Record, about: About) -> str:
    """The layers at fault, if some of them were not."""
    bad = record.get(FAULT_LEAVES, [])
    norms = record.get("leaf_norms", [])
    count = sum(norm is not None for norm in norms)
    if not bad or max(bad) >= len(norms):
        return ""
    if len(bad) >= count > 1:
        return " (all layers)"
    names = names_for(len(norms), about.leaf_names)
    shown = [names[row] for row in ordered(names, bad)]
    return f" ({_listing(shown)})"


def _listing(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _say_happening(found: Happening, events: Events, steps: int) -> list[str]:
    total = total_of(found.total, events)
    if not total:
        return []
    where = events.steps[found.happened]
    line = {
        "overflow": f"overflowed at the loss scale: {total} of {steps} steps",
        "rollback": f"went back to a snapshot: {_times(total)}",
        "back-off": f"took smaller steps after a skip: {_times(total)}",
        "micro-batch": f"micro-batches left out: {total}",
        "zeroed": f"{found.label}: zeroed something in {total} of {steps} steps",
    }[found.kind]
    level = events.levels.get(_LEVELS.get(found.kind, ""))
    if level is not None:
        now = level[np.isfinite(level)][-1]
        line += f", {_LEVELS[found.kind]} now {now:.4g}"
    return [line + _at(where)]


_LEVELS = {"overflow": "loss scale", "back-off": "step factor"}


def _at(steps: np.ndarray) -> str:
    last = [str(step) for step in steps[-_MOST_EVENTS:]]
    if not last:
        return ""
    if len(steps) > len(last):
        return f" (the last at step {last[-1]})"
    return f" (at step{'s' * (len(last) > 1)} {', '.join(last)})"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _say_clip(clip: Clip, events: Events, about: About, steps: int) -> list[str]:
    total, seen = total_of(clip.total, events), total_of(clip.steps, events)
    is_inside = clip.place in about.windows
    of_all = f"{seen} {_WINDOWS}" if is_inside else f"{max(steps, seen)} steps"
    if not total:
        return [f"{clip.label}: cut none of {of_all}"]
    last = np.flatnonzero(np.isfinite(clip.recent_rate))[-1]  # records may be without a state
    rate, scale = float(clip.recent_rate[last]), float(clip.recent_scale[last])
    verb = "scaled" if clip.factory.startswith("normalize") else "cut"
    some = "" if clip.scope == "global" else f" some {PARTS[clip.scope]} in"
    line = f"{clip.label}: {verb}{some} {total} of {of_all} (recent {100 * rate:.0f} %)"
    mean = "mean factor" if clip.scope == "global" else "smallest factor on average"
    line += f", {mean} {scale:.2g}" if rate >= 0.005 else ""
    if not needs_a_word(clip.factory, clip.scope, seen, rate, scale):
        return [line]
    words = advice(clip.factory, clip.scope, scale, *_early_and_late(events))
    lines = (f"  {part}" for part in textwrap.wrap(words, 96))
    return [f"{line}: is the threshold too low?", *lines]


def _early_and_late(events: Events) -> tuple[float, float]:
    """The usual norm in the first and in the last tenth of the records; 0 if it is not known."""
    norm = events.norm[np.isfinite(events.norm)]
    part = max(len(norm) // 10, 1)
    if not norm.size:
        return 0.0, 0.0
    return float(np.median(norm[:part])), float(np.median(norm[-part:]))
