"""Reasons to skip a step whose gradients and loss are finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.arrays import increment, safe_sqrt, tree_where
from optax_guard._core.calls import ToldError, is_transformation
from optax_guard._core.checks import (
    check_callable,
    check_choice,
    check_count,
    check_number,
    shown,
    warn_of_zero,
)
from optax_guard._core.skeleton import same_arrays
from optax_guard._core.states import Entry, PackedState


class Condition(NamedTuple):
    """A rule that says which finite steps to skip.

    Attributes:
      name: how reports call it.
      init: makes its state, a NamedTuple of arrays.
      judge: ``(grad_norm, value, state) -> (skip, new_state)``, where both numbers are finite and
        ``value`` is None when ``update`` was called without it. The guard keeps ``new_state`` if
        the step is accepted, or skipped by this condition.
      needs_value: whether ``update`` must be called with ``value=``, the loss.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> negative = og.Condition(
      ...     "negative loss", lambda: (), lambda norm, value, state: (value < 0, state), True
      ... )
      >>> tx = og.guard(optax.sgd(1.0), skip_if=negative)
      >>> _, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), value=-1.0)
      >>> print(og.explain(state).splitlines()[0])
      Step 0 was skipped: a skip_if condition rejected the step: negative loss (reason 8).
    """

    name: str
    init: Callable[[], Any]
    judge: Callable[[jax.Array, jax.Array | None, Any], tuple[jax.Array, Any]]
    needs_value: bool = False


def check_conditions(skip_if: Any) -> tuple[Condition, ...]:
    """``skip_if`` as a tuple."""
    conditions = (skip_if,) if isinstance(skip_if, Condition) else skip_if
    is_several = type(conditions) in (tuple, list)
    wrong = [part for part in conditions if not isinstance(part, Condition)] if is_several else []
    if wrong or not is_several:
        part = wrong[0] if wrong else skip_if
        raise TypeError(
            "skip_if must be a condition such as og.spike() or og.norm_above(10.0), "
            f"or a tuple of them, got {shown(part)}.{_hint(part)}"
        )
    for condition in conditions:
        if not isinstance(condition.name, str):
            raise TypeError(f"name of an og.Condition must be text, got {shown(condition.name)}.")
        check_callable("init of an og.Condition", condition.init, "() -> state")
        check_callable(
            "judge of an og.Condition",
            condition.judge,
            "(grad_norm, value, state) -> (skip, new_state)",
        )
    return tuple(conditions)


def _hint(part: Any) -> str:
    """What to write instead of something that is no condition."""
    if part in (spike, norm_above):
        return f" Call it first: og.{part.__name__}(...)."
    if isinstance(part, str) and part in ("spike", "norm_above"):
        return f" Write og.{part}(...)."
    if isinstance(part, (int, float)) and not isinstance(part, bool):
        return f" Write og.norm_above({part})."
    if part is None:
        return " Leave it out for no condition."
    if is_transformation(part):
        return " A transformation goes inside: og.guard(optax.chain(clip, optimizer))."
    if "skip" in getattr(part, "__name__", ""):
        return " That one is for optax.MultiSteps(..., should_skip_update_fn=...)."
    if callable(part):
        return " For a rule of your own write og.Condition(name, init, judge)."
    return ""


def condition_keys(conditions: Sequence[Condition]) -> list[str]:
    """Under which the guard keeps their states, in the order of ``skip_if``."""
    return [f"{place:02d} {condition.name}" for place, condition in enumerate(conditions)]


def judge_conditions(
    conditions: Sequence[Condition],
    is_finite: jax.Array,
    bad_proposal: jax.Array,
    grad_norm: jax.Array,
    value: jax.Array | None,
    states: dict[str, Any],
    extra_args: dict[str, Any],
) -> tuple[jax.Array, dict[str, Any]]:
    """Which condition is the first to reject a finite step (-1: none), and the states after it."""
    safe_norm = jnp.where(is_finite, grad_norm, 0)
    safe_value = None if value is None else jnp.where(is_finite, value, 0)
    first, judged = jnp.full((), -1, jnp.int32), []
    if sorted(states) != sorted(keys := condition_keys(conditions)):
        raise ToldError(
            f"This state is of another transformation, a guard with the conditions "
            f"{sorted(states)}, where skip_if gives {keys}. Make a new one with init(params), and "
            "carry the old one over with og.adopt(new_tx.init(params), old_state)."
        )
    for place, (condition, key) in enumerate(zip(conditions, keys, strict=True)):
        state = states[key]
        _check_state(key, state, condition)
        if condition.needs_value and value is None:
            raise ValueError(_missing_value(condition.name, extra_args))
        rejects, new_state = _judged(condition, safe_norm, safe_value, state)
        rejects = rejects & is_finite
        first = jnp.where((first < 0) & rejects, place, first).astype(jnp.int32)
        judged.append((key, rejects, new_state, state))
    is_accepted = is_finite & (first < 0) & ~bad_proposal
    return first, {
        key: tree_where(is_accepted | rejects, new, old) for key, rejects, new, old in judged
    }


def _check_state(key: str, state: Any, condition: Condition) -> None:
    """Raises unless the state has the arrays that the condition makes."""
    own = jax.eval_shape(condition.init)
    if not same_arrays(own, state):
        shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (state, own)]
        raise ToldError(
            f"This state is of another transformation: the condition {key!r} has arrays of the "
            f"shapes {shapes[0]} in it, and skip_if gives {shapes[1]}. Make a new one with "
            "init(params), and carry the old one over with og.adopt(new_tx.init(params), "
            "old_state)."
        )


def _judged(condition: Condition, grad_norm: Any, value: Any, state: Any) -> tuple[Any, Any]:
    """What a condition says.

    Raises:
      TypeError: if that is no bool scalar with a state.
    """
    result = condition.judge(grad_norm, value, state)
    rejects = jnp.asarray(result[0]) if isinstance(result, tuple) and len(result) == 2 else None
    if rejects is None or rejects.dtype != jnp.bool_ or rejects.shape:
        what = type(result).__name__ if rejects is None else f"{rejects.dtype}{rejects.shape}"
        raise TypeError(
            f"judge of the condition {condition.name!r} must return (skip, new_state), skip a bool "
            f"scalar; got {what}. Without a state, return skip, state."
        )
    return rejects, result[1]


def _missing_value(name: str, extra_args: dict[str, Any]) -> str:
    passed = ", ".join(f"{key}=" for key in extra_args if key != "value") or "no loss at all"
    return (
        f"The condition {name!r} judges the loss, but update() was called without value=; it got "
        f"{passed}. Call update(grads, state, params, value=loss). (Flax's "
        "TrainState.apply_gradients passes no loss on: call state.tx.update yourself.)"
    )


def norm_above(max_norm: Any) -> Condition:
    """Skips a step whose global gradient norm exceeds ``max_norm``.

    Args:
      max_norm: scalar in [0, inf], in the unit of the gradients; may be traced.

    Returns:
      A condition for ``guard(skip_if=...)``, without state.

    Raises:
      ValueError: if ``max_norm`` is negative, NaN or no scalar.
      TypeError: if ``max_norm`` is no number.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(1.0), skip_if=og.norm_above(10.0))
      >>> updates, state = tx.update(jnp.array([100.0]), tx.init(jnp.zeros(1)))
      >>> updates, int(state.skip_reason)
      (Array([-0.], dtype=float32), 8)
    """
    check_number("max_norm", max_norm)
    warn_of_zero("max_norm", max_norm, "skips every step with a gradient; leave it out for none.")

    def judge(grad_norm, value, state):
        del value
        return grad_norm > jnp.asarray(max_norm, grad_norm.dtype), state

    return Condition("norm_above", tuple, judge)


class _SpikeArrays(NamedTuple):
    integers: Any
    window: Any


class SpikeState(PackedState, _SpikeArrays):
    """State of :func:`spike`: 4 bytes for each place in the window, and 8.

    Attributes:
      integers: int32 ``[2]``, packed.
      window: float32 ``[window]``, the last values, spikes winsorised to their limit.
    """

    __slots__ = ()
    num_entered = Entry("integers", "int32, values entered; stays within [window, 2 * window)")
    rejected_in_a_row = Entry("integers", "int32, finite values rejected since the last accepted")


def spike(
    sigma: Any = 6.0,
    *,
    of: str = "grad_norm",
    window: int = 128,
    min_history: int | None = None,
    rebaseline_after: int | None = 50,
    min_std_ratio: Any = 1e-2,
) -> Condition:
    """Skips a step whose gradient norm or loss stands out from the last ``window`` of them.

    With mean and (biased) std over the values in the window::

        skip if  x > mean + sigma * max(std, min_std_ratio * |mean|)

    once ``min_history`` values have entered. An accepted value enters the window as it is, a
    skipped finite one as the limit that it broke, so that a second spike shortly after a first
    is caught too. A non-finite value never enters. After ``rebaseline_after`` consecutive
    skips the next value is accepted as a new level, and the window starts anew from it.

    Args:
      sigma: scalar in [0, inf), standard deviations above the mean that are let through.
      of: ``"grad_norm"`` (global, before any clipping) or ``"value"``, the loss that ``update``
        must then receive as ``value=``.
      window: static integer >= 1.
      min_history: static integer in [1, window]; None for ``window // 2`` (at least 1).
      rebaseline_after: static integer >= 1, or None to skip for as long as it takes.
      min_std_ratio: scalar in [0, inf), smallest std relative to the mean, so that constant
        values let small changes through.

    Returns:
      A condition for ``guard(skip_if=...)``.

    Raises:
      ValueError: if an argument is out of range.
      TypeError: if an argument is no number, or a count no static integer.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(1.0), skip_if=og.spike(6.0, window=8))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 1.1, 0.9, 1.0, 1.1, 50.0, 1.0]:
      ...     _, state = tx.update(jnp.array([norm]), state)
      >>> int(state.skipped_total)
      1

    References:
      OLMo 2, `2 OLMo 2 Furious <https://arxiv.org/abs/2501.00656>`_, 2024 (skip-step). Deviations:
      a spike enters winsorised, not as it is (which blinds the test for a whole window); std has
      a floor; a lasting change of level is accepted.
    """
    check_number("sigma", sigma, open_maximum=True)
    check_choice("of", of, ("grad_norm", "value"))
    check_count("window", window)
    check_count("min_history", min_history, optional=True)
    check_count("rebaseline_after", rebaseline_after, optional=True)
    check_number("min_std_ratio", min_std_ratio, open_maximum=True)
    if min_history is None:
        min_history = max(window // 2, 1)
    if min_history > window:
        raise ValueError(f"min_history must be at most window = {window}, got {min_history}.")

    def init():
        zeros = jnp.zeros((window,), jnp.float32)
        return SpikeState.pack(window=zeros, num_entered=0, rejected_in_a_row=0)

    def judge(grad_norm, value, state):
        observed = grad_norm if of == "grad_norm" else value
        observed = jnp.asarray(observed).astype(jnp.float32)
        values, count, rejected = state.window, state.num_entered, state.rejected_in_a_row
        limit = _limit(values, count, jnp.float32(sigma), jnp.float32(min_std_ratio))
        is_spike = (count >= min_history) & (observed > limit)
        is_new_level = jnp.asarray(False)
        if rebaseline_after is not None:
            is_new_level = is_spike & (rejected >= rebaseline_after)
        skip = is_spike & ~is_new_level
        count = jnp.where(is_new_level, 0, count)
        place = jnp.arange(window) == count % window
        entered = jnp.where(skip, limit, observed)
        return skip, SpikeState.pack(
            window=jnp.where(place, entered, values),
            num_entered=_next_count(count, window),
            rejected_in_a_row=jnp.where(skip, increment(rejected), 0),
        )

    name = "spike" if of == "grad_norm" else "spike of the loss"
    return Condition(name, init, judge, needs_value=of == "value")


def _next_count(count: jax.Array, window: int) -> jax.Array:
    """Counts on, within [window, 2 * window) once the window is full, for ever."""
    count = count + 1
    return jnp.where(count >= 2 * window, window, count)


def _limit(
    values: jax.Array, count: jax.Array, sigma: jax.Array, min_std_ratio: jax.Array
) -> jax.Array:
    """Mean plus ``sigma`` standard deviations, relative to the largest value against overflow."""
    is_filled = jnp.arange(values.size) < count
    values = jnp.where(is_filled, values, 0)
    scale = jnp.max(jnp.abs(values))
    scale = jnp.where(scale > 0, scale, 1)
    number = jnp.maximum(jnp.sum(is_filled), 1).astype(values.dtype)
    relative = values / scale
    mean = jnp.sum(relative) / number
    deviations = jnp.where(is_filled, relative - mean, 0)
    std = safe_sqrt(jnp.sum(deviations**2) / number)
    return (mean + sigma * jnp.maximum(std, min_std_ratio * jnp.abs(mean))) * scale
