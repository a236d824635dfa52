"""The guard: steps that would poison a run are skipped, counted and explained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._core.arrays import increment, tree_where
from optax_guard._core.checks import check_axis_name, check_count, check_flag, check_transformation
from optax_guard._core.find import factory_name, is_wrapper_state, own_states
from optax_guard._core.finite import (
    any_nonfinite,
    inexact_leaves,
    is_nonfinite,
    stack_flags,
)
from optax_guard._core.inner import gradient_like, tolerant_update
from optax_guard._core.interpret import Proposal, evaluate, measure_gradients, propose, run
from optax_guard._core.measure import AxisName, psum
from optax_guard._core.trees import float_leaves, strong
from optax_guard.wrappers._poison import Watched, find_poison, look_if
from optax_guard.wrappers.conditions import Condition

GRADIENT = 1
LOSS_VALUE = 2
PROPOSAL = 4
CONDITION = 8
ALREADY_NONFINITE = 16


class GuardState(NamedTuple):
    """State of :func:`guard`: that of the wrapped optimizer, and 40 + 10 * leaves bytes.

    Attributes:
      inner_state: state of the wrapped optimizer.
      guard_step: int32, calls so far, skipped ones included.
      skipped_total: int32.
      skipped_in_a_row: int32.
      last_step_skipped: bool.
      skip_reason: int32 bit mask of the last call: 0 accepted, 1 gradient, 2 loss value, 4
        proposed update or state, 8 condition, 16 parameters or state were already non-finite.
      gave_up: bool, latched by too many skips in a row or by reason 16.
      grad_norm: float32, global norm of the last call's gradients, before any clipping.
      leaf_norms: float32 ``[float leaves]``, norms of the leaves in order; one below about 1e-19
        reads as 0 beside larger ones.
      last_fault_step: int32, the ``guard_step`` that counted the last skipped call; 0 for none.
      last_fault_reason: int32 bit mask.
      last_fault_leaves: bool ``[float leaves]``, which gradients were non-finite then.
      last_fault_norms: float32 ``[float leaves]``, norms of the leaves then.
      initially_nonfinite: bool ``[float leaves of inner_state]``, fields that ``init`` filled
        with non-finite numbers, such as a best loss of +inf; they never count as a fault.
      condition_states: one state for each condition of ``skip_if``.
    """

    inner_state: Any
    guard_step: jax.Array
    skipped_total: jax.Array
    skipped_in_a_row: jax.Array
    last_step_skipped: jax.Array
    skip_reason: jax.Array
    gave_up: jax.Array
    grad_norm: jax.Array
    leaf_norms: jax.Array
    last_fault_step: jax.Array
    last_fault_reason: jax.Array
    last_fault_leaves: jax.Array
    last_fault_norms: jax.Array
    initially_nonfinite: jax.Array
    condition_states: tuple[Any, ...]


def guard(
    inner: optax.GradientTransformation,
    *,
    skip_if: Condition | Sequence[Condition] = (),
    max_consecutive_skips: int | None = 100,
    check_update: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips every step that would make parameters or optimizer state non-finite.

    A step is skipped when

    * any element of the gradients is NaN or Inf (reason 1),
    * ``value=`` (the loss) was passed to ``update`` and is NaN or Inf (reason 2),
    * ``check_update=True`` and ``inner`` turns finite inputs into a non-finite update or state
      (reason 4),
    * a condition in ``skip_if`` says so (reason 8).

    On a skip the update is -0.0, which changes no bit of any parameter (but a backend may flush
    subnormal ones to zero in every addition), and every leaf of the inner state stays bitwise
    what it was: moments, schedule counts, PRNG keys, clip histories. A run with faulty steps ends
    bitwise where the same compiled function ends that saw only the healthy ones. The guard never
    accepts a non-finite gradient. After ``max_consecutive_skips`` skips in a row ``gave_up`` is
    set for good; nothing else changes, and :func:`check` raises on the host. The first step is
    judged like every other.

    When a gradient is non-finite, parameters and inner state are looked at too. If one of them
    was non-finite already, reason 16 is added and ``gave_up`` set at once: no later step can
    heal it.

    What lives outside the optimizer (BatchNorm statistics, step counters) is not held back:
    use :func:`step_ok` and :func:`select`.

    Args:
      inner: the optimizer to protect, clips included: ``guard(chain(clip, optimizer))``.
      skip_if: a condition such as :func:`norm_above` or :func:`spike`, or several.
      max_consecutive_skips: static integer >= 1, or None to never give up.
      check_update: also judge what ``inner`` proposes. Catches an inner that breaks by itself
        (Adam's eps underflows in float16, a schedule returns NaN, lr * g overflows). Costs one
        more evaluation of ``inner`` and one more reduction. Off by default: then such poison is
        found one step later, as reason 16.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map`` or ``pmap``;
        all devices then take the same decision, in one all-reduce. Reason 16 is then looked for
        where gradients are non-finite, and on all devices in the step after. Not needed under
        plain ``jit``.

    Returns:
      A transformation that passes extra args on to ``inner``, less those that it does not take.
      Updates have the dtype that ``inner`` gives them. Cost: one read of the gradients, which a
      clip of this library inside ``inner`` shares; no copy of the state.

    Raises:
      ValueError: if ``max_consecutive_skips`` is not positive.
        From ``init``, if ``inner`` holds a wrapper that must see bad steps and is to go outside:
        :func:`dynamic_loss_scale`, :func:`backoff` or :func:`rollback`.
      TypeError: if an argument has the wrong type, or, from ``update``, if ``inner`` changes
        structure or shapes of its state.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = {"w": jnp.ones(2), "b": jnp.ones(1)}
      >>> tx = og.guard(optax.adam(0.1))
      >>> bad = {"w": jnp.array([1.0, jnp.nan]), "b": jnp.ones(1)}
      >>> updates, state = tx.update(bad, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"]
      Array([1., 1.], dtype=float32)
      >>> print(og.explain(state, params))  # doctest: +ELLIPSIS
      Step 1 was skipped: ...

    References:
      ``optax.apply_if_finite`` is the model. It accepts a NaN after too many in a row, takes
      gradients and updates of the same dtype only, and costs several copies of the state.
    """
    check_transformation("inner", inner)
    check_count("max_consecutive_skips", max_consecutive_skips, optional=True)
    check_flag("check_update", check_update)
    check_axis_name(axis_name)
    conditions = _check_conditions(skip_if)
    inner_update = tolerant_update(inner)

    def init(params):
        inner_state = jax.tree.map(strong, inner.init(params))
        _check_nesting(inner_state)
        num_leaves = len(float_leaves(gradient_like(params)).arrays)

        def zeros(dtype, *shape):  # a new buffer each time: none can be donated twice
            return jnp.zeros(shape, dtype)

        return GuardState(
            inner_state=inner_state,
            guard_step=zeros(jnp.int32),
            skipped_total=zeros(jnp.int32),
            skipped_in_a_row=zeros(jnp.int32),
            last_step_skipped=zeros(jnp.bool_),
            skip_reason=zeros(jnp.int32),
            gave_up=zeros(jnp.bool_),
            grad_norm=zeros(jnp.float32),
            leaf_norms=zeros(jnp.float32, num_leaves),
            last_fault_step=zeros(jnp.int32),
            last_fault_reason=zeros(jnp.int32),
            last_fault_leaves=zeros(jnp.bool_, num_leaves),
            last_fault_norms=zeros(jnp.float32, num_leaves),
            initially_nonfinite=_nonfinite_at_init(inner_state, axis_name),
            condition_states=tuple(condition.init() for condition in conditions),
        )

    def update(updates, state, params=None, **extra_args):
        proposal = propose(inner_update, updates, state.inner_state, params, extra_args)
        watched = _watch(params, state, extra_args.get("value"))
        grad_norm, leaf_norms, leaf_finite, alarm, known = measure_gradients(
            proposal, axis_name, look_if, watched
        )
        value = _shared_value(extra_args.get("value"), axis_name)
        bad_value = jnp.asarray(False) if value is None else ~jnp.isfinite(value)
        is_finite = jnp.all(leaf_finite) & ~bad_value
        bad_proposal, bad_updates = jnp.asarray(False), None
        if check_update:
            bad_proposal, bad_updates, late_alarm = _judge_proposal(
                proposal, is_finite, watched, axis_name
            )
            alarm = None if alarm is None else alarm | late_alarm

        rejected, condition_states = _judge_conditions(
            conditions, is_finite, bad_proposal, grad_norm, value, state.condition_states
        )
        bad_proposal &= is_finite
        ok = is_finite & ~bad_proposal & ~rejected
        if alarm is None:
            # ``ok`` passes through the branch, so that XLA looks at the old state before it
            # overwrites it, and cannot repeat what led to ``ok`` in the loop of every leaf.
            gradients = inexact_leaves(updates)
            ok, alarm = lax.cond(
                ok,
                lambda *_: (jnp.asarray(True), jnp.asarray(False)),
                lambda *operands: (jnp.asarray(False), find_poison(*operands)),
                gradients,
                watched,
            )
        was_poisoned = alarm & (~is_finite | bad_proposal)
        reason = _bits(
            (GRADIENT, ~jnp.all(leaf_finite)),
            (LOSS_VALUE, bad_value),
            (PROPOSAL, bad_proposal),
            (CONDITION, rejected),
            (ALREADY_NONFINITE, was_poisoned),
        )
        new_updates, inner_state = run(proposal, ok, known)
        fault_leaves = ~leaf_finite
        if bad_updates is not None and bad_updates.shape == fault_leaves.shape:
            fault_leaves |= bad_updates & bad_proposal
        new_state = _record(
            state, inner_state, reason, grad_norm, leaf_norms, fault_leaves, condition_states
        )
        return new_updates, new_state

    def _record(state, inner_state, reason, grad_norm, leaf_norms, fault_leaves, condition_states):
        skipped = reason > 0
        in_a_row = jnp.where(skipped, increment(state.skipped_in_a_row), 0)
        gave_up = state.gave_up | ((reason & ALREADY_NONFINITE) > 0)
        if max_consecutive_skips is not None:
            gave_up |= in_a_row >= max_consecutive_skips
        step = increment(state.guard_step)
        recorded = state._replace(
            inner_state=inner_state,
            guard_step=step,
            skipped_total=jnp.where(skipped, increment(state.skipped_total), state.skipped_total),
            skipped_in_a_row=in_a_row,
            last_step_skipped=skipped,
            skip_reason=reason,
            gave_up=gave_up,
            grad_norm=grad_norm.astype(jnp.float32),
            leaf_norms=leaf_norms,
            condition_states=condition_states,
        )
        fault = {
            "last_fault_step": step,
            "last_fault_reason": reason,
            "last_fault_leaves": fault_leaves,
            "last_fault_norms": leaf_norms,
        }
        before = {name: getattr(state, name) for name in fault}
        return recorded._replace(**tree_where(skipped, fault, before))

    return optax.GradientTransformationExtraArgs(init, update)


