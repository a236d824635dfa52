"""Clipping the relative change of parameters, last in the chain."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._core.arrays import safe_ratio, tree_where
from optax_guard._core.axes import AxisName, parameters, resolve_axes
from optax_guard._core.checks import check_axis_name, check_number
from optax_guard._core.groups import make_groups, stack
from optax_guard._core.listening import narrow
from optax_guard._core.measure import measure
from optax_guard._core.rescale import RANGES, Scaling, rescale
from optax_guard._core.states import count_step, rule_state, start_counting
from optax_guard._core.transformation import require_params, transformation
from optax_guard._core.trees import float_leaves


def clip_by_relative_change(
    max_relative: Any = 0.1, *, max_absolute: Any = 1e-2, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales updates down so that no parameter changes by more than a fraction of itself (Clippy).

    For each array, with ``u`` the updates that would be added to parameters ``p``::

        scale  =  min(1, min_i (max_relative * |p_i| + max_absolute) / |u_i|)
        u      <- u * scale

    One scalar an array, so that the direction is kept; an update of zero imposes nothing.
    Place it last, behind the learning rate::

        optax.chain(optax.adagrad(0.1), og.clip_by_relative_change())

    The first step is like every other. An array that holds NaN or Inf passes unchanged, so that a
    guard can see it, and the state stays as it was; a parameter that is NaN imposes nothing.

    Args:
      max_relative: scalar in [0, inf), largest change relative to a parameter.
      max_absolute: scalar in [0, inf), added to that, so that a parameter of zero can move. With
        0, one that is exactly zero stops its whole array.
      axis_name: mesh axes over which updates and parameters are sharded inside ``shard_map``.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own. Its
      ``update`` needs ``params``. Factors are float32 (float64 for float64 leaves). Cost: two reads
      of the updates and one of the parameters; 20 bytes of state.

    Raises:
      ValueError: if an argument is negative, not finite or no scalar; from ``update``, if it is
        called without ``params``.
      TypeError: if an argument is no number.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> params = jnp.array([10.0, 1.0])
      >>> tx = og.clip_by_relative_change(0.1, max_absolute=0.0)
      >>> updates, _ = tx.update(jnp.array([-2.0, -0.5]), tx.init(params), params)
      >>> updates  # 0.1 is the most by which the second may change: a fifth of its update
      Array([-0.4, -0.1], dtype=float32)

    References:
      Tang et al., `Improving training stability for multitask ranking models in recommender
      systems <https://arxiv.org/abs/2302.09178>`_, 2023, algorithm 2.
    """
    check_number("max_relative", max_relative, open_maximum=True)
    check_number("max_absolute", max_absolute, open_maximum=True)
    check_axis_name(axis_name)

    state_type = rule_state("clip_by_relative_change")

    def init(params):
        del params
        return start_counting(state_type)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        require_params(params, "clip_by_relative_change", "compares updates with parameters")
        split = float_leaves(updates, params)
        axes = resolve_axes(axis_name, split.paths, split.arrays, also=parameters(params))
        groups = make_groups("leaf", split.paths, split.arrays)
        measured = measure(
            split.arrays,
            groups,
            axes=axes,
            is_used=narrow(split.is_present),
            small_norms_matter=False,
        )
        is_finite = measured.leaf_finite
        excess = stack(
            [
                _excess(leaf, param, max_relative, max_absolute, groups.dtype)
                for leaf, param in zip(split.arrays, split.matching(params), strict=True)
            ],
            groups.dtype,
        )
        excess = axes.max(excess)
        one = _unit(groups.dtype)
        is_over = is_finite & (excess > one)
        ones = jnp.full_like(excess, one)
        down = RANGES[groups.dtype].down
        scaling = Scaling((excess,), (excess * down,), (ones,), (is_over,))
        arrays = rescale(split.arrays, scaling, groups)

        factors = lax.stop_gradient(one / jnp.where(is_over, excess, one))
        new_state = count_step(
            state, is_cut=jnp.any(is_over), scale=jnp.min(factors, initial=1), history=()
        )
        return split.replace(arrays), tree_where(jnp.all(is_finite), new_state, state)

    return transformation("clip_by_relative_change", state_type, init, update)


def _unit(dtype: Any) -> float:
    """What ``|u| / bound = 1`` is measured as, so that it fits the dtype for the largest ``u``."""
    return 2.0**-40 if np.dtype(dtype) == np.float32 else 2.0**-100


def _excess(
    update: jax.Array, param: jax.Array, max_relative: Any, max_absolute: Any, dtype: Any
) -> jax.Array:
    """The largest ``|u| / bound`` of a leaf, in units of ``_unit``; infinite if a bound is zero."""
    size = jnp.abs(update).astype(dtype) * _unit(dtype)
    bound = jnp.abs(param).astype(dtype) * jnp.asarray(max_relative, dtype)
    bound = bound + jnp.asarray(max_absolute, dtype)
    bound = jnp.where(jnp.isnan(bound), jnp.inf, bound)
    ratio = jnp.where((bound == 0) & (update != 0), jnp.inf, safe_ratio(size, bound))
    return jnp.max(ratio, initial=0)
