"""Clipping norms that stand out from their own recent distribution."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from optax_guard._core.arrays import safe_ratio, safe_sqrt
from optax_guard._core.axes import AxisName
from optax_guard._core.checks import (
    STOPS_TRAINING,
    check_axis_name,
    check_choice,
    check_count,
    check_number,
    check_scope,
    warn_of_zero,
)
from optax_guard._core.groups import Scope
from optax_guard._core.statistics import (
    Moments,
    add_to_moments,
    follow_shift,
    moving_average,
    unless,
    zero_moments,
)
from optax_guard.rules.limit_norms import limit_norms
from optax_guard.rules.rule import Rule, value_at


def clip_by_zscore(
    z_threshold: Any = 2.5,
    *,
    scope: Scope = "global",
    decay: Any = 0.97,
    warmup_steps: int = 25,
    target: str = "reciprocal",
    max_norm: Any = None,
    min_std_ratio: Any = 0.01,
    rebaseline_after: int | None = 100,
    eps: Any = 1e-6,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales down updates whose norm lies far above the running mean of norms (ZClip).

    With ``n`` the norm of a group, ``mean`` and ``std`` the statistics of its history::

        z      =  (n - mean) / (max(std, min_std_ratio * mean) + eps * mean)
        limit  =  mean + z_threshold**2 * std / z    if z > z_threshold   ("reciprocal")
                  mean                                                    ("mean")
                  mean + z_threshold * std                                ("threshold")
                  n                                  otherwise
        limit  =  min(limit, max_norm);   g <- g * min(1, limit / n);   e = min(n, limit)
        mean   <- decay * mean + (1 - decay) * e
        var    <- decay * var + (1 - decay) * (e - mean)**2

    The first ``warmup_steps`` norms pass (only ``max_norm`` applies) and their mean and biased
    variance start the statistics. A norm that is not finite changes no state and passes through
    for a guard to see; a norm of zero enters no statistic. A spike enters as its clipped value.
    When ``rebaseline_after`` consecutive steps were cut by more than a factor of 2, the level
    has changed for good: the statistics restart from the norms of these steps.

    There is no absolute limit unless ``max_norm`` sets one: an explosion during the warm-up
    passes. Combine with :func:`guard`.

    Args:
      z_threshold: scalar in [0, inf], standard deviations above the mean that are let through.
      scope: ``"global"``, ``"leaf"``, ``"unit"``, or a callable ``(path, leaf) -> axes | None``.
      decay: scalar in [0, 1), weight of the old statistics.
      warmup_steps: static integer >= 1.
      target: ``"reciprocal"`` (the further out, the closer to the mean), ``"mean"``,
        ``"threshold"``.
      max_norm: scalar in [0, inf] that caps the limit at every step, or None.
      min_std_ratio: scalar in [0, inf), smallest std used for z, relative to the mean. The paper
        has none (0), and clips norms that are constant up to rounding.
      rebaseline_after: static integer >= 1, or None for the paper's behaviour, which clips for
        thousands of steps after the level rises tenfold.
      eps: scalar in [0, inf), added to the std relative to the mean.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map``.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own. All
      statistics are float32 (float64 for float64 leaves). Under ``optax.inject_hyperparams`` pass
      ``static_args=("warmup_steps", "rebaseline_after")``. Cost: one read of the updates;
      44 bytes of state for scope "global", 24 more for each group of the others.

    Raises:
      ValueError: if an argument is out of range, or ``target`` or ``scope`` unknown.
      TypeError: if an argument is no number, or a count no static integer.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_zscore(2.5, warmup_steps=4)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 1.2, 0.8, 1.0, 100.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(f"{updates[0]:.2f}")  # 100 standard deviations out: almost the mean
      1.00
      >>> int(state.clipped_total)
      1

    References:
      Kumar et al., `ZClip <https://arxiv.org/abs/2504.02507>`_, 2025. Deviations: the floor on
      std, the return from level shifts, relative ``eps``, non-finite and zero norms left out.
      ``min_std_ratio=0, rebaseline_after=None`` is the paper's rule.
    """
    check_number("z_threshold", z_threshold)
    check_scope(scope)
    check_number("decay", decay, maximum=1.0, open_maximum=True)
    check_count("warmup_steps", warmup_steps)
    check_choice("target", target, ("reciprocal", "mean", "threshold"))
    check_number("max_norm", max_norm, optional=True)
    warn_of_zero("max_norm", max_norm, STOPS_TRAINING)
    check_number("min_std_ratio", min_std_ratio, open_maximum=True)
    check_count("rebaseline_after", rebaseline_after, optional=True)
    check_number("eps", eps, open_maximum=True)
    check_axis_name(axis_name)

    def init(norms):
        return zero_moments(norms), zero_moments(norms)  # accepted norms, and the streak

    def limit(norms, history, context):
        def threshold(value):
            return value_at(value, context.step, norms.dtype)

        moments, streak = history
        mean, std = moments.mean, safe_sqrt(moments.variance)
        is_warm = moments.count >= warmup_steps
        spread = jnp.maximum(std, threshold(min_std_ratio) * mean) + threshold(eps) * mean
        excess = norms - mean
        # z > z_threshold as a product: the derivative of a quotient overflows at tiny norms.
        is_spike = is_warm & (excess > threshold(z_threshold) * spread)
        inverse_z = safe_ratio(spread, jnp.where(is_spike, excess, 1))
        limits = {
            "reciprocal": mean + threshold(z_threshold) ** 2 * (std * inverse_z),
            "mean": mean,
            "threshold": mean + threshold(z_threshold) * std,
        }[target]
        limits = jnp.where(is_spike, limits, jnp.inf)
        if max_norm is not None:
            limits = jnp.minimum(limits, threshold(max_norm))
        clipped = jnp.minimum(norms, limits)

        streak, is_new_level = follow_shift(
            streak, norms, is_warm & (norms > 2 * clipped), rebaseline_after
        )
        started = add_to_moments(moments, norms)
        weight = threshold(1 - decay)
        new_mean = moving_average(mean, clipped, weight)
        new_variance = moving_average(moments.variance, (clipped - new_mean) ** 2, weight)

        def pick(start, follow, restart):
            return jnp.where(is_warm, jnp.where(is_new_level, restart, follow), start)

        new_moments = Moments(
            started.count,
            pick(started.mean, new_mean, streak.mean),
            pick(started.variance, new_variance, streak.variance),
        )
        return limits, (new_moments, unless(is_new_level, streak))

    return limit_norms(
        Rule(limit, init),
        name="clip_by_zscore",
        scope=scope,
        axis_name=axis_name,
    )
