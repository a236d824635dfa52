"""The last fault in words, and an error when a guard has given up. Host side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.trees import inexact_leaves
from optax_guard.reading.describe import (
    describe_guard,
    describe_others,
    last_fault_of,
    listing,
    rows_of,
)
from optax_guard.reading.find import (
    Found,
    find_guards,
    find_multi_steps,
    find_states,
    first_leaf,
    refuse_tracers,
)
from optax_guard.reading.metrics import label_of, places_of
from optax_guard.reading.names import named_leaves, network_order
from optax_guard.wrappers.guard_state import GuardState
from optax_guard.wrappers.loss_scale import DynamicLossScaleState
from optax_guard.wrappers.microbatch import SkipMicrobatchState
from optax_guard.wrappers.reasons import SkipReason


class GuardGaveUp(RuntimeError):  # noqa: N818 - it names what happened
    """Raised by :func:`check` when a run cannot go on.

    Attributes:
      step: of the last fault, counted from 0 as in a loop over ``range()``; for a guard inside
        ``optax.MultiSteps`` the window.
      reason: :class:`SkipReason` of the last fault.
      leaves: paths of the leaves that were non-finite in it.
    """

    def __init__(self, message: str, *, step: int, reason: int, leaves: tuple[str, ...]):
        """Keeps the parts of the message as attributes."""
        super().__init__(message)
        self.step = step
        self.reason = SkipReason(reason)
        self.leaves = leaves


def check(opt_state: Any, params: Any = None) -> None:
    """Raises when a guard has given up; call it now and then from the training loop.

    It raises as well when an accumulator of ``optax.MultiSteps`` is non-finite: ``MultiSteps``
    empties it by multiplying with 0, which leaves a NaN where it is, so that no later window is
    any good. :func:`skip_microbatch` prevents that.

    Args:
      opt_state: any pytree that holds at least one :class:`GuardState`.
      params: the parameters, for the names of the leaves in the message.

    Raises:
      GuardGaveUp: with step (counted from 0), reason and faulty leaves, if ``gave_up`` is set in
        any guard, or an accumulator is non-finite, also in any member of an ensemble (a state with
        a batch axis from ``jax.vmap``).
      ValueError: if there is no guard in ``opt_state``.
      TypeError: if called inside ``jit``.

    Cost: waits for the step that made ``opt_state``, and fetches one bool when all is well. One
    read of the accumulator, if there is one.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), max_consecutive_skips=1)
      >>> params = {"w": jnp.zeros(1)}
      >>> _, state = tx.update({"w": jnp.array([jnp.nan])}, tx.init(params))
      >>> og.check(state, params)
      Traceback (most recent call last):
          ...
      optax_guard.GuardGaveUp: The guard gave up. Step 0 was skipped: gradients were not finite...
    """
    refuse_tracers("check", opt_state)
    guards = find_guards(opt_state)
    alarms = [jnp.any(first_leaf(guard.state.gave_up)) for guard in guards]
    accumulators = find_multi_steps(opt_state)
    alarms += [_is_poisoned(inexact_leaves(found.state.acc_grads)) for found in accumulators]
    if not bool(alarms[0] if len(alarms) == 1 else jnp.any(jnp.stack(alarms))):
        return
    poisoned = next((names for names in map(_poisoned_leaves, accumulators) if names), ())
    flags = alarms[: len(guards)]
    guard = next((guard for guard, flag in zip(guards, flags, strict=True) if flag), guards[0])
    guard, params, member = _pick_member(guard, params)
    try:
        rows = rows_of(guard, params)
    except ValueError:  # of another structure: to raise matters more than the names
        params, rows = None, rows_of(guard, None)
    state = jax.device_get(guard.state._replace(inner_state=()))
    bad = (name for name, flag in zip(rows.names, state.last_fault_leaves, strict=True) if flag)
    cause = f"{_describe_poison(poisoned)}\n" if poisoned else "The guard gave up. "
    raise GuardGaveUp(
        f"{cause}{member}{describe_guard(guard, params)}",
        step=max(last_fault_of(guard), 0),
        reason=int(state.last_fault_reason),
        leaves=tuple(bad) or poisoned,
    )


def explain(opt_state: Any, params: Any = None) -> str:
    """Describes the last skipped step: when, why, and which layers.

    Steps count from 0, as in a loop over ``range()``, and all of them count, those included that a
    :func:`dynamic_loss_scale` around the guard kept from it. Inside ``optax.MultiSteps`` windows
    count. Of the layers that were still finite those next to the faulty ones
    come first: between the two is where the fault came in.

    Args:
      opt_state: any pytree that holds at least one :class:`GuardState`,
        :class:`DynamicLossScaleState` or :class:`SkipMicrobatchState`.
      params: the parameters (or a tree of their structure), for the names of the leaves. For a
        guard inside ``optax.masked`` or ``optax.partition`` all of them: which ones it watches
        is read off the moments of its optimizer.

    Returns:
      A few lines of text for every guard in ``opt_state``, and one for each accumulator of
      ``optax.MultiSteps`` that is non-finite for good, loss scale that has seen an overflow,
      micro-batch left out, :func:`rollback` that has gone back, and clip that cut more than half
      of about the last 100 steps.

    Raises:
      ValueError: if there is none of them in ``opt_state``, ``params`` does not match it, or the
        state has a batch axis from ``jax.vmap``.
      TypeError: if called inside ``jit``.

    Cost: waits for the step that made ``opt_state``, and fetches a few numbers for each leaf.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
      >>> tx = og.guard(optax.sgd(0.1))
      >>> gradients = {"w": jnp.array([1.0, jnp.nan]), "b": jnp.array([2.0])}
      >>> _, state = tx.update(gradients, tx.init(params))
      >>> print(og.explain(state, params))
      Step 0 was skipped: gradients were not finite (reason 1).
        non-finite: w (norm nan)
        still finite: b (norm 2)
        Skipped so far: 1 of 1 steps, 1 in a row.
    """
    refuse_tracers("explain", opt_state)
    states = find_states(opt_state)
    guards = [found for found in states if isinstance(found.state, GuardState)]
    others = (DynamicLossScaleState, SkipMicrobatchState)
    if not any(isinstance(found.state, others) for found in states):
        guards = find_guards(opt_state)
    texts = [describe_guard(guard, params) for guard in guards]
    if len(texts) > 1:
        names = [label_of(place) for place in places_of(guards, "")]
        texts = [
            f"Guard {name or number}: {text}"
            for number, (name, text) in enumerate(zip(names, texts, strict=True), 1)
        ]
    poisoned = map(_poisoned_leaves, find_multi_steps(opt_state))
    poisons = [_describe_poison(names) for names in poisoned if names]
    lines = [*poisons, *texts, *describe_others(opt_state, params, has_guard=bool(guards))]
    return "\n".join(lines) or "Nothing was left out."


@jax.jit
def _is_poisoned(leaves: Sequence[jax.Array]) -> jax.Array:
    """Whether any element is non-finite."""
    flags = [~jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
    return jnp.any(jnp.stack(flags)) if flags else jnp.asarray(False)


def _poisoned_leaves(found: Found) -> tuple[str, ...]:
    """Names of the non-finite arrays of an accumulator."""
    leaves = named_leaves(found.state.acc_grads)
    flags = jax.device_get([_is_poisoned([leaf]) for _, leaf in leaves])
    bad = [name for (name, _), flag in zip(leaves, flags, strict=True) if flag]
    return tuple(bad[index] for index in network_order(bad))


def _describe_poison(names: Sequence[str]) -> str:
    return (
        f"The accumulator of optax.MultiSteps is non-finite in {listing(names, range(len(names)))} "
        "and stays so: MultiSteps empties it by multiplying with 0. No later window is any good. "
        "Restore a checkpoint from before, and write optax.MultiSteps(og.guard(optimizer), k, "
        "should_skip_update_fn=og.skip_microbatch)."
    )


def _pick_member(guard: Found, params: Any) -> tuple[Found, Any, str]:
    """Of an ensemble the first member that gave up, and a word on it; else all as it is."""
    flags = np.asarray(jax.device_get(guard.state.gave_up))
    if not flags.ndim:
        return guard, params, ""
    member = tuple(map(int, np.unravel_index(np.argmax(flags), flags.shape)))
    state, around = jax.tree.map(lambda leaf: leaf[member], (guard.state, guard.around))

    def pick(leaf):
        return leaf[member] if np.shape(leaf)[: flags.ndim] == flags.shape else leaf

    place = member[0] if flags.ndim == 1 else member
    text = f"Member {place} of the ensemble ({flags.sum()} of {flags.size} gave up): "
    return guard._replace(state=state, around=around), jax.tree.map(pick, params), text
