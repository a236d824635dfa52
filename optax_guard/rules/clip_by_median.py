"""Clipping to a multiple of the median norm of the first steps."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

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
from optax_guard._core.statistics import add_to_first, no_first_norms
from optax_guard.rules.limit_norms import limit_norms
from optax_guard.rules.rule import Rule, value_at


def clip_by_median(
    ratio: Any = 3.0,
    *,
    scope: Scope = "global",
    warmup_steps: int = 100,
    observe_steps: int = 3,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates down to a multiple of the median norm of the first steps.

    For each group, with ``n`` its norm::

        median  =  median of the first `warmup_steps` norms; of those so far, n included, until then
        limit   =  0                in the first `observe_steps` finite steps
                   ratio * median   afterwards
        g       <- g * min(1, limit / n)

    The first steps only observe: their updates are zero, so that a faulty first gradient does no
    harm. Once ``warmup_steps`` norms have come, the limit is frozen. It therefore never follows a
    later explosion, which a running statistic does, and is no choice for a loss whose gradients
    grow for good reasons (a second loss, a curriculum, a layer that is unfrozen): there
    :func:`stabilize` goes on, and this rule cuts for ever. It does follow an explosion within the
    first steps. With momentum, whose steps grow to ten times the learning rate, that is a common
    one: freeze the limit before it, say with ``warmup_steps=10``, or take :func:`clip_by_norm`
    where the scale of the loss is known. ``metrics`` has ``recent_clip_rate``: near 1, the limit is
    too low, and 0 throughout while the loss rises, too high.

    Norms enter as they came in, since a median hardly moves with spikes. A norm that is not finite
    changes no state, counts as no step, and passes through for a guard to see; a norm of zero
    enters no median, but its step counts as observed.

    Args:
      ratio: scalar in [0, inf).
      scope: ``"global"``, ``"leaf"``, ``"unit"``, or a callable ``(path, leaf) -> axes | None``.
        Each group has a median of its own.
      warmup_steps: static integer >= 1.
      observe_steps: static integer >= 0.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map``.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own. All
      statistics are float32 (float64 for float64 leaves). Under ``optax.inject_hyperparams`` pass
      ``static_args=("warmup_steps", "observe_steps")``. Cost: one read of the updates, and a sort
      of ``warmup_steps`` norms for each group at each step of the warm-up, later none unless they
      are 256 or fewer in all; 428 bytes of state for scope "global", 408 more for each group of
      the others.

    Raises:
      ValueError: if ``ratio`` is negative, NaN or no scalar, a count is out of range, or ``scope``
        is unknown.
      TypeError: if ``ratio`` is no number, or a count no static integer.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_median(3.0, observe_steps=1)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 2.0, 1.0, 100.0, 1.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [0.]
      [2.]
      [1.]
      [4.5]
      [1.]

    References:
      The rule is this library's. Pascanu, Mikolov & Bengio, `On the difficulty of training
      recurrent neural networks <https://arxiv.org/abs/1211.5063>`_, 2013, propose to derive the
      threshold from the average norm over many updates.
    """
    check_number("ratio", ratio, open_maximum=True)
    warn_of_zero("ratio", ratio, STOPS_TRAINING)
    check_scope(scope)
    check_count("warmup_steps", warmup_steps)
    check_count("observe_steps", observe_steps, minimum=0)
    check_axis_name(axis_name)

    def init(norms):
        return no_first_norms(norms, warmup_steps)

    def limit(norms, first, context):
        first = add_to_first(first, norms)
        limits = value_at(ratio, context.step, norms.dtype) * first.median
        is_observing = context.step < observe_steps
        return jnp.where(is_observing, 0, limits), first

    return limit_norms(
        Rule(limit, init),
        name="clip_by_median",
        scope=scope,
        axis_name=axis_name,
    )
