"""Keeping every parameter inside an interval."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from optax_guard._core.arrays import promote, tree_where
from optax_guard._core.axes import AxisName, axes_of_elements
from optax_guard._core.checks import check_axis_name, check_number
from optax_guard._core.groups import make_groups
from optax_guard._core.listening import narrow
from optax_guard._core.measure import measure
from optax_guard._core.states import count_step, rule_state, start_counting
from optax_guard._core.transformation import require_params, transformation
from optax_guard._core.trees import float_leaves
from optax_guard.rules._inside import update_into


def clip_params(
    min_value: Any, max_value: Any, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Changes updates so that every parameter ends in ``[min_value, max_value]``.

    For each element, with ``p`` the parameter and ``u`` the update that would be added::

        u  <-  u                                         if min_value <= p + u <= max_value
        u  <-  clip(p + u, min_value, max_value) - p     otherwise

    Place it last, behind the learning rate::

        optax.chain(optax.adam(1e-3), og.clip_params(-0.01, 0.01))

    ``optax.apply_updates`` then gives parameters inside the interval to one rounding of its
    addition. What starts outside of it is brought in by the first step. The optimizer before it
    does not learn that it was held back: its momentum goes on pointing outwards. Non-finite
    updates pass unchanged, so that a guard can see them, and leave the state as it was; a
    parameter that is not finite is left alone. For some arrays only, use ``optax.masked``.

    Args:
      min_value: scalar in [-inf, inf].
      max_value: scalar in [-inf, inf], not below ``min_value``.
      axis_name: mesh axes over which updates and parameters are sharded inside ``pmap`` or
        ``shard_map(check_vma=False)``, so that all devices count the same. Types tell otherwise.

    Returns:
      A transformation of updates of any float dtype, each returned in its own; of complex ones
      real and imaginary parts are clipped apart. Its ``update`` needs ``params``. Sums are
      float32 (float64 for float64 leaves). Updates are rounded inwards, so that coarse ones end
      inside, too; a float16 one cannot move further than 65504 at once. Cost: two reads of the
      updates and one of the parameters; 20 bytes of state, whose scales are always 1.

    Raises:
      ValueError: if a bound is NaN or no scalar, or ``min_value > max_value``; from ``update``,
        if it is called without ``params``.
      TypeError: if a bound is no number.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = jnp.array([0.5, 0.5, 3.0])
      >>> tx = og.clip_params(-1.0, 1.0)
      >>> updates, _ = tx.update(jnp.array([0.25, 2.0, 0.0]), tx.init(params), params)
      >>> updates, optax.apply_updates(params, updates)
      (Array([ 0.25,  0.5 , -2.  ], dtype=float32), Array([0.75, 1.  , 1.  ], dtype=float32))

    References:
      Arjovsky, Chintala & Bottou, `Wasserstein GAN <https://arxiv.org/abs/1701.07875>`_, 2017,
      clip the weights of the critic to [-0.01, 0.01]. ``optax.keep_params_nonnegative`` is the
      case [0, inf).
    """
    check_number("min_value", min_value, minimum=-math.inf)
    check_number("max_value", max_value, minimum=-math.inf)
    _check_order(min_value, max_value)
    check_axis_name(axis_name)

    state_type = rule_state("clip_params")

    def init(params):
        del params
        return start_counting(state_type)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        require_params(params, "clip_params", "keeps parameters inside bounds")
        split = float_leaves(updates)
        own = split.matching(params)
        axes = axes_of_elements(axis_name, split.paths, split.arrays, own)
        held = [
            _hold(leaf, param, min_value, max_value)
            for leaf, param in zip(split.arrays, own, strict=True)
        ]
        is_held = jnp.asarray(False)
        for leaf, new in zip(split.arrays, held, strict=True):
            is_held |= jnp.any((new != leaf) & (leaf == leaf))
        groups = make_groups("global", split.paths, split.arrays)
        measured = measure(
            split.arrays,
            groups,
            axes=axes,
            is_used=narrow(split.is_present),
            small_norms_matter=False,
        )
        is_finite = jnp.all(measured.leaf_finite)
        is_held = axes.any(is_held)
        new_state = count_step(state, is_cut=is_held, scale=jnp.ones(()), history=())
        return split.replace(held), tree_where(is_finite, new_state, state)

    return transformation("clip_params", state_type, init, update)


def _check_order(min_value: Any, max_value: Any) -> None:
    if isinstance(min_value, Tracer) or isinstance(max_value, Tracer):
        return
    if float(min_value) > float(max_value):
        raise ValueError(
            f"min_value must not be above max_value, got {min_value!r} and {max_value!r}."
        )


def _hold(update: jax.Array, param: jax.Array, min_value: Any, max_value: Any) -> jax.Array:
    if jnp.iscomplexobj(update):
        real = _hold(update.real, jnp.real(param), min_value, max_value)
        return lax.complex(real, _hold(update.imag, jnp.imag(param), min_value, max_value))
    wide = promote(update.dtype, param.dtype, jnp.float32)
    low, high = jnp.asarray(min_value, wide), jnp.asarray(max_value, wide)
    # In float32, so that the verdict on float16 does not depend on how XLA rounds in between.
    moved = param.astype(wide) + update.astype(wide)
    is_outside = ((moved < low) | (moved > high)) & jnp.isfinite(update) & jnp.isfinite(param)
    target = jnp.clip(jnp.where(is_outside, moved, low), low, high)
    return jnp.where(is_outside, update_into(target, low, high, param, update.dtype), update)
