"""Clipping to a constant or scheduled norm."""

from __future__ import annotations

from typing import Any

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


def clip_by_norm(
    max_norm: Any, *, scope: Scope = "global", axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales updates down to a norm of at most ``max_norm``.

    For each group of elements, with ``n`` its Euclidean norm::

        g  <-  g * min(1, max_norm / n)

    ``"global"`` clips the norm over the whole tree (Pascanu et al.), ``"leaf"`` each array (what
    TensorFlow calls ``clip_by_norm``), ``"unit"`` each output unit. The first step is like every
    other. A gradient that holds NaN or Inf passes unchanged, so that a guard can see it, and
    leaves the state as it was.

    Unlike ``optax.clip_by_global_norm`` the norm neither overflows (float16 above 255, float32
    from 1e19) nor loses terms in bfloat16, and a negative or NaN threshold is an error.

    Args:
      max_norm: scalar in [0, inf], in the unit of the gradients; a number, an array, a traced
        value, or a schedule of the number of finite steps.
      scope: ``"global"``, ``"leaf"``, ``"unit"``, or a callable ``(path, leaf) -> axes | None``.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map``, or a callable
        ``(path, leaf) -> names | None``. With ``"unit"`` or a callable scope let it leave out an
        axis that deals whole groups out to the devices, as one along the outputs of a kernel.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own.
      Norms are float32 (float64 for float64 leaves). Cost: one read of the updates, and the
      multiplication, which XLA fuses into the optimizer; 20 bytes of state.

    Raises:
      ValueError: if ``max_norm`` is negative, NaN or no scalar, or ``scope`` is unknown.
      TypeError: if ``max_norm`` is no number.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_norm(1.0)
      >>> gradients = {"w": jnp.array([3.0, 4.0], jnp.float16)}
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> updates["w"]
      Array([0.6, 0.8], dtype=float16)

    References:
      Pascanu, Mikolov & Bengio, `On the difficulty of training recurrent neural networks
      <https://arxiv.org/abs/1211.5063>`_, 2013.
    """
    check_number("max_norm", max_norm, schedule=True)
    warn_of_zero("max_norm", max_norm, STOPS_TRAINING)
    check_scope(scope)
    check_axis_name(axis_name)

    def limit(norms, history, context):
        return value_at(max_norm, context.step, norms.dtype, "max_norm"), history

    rule = Rule(
        limit,
        smallest_limit=lambda context: value_at(max_norm, context.step, "float32", "max_norm"),
    )
    return limit_norms(rule, name="clip_by_norm", scope=scope, axis_name=axis_name)
