"""The last fault in words, and an error when a guard has given up. Host side."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard.guarding import guard as _guard
from optax_guard.reporting._names import named_leaves
from optax_guard.reporting.metrics import first_leaf, guard_states

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
      GuardGaveUp: with step, reason and faulty leaves, if ``gave_up`` is set in any guard.
      ValueError: if there is no guard in ``opt_state``.

    Cost: waits for the step that made ``opt_state``, and fetches one bool when all is well.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), max_consecutive_skips=1)
      >>> params = {"w": jnp.zeros(1)}
      >>> _, state = tx.update({"w": jnp.array([jnp.nan])}, tx.init(params))
      >>> og.check(state, params)
      Traceback (most recent call last):
          ...
      optax_guard.reporting.explain.GuardGaveUp: ...
    """
    guards = guard_states(opt_state)
    gave_up = [first_leaf(state.gave_up) for state in guards]
    if not bool(gave_up[0] if len(gave_up) == 1 else jnp.any(jnp.stack(gave_up))):
        return
    state = next(guard for guard, flag in zip(guards, gave_up, strict=True) if bool(flag))
    if params is not None and len(_names_in(params)) != _host(state.last_fault_leaves).size:
        params = None  # of another structure: to raise matters more than the names
    names = _names(params, state)
    faulty = tuple(
        name for name, bad in zip(names, _host(state.last_fault_leaves), strict=True) if bad
    )
    reason = int(_host(state.last_fault_reason))
    raise GuardGaveUp(
        f"The guard gave up. {_describe(state, params)}",
        step=int(_host(state.last_fault_step)),
        reason=reason,
        leaves=faulty,
    )


def explain(opt_state: Any, params: Any = None) -> str:
    """Describes the last skipped step: when, why, and which layers.

    Args:
      opt_state: any pytree that holds at least one :class:`GuardState`.
      params: the parameters (or a tree of their structure), for the names of the leaves.

    Returns:
      A few lines of text for every guard in ``opt_state``.

    Raises:
      ValueError: if there is no guard in ``opt_state``, or ``params`` does not match it.

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
    return "\n".join(_describe(state, params) for state in guard_states(opt_state))


def _host(value: Any) -> np.ndarray:
    return np.asarray(first_leaf(value))


def _names(params: Any, state: _guard.GuardState) -> tuple[str, ...]:
    count = _host(state.last_fault_leaves).size
    if params is None:
        return tuple(f"leaf {index}" for index in range(count))
    names = _names_in(params)
    if len(names) != count:
        raise ValueError(
            f"params has {len(names)} float leaves, but the guard watches {count}. Pass the "
            "tree of parameters that the optimizer was initialised with; with Flax NNX, "
            "nnx.state(model, nnx.Param)."
        )
    return names


def _names_in(params: Any) -> tuple[str, ...]:
    return tuple(name for name, _ in named_leaves(_guard._gradient_like(params)))


def _describe(state: _guard.GuardState, params: Any) -> str:
    steps, skipped, in_a_row = (
        int(_host(value))
        for value in (state.guard_step, state.skipped_total, state.skipped_in_a_row)
    )
    if skipped == 0:
        return f"No step was skipped in {steps} steps."
    names = _names(params, state)
    flags, norms = _host(state.last_fault_leaves), _host(state.last_fault_norms)
    reason = int(_host(state.last_fault_reason))
    labelled = [f"{name} (norm {norm:.3g})" for name, norm in zip(names, norms, strict=True)]
    lines = [
        f"Step {int(_host(state.last_fault_step))} was skipped: "
        f"{reason_in_words(reason)} (reason {reason})."
    ]
    if any(flags):
        lines.append("  non-finite: " + _listing(labelled, flags))
    if not all(flags):
        lines.append("  still finite: " + _listing(labelled, ~flags))
    lines += _poisoned_parameters(params, reason)
    lines.append(f"  Skipped so far: {skipped} of {steps} steps, {in_a_row} in a row.")
    if bool(_host(state.gave_up)):
        lines.append("  The guard has given up: training cannot recover by itself.")
    return "\n".join(lines)


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
    picked = [label for label, is_chosen in zip(labels, chosen, strict=True) if is_chosen]
    more = len(picked) - _MOST_LEAVES
    return ", ".join(picked[:_MOST_LEAVES]) + (f" and {more} more" if more > 0 else "")
