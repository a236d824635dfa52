"""Keeping the norms of parameters below a limit (max-norm constraint)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._core.arrays import promote
from optax_guard._core.axes import AxisName
from optax_guard._core.checks import check_axis_name, check_number, check_scope
from optax_guard._core.groups import Scope
from optax_guard._core.states import rule_state
from optax_guard._core.transformation import require_params, transformation
from optax_guard._core.trees import float_leaves
from optax_guard.rules._inside import update_into
from optax_guard.rules.limit_norms import limit_norms
from optax_guard.rules.rule import Rule, value_at


def clip_params_by_norm(
    max_norm: Any, *, scope: Scope = "unit", axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Changes updates so that no group of parameters ends with a norm above ``max_norm``.

    For each group, with ``p`` its parameters and ``u`` the updates that would be added::

        u  <-  u                                     if norm(p + u) <= max_norm
        u  <-  (p + u) * max_norm / norm(p + u) - p  otherwise

    Place it last, behind the learning rate::

        optax.chain(optax.sgd(0.1, momentum=0.9), og.clip_params_by_norm(3.0))

    ``optax.apply_updates`` then gives norms of at most ``max_norm``, to one rounding of its
    addition in each element. Groups that start outside are brought in by the first step.
    Non-finite updates pass unchanged, with the whole of their group, so that a guard can see them,
    and leave the state as it was; a parameter that is not finite is left alone.

    With ``"unit"`` a bias vector is one group, too. To leave biases and scales alone::

        optax.masked(og.clip_params_by_norm(3.0), lambda p: jax.tree.map(lambda x: x.ndim > 1, p))

    Args:
      max_norm: scalar in [0, inf].
      scope: ``"global"``, ``"leaf"``, ``"unit"`` (the weights that feed one output, which the
        authors limit), or a callable ``(path, leaf) -> axes | None``, see
        :func:`clip_by_param_norm`.
      axis_name: mesh axes over which updates and parameters are sharded inside ``shard_map``.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own. Its
      ``update`` needs ``params``. Sums and norms are float32 (float64 for float64 leaves). Updates
      are rounded inwards, so that coarse ones end inside, too; a float16 one cannot move further
      than 65504 at once. Cost: two reads of updates and parameters; 20 bytes of state.

    Raises:
      ValueError: if ``max_norm`` is negative, NaN or no scalar, or ``scope`` is unknown; from
        ``update``, if it is called without ``params``.
      TypeError: if ``max_norm`` is no number.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = {"kernel": jnp.array([[2.0, 0.0], [0.0, 1.0]])}  # a column feeds one output
      >>> tx = og.clip_params_by_norm(2.5)
      >>> updates = {"kernel": jnp.array([[1.0, 0.5], [4.0, 0.0]])}
      >>> updates, _ = tx.update(updates, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"]  # (3, 4) had the norm 5
      Array([[1.5, 0.5],
             [2. , 1. ]], dtype=float32)

    References:
      Srebro, Rennie & Jaakkola, *Maximum-margin matrix factorization*, 2004; with dropout in
      Srivastava et al., `Dropout <https://jmlr.org/papers/v15/srivastava14a.html>`_, 2014,
      section 5.1. Keras' ``MaxNorm`` divides by norm + 1e-7; here there is no such bias.
    """
    check_number("max_norm", max_norm)
    check_scope(scope)
    check_axis_name(axis_name)

    def limit(norms, history, context):
        return value_at(max_norm, context.step, norms.dtype), history

    rule = Rule(
        limit,
        smallest_limit=lambda context: value_at(max_norm, context.step, "float32"),
    )
    project = limit_norms(
        rule,
        name="clip_params_by_norm",
        scope=scope,
        axis_name=axis_name,
    )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        require_params(params, "clip_params_by_norm", "limits norms of parameters")
        split = float_leaves(updates)
        arrays = split.matching(params)
        moved = list(map(_sum, arrays, split.arrays))
        projected, new_state = project.update(split.replace(moved), state)
        held = map(_hold, split.arrays, arrays, moved, float_leaves(projected).arrays)
        return split.replace(list(held)), new_state

    name = "clip_params_by_norm"
    return transformation(name, rule_state(name), project.init, update)


def _sum(param: jax.Array, update: jax.Array) -> jax.Array:
    """Where the update leads, in float32 at least; a finite sum past its range is cut to it.

    A parameter that is not finite, such as a mask of -inf, adds nothing to its norm.
    """
    wide = promote(param.dtype, update.dtype, jnp.float32)
    param, update = param.astype(wide), update.astype(wide)
    if jnp.iscomplexobj(param):
        return lax.complex(_sum(param.real, update.real), _sum(param.imag, update.imag))
    most = jnp.finfo(wide).max
    moved = jnp.where(jnp.isfinite(param), jnp.clip(param + update, -most, most), 0)
    return jnp.where(jnp.isfinite(update), moved, update)


def _hold(update: jax.Array, param: jax.Array, moved: jax.Array, projected: jax.Array) -> jax.Array:
    """The update that leads to ``projected`` where that differs from where it leads now."""
    if jnp.iscomplexobj(update):
        real = _hold(update.real, jnp.real(param), moved.real, projected.real)
        return lax.complex(real, _hold(update.imag, jnp.imag(param), moved.imag, projected.imag))
    is_held = (projected != moved) & jnp.isfinite(moved)
    most = jnp.abs(projected)
    return jnp.where(is_held, update_into(projected, -most, most, param, update.dtype), update)
