"""The last fault in words, and an error when a guard has given up. Host side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.find import states_of_type
from optax_guard.reading.find import (
    Found,
    find_guards,
    find_states,
    refuse_batched,
    refuse_tracers,
)
from optax_guard.reading.metrics import first_leaf
from optax_guard.reading.names import (
    LeafNames,
    gradient_leaves,
    guard_leaf_names,
    named_leaves,
)
from optax_guard.wrappers import guard as _guard
from optax_guard.wrappers.guard import GuardState
from optax_guard.wrappers.loss_scale import DynamicLossScaleState
from optax_guard.wrappers.rollback import RollbackState

_REASONS = {
    _guard.GRADIENT: "gradients were not finite",
    _guard.LOSS_VALUE: "the loss value was not finite",
    _guard.PROPOSAL: "the optimizer proposed a non-finite update or state from finite inputs",
    _guard.CONDITION: "a skip_if condition rejected the step",
    _guard.ALREADY_NONFINITE: "parameters or optimizer state were already non-finite",
}
_MOST_LEAVES = 8


class GuardGaveUp(RuntimeError):  # noqa: N818 - it names what happened
    """Raised by :func:`check` when a guard skipped too many steps in a row.

    Attributes:
      step: the guard's count of calls at the last fault.
      reason: int bit mask of the last fault, see :class:`GuardState`.
      leaves: paths of the leaves that were non-finite in it.
    """

    def __init__(self, message: str, *, step: int, reason: int, leaves: tuple[str, ...]):
        """Keeps the parts of the message as attributes."""
        super().__init__(message)
        self.step = step
        self.reason = reason
        self.leaves = leaves


def reason_in_words(reason: int) -> str:
    """The bits of a skip reason, joined."""
    words = [text for bit, text in _REASONS.items() if reason & bit]
    return "; ".join(words) if words else "accepted"


def check(opt_state: Any, params: Any = None) -> None:
    """Raises when a guard has given up; call it now and then from the training loop.

    Args:
      opt_state: any pytree that holds at least one :class:`GuardState`.
      params: the parameters, for the names of the leaves in the message.

    Raises:
      GuardGaveUp: with step, reason and faulty leaves, if ``gave_up`` is set in any guard, or in
        any member of an ensemble (a state with a batch axis from ``jax.vmap``).
      ValueError: if there is no guard in ``opt_state``.
      TypeError: if called inside ``jit``.

    Cost: waits for the step that made ``opt_state``, and fetches one bool when all is well.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), max_consecutive_skips=1)
      >>> params = {"w": jnp.zeros(1)}
      >>> _, state = tx.update({"w": jnp.array([jnp.nan])}, tx.init(params))
      >>> og.check(state, params)
      Traceback (most recent call last):
          ...
      optax_guard.reading.explain.GuardGaveUp: ...
    """
    refuse_tracers("check", opt_state)
    guards = find_guards(opt_state)
    gave_up = [first_leaf(guard.state.gave_up) for guard in guards]
    gave_up = [jnp.any(flags) if flags.ndim else flags for flags in gave_up]
    if not bool(gave_up[0] if len(gave_up) == 1 else jnp.any(jnp.stack(gave_up))):
        return
    guard = next(guard for guard, flag in zip(guards, gave_up, strict=True) if bool(flag))
    guard, member = _member_that_gave_up(guard)
    try:
        names = _names(guard, params)
    except ValueError:  # of another structure: to raise matters more than the names
        params, names = None, _names(guard, None)
    state = jax.device_get(guard.state._replace(inner_state=()))
    flags = _host(state.last_fault_leaves)
    raise GuardGaveUp(
        f"The guard gave up. {member}{_describe(guard, params)}",
        step=int(_host(state.last_fault_step)),
        reason=int(_host(state.last_fault_reason)),
        leaves=tuple(name for name, bad in zip(names.names, flags, strict=True) if bad),
    )


def explain(opt_state: Any, params: Any = None) -> str:
    """Describes the last skipped step: when, why, and which layers.

    Of the layers that were still finite those next to the faulty ones come first: between the
    two is where the fault came in.

    Args:
      opt_state: any pytree that holds at least one :class:`GuardState` or
        :class:`DynamicLossScaleState`.
      params: the parameters (or a tree of their structure), for the names of the leaves. For a
        guard inside ``optax.masked`` or ``optax.partition`` all of them: which ones it watches
        is read off the moments of its optimizer.

    Returns:
      A few lines of text for every guard in ``opt_state``, one for each loss scale that has seen
      an overflow, and one for each :func:`rollback` that has gone back.

    Raises:
      ValueError: if there is neither in ``opt_state``, ``params`` does not match it, or the state
        has a batch axis from ``jax.vmap``.
      TypeError: if called inside ``jit``.

    Cost: waits for the step that made ``opt_state``, and fetches a few numbers for each leaf.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
      >>> tx = og.guard(optax.sgd(0.1))
      >>> gradients = {"w": jnp.array([1.0, jnp.nan]), "b": jnp.array([2.0])}
      >>> _, state = tx.update(gradients, tx.init(params))
      >>> print(og.explain(state, params))
      Step 1 was skipped: gradients were not finite (reason 1).
        non-finite: w (norm nan)
        still finite: b (norm 2)
        Skipped so far: 1 of 1 steps, 1 in a row.
    """
    refuse_tracers("explain", opt_state)
    scales = states_of_type(opt_state, DynamicLossScaleState)
    returns = states_of_type(opt_state, RollbackState)
    guards = [found for found in find_states(opt_state) if isinstance(found.state, GuardState)]
    texts = [
        _describe(guard, params) for guard in guards or ([] if scales else find_guards(opt_state))
    ]
    if len(texts) > 1:
        texts = [f"Guard {number}: {text}" for number, text in enumerate(texts, 1)]
    return "\n".join([*texts, *_overflows(scales, bool(texts)), *_returns(returns)])


def _overflows(scales: Sequence[DynamicLossScaleState], has_guard: bool) -> list[str]:
    """One line for each loss scale; none for one that nothing happened to, beside a guard."""
    lines = []
    for state in scales:
        total, in_a_row = (
            _host(count) for count in (state.overflows_total, state.overflows_in_a_row)
        )
        refuse_batched("explain", total)
        scale = f"the loss scale is {_host(state.loss_scale):g}"
        if total:
            lines.append(f"Gradients overflowed in {total} steps, {in_a_row} in a row; {scale}.")
        elif not has_guard:
            lines.append(f"No gradient overflowed; {scale}.")
    return lines


def _returns(states: Sequence[RollbackState]) -> list[str]:
    totals = [int(_host(state.rollbacks_total)) for state in states]
    return [f"Returns to a snapshot so far: {total}." for total in totals if total]


def _member_that_gave_up(guard: Found) -> tuple[Found, str]:
    """Of an ensemble the first member that gave up, and a word on it; else the guard itself."""
    flags = _host(guard.state.gave_up)
    if not flags.ndim:
        return guard, ""
    member = np.unravel_index(np.argmax(flags), flags.shape)
    state = jax.tree.map(lambda leaf: leaf[member], guard.state)
    place = member[0] if flags.ndim == 1 else tuple(map(int, member))
    text = f"Member {place} of the ensemble ({flags.sum()} of {flags.size} gave up): "
    return guard._replace(state=state), text


def _host(value: Any) -> np.ndarray:
    return np.asarray(jax.tree.leaves(value)[0])


def _names(guard: Found, params: Any) -> LeafNames:
    return guard_leaf_names(guard, None if params is None else gradient_leaves(params))


def _describe(guard: Found, params: Any) -> str:
    state = jax.device_get(guard.state._replace(inner_state=()))
    refuse_batched("explain", _host(state.guard_step))
    steps, skipped, in_a_row = (
        int(_host(value))
        for value in (state.guard_step, state.skipped_total, state.skipped_in_a_row)
    )
    if skipped == 0:
        return f"No step was skipped in {steps} steps."
    names = _names(guard, params)
    reason = int(_host(state.last_fault_reason))
    lines = [
        f"Step {int(_host(state.last_fault_step))} was skipped: "
        f"{reason_in_words(reason)} (reason {reason})."
    ]
    lines += _layers(names.names, _host(state.last_fault_leaves), _host(state.last_fault_norms))
    if params is not None and not names.are_known:
        lines.append(
            "  The guard sits inside optax.masked or optax.partition and watches "
            f"{len(names.names)} of the leaves.\n"
            "  The state of its optimizer does not tell which, so they are numbered."
        )
    lines += _poisoned_parameters(params, reason)
    lines.append(f"  Skipped so far: {skipped} of {steps} steps, {in_a_row} in a row.")
    if bool(_host(state.gave_up)):
        lines.append("  The guard has given up: training cannot recover by itself.")
    return "\n".join(lines)


def _layers(names: Sequence[str], flags: np.ndarray, norms: np.ndarray) -> list[str]:
    """The faulty leaves, and those still finite next to them: between the two it came in."""
    labels = [f"{name} (norm {norm:.3g})" for name, norm in zip(names, norms, strict=True)]
    bad, good = np.flatnonzero(flags), np.flatnonzero(~flags)
    lines = []
    if bad.size:
        lines.append("  non-finite: " + _listing(labels, bad))
        distances = np.abs(good[:, None] - bad).min(axis=1)
        good = good[np.argsort(distances, kind="stable")]
    if good.size:
        lines.append("  still finite: " + _listing(labels, good))
    elif len(labels) > 1:
        lines.append("  No leaf is still finite: it came with the batch, the loss or the weights.")
    if not bad.size:
        lines.append(f"  norm of all gradients: {math.hypot(*norms):.3g}")
    return lines


def _poisoned_parameters(params: Any, reason: int) -> list[str]:
    """Names the non-finite parameters when the fault was theirs."""
    if params is None or not reason & _guard.ALREADY_NONFINITE:
        return []
    bad = [
        name
        for name, leaf in named_leaves(params)
        if not np.all(np.isfinite(np.asarray(jax.device_get(leaf)).astype(np.complex128)))
    ]
    place = ", ".join(bad[:_MOST_LEAVES]) if bad else "the optimizer state"
    return [f"  non-finite before the step: {place}. Restore a checkpoint from before that."]


def _listing(labels: list[str], chosen: np.ndarray) -> str:
    """The first few of the chosen labels, in the order of the leaves."""
    shown = [labels[index] for index in sorted(chosen[:_MOST_LEAVES])]
    more = len(chosen) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