def _check_conditions(skip_if: Any) -> tuple[Condition, ...]:
    conditions = (skip_if,) if isinstance(skip_if, Condition) else skip_if
    if not isinstance(conditions, (tuple, list)) or not all(
        isinstance(condition, Condition) for condition in conditions
    ):
        raise TypeError(
            "skip_if must be a condition such as og.spike() or og.norm_above(10.0), "
            f"or a tuple of them, got {skip_if!r}."
        )
    return tuple(conditions)


def _check_nesting(inner_state: Any) -> None:
    """A wrapper that acts on bad steps must not sit where it sees none."""
    for state in own_states(inner_state):
        if is_wrapper_state(state) and not isinstance(state, GuardState):
            name = factory_name(type(state))
            raise ValueError(
                f"{name} inside of a guard would never see a bad step: the guard skips those, and "
                f"all that is in it stays as it was. Write og.{name}(og.guard(optimizer)) instead "
                f"of og.guard(og.{name}(optimizer))."
            )


def _bits(*reasons: tuple[int, jax.Array]) -> jax.Array:
    total = jnp.zeros((), jnp.int32)
    for bit, holds in reasons:
        total = total + jnp.where(holds, bit, 0).astype(jnp.int32)
    return total


def _any_device(flag: jax.Array, axis_name: AxisName) -> jax.Array:
    return flag if axis_name is None else psum(flag.astype(jnp.int32), axis_name) > 0


