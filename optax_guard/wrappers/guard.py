"""The guard: steps that would poison a run are skipped, counted and explained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._core.arrays import increment, tree_where
from optax_guard._core.axes import AxisName, MeshAxes, resolve_axes, resolve_axes_at_init
from optax_guard._core.checks import (
    check_axis_name,
    check_callable,
    check_count,
    check_flag,
    check_transformation,
)
from optax_guard._core.find import factory_name, is_wrapper_state, own_states
from optax_guard._core.finite import any_nonfinite, is_nonfinite, stack_flags
from optax_guard._core.groups import Groups, Stacked, make_groups
from optax_guard._core.inner import gradient_like, tolerant_update
from optax_guard._core.interpret import (
    Proposal,
    Reader,
    Reading,
    evaluate,
    make_reader,
    propose,
    run,
)
from optax_guard._core.measure import MeasureCall
from optax_guard._core.states import Entry, PackedState, RuleState, flag, norm
from optax_guard._core.transformation import require_state, transformation
from optax_guard._core.trees import FloatLeaves, float_leaves, inexact_leaves, strong
from optax_guard.wrappers._poison import LookIf, Watched
from optax_guard.wrappers.conditions import (
    Condition,
    check_conditions,
    condition_keys,
    judge_conditions,
)
from optax_guard.wrappers.reasons import SkipReason

_RELOOK = 128  # steps after which a norm of zero is looked at again, whether it is one
_BAD, _UNUSED, _DEPTH = 1, 2, 4  # what the flags of a row are made of


class _GuardArrays(NamedTuple):
    inner_state: Any
    integers: Any
    numbers: Any
    condition_states: Any


def _rows(state: Any, start: int, number: int) -> slice:
    count = (np.shape(jax.tree.leaves(state.numbers)[0])[-1] - 1) // 2
    return slice(start + number * count, start + (number + 1) * count)


_NUM_COUNTERS = 10


class GuardState(PackedState, _GuardArrays):
    """State of :func:`guard`: that of the wrapped optimizer, and two arrays.

    They take 44 bytes, 12 for each row (float leaf, or layer of a stacked one), and 4 for each
    float leaf of parameters and inner state.

    Attributes:
      inner_state: state of the wrapped optimizer.
      integers: int32, packed.
      numbers: float32, packed.
      condition_states: ``{"place name": state}`` of each condition in ``skip_if``.
    """

    __slots__ = ()

    guard_step = Entry("integers", "int32, calls so far, skipped ones included")
    skipped_total = Entry("integers", "int32, skipped calls so far")
    skipped_in_a_row = Entry("integers", "int32, skipped calls since the last accepted one")
    last_step_skipped = flag("integers", "bool, whether the last call was skipped")
    skip_reason = Entry("integers", "int32, bits of the last call's :class:`SkipReason`")
    skip_condition = Entry(
        "integers", "int32, which of ``skip_if`` was the first to reject the last call; -1: none"
    )
    gave_up = flag("integers", "bool, latched by too many skips in a row, or by reason 16")
    last_fault_step = Entry("integers", "int32, ``guard_step`` at the last skip; 0: none yet")
    last_fault_reason = Entry("integers", "int32, reason of the last skip")
    last_fault_condition = Entry("integers", "int32, ``skip_condition`` of the last skip")
    row_flags = Entry(
        "integers",
        "int32 ``[rows]``: 1 non-finite at the last fault, 2 unused, 4 times the depth of a stack",
        where=lambda state: _rows(state, _NUM_COUNTERS, 0),
    )
    initially_nonfinite = Entry(
        "integers",
        "bool for each float leaf of inner state and parameters: not finite at ``init``, such as "
        "a best loss of +inf or a mask of -inf; it never counts as a fault",
        where=lambda state: slice(_rows(state, _NUM_COUNTERS, 1).start, None),
        read=lambda state, stored: stored != 0,
    )
    grad_norm = norm("numbers", "float32, global norm of the last gradients, before any clip")
    leaf_norms = norm(
        "numbers",
        "float32 ``[rows]``, norms of the last gradients, leaf by leaf in order, or layer by "
        "layer where a leaf stacks layers; 0 for those that are unused",
        where=lambda state: _rows(state, 1, 0),
    )
    last_fault_norms = norm(
        "numbers",
        "float32 ``[rows]``, the same at the last skip",
        where=lambda state: _rows(state, 1, 1),
    )

    @property
    def last_fault_leaves(self) -> Any:
        """Bool ``[rows]``, which gradients were non-finite at the last fault."""
        return (self.row_flags & _BAD) != 0

    @property
    def unused_leaves(self) -> Any:
        """Bool ``[rows]``, which gradients reach no output of the wrapped optimizer."""
        return (self.row_flags & _UNUSED) != 0

    @property
    def stack_depths(self) -> Any:
        """int32 ``[rows]``, along how many leading axes the row's array stacks layers."""
        return self.row_flags // _DEPTH


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
      stacked: ``(path, leaf) -> bool | int``, which arrays stack layers along axis 0, or along how
        many leading axes (``lax.scan``, ``nn.scan``, pipeline stages). Their norms are kept, and
        faults named, layer by layer: ``layers/kernel[3]``. None: none does.
      notify: ``(step, reason, names of the non-finite rows) -> None``, called on the host at a
        skip, for trainers that hide the optimizer's state. A healthy step calls nothing.
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
    check_callable("stacked", stacked, "(path, leaf) -> bool | int", optional=True)
    check_callable("notify", notify, "(step, reason, names) -> None", optional=True)
    check_axis_name(axis_name)
    conditions = check_conditions(skip_if)
    inner_update = tolerant_update(inner)

    def init(params):
        inner_state = jax.tree.map(strong, inner.init(params))
        _check_nesting(inner_state)
        _warn_of_nothing_to_guard(inner_state)
        split = float_leaves(gradient_like(params))
        groups = make_groups("global", split.paths, split.arrays, stacked=stacked)
        zeros = jnp.zeros((sum(groups.rows),), jnp.float32)
        return GuardState.pack(
            inner_state=inner_state,
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
            row_flags=_DEPTH * np.repeat(np.asarray(groups.depths, np.int32), groups.rows),
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
        require_state(state, GuardState, "guard", updates)
        value = _checked_value(extra_args.get("value"))
        num_rows = _rows(state, 0, 0).stop
        gradients = float_leaves(updates, gradient_like(params), count=num_rows)
        axes = resolve_axes(axis_name, gradients.paths, gradients.arrays, also={"value=": value})
        value = None if value is None else axes.mean(value)

        proposal = propose(inner_update, gradients, state.inner_state, params, extra_args)
        case = _Case(proposal, gradients, axes, state, params, value)
        reader, reading = _read(case, stacked)
        groups = reader.call.groups
        verdict = _judge(case, reading, groups, conditions, check_update, extra_args)
        new_updates, inner_state = run(proposal, verdict.ok, reader, reading)
        new_state = _record(state, inner_state, reading, verdict, reader.call)
        if notify is not None:
            _notify(notify, new_state, gradients, groups, axes)
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
            "last_fault_norms": reading.leaf_norms,
        }
        before = {name: getattr(state, name) for name in fault}
        is_bad = jnp.where(skipped, verdict.bad_rows, state.last_fault_leaves)
        return GuardState.pack(
            inner_state=inner_state,
            guard_step=step,
            skipped_total=jnp.where(skipped, increment(state.skipped_total), state.skipped_total),
            skipped_in_a_row=in_a_row,
            last_step_skipped=skipped,
            skip_reason=verdict.reason,
            skip_condition=verdict.condition,
            gave_up=gave_up,
            row_flags=is_bad.astype(jnp.int32) * _BAD + _static_flags(call),
            initially_nonfinite=state.initially_nonfinite,
            grad_norm=reading.norm.astype(jnp.float32),
            leaf_norms=reading.leaf_norms,
            condition_states=verdict.condition_states,
            **tree_where(skipped, fault, before),
        )

    return transformation(init, update)


