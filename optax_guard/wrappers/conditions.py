"""Reasons to skip a step whose gradients and loss are finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.arrays import tree_where
from optax_guard._core.calls import ToldError, is_transformation
from optax_guard._core.checks import (
    check_callable,
    check_number,
    shown,
    warn_of_zero,
)
from optax_guard._core.skeleton import same_arrays


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
    if getattr(part, "__name__", None) in ("spike", "norm_above"):
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
