"""The update that leads into a set, whatever its dtype rounds to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._core.arrays import update_towards


def update_into(
    target: jax.Array, low: jax.Array, high: jax.Array, start: jax.Array, dtype: Any
) -> jax.Array:
    """The update of ``dtype`` that takes ``start`` to ``target`` in ``[low, high]``.

    Rounded to nearest it could end outside by as much as its dtype is coarse: a bfloat16 leads
    from 40.1 to 1.1 instead of 1. Its neighbour is taken if that ends inside. Real arrays only.
    """
    nearest = update_towards(target, start, dtype)
    outwards = _side(start, nearest, low, high)
    inwards = jnp.where(outwards > 0, -jnp.inf, jnp.inf).astype(dtype)
    neighbour = jnp.nextafter(lax.stop_gradient(nearest), inwards)
    is_better = (outwards != 0) & (_side(start, neighbour, low, high) == 0)
    # As a constant difference, since nextafter has no derivative.
    return nearest + lax.stop_gradient(jnp.where(is_better, neighbour - nearest, 0))


def _side(start: jax.Array, update: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Where the update leads: 1 above the interval, -1 below it, 0 inside."""
    wide = jnp.result_type(low, high)
    end = lax.stop_gradient(start.astype(wide) + update.astype(wide))
    return (end > high).astype(wide) - (end < low).astype(wide)