class _Case(NamedTuple):
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
        is_suspicious = self.state.last_step_skipped
        if self.value is not None:
            is_suspicious |= ~jnp.isfinite(self.value)
        leaves = (inexact_leaves(self.params), inexact_leaves(self.state.inner_state))
        return Watched(*leaves, self.state.initially_nonfinite, is_suspicious)

    @property
    def look(self) -> LookIf:
        return LookIf(tuple(leaf.shape for leaf in self.gradients.arrays))


class _Verdict(NamedTuple):
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


def _read(case: _Case, stacked: Stacked) -> tuple[Reader, Reading]:
    """All that is known of the gradients, in one read and, on many devices, one collective."""
    state = case.state
    # A norm of zero is looked at again, for elements so small that their squares are zero, unless
    # it was zero in the last step too.
    is_due = (state.guard_step % _RELOOK) == 0
    small_rows_matter = (state.leaf_norms != 0) | is_due
    reader = make_reader(case.proposal, case.gradients, case.axes, stacked=stacked, watch=case.look)
    watched = case.watched if case.axes.names else ()
    return reader, reader.read(case.proposal.arguments, small_rows_matter, watched)


def _judge(
    case: _Case,
    reading: Reading,
    groups: Groups,
    conditions: Sequence[Condition],
    check_update: bool,
    extra_args: dict[str, Any],
) -> _Verdict:
    """Whether to accept the step, and why not."""
    alarm = None if reading.noted is None else reading.noted[0] > 0
    bad_value = jnp.asarray(False) if case.value is None else ~jnp.isfinite(case.value)
    is_finite = jnp.all(reading.leaf_finite) & ~bad_value
    bad_proposal, bad_rows = jnp.asarray(False), ~reading.leaf_finite
    if check_update:
        bad_proposal, bad_updates, late_alarm = _judge_proposal(case, reading, is_finite)
        alarm = None if alarm is None else alarm | late_alarm
        bad_rows |= _as_rows(bad_updates & bad_proposal, groups, bad_rows)
    rejecting, condition_states = judge_conditions(
        conditions, is_finite, bad_proposal, reading.norm, case.value, case.state.condition_states,
        extra_args,
    )  # fmt: skip
    rejected = rejecting >= 0
    ok = is_finite & ~bad_proposal & ~rejected
    if alarm is None:
        # ``ok`` passes through the branch, so that XLA looks at the old state before it
        # overwrites it, and cannot repeat what led to ``ok`` in the loop of every leaf.
        ok, alarm = lax.cond(
            ok,
            lambda _: (jnp.asarray(True), jnp.asarray(False)),
            lambda watched: (jnp.asarray(False), case.look.find(watched)),
            case.watched,
        )
    was_poisoned = alarm & (~is_finite | bad_proposal)
    reason = _bits(
        (SkipReason.GRADIENT, ~jnp.all(reading.leaf_finite)),
        (SkipReason.LOSS_VALUE, bad_value),
        (SkipReason.PROPOSAL, bad_proposal),
        (SkipReason.CONDITION, rejected),
        (SkipReason.ALREADY_NONFINITE, was_poisoned),
    )
    return _Verdict(ok, reason, rejecting, bad_rows, condition_states)


