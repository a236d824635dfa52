"""Clipping elements to the running mean of the largest element of their array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._core.arrays import safe_ratio, times, tree_where
from optax_guard._core.axes import AxisName, resolve_axes
from optax_guard._core.checks import check_axis_name, check_number
from optax_guard._core.groups import make_groups, stack
from optax_guard._core.listening import narrow, note
from optax_guard._core.measure import measure
from optax_guard._core.states import count_step, rule_state, start_counting
from optax_guard._core.statistics import corrected_weight, moving_average
from optax_guard._core.transformation import transformation
from optax_guard._core.trees import float_leaves
from optax_guard.rules._packing import MOST_COUNTED
from optax_guard.rules.rule import value_at


def clip_by_max_ema(
    decay: Any = 0.999, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales down single elements far above the usual largest one of their array (AdaClip).

    For each array, with ``max|g|`` its largest absolute element at step ``t``::

        m      <-  decay * m + (1 - decay) * max|g|
        m_hat  =   m / (1 - decay**t)
        g_i    <-  g_i * m_hat / max|g|      where |g_i| > m_hat

    The first step passes, since ``m_hat`` is its own maximum. Maxima enter as they came in: a spike
    of 1000 times the usual maximum raises ``m_hat`` by about 1000 * (1 - decay), later more, early
    in training, up to itself. A gradient that holds NaN or Inf changes no state and passes through
    for a guard to see; an array of zeros enters no statistic and counts as no step of its own.

    Args:
      decay: scalar in [0, 1), weight of the old mean.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map``.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own. All
      statistics are float32 (float64 for float64 leaves). Cost: two reads of the updates, one
      for the maximum and one for the sum that tells NaN (a maximum does not); 20 bytes of state,
      and 8 for each array.

    Raises:
      ValueError: if ``decay`` is outside [0, 1) or no scalar.
      TypeError: if ``decay`` is no number.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_max_ema(0.999)
      >>> state = tx.init(jnp.zeros(3))
      >>> for _ in range(9):
      ...     _, state = tx.update(jnp.array([1.0, 0.5, -1.0]), state)
      >>> updates, _ = tx.update(jnp.array([1.0, 0.5, -101.0]), state)
      >>> print(updates.round(1))  # one of ten maxima was 101: their mean is 11
      [  1.    0.5 -11. ]

    References:
      Huang et al., `Stable-SPAM: how to train in 4-bit more stably than 16-bit Adam
      <https://arxiv.org/abs/2502.17055>`_, 2025. Deviations: no periodic reset (after which the
      threshold is 316 times the maximum there); arrays of zeros and non-finite ones are left out.
    """
    check_number("decay", decay, maximum=1.0, open_maximum=True)
    check_axis_name(axis_name)

    state_type = rule_state("clip_by_max_ema")

    def init(params):
        split = float_leaves(params)
        groups = make_groups("leaf", split.paths, split.arrays)
        # Counts, then means.
        return start_counting(state_type, jnp.zeros((2, len(split.arrays)), groups.dtype))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        count, mean = state.history
        split = float_leaves(updates, params, count=len(count))
        axes = resolve_axes(axis_name, split.paths, split.arrays)
        groups = make_groups("leaf", split.paths, split.arrays)
        is_used = narrow(split.is_present)
        measured = measure(
            split.arrays,
            groups,
            axes=axes,
            is_used=is_used,
            small_norms_matter=False,
        )
        is_finite = measured.leaf_finite
        nothing = jnp.zeros((), groups.dtype)
        pairs = zip(split.arrays, is_used, strict=True)
        largest = stack(
            [_largest(leaf, groups.dtype) if used else nothing for leaf, used in pairs],
            groups.dtype,
        )
        note(split.arrays, is_used, largest)
        largest = axes.max(largest)
        usable = is_finite & (largest > 0)
        largest = jnp.where(usable, largest, 1)

        new_count = jnp.minimum(count + 1, MOST_COUNTED)
        weight = corrected_weight(value_at(1 - decay, state.steps, groups.dtype), new_count)
        means = moving_average(mean, largest, weight)
        is_spike = usable & (largest > means)
        factors = jnp.where(is_spike, safe_ratio(means, largest), 1)
        history = jnp.stack([new_count, means])
        new_state = count_step(
            state,
            is_cut=jnp.any(is_spike),
            scale=jnp.min(factors, initial=1),
            history=jnp.where(usable, history, state.history),
        )
        arrays = _cut(split.arrays, is_spike, means, factors)
        return split.replace(arrays), tree_where(jnp.all(is_finite), new_state, state)

    return transformation("clip_by_max_ema", state_type, init, update)


def _largest(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Largest absolute element; that of a complex number may lie past the range of its parts."""
    largest = jnp.max(jnp.abs(leaf), initial=0).astype(dtype)
    return jnp.minimum(largest, jnp.finfo(dtype).max)


def _cut(
    arrays: Sequence[jax.Array], is_spike: jax.Array, means: jax.Array, factors: jax.Array
) -> list[jax.Array]:
    """Multiplies the elements beyond their mean by the factor of their array."""

    def split(limits, factors):
        return [(limits[i], factors[i]) for i in range(len(arrays))]

    # XLA does not fuse across a branch: else it would repeat all statistics in every array's loop.
    limits = jnp.where(is_spike, means, jnp.inf)
    pairs = lax.cond(
        jnp.any(is_spike),
        split,
        lambda limits, factors: split(jnp.full_like(limits, jnp.inf), jnp.ones_like(factors)),
        *(limits, factors),
    )
    return [
        jnp.where(jnp.abs(leaf).astype(limit.dtype) > limit, times(leaf, factor), leaf)
        for leaf, (limit, factor) in zip(arrays, pairs, strict=True)
    ]
