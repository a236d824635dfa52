"""Normalising to a running signal-to-noise ratio of the norm."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._core.arrays import increment, safe_ratio, safe_sqrt
from optax_guard._core.axes import AxisName
from optax_guard._core.checks import check_axis_name, check_number, check_scope
from optax_guard._core.groups import Scope
from optax_guard._core.statistics import corrected_weight, moving_average
from optax_guard.rules.limit_norms import limit_norms
from optax_guard.rules.rule import Rule, value_at


def normalize_by_ema_norm(
    *,
    b1: Any = 0.7,
    b2: Any = 0.9,
    scope: Scope = "leaf",
    eps: Any = 1e-6,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives updates a norm near 1 that shrinks while norms fluctuate (AdaGN of Stable-SPAM).

    For each group, with ``n`` its norm at its step ``t``::

        m  <-  b1 * m + (1 - b1) * n             m_hat = m / (1 - b1**t)
        v  <-  b2 * v + (1 - b2) * n**2          v_hat = v / (1 - b2**t)
        g  <-  g / n * m_hat / (sqrt(v_hat) + eps)

    The first step, and every step of constant norms, gives the norm ``1 / (1 + eps / n)``. After a
    spike of any size the norm is at most ``(1 - b1) / sqrt(1 - b2)`` or about 0.95 with the
    defaults, and then below 1 until ``v`` has forgotten it. A norm that is not finite changes
    no state and passes through for a guard to see; a norm of zero enters no statistic.

    Args:
      b1: scalar in [0, 1), weight of the old mean.
      b2: scalar in [0, 1), weight of the old mean square.
      scope: ``"global"``, ``"leaf"``, ``"unit"``, or a callable ``(path, leaf) -> axes | None``.
      eps: scalar in [0, inf), in the unit of the gradients: norms much below it stay small.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map``.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own. All
      statistics are float32 (float64 for float64 leaves). Cost: one read of the updates; 20 bytes
      of state, and 12 for each group.

    Raises:
      ValueError: if an argument is out of range or no scalar, or ``scope`` is unknown.
      TypeError: if an argument is no number.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.normalize_by_ema_norm()
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [5.0, 5.0, 5000.0, 5.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(f"{updates[0]:.2f}")
      1.00
      1.00
      0.75
      0.54

    References:
      Huang et al., `Stable-SPAM: how to train in 4-bit more stably than 16-bit Adam
      <https://arxiv.org/abs/2502.17055>`_, 2025. Deviation: zero and non-finite norms are left out.
    """
    check_number("b1", b1, maximum=1.0, open_maximum=True)
    check_number("b2", b2, maximum=1.0, open_maximum=True)
    check_scope(scope)
    check_number("eps", eps, open_maximum=True)
    check_axis_name(axis_name)

    def init(norms):
        zeros = jnp.zeros(norms.shape, norms.dtype)
        return zeros.astype(jnp.int32), zeros, zeros  # count, mean, root mean square

    def limit(norms, history, context):
        def threshold(value):
            return value_at(value, context.step, norms.dtype)

        count, mean, rms = history
        count = increment(count)
        mean_weight = corrected_weight(threshold(1 - b1), count)
        square_weight = corrected_weight(threshold(1 - b2), count)
        mean = moving_average(mean, norms, mean_weight)
        # Relative to the larger of the two, so that no square overflows; drops out of the result.
        unit = lax.stop_gradient(jnp.maximum(rms, norms))
        square = jnp.square(rms / unit)
        square = moving_average(square, jnp.square(norms / unit), square_weight)
        rms = unit * safe_sqrt(square)
        target = safe_ratio(mean, rms + threshold(eps))
        return target, (count, mean, rms)

    return limit_norms(
        Rule(limit, init, is_target=True),
        name="normalize_by_ema_norm",
        scope=scope,
        axis_name=axis_name,
    )
