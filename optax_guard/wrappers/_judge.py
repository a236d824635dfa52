"""Whether a guard accepts a step, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._core.axes import MeshAxes
from optax_guard._core.finite import any_nonfinite, is_nonfinite, stack_flags
from optax_guard._core.groups import Groups
from optax_guard._core.interpret import evaluate
from optax_guard._core.plan import Proposal
from optax_guard._core.reader import Reading
from optax_guard._core.trees import FloatLeaves, inexact_leaves
from optax_guard.wrappers._poison import LookIf, Watched
from optax_guard.wrappers.conditions import Condition, judge_conditions
from optax_guard.wrappers.guard_state import GuardState
from optax_guard.wrappers.reasons import SkipReason


class Case(NamedTuple):
    """What a step is judged by, besides its gradients.

    Attributes:
      proposal: what the optimizer would do.
      gradients: of the step.
      axes: mesh axes over which the gradients are sharded.
      state: of the guard, before the step.
      params: before the step, or None.
      value: the loss, the mean over devices that each have their own; or None.
    """

    proposal: Proposal
    gradients: FloatLeaves
    axes: MeshAxes
    state: GuardState
    params: Any
    value: jax.Array | None

    @property
    def watched(self) -> Watched:
        # On many devices what is bad here may be fine elsewhere, where a poison sits. All of them
        # look in the step after.
        is_suspicious = self.state.last_step_skipped if self.axes.names else jnp.asarray(False)
        if self.value is not None:
            is_suspicious |= ~jnp.isfinite(self.value)
        leaves = (inexact_leaves(self.params), inexact_leaves(self.state.inner_state))
        return Watched(*leaves, self.state.initially_nonfinite, is_suspicious)

    @property
    def look(self) -> LookIf:
        return LookIf(tuple(leaf.shape for leaf in self.gradients.arrays))


class Verdict(NamedTuple):
    """What the guard decides.

    Attributes:
      ok: bool, whether the step is accepted.
      reason: int32, bits of :class:`SkipReason`.
      condition: int32, the first condition that rejects; -1 for none.
      bad_rows: bool ``[rows]``, where the fault is.
      condition_states: those that follow.
    """

    ok: jax.Array
    reason: jax.Array
    condition: jax.Array
    bad_rows: jax.Array
    condition_states: Any


def judge(
    case: Case,
    reading: Reading,
    groups: Groups,
    conditions: Sequence[Condition],
    check_update: bool,
    extra_args: dict[str, Any],
) -> Verdict:
    """Whether to accept the step, and why not."""
    alarm = jnp.asarray(False) if reading.alarm is None else reading.alarm
    gradients_are_finite = jnp.isfinite(reading.norm)
    bad_value = jnp.asarray(False) if case.value is None else ~jnp.isfinite(case.value)
    is_finite = gradients_are_finite & ~bad_value
    bad_proposal, bad_rows = jnp.asarray(False), ~reading.leaf_finite
    if check_update:
        bad_proposal, bad_updates, late_alarm = _judge_proposal(case, reading, is_finite)
        alarm |= late_alarm
        bad_rows |= _as_rows(bad_updates & bad_proposal, groups, bad_rows)
    rejecting, condition_states = judge_conditions(
        conditions, is_finite, bad_proposal, reading.norm, case.value, case.state.condition_states,
        extra_args,
    )  # fmt: skip
    rejected = rejecting >= 0
    ok = is_finite & ~bad_proposal & ~rejected
    was_poisoned = alarm & (~is_finite | bad_proposal)
    reason = _bits(
        (SkipReason.GRADIENT, ~gradients_are_finite),
        (SkipReason.LOSS_VALUE, bad_value),
        (SkipReason.PROPOSAL, bad_proposal),
        (SkipReason.CONDITION, rejected),
        (SkipReason.ALREADY_NONFINITE, was_poisoned),
    )
    return Verdict(ok, reason, rejecting, bad_rows, condition_states)


def _judge_proposal(
    case: Case, reading: Reading, is_finite: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether finite inputs lead to non-finite ones, which updates, and the alarm if so."""
    shapes, axes = case.look.shapes, case.axes
    arguments = case.proposal.arguments

    def look_at(arguments):
        updates, new_state = evaluate(case.proposal, arguments, reading)
        bad_updates = stack_flags([is_nonfinite(leaf) for leaf in inexact_leaves(updates)])
        bad_state = any_nonfinite(shapes, case.state.initially_nonfinite, new_state)
        return jnp.append(bad_updates, jnp.any(bad_updates) | bad_state)

    if not axes.names:
        # In a branch of its own XLA does not share what the real evaluation will compute again;
        # it would write all of it to memory for that, and take twice the time.
        nothing = jax.eval_shape(look_at, arguments)
        flags = lax.cond(is_finite, look_at, lambda _: jnp.zeros_like(nothing), arguments)
        is_bad = flags[-1] & is_finite
        return is_bad, flags[:-1], case.look(case.watched, is_bad)
    flags = look_at(arguments)  # not under a branch: ``inner`` may hold collectives
    alarm = case.look(case.watched, jnp.any(flags))
    flags = axes.any(jnp.append(flags, alarm))
    return flags[-2] & is_finite, flags[:-2], flags[-1]


def _as_rows(flags: jax.Array, groups: Groups, rows: jax.Array) -> jax.Array:
    """Flags of the updates for the rows of the gradients, if the two belong together."""
    counts = groups.rows
    if flags.shape != (len(counts),):
        return jnp.zeros_like(rows)
    return jnp.repeat(flags, np.asarray(counts), total_repeat_length=rows.shape[0])


def _bits(*reasons: tuple[int, jax.Array]) -> jax.Array:
    total = jnp.zeros((), jnp.int32)
    for bit, holds in reasons:
        total = total + jnp.where(holds, int(bit), 0).astype(jnp.int32)
    return total
