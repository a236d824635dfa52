"""The condition that a gradient norm or a loss stands out from those before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._core.arrays import increment, safe_sqrt
from optax_guard._core.checks import check_choice, check_count, check_number
from optax_guard._core.states import Entry, PackedState
from optax_guard.wrappers.conditions import Condition


class _SpikeArrays(NamedTuple):
    integers: Any
    window: Any


class SpikeState(PackedState, _SpikeArrays):
    """State of :func:`spike`: 4 bytes for each place in the window, and 8.

    Attributes:
      integers: int32 ``[2]``, packed.
      window: float32 ``[window]``, the last values, spikes winsorised to their limit.
    """

    __slots__ = ()
    num_entered = Entry("integers", "int32, values entered; stays within [window, 2 * window)")
    rejected_in_a_row = Entry("integers", "int32, finite values rejected since the last accepted")


def spike(
    sigma: Any = 6.0,
    *,
    of: str = "grad_norm",
    window: int = 128,
    min_history: int | None = None,
    rebaseline_after: int | None = 50,
    min_std_ratio: Any = 1e-2,
) -> Condition:
    """Skips a step whose gradient norm or loss stands out from the last ``window`` of them.

    With mean and (biased) std over the values in the window::

        skip if  x > mean + sigma * max(std, min_std_ratio * |mean|)

    once ``min_history`` values have entered. An accepted value enters the window as it is, a
    skipped finite one as the limit that it broke, so that a second spike shortly after a first
    is caught too. A non-finite value never enters. After ``rebaseline_after`` consecutive
    skips the next value is accepted as a new level, and the window starts anew from it.

    Args:
      sigma: scalar in [0, inf), standard deviations above the mean that are let through.
      of: ``"grad_norm"`` (global, before any clipping) or ``"value"``, the loss that ``update``
        must then receive as ``value=``.
      window: static integer >= 1.
      min_history: static integer in [1, window]; None for ``window // 2`` (at least 1).
      rebaseline_after: static integer >= 1, or None to skip for as long as it takes.
      min_std_ratio: scalar in [0, inf), smallest std relative to the mean, so that constant
        values let small changes through.

    Returns:
      A condition for ``guard(skip_if=...)``.

    Raises:
      ValueError: if an argument is out of range.
      TypeError: if an argument is no number, or a count no static integer.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(1.0), skip_if=og.spike(6.0, window=8))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 1.1, 0.9, 1.0, 1.1, 50.0, 1.0]:
      ...     _, state = tx.update(jnp.array([norm]), state)
      >>> int(state.skipped_total)
      1

    References:
      OLMo 2, `2 OLMo 2 Furious <https://arxiv.org/abs/2501.00656>`_, 2024 (skip-step). Deviations:
      a spike enters winsorised, not as it is (which blinds the test for a whole window); std has
      a floor; a lasting change of level is accepted.
    """
    check_number("sigma", sigma, open_maximum=True)
    check_choice("of", of, ("grad_norm", "value"))
    check_count("window", window)
    check_count("min_history", min_history, optional=True)
    check_count("rebaseline_after", rebaseline_after, optional=True)
    check_number("min_std_ratio", min_std_ratio, open_maximum=True)
    if min_history is None:
        min_history = max(window // 2, 1)
    if min_history > window:
        raise ValueError(f"min_history must be at most window = {window}, got {min_history}.")

    def init():
        zeros = jnp.zeros((window,), jnp.float32)
        return SpikeState.pack(window=zeros, num_entered=0, rejected_in_a_row=0)

    def judge(grad_norm, value, state):
        observed = grad_norm if of == "grad_norm" else value
        observed = jnp.asarray(observed).astype(jnp.float32)
        values, count, rejected = state.window, state.num_entered, state.rejected_in_a_row
        limit = _limit(values, count, jnp.float32(sigma), jnp.float32(min_std_ratio))
        is_spike = (count >= min_history) & (observed > limit)
        is_new_level = jnp.asarray(False)
        if rebaseline_after is not None:
            is_new_level = is_spike & (rejected >= rebaseline_after)
        skip = is_spike & ~is_new_level
        count = jnp.where(is_new_level, 0, count)
        place = jnp.arange(window) == count % window
        entered = jnp.where(skip, limit, observed)
        return skip, SpikeState.pack(
            window=jnp.where(place, entered, values),
            num_entered=_next_count(count, window),
            rejected_in_a_row=jnp.where(skip, increment(rejected), 0),
        )

    name = "spike" if of == "grad_norm" else "spike of the loss"
    return Condition(name, init, judge, needs_value=of == "value")


def _next_count(count: jax.Array, window: int) -> jax.Array:
    """Counts on, within [window, 2 * window) once the window is full, for ever."""
    count = count + 1
    return jnp.where(count >= 2 * window, window, count)


def _limit(
    values: jax.Array, count: jax.Array, sigma: jax.Array, min_std_ratio: jax.Array
) -> jax.Array:
    """Mean plus ``sigma`` standard deviations, relative to the largest value against overflow."""
    is_filled = jnp.arange(values.size) < count
    values = jnp.where(is_filled, values, 0)
    scale = jnp.max(jnp.abs(values))
    scale = jnp.where(scale > 0, scale, 1)
    number = jnp.maximum(jnp.sum(is_filled), 1).astype(values.dtype)
    relative = values / scale
    mean = jnp.sum(relative) / number
    deviations = jnp.where(is_filled, relative - mean, 0)
    std = safe_sqrt(jnp.sum(deviations**2) / number)
    return (mean + sigma * jnp.maximum(std, min_std_ratio * jnp.abs(mean))) * scale
