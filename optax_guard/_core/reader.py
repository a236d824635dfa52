"""Reads the gradients of a planned step once, for a guard and for the clip inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._core.axes import MeshAxes
from optax_guard._core.groups import Stacked, make_groups
from optax_guard._core.listening import narrow
from optax_guard._core.measure import measure_and_watch
from optax_guard._core.plan import Plan, Proposal
from optax_guard._core.roots import Measurement, merge_rows
from optax_guard._core.sums import MeasureCall, Watch
from optax_guard._core.trees import FloatLeaves


class Reading(NamedTuple):
    """What is known of the gradients before the update.

    Attributes:
      norm: of all leaves together.
      leaf_norms: float32 ``[rows]``.
      leaf_finite: bool ``[rows]``.
      alarm: whether ``watch`` alarmed on any device; None if nothing is watched.
      answers: results of the measurement inside, flat.
    """

    norm: jax.Array
    leaf_norms: jax.Array
    leaf_finite: jax.Array
    alarm: jax.Array | None
    answers: tuple[Any, ...]


class Reader(NamedTuple):
    """Measures the gradients among the arguments, in one read that a clip inside shares.

    Attributes:
      plan: for what.
      call: the measurement.
      is_shared: whether it answers for the one inside, too.
    """

    plan: Plan
    call: MeasureCall
    is_shared: bool

    def read(
        self,
        arguments: Sequence[Any],
        small_rows_matter: jax.Array | bool = False,
        watched: Any = (),
    ) -> Reading:
        """All norms, and what ``call.watch`` finds."""
        plan = self.plan
        leaves = [
            None if place is None else jnp.asarray(arguments[place]) for place in plan.gradients
        ]
        small_norms_matter: Any = True
        if self.is_shared:
            small_norms_matter, _ = self._asked(arguments)
        measured, alarm = measure_and_watch(
            leaves,
            self.call,
            small_norms_matter=small_norms_matter,
            small_rows_matter=small_rows_matter,
            watched=watched,
        )
        return Reading(*measured[-3:], alarm, self._answers(measured, leaves, arguments))

    def _answers(
        self, measured: Measurement, leaves: Sequence[Any], arguments: Sequence[Any]
    ) -> tuple[Any, ...]:
        heard = self.plan.heard
        if heard is None:
            return ()
        if self.is_shared:
            if not heard.groups.has_stacks:
                measured = merge_rows(measured, self.call.groups)
            return tuple(jax.tree.leaves((measured, None)))
        # Such as that of a guard inside, which watches for itself.
        small, watched = self._asked(arguments)
        call = heard._replace(is_used=self.plan.is_used)
        result = measure_and_watch(leaves, call, small_norms_matter=small, watched=watched)
        return tuple(jax.tree.leaves(result))

    def _asked(self, arguments: Sequence[Any]) -> Any:
        """Operands of the measurement inside, besides the gradients."""
        question = self.plan.question
        operands = [] if question is None else question.evaluate(arguments)
        return jax.tree.unflatten(self.plan.question_treedef, operands)


def make_reader(
    proposal: Proposal,
    gradients: FloatLeaves,
    axes: MeshAxes,
    *,
    stacked: Stacked = None,
    watch: Watch | None = None,
) -> Reader:
    """The reader of the gradients of a proposal."""
    plan = proposal.plan._replace(is_used=narrow(proposal.plan.is_used))
    heard = plan.heard
    groups = make_groups("global", gradients.paths, gradients.arrays, stacked=stacked)
    is_shared = heard is not None and heard.axes == axes and heard.watch is None
    if heard is not None and is_shared:
        is_shared = heard.groups.depths == groups.depths or not (
            heard.groups.has_stacks or heard.groups.is_flat
        )
        groups = heard.groups._replace(depths=groups.depths) if is_shared else groups
    call = MeasureCall(groups, plan.is_used, axes, watch)
    return Reader(plan, call, is_shared)
