"""Clipping relative to the norm of the parameters."""

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


def clip_by_param_norm(
    ratio: Any = 0.01, *, scope: Scope = "unit", eps: Any = 1e-3, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales updates down to a fraction of the norm of their parameters (AGC).

    For each group, with ``n`` the norm of its updates::

        g  <-  g * min(1, ratio * max(norm of its parameters, eps) / n)

    The first step is like every other. A gradient that holds NaN or Inf passes unchanged, so that a
    guard can see it, and leaves the state as it was; beside a parameter that is NaN nothing is
    clipped.

    A group should be what feeds one output. ``"unit"`` takes that to be an index of the last axis,
    for ranks 2 to 5 as ``optax.adaptive_grad_clip`` does (rank 3: each index of the last two
    axes). Where arrays are laid out otherwise, tell by path which axes make up a unit, None
    being the whole array::

        def scope(path, leaf):
            if leaf.ndim < 2:
                return None
            if path.endswith("embedding"):       # [vocabulary, features]: one norm a token
                return 1
            if path.endswith("conv1d/kernel"):   # [width, in, out]
                return (0, 1)
            if path.endswith("out/kernel"):      # attention output, [heads, dim, out]
                return (0, 1)
            if path.startswith("layers/"):       # scan-stacked, [layers, in, out]
                return 1
            return tuple(range(leaf.ndim - 1))

        tx = og.clip_by_param_norm(0.01, scope=scope)

    The authors leave the final layer alone. ``optax.masked`` does that::

        def all_but_head(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: "head" not in jax.tree_util.keystr(path), params
            )

        tx = optax.masked(og.clip_by_param_norm(0.01), all_but_head)

    Args:
      ratio: scalar in [0, inf).
      scope: ``"global"``, ``"leaf"``, ``"unit"``, or a callable ``(path, leaf) -> axes | None``.
      eps: scalar in [0, inf), stands in for smaller norms of parameters, such as zero ones.
      axis_name: mesh axes over which updates and parameters are sharded inside ``shard_map``.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own. Its
      ``update`` needs ``params``. Norms are float32 (float64 for float64 leaves). Cost: one read
      of the updates and one of the parameters; 20 bytes of state.

    Raises:
      ValueError: if ``ratio`` or ``eps`` is negative, not finite or no scalar, or ``scope`` is
        unknown; from ``update``, if it is called without ``params``.
      TypeError: if ``ratio`` or ``eps`` is no number.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> params = {"w": jnp.array([[30.0, 3.0], [40.0, 4.0]])}  # units of norms 50 and 5
      >>> tx = og.clip_by_param_norm(0.01)
      >>> gradients = {"w": jnp.array([[0.3, 0.3], [0.4, 0.4]])}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> updates["w"]
      Array([[0.3 , 0.03],
             [0.4 , 0.04]], dtype=float32)

    References:
      Brock, De, Smith & Simonyan, `High-performance large-scale image recognition without
      normalization <https://arxiv.org/abs/2102.06171>`_, 2021. As ``optax.adaptive_grad_clip``,
      but for float16, where that one gives NaN from finite inputs.
    """
    check_number("ratio", ratio, open_maximum=True)
    warn_of_zero("ratio", ratio, STOPS_TRAINING)
    check_scope(scope)
    check_number("eps", eps, open_maximum=True)
    check_axis_name(axis_name)

    def limit(norms, history, context):
        floor = value_at(eps, context.step, norms.dtype)
        largest = jnp.maximum(context.param_norms, floor)
        return value_at(ratio, context.step, norms.dtype) * largest, history

    rule = Rule(
        limit,
        smallest_limit=lambda context: jnp.asarray(ratio * eps, jnp.float32),
        needs_params=True,
        param_norm_floor=eps,
    )
    return limit_norms(rule, name="clip_by_param_norm", scope=scope, axis_name=axis_name)
