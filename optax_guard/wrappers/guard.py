"""The guard: steps that would poison a run are skipped, counted and explained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._core.arrays import increment, tree_where
from optax_guard._core.axes import (
    AxisName,
    parameters,
    resolve_axes,
    resolve_axes_at_init,
    state_of_optimizer,
)
from optax_guard._core.calls import check_number_of_rows, explain_failed_update
from optax_guard._core.checks import (
    check_axis_name,
    check_callable,
    check_count,
    check_flag,
    check_transformation,
)
from optax_guard._core.finite import is_nonfinite, stack_flags
from optax_guard._core.groups import Stacked, make_groups
from optax_guard._core.inner import gradient_like, tolerant_update
from optax_guard._core.interpret import run
from optax_guard._core.plan import propose
from optax_guard._core.reader import Reader, Reading, make_reader
from optax_guard._core.transformation import transformation
from optax_guard._core.trees import (
    FloatLeaves,
    float_leaves,
    inexact_leaves,
    is_placeholder,
    strong,
)
from optax_guard.wrappers._judge import Case, judge
from optax_guard.wrappers._nesting import check_nesting, warn_of_no_stack
from optax_guard.wrappers._notify import call_host
from optax_guard.wrappers.conditions import (
    Condition,
    check_conditions,
    condition_keys,
)
from optax_guard.wrappers.guard_state import GuardState, rows_of, stacks_of, unused_rows
from optax_guard.wrappers.reasons import SkipReason

_RELOOK = 128  # steps after which a norm of zero is looked at again, whether it is one


def guard(
    inner: optax.GradientTransformation,
    *,
    skip_if: Condition | Sequence[Condition] = (),
    max_consecutive_skips: int | None = 100,
    check_update: bool = False,
    stacked: Stacked = None,
    notify: Callable[[int, SkipReason, tuple[str, ...]], Any] | None = None,
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

    When a gradient is non-finite, parameters and inner state are looked at too. If one of them was
    non-finite already, reason 16 is added and ``gave_up`` set at once: no later step can heal it.

    A guard protects what is inside of it and sees nothing of what it stands in. Behind an
    optimizer, as in ``chain(optimizer, guard(...))``, it comes too late; in front of one, the zeros
    of a skipped step move momentum and schedules.

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
      stacked: ``(path, leaf) -> bool | int``, which arrays stack layers along axis 0, or along how
        many leading axes (``lax.scan``, ``nn.scan``, pipeline stages). Their norms are kept, and
        faults named, layer by layer: ``layers/kernel[3]``. None: none does.
      notify: ``(step, reason, names of the non-finite rows) -> None``, called on the host at a
        skip whose new state is used; steps count from 0, as in :func:`explain`. A healthy step
        calls nothing, but XLA:CPU runs what may call in the thread that asks for it (steps of 4.5
        ms: 1.4 times, ``benchmarks/history_cost.py``); in ``shard_map`` JAX, too, is slower.
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

    Trainers that own the loop (NumPyro, Flowjax, ...) take the guarded optimizer and never give its
    state out; ``notify`` is heard all the same::

        def notify(step, reason, names):
            print(f"step {step} skipped: {reason.words} {names}")

        tx = og.guard(optax.adam(1e-3), notify=notify)
        numpyro.infer.SVI(model, guide, numpyro.optim.optax_to_numpyro(tx), loss)
        flowjax.train.fit_to_data(key, flow, data, optimizer=tx)

    What a callback raises may end the run or not, as the backend has it; let it write, not raise.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = {"w": jnp.ones(2), "b": jnp.ones(1)}
      >>> tx = og.guard(optax.adam(0.1))
      >>> bad = {"w": jnp.array([1.0, jnp.nan]), "b": jnp.ones(1)}
      >>> updates, state = tx.update(bad, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"]
      Array([1., 1.], dtype=float32)
      >>> print(og.explain(state, params))  # doctest: +ELLIPSIS
      Step 0 was skipped: ...

    References:
      ``optax.apply_if_finite`` is the model. It accepts a NaN after too many in a row, takes
      gradients and updates of the same dtype only, and costs several copies of the state.
    """
    check_transformation("inner", inner)
    check_count("max_consecutive_skips", max_consecutive_skips, optional=True)
    check_flag("check_update", check_update)
    check_callable("stacked", stacked, "(path, leaf) -> bool | int", optional=True)
    check_callable("notify", notify, "(step, reason, names) -> None", optional=True)
    check_axis_name(axis_name)
    conditions = check_conditions(skip_if)
    inner_update = tolerant_update(inner)
    # No function, of whose closure Equinox and Optimistix would make a copy: it fills a list there.
    listener = None if notify is None else functools.partial(notify)

    def init(params):
        inner_state = jax.tree.map(strong, inner.init(params))
        check_nesting(inner, inner_state)
        split = float_leaves(gradient_like(params))
        groups = make_groups("global", split.paths, split.arrays, stacked=stacked)
        if stacked is not None:
            warn_of_no_stack(params, groups)
        zeros = jnp.zeros((sum(groups.rows),), jnp.float32)
        return GuardState.pack(
            inner_state=inner_state,
            # A leaf for that of tree_map_params, which compares this with the real state.
            stacks=0 if stacked and is_placeholder(params) else stacks_of(groups.depths),
            guard_step=0,
            skipped_total=0,
            skipped_in_a_row=0,
            last_step_skipped=False,
            skip_reason=0,
            skip_condition=-1,
            gave_up=False,
            last_fault_step=0,
            last_fault_reason=0,
            last_fault_condition=-1,
            last_fault_leaves=jnp.zeros(zeros.shape, jnp.bool_),
            unused_leaves=jnp.zeros(zeros.shape, jnp.bool_),
            initially_nonfinite=_nonfinite_now((inner_state, params), split, axis_name),
            grad_norm=0.0,
            leaf_norms=zeros,
            last_fault_norms=zeros,
            condition_states={
                key: condition.init()
                for key, condition in zip(condition_keys(conditions), conditions, strict=True)
            },
        )

    def update(updates, state, params=None, **extra_args):
        value = _checked_value(extra_args.get("value"))
        num_rows = rows_of(state, 0, 0).stop
        gradients = float_leaves(updates, gradient_like(params), count=num_rows)
        groups = make_groups("global", gradients.paths, gradients.arrays, stacked=stacked)
        check_number_of_rows("guard", gradients, sum(groups.rows), num_rows)
        also = parameters(params) | state_of_optimizer(state.inner_state)
        also["The loss passed as value="] = value
        axes = resolve_axes(axis_name, gradients.paths, gradients.arrays, also=also)
        value = None if value is None else axes.mean(value)

        try:
            proposal = propose(inner_update, gradients, state.inner_state, params, extra_args)
        except (TypeError, ValueError) as error:
            explain_failed_update("guard", gradients, gradient_like(params), error)
            raise
        case = Case(proposal, gradients, axes, state, params, value)
        reader, reading = _read(case, stacked)
        groups = reader.call.groups
        verdict = judge(case, reading, groups, conditions, check_update, extra_args)
        new_updates, inner_state = run(proposal, verdict.ok, reader, reading)
        new_state = _record(state, inner_state, reading, verdict, reader.call)
        if listener is not None:
            new_state = call_host(listener, new_state, gradients, groups, axes)
        return new_updates, new_state

    def _record(state, inner_state, reading, verdict, call):
        skipped = verdict.reason > 0
        in_a_row = jnp.where(skipped, increment(state.skipped_in_a_row), 0)
        gave_up = state.gave_up | ((verdict.reason & SkipReason.ALREADY_NONFINITE) > 0)
        if max_consecutive_skips is not None:
            gave_up |= in_a_row >= max_consecutive_skips
        step = increment(state.guard_step)
        fault = {
            "last_fault_step": step,
            "last_fault_reason": verdict.reason,
            "last_fault_condition": verdict.condition,
            "last_fault_leaves": verdict.bad_rows,
            "last_fault_norms": reading.leaf_norms,
        }
        before = {name: getattr(state, name) for name in fault}
        return GuardState.pack(
            inner_state=inner_state,
            stacks=state.stacks,
            guard_step=step,
            skipped_total=jnp.where(skipped, increment(state.skipped_total), state.skipped_total),
            skipped_in_a_row=in_a_row,
            last_step_skipped=skipped,
            skip_reason=verdict.reason,
            skip_condition=verdict.condition,
            gave_up=gave_up,
            unused_leaves=unused_rows(call),
            initially_nonfinite=state.initially_nonfinite,
            grad_norm=reading.norm.astype(jnp.float32),
            leaf_norms=reading.leaf_norms,
            condition_states=verdict.condition_states,
            **tree_where(skipped, fault, before),
        )

    return transformation("guard", GuardState, init, update)


