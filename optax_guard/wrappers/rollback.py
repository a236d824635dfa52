"""Going back to a snapshot when bad steps do not stop."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._core.arrays import increment, update_towards
from optax_guard._core.axes import AxisName, MeshAxes, no_elements, resolve_axes
from optax_guard._core.checks import check_axis_name, check_count, check_transformation
from optax_guard._core.find import optimizer_part, with_optimizer_part
from optax_guard._core.finite import is_nonfinite, stack_flags
from optax_guard._core.inner import tolerant_update
from optax_guard._core.interpret import keep_unless
from optax_guard._core.states import Entry, PackedState, flag
from optax_guard._core.transformation import require_params, transformation
from optax_guard._core.trees import float_leaves, is_inexact, strong
from optax_guard.wrappers._notify import quietly
from optax_guard.wrappers._verdict import require_guard, verdict


class _RollbackArrays(NamedTuple):
    inner_state: Any
    snapshot_params: Any
    snapshot_state: Any
    integers: Any


class RollbackState(PackedState, _RollbackArrays):
    """State of :func:`rollback`: that of the wrapped guard, a copy of the run, and 20 bytes.

    Attributes:
      inner_state: state of the wrapped guard.
      snapshot_params: the parameters to return to, less those that are no floats.
      snapshot_state: the optimizer's state that belongs to them.
      integers: int32, packed.
    """

    __slots__ = ()
    healthy_since_snapshot = Entry("integers", "int32, accepted steps since it was taken")
    healthy_in_a_row = Entry("integers", "int32, accepted steps since the last skipped one")
    bad_in_a_row = Entry("integers", "int32, skipped since the last accepted step or return")
    rollbacks_total = Entry("integers", "int32, returns so far")
    last_step_rolled_back = flag("integers", "bool")


def rollback(
    inner: optax.GradientTransformation,
    *,
    every: int = 100,
    after_skips: int = 10,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns parameters and optimizer to a snapshot when too many steps in a row were skipped.

    A guard inside ``inner`` decides what is skipped. With ``s`` the snapshot, ``p`` the
    parameters::

        init:                              s <- p and the state of the optimizer
        every-th healthy step after that:  s <- the same, before the next accepted step
        after_skips-th bad step in a row:  u <- s - p, and the state of the optimizer from s

    so that ``optax.apply_updates`` lands on the snapshot, to one rounding of its addition. After a
    return the count of bad steps starts again. Where parameters were so large that this rounding
    swallowed the snapshot (1e20 + (1 - 1e20) is 0), the next step adds what is missing.

    A snapshot is taken of parameters that the guard has just accepted a gradient of, never of
    where an update has led that nobody has judged; parameters and state must be finite, and the
    last ``min(every, after_skips)`` steps healthy. That does not prove it good: taken while a run
    diverges slowly, with finite gradients, it leads back there.

    What comes back: parameters, moments, schedule counts, PRNG keys and clip histories inside the
    guard. What goes on: the counters and conditions of the guard, the shrinking of
    :func:`backoff`, the scale of :func:`dynamic_loss_scale`. ``gave_up``, once set, stays,
    hence ``after_skips`` should be less than ``max_consecutive_skips`` of the guard.

    It rescues parameters that have become so large that no gradient is finite. It does not remove
    the cause: a learning rate that is too high leads to the same place again. So let the
    steps after a return be smaller::

        og.rollback(og.backoff(og.guard(optimizer)))

    A parameter that is already NaN or Inf stays so, since nothing added to it is finite: prevent
    that with ``guard(..., check_update=True)``. What lives outside of the optimizer (BatchNorm
    statistics, EMA weights) is not taken back.

    Args:
      inner: a guarded optimizer, such as ``guard(...)`` or ``backoff(guard(...))``.
      every: static integer >= 1, healthy steps between snapshots.
      after_skips: static integer >= 1.
      axis_name: mesh axes over which parameters are sharded inside ``shard_map`` or ``pmap``, as
        given to the guard.

    Returns:
      A transformation that passes extra args on to ``inner``, less those that it does not take.
      Its ``update`` needs ``params``. Updates keep the dtype that ``inner`` gives them; a
      float16 one cannot go further than 65504 at once, the next step adds the rest. Memory: one
      more copy of the parameters and of the optimizer's state (for Adam three times the size of
      the parameters). Time: the guard's verdict is
      taken twice, and XLA on CPU makes copies of the state that it need not: with AdamW and 12
      million parameters the update takes about six times as long as plain AdamW (a guard alone:
      1.2 times), next to forward and backward passes. Compiling takes twice as long as a guard's.

    Raises:
      ValueError: if ``every`` or ``after_skips`` is not positive; from ``init``, if there is no
        guard in ``inner``; from ``update``, if it is called without ``params``.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.rollback(og.guard(optax.sgd(1.0)), every=2, after_skips=2)
      >>> params = jnp.array([10.0])
      >>> state = tx.init(params)
      >>> for gradient in [1.0, 1.0, 1.0, 1.0, jnp.nan, jnp.nan, 1.0]:
      ...     updates, state = tx.update(jnp.array([gradient]), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params, end=" ")
      [9.] [8.] [7.] [6.] [6.] [8.] [7.]

    References:
      By hand in many a training log, such as `PaLM's <https://arxiv.org/abs/2204.02311>`_
      (section 5.1), which restarts 100 steps before a spike and skips the batches around it.
    """
    check_transformation("inner", inner)
    check_count("every", every)
    check_count("after_skips", after_skips)
    check_axis_name(axis_name)
    inner_update = tolerant_update(inner)
    quiet_steps = min(every, after_skips)

    def init(params):
        inner_state = jax.tree.map(strong, inner.init(params))
        require_guard(inner_state, "rollback")
        copies = jax.tree.map(_copy, _snapshot_of(params, inner_state))
        return RollbackState.pack(
            inner_state=inner_state,
            snapshot_params=copies.params,
            snapshot_state=copies.state,
            healthy_since_snapshot=0,
            healthy_in_a_row=0,
            bad_in_a_row=0,
            rollbacks_total=0,
            last_step_rolled_back=False,
        )

    def update(updates, state, params=None, **extra_args):
        require_params(params, "rollback", "takes snapshots of the parameters")
        split = float_leaves(params)
        axes = resolve_axes(axis_name, split.paths, split.arrays, what="parameter")
        # Traced twice: of this one only the verdict is used, and XLA drops the rest. To know it
        # before anything of the old state is overwritten saves copies of all of that.
        with quietly():
            judged = inner_update(updates, state.inner_state, params, **extra_args)
        is_skipped, is_healthy = verdict(state.inner_state, judged[1])
        in_a_row = jnp.where(is_skipped, increment(state.bad_in_a_row), 0)
        in_a_row = jnp.where(is_skipped | is_healthy, in_a_row, state.bad_in_a_row)
        returns = in_a_row >= after_skips

        since, healthy_in_a_row = state.healthy_since_snapshot, state.healthy_in_a_row
        is_due = is_healthy & (since >= every) & (healthy_in_a_row >= quiet_steps)
        snapshot, old_inner_state, is_taken = _take_snapshot(state, params, is_due, axes)
        state = state._replace(
            inner_state=old_inner_state,
            snapshot_params=snapshot.params,
            snapshot_state=snapshot.state,
        )

        def forward(updates, state):
            return inner_update(updates, state.inner_state, params, **extra_args)

        def go_on(step, state):
            updates, inner_state = step
            return _add_missing(updates, params, state), inner_state, state.snapshot_state

        def go_back(step, state):
            updates, inner_state = step
            back = with_optimizer_part(inner_state, state.snapshot_state)
            return _return(updates, params, state), back, state.snapshot_state

        # All of the step is in the branches, and the snapshot comes out of them again, because
        # XLA on CPU copies less so: half of the time of a select after the step.
        if not axes.names:
            new_updates, inner_state, snapshot_state = lax.cond(
                returns,
                lambda updates, state: go_back(forward(updates, state), state),
                lambda updates, state: go_on(forward(updates, state), state),
                updates,
                state,
            )
        else:  # no collective may sit in a branch
            step = forward(updates, state)
            new_updates, inner_state, snapshot_state = jax.tree.map(
                functools.partial(keep_unless, returns), go_back(step, state), go_on(step, state)
            )

        since = jnp.where(is_taken | returns, 0, since)
        quiet = jnp.where(is_skipped, 0, healthy_in_a_row)
        total = state.rollbacks_total
        return new_updates, RollbackState.pack(
            inner_state=inner_state,
            snapshot_params=snapshot.params,
            snapshot_state=snapshot_state,
            healthy_since_snapshot=jnp.where(is_healthy, increment(since), since),
            healthy_in_a_row=jnp.where(is_healthy, increment(quiet), quiet),
            bad_in_a_row=jnp.where(returns, 0, in_a_row),
            rollbacks_total=jnp.where(returns, increment(total), total),
            last_step_rolled_back=returns,
        )

    return transformation("rollback", RollbackState, init, update)


