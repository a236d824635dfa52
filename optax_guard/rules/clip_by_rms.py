"""Clipping to a constant or scheduled root mean square."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from optax_guard._core.axes import AxisName
from optax_guard._core.checks import (
    STOPS_TRAINING,
    check_axis_name,
    check_number,
    check_scope,
    warn_of_zero,
)
from optax_guard._core.groups import Scope
from optax_guard.rules.limit_norms import limit_norms
from optax_guard.rules.rule import Rule, value_at


def clip_by_rms(
    max_rms: Any = 1.0, *, scope: Scope = "leaf", axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales updates down to a root mean square of at most ``max_rms``.

    For each group, with ``rms = norm / sqrt(number of elements)``::

        g  <-  g * min(1, max_rms / rms)

    Before the optimizer it clips gradients; after a ``scale_by_*`` it is the update clipping of
    Adafactor and StableAdamW, which bounds the step when the second moment lags behind::

        optax.chain(optax.scale_by_adam(), og.clip_by_rms(1.0), optax.scale_by_learning_rate(lr))

    The first step is like every other. A gradient that holds NaN or Inf passes unchanged and
    leaves the state as it was.

    Args:
      max_rms: scalar in [0, inf]; a number, an array, a traced value, or a schedule of the number
        of finite steps.
      scope: ``"global"``, ``"leaf"``, ``"unit"``, or a callable ``(path, leaf) -> axes | None``.
      axis_name: mesh axes over which the updates are sharded; elements are counted over them.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own. Cost:
      one read of the updates; 20 bytes of state.

    Raises:
      ValueError: if ``max_rms`` is negative, NaN or no scalar, or ``scope`` is unknown.
      TypeError: if ``max_rms`` is no number.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_rms(1.0)
      >>> updates = {"w": jnp.array([2.0, -2.0]), "b": jnp.array([0.5])}
      >>> updates, state = tx.update(updates, tx.init(updates))
      >>> updates["w"], updates["b"]
      (Array([ 1., -1.], dtype=float32), Array([0.5], dtype=float32))

    References:
      Shazeer & Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018, section 6;
      Wortsman et al., `Stable and low-precision training (StableAdamW)
      <https://arxiv.org/abs/2304.13013>`_, 2023, who clip the RMS of g / sqrt(v) instead.
    """
    check_number("max_rms", max_rms, schedule=True)
    warn_of_zero("max_rms", max_rms, STOPS_TRAINING)
    check_scope(scope)
    check_axis_name(axis_name)

    def limit(norms, history, context):
        root_size = jnp.asarray(context.size, norms.dtype) ** 0.5
        return value_at(max_rms, context.step, norms.dtype, "max_rms") * root_size, history

    rule = Rule(
        limit,
        smallest_limit=lambda context: value_at(max_rms, context.step, "float32", "max_rms"),
    )
    return limit_norms(rule, name="clip_by_rms", scope=scope, axis_name=axis_name)
