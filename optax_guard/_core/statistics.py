"""Running statistics that neither a constant nor a spike can spoil; arrays of groups throughout.

Every average is in increment form, so that constant norms leave it bitwise constant, and
variances are centred, so that they never go negative. Axis 0 of a buffer is time: whatever has
the shape of the norms then broadcasts against it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._core.arrays import increment


class Moments(NamedTuple):
    """Count, mean and biased variance of the norms of each group."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


def zero_moments(norms: jax.ShapeDtypeStruct) -> Moments:
    """Moments of nothing."""
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


def moving_average(average: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    """``(1 - weight) * average + weight * new``, exact when both are equal."""
    return average + weight * (new - average)


def corrected_weight(weight: jax.Array, count: jax.Array) -> jax.Array:
    """Weight of the ``count``-th value in an average with Adam's correction of its start at zero.

    ``weight / (1 - (1 - weight)**count)``, exactly 1 for the first value. The corrected average
    itself can then be stored, and stays bitwise constant when the values do.
    """
    log_decay = jnp.log1p(-jnp.minimum(weight, 1 - 2**-24))
    decayed = jnp.expm1(count.astype(weight.dtype) * log_decay)
    return jnp.where(count > 1, -weight / decayed, 1)


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


def unless(condition: jax.Array, moments: Moments) -> Moments:
    """Moments of nothing where ``condition`` holds."""
    return Moments(*(jnp.where(condition, jnp.zeros_like(part), part) for part in moments))


def empty_window(norms: jax.ShapeDtypeStruct, window: int) -> tuple[jax.Array, jax.Array]:
    """A ring buffer for the last norms of each group, and how many it holds."""
    values = jnp.zeros((window, *norms.shape), norms.dtype)
    return values, jnp.zeros(norms.shape, jnp.int32)


def add_to_window(
    values: jax.Array, count: jax.Array, norms: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Lets norms into a ring buffer.

    Args:
      values: ``[window, *groups]``.
      count: int32 ``[*groups]``, norms let in so far; the last ``window`` of them are kept.
      norms: ``[*groups]``.

    Returns:
      The two arrays with this step. Once the window is full, the count goes on within
      [window, 2 * window), so that it never overflows.
    """
    window = len(values)
    is_next = _places(values) == (count % window)[jnp.newaxis]
    values = jnp.where(is_next, norms[jnp.newaxis], values)
    count = count + 1
    return values, jnp.where(count >= 2 * window, window, count)


def percentile_of(values: jax.Array, count: jax.Array, percentile: Any) -> jax.Array:
    """Percentile of the first ``count`` entries, with linear interpolation as in NumPy.

    Args:
      values: ``[size, *groups]``; what lies beyond ``count`` is ignored.
      count: int32 ``[*groups]``, at least 1; more than ``size`` counts as ``size``.
      percentile: scalar in [0, 100], a number or an array.
    """
    ordered, last = _in_order(values, count)
    # The position percentile / 100 * last, whole numbers apart from the rest: a float32 product
    # knows 899.1 to 6e-5 only, and lets in as much of a spike that stands at 900.
    whole = jnp.asarray(percentile // 1).astype(jnp.int32) * last
    rest = (whole % 100).astype(values.dtype)
    rest += jnp.asarray(percentile % 1).astype(values.dtype) * last.astype(values.dtype)
    low = whole // 100 + (rest // 100).astype(jnp.int32)
    fraction = (rest % 100) / 100

    lower, upper = _at(ordered, low), _at(ordered, jnp.minimum(low + 1, last))
    return lower + fraction * (upper - lower)


def median_of(values: jax.Array, count: jax.Array) -> jax.Array:
    """``percentile_of(values, count, 50)`` in a few kernels."""
    ordered, last = _in_order(values, count)
    lower, upper = _at(ordered, last >> 1), _at(ordered, (last + 1) >> 1)
    return lower + (upper - lower) / 2


def _in_order(values: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first ``count`` entries, sorted, then inf; and the place of the last of them."""
    last = jnp.minimum(count, len(values)) - 1
    is_filled = _places(values) <= last[jnp.newaxis]
    return _sorted(jnp.where(is_filled, values, jnp.inf)), last


@jax.custom_jvp
def _sorted(norms: jax.Array) -> jax.Array:
    """``jnp.sort(norms, axis=0)`` in a quarter of the time: bits of numbers >= 0 order as they do.

    JAX compares floats so that NaN comes last, in a function of its own for every pair.
    """
    bits = lax.bitcast_convert_type(norms, f"int{8 * norms.dtype.itemsize}")
    return lax.bitcast_convert_type(lax.sort(bits, dimension=0, is_stable=False), norms.dtype)


@_sorted.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return jax.jvp(lambda norms: jnp.sort(norms, axis=0), primals, tangents)


def _at(ordered: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(ordered, index[jnp.newaxis], axis=0)[0]


def _places(values: jax.Array) -> jax.Array:
    """Index along axis 0, ready to broadcast against ``values``."""
    return jnp.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))


class FirstNorms(NamedTuple):
    """The first norms of each group and their median.

    Attributes:
      count: int32 ``[*groups]``, norms in ``values``.
      values: ``[number, *groups]``.
      median: ``[*groups]``, of the norms so far; constant once all have come.
    """

    count: jax.Array
    values: jax.Array
    median: jax.Array


def no_first_norms(norms: jax.ShapeDtypeStruct, number: int) -> FirstNorms:
    """Room for ``number`` norms of each group."""
    return FirstNorms(
        jnp.zeros(norms.shape, jnp.int32),
        jnp.zeros((number, *norms.shape), norms.dtype),
        jnp.zeros(norms.shape, norms.dtype),
    )


_FEW = 256  # norms that are sorted sooner than a device has told whether they have to be


def add_to_first(first: FirstNorms, norms: jax.Array) -> FirstNorms:
    """Lets norms in where there is room; many are not sorted once no group has any."""
    number = len(first.values)

    def extend(first, norms):
        is_next = _places(first.values) == first.count[jnp.newaxis]
        values = jnp.where(is_next, norms[jnp.newaxis], first.values)
        count = jnp.minimum(first.count + 1, number)
        median = median_of(values, count)
        return FirstNorms(count, values, median)

    if first.values.size <= _FEW:
        return extend(first, norms)
    return lax.cond(jnp.any(first.count < number), extend, lambda first, _: first, first, norms)