def _read(case: Case, stacked: Stacked) -> tuple[Reader, Reading]:
    """All that is known of the gradients, in one read and, on many devices, one collective."""
    state = case.state
    # A norm of zero is looked at again, for elements so small that their squares are zero, unless
    # it was zero in the last step too.
    is_due = (state.guard_step % _RELOOK) == 0
    small_rows_matter = (state.leaf_norms != 0) | is_due
    reader = make_reader(case.proposal, case.gradients, case.axes, stacked=stacked, watch=case.look)
    return reader, reader.read(case.proposal.arguments, small_rows_matter, case.watched)


def _checked_value(value: Any) -> jax.Array | None:
    """The loss as an array.

    Raises:
      TypeError: if it is no real scalar.
    """
    if value is None:
        return None
    is_scalar = isinstance(value, (jax.Array, np.ndarray, np.generic, int, float))
    if not is_scalar or np.shape(value) != () or jnp.iscomplexobj(value):
        kind = f"an array of shape {np.shape(value)}" if is_scalar else type(value).__name__
        kind = "complex" if is_scalar and np.shape(value) == () else kind
        raise TypeError(
            f"value= must be the loss, a real scalar, but is {kind}. Pass its mean, as in "
            "update(grads, state, params, value=loss.mean()); of (loss, aux) only the loss."
        )
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.float32)


def _nonfinite_now(tree: Any, split: FloatLeaves, axis_name: AxisName) -> jax.Array:
    """Which leaves are non-finite, on any device if called inside the mesh."""
    flags = [
        jnp.asarray(False) if isinstance(leaf, jax.ShapeDtypeStruct) else is_nonfinite(leaf)
        for leaf in inexact_leaves(tree)
    ]
    axes = resolve_axes_at_init(axis_name, split.paths, split.arrays)
    return axes.any(stack_flags(flags))
