"""What single states say, in words: a guard, a loss scale, a clip, an accumulator. Host side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from optax_guard._core.find import factory_name, is_clip_state
from optax_guard.reading.clips import PARTS, advice, needs_a_word, scope_of, with_scope
from optax_guard.reading.find import Found, find_states, refuse_batched
from optax_guard.reading.metrics import label_of, places_of
from optax_guard.reading.names import (
    Rows,
    condition_names,
    gradient_leaves,
    guard_rows,
    named_leaves,
    network_order,
)
from optax_guard.wrappers._verdict import guard_inside
from optax_guard.wrappers.guard_state import GuardState
from optax_guard.wrappers.loss_scale import DynamicLossScaleState
from optax_guard.wrappers.microbatch import SkipMicrobatchState
from optax_guard.wrappers.reasons import SkipReason
from optax_guard.wrappers.rollback import RollbackState

_MOST_LEAVES = 8


def rows_of(guard: Found, params: Any) -> Rows:
    """The rows of a guard, named by the parameters if there are any."""
    return guard_rows(guard, None if params is None else gradient_leaves(params))


def describe_guard(guard: Found, params: Any) -> str:
    """The last fault of a guard: when, why and where."""
    state = jax.device_get(guard.state._replace(inner_state=()))
    refuse_batched("explain", state.guard_step)
    steps, skipped = calls_around(guard), int(state.skipped_total)
    unit = "windows of MultiSteps" if guard.multi_steps else "steps"
    if skipped == 0:
        return _describe_health(guard, unit)
    reason = SkipReason(int(state.last_fault_reason))
    name = "Window" if guard.multi_steps else "Step"
    lines = [
        f"{name} {last_fault_of(guard)} was skipped: "
        f"{_in_words(reason, state)} (reason {int(reason)})."
    ]
    rows = rows_of(guard, params)
    lines += _layers(rows.names, state)
    if params is not None and not rows.are_known:
        lines.append(
            "  The guard sits inside optax.masked or optax.partition and watches "
            f"{len(rows.names)} of the leaves.\n"
            "  The state of its optimizer does not tell which, so they are numbered."
        )
    lines += _poisoned_parameters(guard, params, reason)
    in_a_row = int(state.skipped_in_a_row)
    lines.append(f"  Skipped so far: {skipped} of {steps} {unit}, {in_a_row} in a row.")
    if bool(state.gave_up):
        lines.append("  The guard has given up: training cannot recover by itself.")
    return "\n".join(lines)


def _loss_scale_around(guard: Found) -> DynamicLossScaleState | None:
    """The outermost loss scale that hands its steps straight on to a guard.

    It sees those too that it keeps from the guard, as the training loop does.
    """
    for place, state in enumerate(guard.around):
        is_scale = isinstance(state, DynamicLossScaleState)
        if is_scale and guard_inside(state.inner_state) is not None:
            is_first = not any(isinstance(s, GuardState) for s in guard.around[place:])
            return state if is_first else None
    return None


def calls_around(guard: Found) -> int:
    """How many steps there were, as the training loop counts them."""
    scale = _loss_scale_around(guard)
    return int(guard.state.guard_step if scale is None else scale.steps)


def last_fault_of(guard: Found) -> int:
    """The number of the last skipped step, from 0 as in a loop over ``range()``."""
    scale = _loss_scale_around(guard)
    return int(guard.state.last_fault_step if scale is None else scale.last_skip_step) - 1


def _describe_health(guard: Found, unit: str) -> str:
    steps = int(guard.state.guard_step)
    sees_less = guard.multi_steps or any(
        isinstance(state, DynamicLossScaleState) and np.any(jax.device_get(state.overflows_total))
        for state in guard.around
    )
    if sees_less:  # others may have left out a step, so that it would be wrong to say that none was
        return f"The guard skipped none of the {steps} {unit} that reached it."
    return f"No step was skipped in {steps} steps."


def _in_words(reason: SkipReason, state: GuardState) -> str:
    """The words of a reason, with the name of the condition that rejected the step."""
    names, index = condition_names(state), int(state.last_fault_condition)
    if not (reason & SkipReason.CONDITION and 0 <= index < len(names)):
        return reason.words
    words = SkipReason.CONDITION.words
    return reason.words.replace(words, f"{words}: {names[index]}")


def _layers(names: Sequence[str], state: GuardState) -> list[str]:
    """The faulty layers, and those still finite next to them: between the two it came in."""
    order = network_order(names)
    order = order[~state.unused_leaves[order]]
    flags, norms = state.last_fault_leaves[order], state.last_fault_norms[order]
    labels = [f"{names[i]} (norm {norm:.3g})" for i, norm in zip(order, norms, strict=True)]
    bad, good = np.flatnonzero(flags), np.flatnonzero(~flags)
    lines = []
    if bad.size:
        lines.append("  non-finite: " + listing(labels, bad))
        distances = np.abs(good[:, None] - bad).min(axis=1)
        good = good[np.argsort(distances, kind="stable")]
    if good.size:
        lines.append("  still finite: " + listing(labels, good))
    elif len(labels) > 1:
        lines.append("  No leaf is still finite: it came with the batch, the loss or the weights.")
    if not bad.size:
        lines.append(f"  norm of all gradients: {math.hypot(*norms):.3g}")
    return lines


def _poisoned_parameters(guard: Found, params: Any, reason: SkipReason) -> list[str]:
    """Names the parameters that have become non-finite when the fault was theirs."""
    if params is None or not reason & SkipReason.ALREADY_NONFINITE:
        return []
    leaves = named_leaves(params)
    flags = np.asarray(jax.device_get(guard.state.initially_nonfinite))
    were_bad = np.zeros(len(leaves), bool)
    if not guard.is_masked and len(leaves) <= len(flags):  # those of the inner state come first
        were_bad = flags[len(flags) - len(leaves) :]
    bad = [
        name
        for (name, leaf), was_bad in zip(leaves, were_bad, strict=True)
        if not was_bad and not _is_finite(leaf)
    ]
    bad = [bad[index] for index in network_order(bad)]
    place = ", ".join(bad[:_MOST_LEAVES]) if bad else "the optimizer state"
    return [f"  non-finite before the step: {place}. Restore a checkpoint from before that."]


def _is_finite(leaf: Any) -> bool:
    return bool(np.all(np.isfinite(np.asarray(jax.device_get(leaf)).astype(np.complex128))))


def listing(labels: Sequence[str], chosen: Sequence[int] | np.ndarray) -> str:
    """The first few of the chosen labels, in their order."""
    shown = [labels[index] for index in sorted(chosen[:_MOST_LEAVES])]
    more = len(chosen) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def describe_others(opt_state: Any, params: Any, *, has_guard: bool) -> list[str]:
    """A line for each state beside the guards that something happened to."""
    lines: list[str] = []
    states = find_states(opt_state)
    for found, place in zip(states, places_of(states, ""), strict=True):
        state = found.state
        if isinstance(state, DynamicLossScaleState):
            lines += _overflows(state, has_guard)
        elif isinstance(state, SkipMicrobatchState):
            lines += _left_out(found, params)
        elif isinstance(state, RollbackState):
            total = int(jax.device_get(state.rollbacks_total))
            lines += [f"Returns to a snapshot so far: {total}."] * (total > 0)
        elif is_clip_state(state):
            lines += _cuts_often(found, label_of(place))
    return lines


def _overflows(state: DynamicLossScaleState, has_guard: bool) -> list[str]:
    """None for a scale that nothing happened to, beside a guard."""
    state = jax.device_get(state._replace(inner_state=()))
    refuse_batched("explain", state.overflows_total)
    total, in_a_row = int(state.overflows_total), int(state.overflows_in_a_row)
    scale = f"the loss scale is {state.loss_scale:g}"
    if total:
        return [f"Gradients overflowed in {total} steps, {in_a_row} in a row; {scale}."]
    return [] if has_guard else [f"No gradient overflowed; {scale}."]


def _left_out(found: Found, params: Any) -> list[str]:
    """What :func:`skip_microbatch` left out."""
    state = jax.device_get(found.state)
    refuse_batched("explain", state.microbatch_skipped)
    lines = []
    if bool(state.microbatch_skipped):
        flags = np.asarray(state.microbatch_bad_leaves)
        tree = found.multi_steps[-1].acc_grads if found.multi_steps else params
        names = [leaf.name for leaf in ([] if tree is None else gradient_leaves(tree))]
        if len(names) != len(flags):
            names = [f"leaf {index}" for index in range(len(flags))]
        order = network_order(names)
        labels = [names[index] for index in order]
        where = listing(labels, np.flatnonzero(flags[order]))
        lines.append(f"The last micro-batch was left out of its window; non-finite: {where}.")
    total = int(getattr(state, "skipped_total", 0))
    return lines + [f"Micro-batches left out so far: {total}."] * (total > 0)


def _cuts_often(found: Found, label: str) -> list[str]:
    """Advice on a clip that cuts most steps."""
    state, name = found.state, factory_name(type(found.state))
    numbers = jax.device_get((state.steps, state.recent_clip_rate, state.recent_scale))
    steps, rate, scale = map(np.asarray, numbers)
    scope = scope_of(state)
    if steps.ndim or not needs_a_word(name, scope, float(steps), float(rate), float(scale)):
        return []
    guard = next((s for s in found.around[::-1] if isinstance(s, GuardState)), None)
    late = 0.0
    if guard is not None and not found.is_masked and scope == "global":
        late = float(jax.device_get(guard.grad_norm))
    late = late if math.isfinite(late) else 0.0
    some = "" if scope == "global" else f"some {PARTS[scope]} in "
    often = f"{with_scope(label, name, scope)} cut {some}{rate:.0%} of the last 100 steps or so"
    mean = f"to {scale:.2g} of its length on average"
    return [f"{often}, {mean}. {advice(name, scope, float(scale), late=late)}"]