def _judge_proposal(
    case: _Case, reading: Reading, is_finite: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether finite inputs lead to non-finite ones, which updates, and the alarm if so."""
    shapes, axes = case.look.shapes, case.axes
    arguments = case.proposal.arguments

    def judge(arguments):
        updates, new_state = evaluate(case.proposal, arguments, reading)
        bad_updates = stack_flags([is_nonfinite(leaf) for leaf in inexact_leaves(updates)])
        bad_state = any_nonfinite(shapes, case.state.initially_nonfinite, new_state)
        return jnp.append(bad_updates, jnp.any(bad_updates) | bad_state)

    if not axes.names:
        # In a branch of its own XLA does not share what the real evaluation will compute again;
        # it would write all of it to memory for that, and take twice the time.
        nothing = jax.eval_shape(judge, arguments)
        flags = lax.cond(is_finite, judge, lambda _: jnp.zeros_like(nothing), arguments)
        return flags[-1] & is_finite, flags[:-1], jnp.asarray(False)
    flags = judge(arguments)  # not under a branch: ``inner`` may hold collectives
    alarm = case.look.if_bad(case.watched, jnp.any(flags))
    flags = axes.any(jnp.append(flags, alarm))
    return flags[-2] & is_finite, flags[:-2], flags[-1]


def _as_rows(flags: jax.Array, groups: Groups, rows: jax.Array) -> jax.Array:
    """Flags of the updates for the rows of the gradients, if the two belong together."""
    counts = groups.rows
    if flags.shape != (len(counts),):
        return jnp.zeros_like(rows)
    return jnp.repeat(flags, np.asarray(counts), total_repeat_length=rows.shape[0])


def _static_flags(call: MeasureCall) -> np.ndarray:
    """What of ``row_flags`` is known when the step is traced."""
    flags = [
        _UNUSED * (not is_used) + _DEPTH * depth
        for is_used, depth in zip(call.is_used, call.groups.depths, strict=True)
    ]
    return np.repeat(np.asarray(flags, np.int32), call.groups.rows)


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
        raise TypeError(
            f"value= must be the loss, a real scalar, but is {kind}. Pass its mean, as in "
            "update(grads, state, params, value=loss.mean()); of (loss, aux) only the loss."
        )
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.float32)


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


def _warn_of_nothing_to_guard(inner_state: Any) -> None:
    """Legal and futile: said once, when the state is made."""
    if isinstance(inner_state, GuardState):
        warnings.warn(
            "A guard around a guard has nothing left to skip; one is enough, and counts every "
            "step. Write og.guard(optimizer, ...) with the conditions of both.",
            stacklevel=3,
        )
    parts = inner_state if type(inner_state) is tuple else (inner_state,)
    if parts and all(isinstance(part, RuleState) for part in parts):
        warnings.warn(
            "This guard holds clips only, so a skipped step reaches the optimizer behind it as "
            "zeros, which move momentum and schedules. Put the optimizer inside: "
            "og.guard(optax.chain(clip, optimizer)).",
            stacklevel=3,
        )


def _bits(*reasons: tuple[int, jax.Array]) -> jax.Array:
    total = jnp.zeros((), jnp.int32)
    for bit, holds in reasons:
        total = total + jnp.where(holds, int(bit), 0).astype(jnp.int32)
    return total


def _nonfinite_now(tree: Any, split: FloatLeaves, axis_name: AxisName) -> jax.Array:
    """Which leaves are non-finite, on any device if called inside the mesh."""
    flags = [
        jnp.asarray(False) if isinstance(leaf, jax.ShapeDtypeStruct) else is_nonfinite(leaf)
        for leaf in inexact_leaves(tree)
    ]
    axes = resolve_axes_at_init(axis_name, split.paths, split.arrays)
    return axes.any(stack_flags(flags))


def _notify(
    notify: Callable[..., Any],
    state: GuardState,
    gradients: FloatLeaves,
    groups: Groups,
    axes: MeshAxes,
) -> None:
    """Calls ``notify`` on the host, on a skip only, and from one device."""
    names = np.asarray(groups.row_names(gradients.paths), object)

    def call(step, reason, flags):
        if reason:  # under ``vmap`` every member gets here
            found = tuple(names[np.asarray(flags)])
            notify(int(step), SkipReason(int(reason)), found)

    is_mine = jnp.asarray(True)
    for name in axes.names:
        is_mine &= lax.axis_index(name) == 0
    lax.cond(
        state.last_step_skipped & is_mine,
        lambda *numbers: jax.debug.callback(call, *numbers),
        lambda *numbers: None,
        state.guard_step,
        state.skip_reason,
        state.last_fault_leaves,
    )
