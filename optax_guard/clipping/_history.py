"""Running statistics that neither a constant nor a spike can spoil; arrays of groups throughout.

Every average is in increment form, so that constant norms leave it bitwise constant, and
variances are centred, so that they never go negative.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._arrays import increment


class Moments(NamedTuple):
    """Count, mean and biased variance of the norms of each group. Never stored in a state."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


def zero_moments(norms: jax.ShapeDtypeStruct) -> Moments:
    """Moments of nothing, each in a buffer of its own, since none can be donated twice."""
    dtypes = (jnp.int32, norms.dtype, norms.dtype)
    return Moments(*(jnp.zeros(norms.shape, dtype) for dtype in dtypes))


def add_to_moments(moments: Moments, norms: jax.Array) -> Moments:
    """Welford's recurrence with the biased variance."""
    count = increment(moments.count)
    weight = 1 / count.astype(norms.dtype)
    delta = norms - moments.mean
    mean = moments.mean + weight * delta
    variance = moments.variance + weight * (delta * (norms - mean) - moments.variance)
    return Moments(count, mean, jnp.maximum(variance, 0))


def moving_average(average: jax.Array, new: jax.Array, decay: jax.Array) -> jax.Array:
    """``decay * average + (1 - decay) * new``, exact when both are equal."""
    return average + (1 - decay) * (new - average)


def follow_shift(
    streak: Moments, norms: jax.Array, is_cut_by_half: jax.Array, rebaseline_after: int | None
) -> tuple[Moments, jax.Array]:
    """Watches for a lasting change of level.

    Args:
      streak: moments of the norms since cutting by more than a factor of 2 began.
      norms: incoming norms.
      is_cut_by_half: bool, whether this step was cut by more than a factor of 2.
      rebaseline_after: length of a streak that counts as a lasting change; None for never.

    Returns:
      The streak with this step added (empty if the step was not cut by half), and a bool array
      that says where the streak has become a new level. A caller restarts its statistics there.
    """
    if rebaseline_after is None:
        return streak, jnp.zeros(norms.shape, np.bool_)
    longer = add_to_moments(streak, norms)
    kept = Moments(*(jnp.where(is_cut_by_half, part, jnp.zeros_like(part)) for part in longer))
    return kept, kept.count >= rebaseline_after
