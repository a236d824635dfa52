"""Clipping to a multiple of the running mean of clipped norms."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from optax_guard._core.arrays import increment
from optax_guard._core.axes import AxisName
from optax_guard._core.checks import (
    STOPS_TRAINING,
    check_axis_name,
    check_count,
    check_number,
    check_scope,
    warn_of_zero,
)
from optax_guard._core.groups import Scope
from optax_guard._core.statistics import follow_shift, moving_average, unless, zero_moments
from optax_guard.rules.limit_norms import limit_norms
from optax_guard.rules.rule import Rule, value_at


def clip_by_ema(
    ratio: Any = 1.05,
    *,
    scope: Scope = "leaf",
    decay: Any = 0.98,
    warmup_steps: int = 100,
    warmup_max_norm: Any = 1.0,
    rebaseline_after: int | None = 100,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates down to a multiple of the running mean of their clipped norms (AdaGC).

    For each group, with ``n`` its norm, ``global_norm`` that of the whole tree, and ``count`` its
    norms so far::

        while count < warmup_steps:
            limit  =  n * min(1, warmup_max_norm / global_norm)
            mean   <- min(mean, limit)                 (the first limit, to begin with)
        afterwards:
            limit  =  ratio * mean
            mean   <- decay * mean + (1 - decay) * min(n, limit)
        g  <-  g * min(1, limit / n)

    So the warm-up clips the global norm to ``warmup_max_norm``, from the first step on, and leaves
    behind the smallest norm that each group had. Later a norm may grow by
    ``(ratio - 1) * (1 - decay)`` a step, 0.1 % with the defaults, and is clipped if it grows
    faster. A spike enters as its clipped value. When ``rebaseline_after`` consecutive steps were
    cut by more than a factor of 2, the level has changed for good: the mean restarts as the mean
    of their incoming norms. A norm that is not finite changes no state and passes through for a
    guard to see; a norm of zero enters no statistic and is no step of the warm-up.

    Args:
      ratio: scalar in [0, inf).
      scope: ``"global"``, ``"leaf"``, ``"unit"``, or a callable ``(path, leaf) -> axes | None``.
      decay: scalar in [0, 1), weight of the old mean.
      warmup_steps: static integer >= 1.
      warmup_max_norm: scalar in [0, inf], largest global norm during the warm-up.
      rebaseline_after: static integer >= 1, or None for the paper's behaviour, which after a
        tenfold rise takes thousands of steps to catch up.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map``.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own. All
      statistics are float32 (float64 for float64 leaves). Under ``optax.inject_hyperparams`` pass
      ``static_args=("warmup_steps", "rebaseline_after")``. Cost: one read of the updates; 20
      bytes of state, and 20 for each group.

    Raises:
      ValueError: if an argument is out of range, or ``scope`` unknown.
      TypeError: if an argument is no number, or a count no static integer.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_ema(1.05, warmup_steps=2)
      >>> state = tx.init({"w": jnp.zeros(1), "b": jnp.zeros(1)})
      >>> for norm in [0.6, 0.5, 40.0]:
      ...     gradients = {"w": jnp.array([norm]), "b": jnp.array([0.5])}
      ...     updates, state = tx.update(gradients, state)
      >>> updates  # w is cut to 1.05 times its smallest norm so far, b passes
      {'b': Array([0.5], dtype=float32), 'w': Array([0.525], dtype=float32)}

    References:
      Wang et al., `AdaGC: improving training stability for large language model pretraining
      <https://arxiv.org/abs/2502.11034>`_, 2025. Deviations: zero norms are left out (one freezes
      an array for good there), non-finite ones too; a lasting change of level is accepted.
    """
    check_number("ratio", ratio, open_maximum=True)
    warn_of_zero("ratio", ratio, STOPS_TRAINING)
    check_scope(scope)
    check_number("decay", decay, maximum=1.0, open_maximum=True)
    check_count("warmup_steps", warmup_steps)
    check_number("warmup_max_norm", warmup_max_norm)
    check_count("rebaseline_after", rebaseline_after, optional=True)
    check_axis_name(axis_name)

    def init(norms):
        zeros = jnp.zeros(norms.shape, norms.dtype)
        return zeros.astype(jnp.int32), zeros, zero_moments(norms)

    def limit(norms, history, context):
        def threshold(value):
            return value_at(value, context.step, norms.dtype)

        count, mean, streak = history
        is_warm = count >= warmup_steps
        most = threshold(warmup_max_norm)
        is_capped = context.global_norm > most
        most = jnp.where(is_capped, most, 1)  # inf * share would have a derivative of NaN
        first_limits = jnp.where(is_capped, most * context.shares, norms)
        limits = jnp.where(is_warm, threshold(ratio) * mean, first_limits)
        clipped = jnp.minimum(norms, limits)

        streak, is_new_level = follow_shift(
            streak, norms, is_warm & (norms > 2 * clipped), rebaseline_after
        )
        smallest = jnp.where(count > 0, jnp.minimum(mean, clipped), clipped)
        followed = moving_average(mean, clipped, threshold(1 - decay))
        restarted = jnp.where(is_new_level, streak.mean, followed)
        new_mean = jnp.where(is_warm, restarted, smallest)
        return limits, (increment(count), new_mean, unless(is_new_level, streak))

    return limit_norms(
        Rule(limit, init, needs_global_norm=True),
        name="clip_by_ema",
        scope=scope,
        axis_name=axis_name,
    )
