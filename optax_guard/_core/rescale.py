"""Brings groups of elements to given norms, over the full range of their dtype.

``rescale`` multiplies by ``limit / norm`` as two factors, since the quotient itself may be
subnormal. It has a derivative rule, because those of the parts overflow where the derivative of
the whole is finite (at zero, at 1e-30, and next to a NaN).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._core.arrays import promote, rounded
from optax_guard._core.groups import Groups


class Range(NamedTuple):
    """Sums of squares in [low, high] are accurate; ``up`` and ``down`` rescale the others."""

    low: float
    high: float
    up: float
    down: float


RANGES = {
    np.dtype("float32"): Range(2.0**-66, 2.0**126, 2.0**80, 2.0**-100),
    np.dtype("float64"): Range(2.0**-400, 2.0**1000, 2.0**500, 2.0**-600),
}


def any_of(flags: Iterable[jax.Array]) -> jax.Array:
    flags = [jnp.any(flag) for flag in flags]
    return jnp.any(jnp.stack(flags)) if flags else jnp.asarray(False)


def factors_to(
    norms: Sequence[jax.Array], scaled: Sequence[jax.Array], limits: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Two factors for each group whose product is ``limit / norm``, neither one subnormal."""
    firsts, seconds = [], []
    for norm, small, limit in zip(norms, scaled, limits, strict=True):
        r = RANGES[np.dtype(norm.dtype)]
        tiny = float(jnp.finfo(norm.dtype).tiny)
        is_large = norm > 1 / (4 * tiny)  # the reciprocal would be subnormal
        divisor = jnp.where(norm > 0, norm, 1)
        quotient = limit / divisor
        is_plain = ~is_large & (jnp.abs(quotient) >= 2**24 * tiny) & (norm >= tiny)
        is_plain &= jnp.isfinite(quotient)
        first = jnp.where(is_large, r.down, 1 / divisor)
        second = jnp.where(is_large, limit / jnp.where(small > 0, small, 1), limit)
        firsts.append(jnp.where(is_plain, 1, first))
        seconds.append(jnp.where(is_plain, quotient, second))
    return firsts, seconds


def widen(leaf: jax.Array, dtype: Any) -> jax.Array:
    """``leaf`` in at least the precision of ``dtype``."""
    return leaf.astype(promote(leaf.dtype, dtype))


def scale_by(leaf: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """``leaf * first * second`` in the precision of the factors, in the dtype of the leaf."""
    if jnp.iscomplexobj(leaf):
        # A complex product would turn Inf into NaN and -0.0 into 0.0.
        real, imag = (scale_by(part, first, second) for part in (leaf.real, leaf.imag))
        return lax.complex(real, imag)
    return rounded((widen(leaf, first.dtype) * first) * second, leaf.dtype)


class Scaling(NamedTuple):
    """How to bring groups to ``limits``: blocks of norms, scaled norms, limits and verdicts."""

    norms: Any
    scaled: Any
    limits: Any
    active: Any


def rescale(leaves: Sequence[jax.Array], scaling: Scaling, groups: Groups) -> tuple[jax.Array, ...]:
    """Gives each active group the norm ``limit``; the others keep every bit."""
    return rescale_and_split(leaves, scaling, groups, None)[0]


def rescale_and_split(
    leaves: Sequence[jax.Array],
    scaling: Scaling,
    groups: Groups,
    flat: jax.Array | None,
    is_any: jax.Array | None = None,
) -> tuple[tuple[jax.Array, ...], list[jax.Array]]:
    """``rescale``, and the part for each leaf of ``flat`` ``[rows, units]``, of a flat block.

    ``is_any`` tells whether one is active on any device, where each has groups of its own.
    """
    is_any = any_of(scaling.active) if is_any is None else is_any
    firsts, seconds, parts = _spread_factors(lax.stop_gradient(scaling), groups, flat, is_any)
    # Leaf by leaf, so that one whose update nobody needs is not kept alive by the others.
    own = (Scaling(*part) for part in zip(*map(groups.spread, scaling), strict=True))
    return tuple(map(_rescale_leaf, leaves, firsts, seconds, own)), parts


def _spread_factors(
    scaling: Scaling, groups: Groups, flat: jax.Array | None, is_any: jax.Array
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Two factors for each leaf, ready to broadcast, and its part of ``flat``."""
    ones = [jnp.ones_like(norm) for norm in scaling.norms]

    def factors(scaling):
        firsts, seconds = factors_to(*scaling[:3])
        chosen = [list(map(jnp.where, scaling.active, each, ones)) for each in (firsts, seconds)]
        return chosen[0], chosen[1]

    # The branch saves little, but XLA cannot fuse across it; without it all that led to the
    # factors would be repeated in the loop of every leaf, and compiling take five times as long.
    if groups.kind == "global" or (groups.kind == "each" and not groups.is_flat):
        chosen = lax.cond(is_any, factors, lambda _: (ones, ones), scaling)
        firsts, seconds = map(groups.spread, chosen)
        return firsts, seconds, []
    # One array for each leaf leaves the branch. Slices of a vector in the loop of every leaf
    # would make all loops different, and the compiler compiles equal ones once.
    starts = groups.starts()
    rest = jnp.zeros((0, ones[0].size), groups.dtype) if flat is None else flat
    parts = lax.cond(
        is_any,
        lambda scaling, rest: groups.split(_rows(*factors(scaling), rest), starts),
        lambda scaling, rest: groups.split(_rows(ones, ones, rest), starts),
        scaling,
        rest,
    )
    return [part[0] for part in parts], [part[1] for part in parts], [part[2:] for part in parts]


def _rows(firsts: Sequence[jax.Array], seconds: Sequence[jax.Array], rest: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.stack([firsts[0], seconds[0]]), rest])


@jax.custom_jvp
def _rescale_leaf(
    leaf: jax.Array, first: jax.Array, second: jax.Array, scaling: Scaling
) -> jax.Array:
    del scaling  # what the factors were made of
    return scale_by(leaf, first, second)


@_rescale_leaf.defjvp
def _rescale_leaf_jvp(primals, tangents):
    # u = g L/n, so du = (dg - (g/n) dn) L/n + (g/n) dL. Every factor is finite where u is.
    leaf, _, _, scaling = primals
    dot, _, _, scaling_dot = tangents
    active = scaling.active
    norm, scaled, limit = (jnp.where(active, part, jnp.ones_like(part)) for part in scaling[:3])
    one = jnp.ones_like(norm)
    (unit_first,), (unit_second,) = factors_to([norm], [scaled], [one])
    (first,), (second,) = factors_to([norm], [scaled], [limit])
    wide = widen(jnp.where(active, leaf, jnp.zeros_like(leaf)), norm.dtype)
    unit = scale_by(wide, unit_first, unit_second)
    across = dot.astype(unit.dtype) - unit * scaling_dot.norms
    moved = scale_by(across, first, second) + unit * scaling_dot.limits
    return _rescale_leaf(*primals), jnp.where(active, moved.astype(leaf.dtype), dot)
