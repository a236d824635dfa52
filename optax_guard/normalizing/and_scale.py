"""Normalising updates instead of clipping them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from optax_guard._checks import check_axis_name, check_number, check_scope
from optax_guard._norms import AxisName
from optax_guard._scopes import Scope
from optax_guard.clipping._core import Rule, limit_norms, no_history, value_at


class NormalizeAndScaleState(NamedTuple):
    """State of :func:`normalize_and_scale`: three scalars.

    Attributes:
      normalize_steps: int32, finite steps seen (the argument of a schedule).
      normalize_total: int32, steps in which at least one group was rescaled.
      normalize_last_scale: float32, smallest factor applied in the last finite step.
      normalize_history: empty.
    """

    normalize_steps: jax.Array
    normalize_total: jax.Array
    normalize_last_scale: jax.Array
    normalize_history: Any


def normalize_and_scale(
    alpha: Any = 1.0,
    *,
    scope: Scope = "global",
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives updates the norm ``alpha``, whatever norm they came with.

    For each group, with ``n`` its Euclidean norm::

        g  <-  g * alpha / n        (g = 0 stays 0)

    The direction is kept, the length is chosen: neither exploding nor vanishing gradients change
    how far a step goes. Nor does convergence, so ``alpha`` (times the learning rate) must decay
    for plain SGD to settle; a schedule does that. The first step is like every other. A gradient
    that holds NaN or Inf passes unchanged and leaves the state as it was.

    Args:
      alpha: scalar in [0, inf), the norm to give; a number, an array, a traced value, or a
        schedule of the number of finite steps.
      scope: ``"global"``, ``"leaf"``, ``"unit"``, or a callable ``(path, leaf) -> axes | None``.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map``.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own; right
      for element sizes from 1e-37 to 3e38. Cost: one read of the updates; 12 bytes of state.

    Raises:
      ValueError: if ``alpha`` is negative, not finite or no scalar, or ``scope`` is unknown.
      TypeError: if ``alpha`` is no number.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.normalize_and_scale(1.0)
      >>> updates, _ = tx.update(jnp.array([3e-30, 4e-30]), tx.init(jnp.zeros(2)))
      >>> updates
      Array([0.6, 0.8], dtype=float32)

    References:
      Hazan, Levy & Shalev-Shwartz, `Beyond convexity: stochastic quasi-convex optimization
      <https://arxiv.org/abs/1507.02030>`_, 2015 (normalised gradient descent).
    """
    check_number("alpha", alpha, open_maximum=True, schedule=True)
    check_scope(scope)
    check_axis_name(axis_name)

    def limit(norms, history, context):
        return value_at(alpha, context.step, norms.dtype), history

    return limit_norms(
        Rule(init=no_history, limit=limit, is_target=True),
        NormalizeAndScaleState,
        name="normalize_and_scale",
        scope=scope,
        axis_name=axis_name,
    )