def _copy(leaf: Any) -> Any:
    """No buffer can be donated twice; shapes, to plan memory with, have none."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.copy(leaf)


class _Snapshot(NamedTuple):
    params: Any
    state: Any


def _snapshot_of(params: Any, inner_state: Any) -> _Snapshot:
    """In the structure of both, so that tools see which of its arrays belong to a parameter."""

    def keep(leaf):
        return leaf if is_inexact(leaf) else optax.MaskedNode()

    return _Snapshot(jax.tree.map(keep, params), optimizer_part(inner_state))


def _take_snapshot(
    state: RollbackState, params: Any, is_due: jax.Array, axes: MeshAxes
) -> tuple[_Snapshot, Any, jax.Array]:
    """The snapshot that follows, the inner state untouched, and whether it was taken."""
    old = _Snapshot(state.snapshot_params, state.snapshot_state)
    new = _snapshot_of(params, state.inner_state)

    def count_bad(new, old):
        # A best loss of +inf, say, was there from the beginning.
        pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
        pairs = [(leaf, before) for leaf, before in pairs if is_inexact(leaf)]
        flags = [is_nonfinite(leaf) & ~is_nonfinite(before) for leaf, before in pairs]
        return jnp.sum(stack_flags(flags), dtype=jnp.int32)

    def count_none(new, old):
        # On mesh axes of the type that ``count_bad`` has, of which every array takes part.
        if not axes.names:
            return jnp.zeros((), jnp.int32)
        return count_bad(*jax.tree.map(no_elements, (new, old)))

    num_bad = lax.cond(is_due, count_bad, count_none, new, old)
    is_taken = is_due & (axes.psum(num_bad) == 0)
    # The optimizer's state passes through the branch, so that XLA copies it in there and not, for
    # want of knowing better, before every update that overwrites it.
    snapshot, passed = lax.cond(
        is_taken, lambda new, old: (new, new.state), lambda new, old: (old, new.state), new, old
    )
    return snapshot, with_optimizer_part(state.inner_state, passed), is_taken


def _return(updates: Any, params: Any, state: RollbackState) -> Any:
    """The updates that lead from ``params`` to the snapshot."""

    def change(update, param, target):
        gap = update_towards(target, param, update.dtype)
        # A parameter that is there keeps every bit; one that is not finite cannot be mended.
        return jnp.where(_is_away(param, target), gap, jnp.full_like(update, -0.0))

    return _map_with_snapshot(change, updates, params, state)


def _add_missing(updates: Any, params: Any, state: RollbackState) -> Any:
    """``updates``, and in the step after a return what its rounding has swallowed."""

    def change(update, param, target):
        gap = update_towards(target, param, update.dtype)
        is_missing = state.last_step_rolled_back & _is_away(param, target)
        return jnp.where(is_missing, update + gap, update)

    return _map_with_snapshot(change, updates, params, state)


def _is_away(param: jax.Array, target: jax.Array) -> jax.Array:
    return (param != target) & jnp.isfinite(param)


def _map_with_snapshot(change: Any, updates: Any, params: Any, state: RollbackState) -> Any:
    """Applies ``change(update, parameter, its snapshot)`` to the float leaves of ``updates``."""
    split = float_leaves(updates, params)
    own, kept = split.matching(params), split.matching(state.snapshot_params)
    triples = zip(split.arrays, own, kept, strict=True)
    return split.replace([change(*triple) for triple in triples])
