"""Normalising updates to a chosen norm, or to one that follows from their history."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._core.axes import AxisName
from optax_guard._core.checks import check_axis_name, check_number, check_scope
from optax_guard._core.groups import Scope
from optax_guard._core.statistics import (
    add_to_first,
    moving_average,
    no_first_norms,
)
from optax_guard.rules.limit_norms import limit_norms
from optax_guard.rules.rule import Rule, no_history, value_at

_NUM_FIRST = 100
_CEILING = 2.0


def normalize_and_scale(
    alpha: Any = 1.0,
    *,
    scope: Scope = "global",
    decay: Any = 0.99,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives updates the norm ``alpha``, whatever norm they came with.

    For each group, with ``n`` its Euclidean norm::

        g  <-  g * alpha / n        (g = 0 stays 0)

    The direction is kept, the length is chosen: neither exploding nor vanishing gradients change
    how far a step goes. Nor does convergence, so ``alpha`` (times the learning rate) must decay
    for plain SGD to settle; a schedule does that. The first step is like every other. A gradient
    that holds NaN or Inf passes unchanged and leaves the state as it was.

    With ``alpha="auto"`` the history of ``n`` chooses, group by group. ``median`` is that of the
    first 100 norms, of those so far before they are complete::

        alpha  =  min(median, n)                                             first 100 norms
        alpha  <- decay * alpha + (1 - decay) * min(n, 2 * median)           afterwards

    A spike counts as at most twice the median, a zero norm not at all, and the update scales with
    the loss, as the gradient does. Steps shrink as the norms do, so that plain SGD settles
    without a schedule. The limit of the rule: where early norms have exploded already, so has
    their median, and so will the steps be. Prefer a fixed ``alpha`` if you know one.

    Args:
      alpha: scalar in [0, inf), the norm to give; a number, an array, a traced value, or a
        schedule of the number of finite steps; or ``"auto"``.
      scope: ``"global"``, ``"leaf"``, ``"unit"``, or a callable ``(path, leaf) -> axes | None``.
      decay: scalar in [0, 1), weight of the old ``alpha`` with ``"auto"``; else unused.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map``.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own; right
      for element sizes from 1e-37 to 3e38. Cost: one read of the updates; 20 bytes of state. With
      ``"auto"`` also a sort of 100 norms for each group in each of the first 100 steps, and 412
      bytes of state for each group.

    Raises:
      ValueError: if ``alpha`` is negative, not finite or no scalar, ``decay`` is outside [0, 1), or
        ``scope`` is unknown.
      TypeError: if ``alpha`` is neither a number nor ``"auto"``, or ``decay`` is no number.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.normalize_and_scale(1.0)
      >>> updates, _ = tx.update(jnp.array([3e-30, 4e-30]), tx.init(jnp.zeros(2)))
      >>> updates
      Array([0.6, 0.8], dtype=float32)

    References:
      Hazan, Levy & Shalev-Shwartz, `Beyond convexity: stochastic quasi-convex optimization
      <https://arxiv.org/abs/1507.02030>`_, 2015 (normalised gradient descent). The rule of
      ``"auto"`` is this library's.
    """
    check_number("alpha", alpha, open_maximum=True, schedule=True, word="auto")
    check_scope(scope)
    check_number("decay", decay, maximum=1.0, open_maximum=True)
    check_axis_name(axis_name)

    def constant(norms, history, context):
        return value_at(alpha, context.step, norms.dtype, "alpha"), history

    is_auto = isinstance(alpha, str)
    return limit_norms(
        Rule(
            _auto_limit(decay) if is_auto else constant,
            _init_auto if is_auto else no_history,
            is_target=True,
        ),
        name="normalize_and_scale",
        scope=scope,
        axis_name=axis_name,
    )


def _init_auto(norms: jax.ShapeDtypeStruct) -> Any:
    return no_first_norms(norms, _NUM_FIRST), jnp.zeros(norms.shape, norms.dtype)


def _auto_limit(decay: Any) -> Any:
    def limit(norms, history, context):
        first, alpha = history
        is_full = first.count >= _NUM_FIRST
        first = add_to_first(first, norms)
        winsorised = jnp.minimum(norms, _CEILING * first.median)
        weight = value_at(1 - decay, context.step, norms.dtype)
        alpha = jnp.where(is_full, moving_average(alpha, winsorised, weight), first.median)
        target = jnp.where(is_full, alpha, jnp.minimum(alpha, norms))
        return target, (first, alpha)

    return limit