def _shared_value(value: Any, axis_name: AxisName) -> jax.Array | None:
    """The loss, averaged over devices that each have their own; NaN on one is NaN on all."""
    if value is None:
        return None
    value = jnp.mean(jnp.asarray(value))
    return value if axis_name is None else lax.pmean(value, axis_name)


def _nonfinite_at_init(inner_state: Any, axis_name: AxisName) -> jax.Array:
    """Which fields ``init`` made non-finite, on any device if called inside the mesh."""
    flags = stack_flags([is_nonfinite(leaf) for leaf in inexact_leaves(inner_state)])
    try:
        return _any_device(flags, axis_name)
    except NameError:  # JAX: the axis is unbound, ``init`` was called outside of shard_map
        return flags


def _watch(params: Any, state: GuardState, value: Any) -> Watched:
    # On many devices what is bad here may be fine elsewhere, where a poison sits. All of them
    # look in the step after.
    is_suspicious = state.last_step_skipped
    if value is not None:
        is_suspicious |= ~jnp.all(jnp.isfinite(jnp.asarray(value)))
    leaves = (inexact_leaves(params), inexact_leaves(state.inner_state))
    return Watched(*leaves, state.initially_nonfinite, is_suspicious)


def _judge_proposal(
    proposal: Proposal, is_finite: jax.Array, watched: Watched, axis_name: AxisName
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether the proposed updates or state are non-finite, which updates, and the alarm if so."""
    gradients = inexact_leaves([proposal.arguments[i] for i in proposal.gradients])

    def judge(arguments):
        updates, new_state = evaluate(proposal._replace(arguments=arguments))
        bad_updates = stack_flags([is_nonfinite(leaf) for leaf in inexact_leaves(updates)])
        bad_state = any_nonfinite(gradients, watched.initially_nonfinite, new_state)
        return jnp.append(bad_updates, jnp.any(bad_updates) | bad_state)

    if axis_name is None:
        # In a branch of its own XLA does not share what the real evaluation will compute again;
        # it would write all of it to memory for that, and take twice the time.
        nothing = jax.eval_shape(judge, proposal.arguments)
        flags = lax.cond(is_finite, judge, lambda _: jnp.zeros_like(nothing), proposal.arguments)
        return flags[-1], flags[:-1], jnp.asarray(False)
    flags = judge(proposal.arguments)  # not under a branch: ``inner`` may hold collectives
    alarm = look_if(gradients, watched, jnp.any(flags))
    flags = _any_device(jnp.append(flags, alarm), axis_name)
    return flags[-2], flags[:-2], flags[-1]


def _judge_conditions(
    conditions: Sequence[Condition],
    is_finite: jax.Array,
    bad_proposal: jax.Array,
    grad_norm: jax.Array,
    value: Any,
    states: tuple[Any, ...],
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Whether any condition rejects a finite step, and the states that follow."""
    verdicts, proposed = [], []
    safe_norm = jnp.where(is_finite, grad_norm, 0)
    safe_value = None if value is None else jnp.where(is_finite, value, 0)
    for condition, state in zip(conditions, states, strict=True):
        rejects, new_state = condition.judge(safe_norm, safe_value, state)
        verdicts.append(rejects & is_finite)
        proposed.append(new_state)
    any_rejects = jnp.any(stack_flags(verdicts)) if verdicts else jnp.asarray(False)
    is_accepted = is_finite & ~any_rejects & ~bad_proposal
    new_states = tuple(
        tree_where(is_accepted | rejects, new, old)
        for rejects, new, old in zip(verdicts, proposed, states, strict=True)
    )
    return any_rejects, new_states
