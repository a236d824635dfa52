"""Clipping to a percentile of the recent norms."""

from __future__ import annotations

import warnings
from typing import Any

import optax

from optax_guard._core.axes import AxisName
from optax_guard._core.checks import check_axis_name, check_count, check_number, check_scope
from optax_guard._core.groups import Scope
from optax_guard._core.statistics import add_to_window, empty_window, percentile_of
from optax_guard.rules.limit_norms import limit_norms
from optax_guard.rules.rule import Rule


def clip_by_percentile(
    percentile: Any = 10.0,
    *,
    scope: Scope = "global",
    window: int = 1000,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates down to a percentile of the last norms (AutoClip).

    For each group, with ``n`` its norm::

        limit  =  percentile of the last `window` norms, n included, linearly interpolated
        g      <- g * min(1, limit / n)

    With the default, nine steps of ten are clipped: the rule normalises to a small norm more
    than it clips. The norms enter as they came in, spikes too, for a percentile hardly moves with
    them. The first norm is its own percentile and passes; a spike in one of the first steps
    passes or stays visible in the interpolation. A norm that is not finite changes no state and
    passes through for a guard to see; a norm of zero enters no window.

    Args:
      percentile: scalar in [0, 100]; 50 is the running median.
      scope: ``"global"``, ``"leaf"``, ``"unit"``, or a callable ``(path, leaf) -> axes | None``.
        Each group has a window of its own.
      window: static integer >= 1. The paper keeps all norms of a run.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map``.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own. The
      window is float32 (float64 for float64 leaves). Under ``optax.inject_hyperparams`` pass
      ``static_args=("window",)``. Cost: one read of the updates, and a sort of the window for
      each group at each step, 40 µs for 1000 norms on a CPU; 4 kB of state for a window of 1000
      and scope "global", times the number of groups for the others: 4 MB for 1000 units.

    Raises:
      ValueError: if ``percentile`` is outside [0, 100] or no scalar, ``window`` is not positive,
        or ``scope`` is unknown.
      TypeError: if ``percentile`` is no number, or ``window`` no static integer.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_percentile(50.0, window=3)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 2.0, 3.0, 100.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> updates  # the median of 2, 3 and 100
      Array([3.], dtype=float32)

    References:
      Seetharaman, Wichern, Pardo & Le Roux, `AutoClip: adaptive gradient clipping for source
      separation networks <https://arxiv.org/abs/2007.14469>`_, 2020. Deviations: a window in place
      of the whole history; non-finite and zero norms left out (one NaN makes every later
      percentile NaN there).
    """
    check_number("percentile", percentile, maximum=100.0)
    if isinstance(percentile, float) and 0 < percentile < 1:
        warnings.warn(
            f"percentile={percentile} is below the first per cent of the norms: nearly every step "
            f"is cut to the smallest of them. Percentiles go from 0 to 100; for this fraction, "
            f"write percentile={100 * percentile:g}.",
            stacklevel=2,
        )
    check_scope(scope)
    check_count("window", window)
    check_axis_name(axis_name)

    def init(norms):
        return empty_window(norms, window)

    def limit(norms, history, context):
        del context
        values, count = history
        values, count = add_to_window(values, count, norms)
        return percentile_of(values, count, percentile), (values, count)

    return limit_norms(
        Rule(limit, init),
        name="clip_by_percentile",
        scope=scope,
        axis_name=axis_name,
    )
