"""Euclidean norms of gradients, right over the full range of their dtype, in one read.

``measure`` sums squares in float32 (float64 for float64 leaves). Where such a sum leaves
the range in which it is accurate, a cold branch reads the gradients again at two other
scales, fixed powers of two, so that 1e-37 does not underflow and 3e38 does not overflow.
On mesh axes the branch stays local to each device and the sums of all three scales
travel in one ``psum``, and with them what a guard wants to know: no collective depends on data.
What a guard looks at where gradients are bad hangs on the same branch.

It has a derivative rule, because those of the parts overflow where the derivative of the whole is
finite (at zero, at 1e-30, and next to a NaN).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._core.axes import NO_AXES, MeshAxes
from optax_guard._core.groups import Groups
from optax_guard._core.listening import Heard, announce
from optax_guard._core.rescale import RANGES, any_of, factors_to, scale_by, widen
from optax_guard._core.roots import Measurement, plain_roots_of, roots_of
from optax_guard._core.sums import (
    MeasureCall,
    Sums,
    at_all_scales,
    batches_of,
    load_batch,
    reread,
    squared_sum,
    unload,
)

# Squared norm of a row below which elements of a large array may have underflowed.
_SMALL_ROW = {np.dtype("float32"): 2.0**-100, np.dtype("float64"): 2.0**-800}


def _is_cold(
    leaves: tuple[jax.Array, ...],
    stacked: tuple[jax.Array, ...],
    small_norms_matter: jax.Array,
    small_rows_matter: jax.Array,
    call: MeasureCall,
) -> jax.Array:
    """Whether a plain sum that matters is out of range."""
    groups = call.groups
    r = RANGES[groups.dtype]
    sums = groups.total(stacked)
    high = r.high / max(1, sum(part.size for part in sums))  # that of all groups fits then, too
    is_cold = any_of([~(part <= high) for part in sums])
    used = [leaf for leaf, is_used in zip(leaves, call.is_used, strict=True) if is_used]
    if used and all(leaf.dtype == jnp.float16 for leaf in used):
        # Squares of float16 fit float32. A constant False for them would let XLA fold the scales
        # into infinite ones.
        return is_cold
    pairs = list(zip(sums, _used_blocks(call), strict=True))
    any_small = any_of([(part < r.low) & is_used for part, is_used in pairs])
    all_small = ~any_of([(part >= r.low) & is_used for part, is_used in pairs])
    is_cold |= jnp.where(small_norms_matter, any_small, all_small)
    if groups.kind == "each":
        # The sums of rows would be merged with what they are sums of, and that written to memory.
        return is_cold
    is_row_used = np.repeat(np.asarray(call.is_used, np.bool_), groups.rows)
    is_small_row = groups.row_sums(stacked) < _SMALL_ROW[groups.dtype]
    return is_cold | jnp.any(is_small_row & is_row_used & small_rows_matter)


def _used_blocks(call: MeasureCall) -> list[Any]:
    """For each block which of its groups are used."""
    is_used = np.asarray(call.is_used, np.bool_)
    if call.groups.kind == "global":
        return [np.asarray(True)]
    if call.groups.is_flat:
        return [np.asarray(True) if is_used.all() else call.groups.repeat(is_used)]
    return [is_used] if call.groups.kind == "leaf" else list(is_used)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _measure(
    leaves: tuple[jax.Array, ...],
    small_norms_matter: jax.Array,
    small_rows_matter: jax.Array,
    watched: Any,
    call: MeasureCall,
) -> tuple[Measurement, jax.Array | None]:
    groups, axes = call.groups, call.axes
    batches = batches_of(leaves, call)
    terms = tuple(
        squared_sum(*load_batch(batch, leaves, groups), groups.dtype) for batch in batches
    )
    stacked = unload(terms, batches, call)
    shards = [axes.num_shards(index) for index in range(len(leaves))]
    sizes = groups.sizes(call.is_used, shards)
    is_cold = _is_cold(leaves, stacked, small_norms_matter, small_rows_matter, call)

    # From here on everything hangs on a branch, whose outputs XLA cannot fuse with what made
    # them; else it would repeat the sum over all leaves in the loop of every leaf.
    if not axes.names:
        if call.watch is not None:
            is_cold |= call.watch.is_due(watched)

        def cold(leaves, terms, _, watched):
            measured = roots_of(reread(leaves, terms, call), sizes, groups)
            return measured, call.watch and call.watch(watched, ~jnp.isfinite(measured.norm))

        def hot(leaves, terms, stacked, _):
            del leaves
            measured = plain_roots_of(stacked, terms, batches, sizes, call)
            return measured, call.watch and jnp.asarray(False)

        return lax.cond(is_cold, cold, hot, leaves, terms, stacked, watched)
    sums = lax.cond(
        is_cold,
        lambda leaves, terms, _: reread(leaves, terms, call),
        lambda leaves, terms, stacked: at_all_scales(stacked, [1.0] * len(stacked), groups.dtype),
        leaves,
        terms,
        stacked,
    )
    if axes.has_kept:
        # Each device has norms of its own, and all of them the same rows.
        rows = axes.psum([_count_rows_once(groups.row_sums(part), call) for part in sums])
        return roots_of(Sums(*map(tuple, axes.sum_groups(*sums))), sizes, groups, rows), None
    sums = Sums(*(tuple(_count_once(part, call)) for part in sums))
    if call.watch is None:
        return roots_of(axes.psum(sums), sizes, groups), None
    is_bad = ~jnp.isfinite(sum((jnp.sum(part) for part in stacked), jnp.zeros((), groups.dtype)))
    alarm = call.watch(watched, is_bad).astype(groups.dtype)
    sums, num_alarms = axes.psum((sums, alarm))
    return roots_of(sums, sizes, groups), num_alarms > 0


def _count_once(part: Sequence[jax.Array], call: MeasureCall) -> Sequence[jax.Array]:
    """Sums in the form of ``_unload``, those of repeated leaves on the first device only."""
    groups, axes = call.groups, call.axes
    if not axes.names or all(own == axes.names for own in axes.of_leaves):
        return part
    if groups.kind == "each" and not groups.is_flat:
        return axes.count_once(part)
    if groups.is_flat:
        return (jnp.where(groups.repeat(_is_counted(call)), part[0], 0),)
    return (_count_rows_once(part[0], call),)


def _count_rows_once(rows: jax.Array, call: MeasureCall) -> jax.Array:
    """The same for one vector ``[rows]``."""
    numbers = np.asarray(call.groups.rows)
    is_counted = jnp.repeat(_is_counted(call), numbers, total_repeat_length=rows.shape[0])
    return jnp.where(is_counted, rows, 0)


def _is_counted(call: MeasureCall) -> jax.Array:
    """``[leaves]``, whether this device is to count them."""
    ones = call.axes.count_once([jnp.ones((), np.bool_) for _ in call.groups.shapes])
    return jnp.stack(ones) if ones else jnp.zeros((0,), np.bool_)


@_measure.defjvp
def _measure_jvp(call, primals, tangents):
    groups, axes = call.groups, call.axes
    leaves, *_ = primals
    leaf_dots, *_ = tangents
    result, alarm = _measure(*primals, call)
    down = RANGES[groups.dtype].down

    def tangent(groups, norms, scaled, finite, total):
        # d|g| = <g, dg> / |g|; zero where the norm is zero or not finite.
        ones = tuple(jnp.ones_like(norm) for norm in norms)
        firsts, seconds = map(groups.spread, factors_to(norms, scaled, ones))
        is_usable = groups.spread(
            [is_finite & (norm > 0) for is_finite, norm in zip(finite, norms, strict=True)]
        )
        terms, shapes = [], groups.group_shapes()
        for i, (leaf, own) in enumerate(zip(leaves, groups.axes, strict=True)):
            if not call.is_used[i]:
                terms.append(jnp.zeros(shapes[i], groups.dtype))
                continue
            wide = widen(jnp.where(is_usable[i], leaf, jnp.zeros_like(leaf)), groups.dtype)
            unit = scale_by(wide, firsts[i], seconds[i])
            product = jnp.real(jnp.conj(unit) * leaf_dots[i].astype(unit.dtype))
            terms.append(jnp.sum(product, axis=own, keepdims=len(own) < leaf.ndim))
        return total(terms)

    def add_up(terms):
        return axes.psum(axes.count_once(terms))

    def total(terms):
        terms = axes.sum_groups(terms)[0] if axes.has_kept else add_up(terms)
        if groups.kind == "each":
            return (groups.flatten(terms),) if groups.is_flat else tuple(terms)
        vector = jnp.stack(terms) if terms else jnp.zeros((0,), groups.dtype)
        return (jnp.sum(vector),) if groups.kind == "global" else (vector,)

    norms = tangent(groups, result.norms, result.scaled, result.finite, total)
    whole = groups.of_rows()
    row_norms = result.leaf_norms.astype(groups.dtype)
    blocks = whole.split_rows(row_norms)
    finite = whole.split_rows(result.leaf_finite)
    row_dots = tangent(whole, blocks, tuple(block * down for block in blocks), finite, add_up)
    row_dots = [dot.reshape(-1) for dot in row_dots]
    row_norms_dot = jnp.concatenate(row_dots) if row_dots else jnp.zeros((0,), groups.dtype)
    is_usable = jnp.isfinite(result.norm) & (result.norm > 0)
    shares = jnp.where(is_usable, row_norms, 0) / jnp.where(is_usable, result.norm, 1)
    dots = Measurement(
        norms=norms,
        scaled=tuple(dot * down for dot in norms),
        finite=tuple(np.zeros(flag.shape, jax.dtypes.float0) for flag in result.finite),
        sizes=jnp.zeros_like(result.sizes),
        norm=jnp.sum(shares * row_norms_dot),
        leaf_norms=row_norms_dot.astype(jnp.float32),
        leaf_finite=np.zeros(result.leaf_finite.shape, jax.dtypes.float0),
    )
    alarm_dot = alarm if alarm is None else np.zeros(alarm.shape, jax.dtypes.float0)
    return (result, alarm), (dots, alarm_dot)


@functools.cache
def _jitted_measure(call: MeasureCall) -> Any:
    return jax.jit(functools.partial(_measure, call=call))


def measure(
    leaves: Sequence[jax.Array],
    groups: Groups,
    *,
    axes: MeshAxes = NO_AXES,
    is_used: Sequence[bool] | None = None,
    small_norms_matter: jax.Array | bool = True,
) -> Measurement:
    """Norms of groups of elements and of every leaf, from one read of the leaves.

    Args:
      leaves: inexact arrays.
      groups: which elements share a norm.
      axes: mesh axes over which the leaves are sharded.
      is_used: for each leaf whether to look at it; None for all.
      small_norms_matter: scalar bool, false when nobody cares how far below about 1e-10 a
        norm is, which spares arrays of zeros the second read.
    """
    is_used = (True,) * len(leaves) if is_used is None else tuple(is_used)
    call = MeasureCall(groups, is_used, axes, None)
    return measure_and_watch(leaves, call, small_norms_matter=small_norms_matter)[0]


def measure_and_watch(
    leaves: Sequence[Any],
    call: MeasureCall,
    *,
    small_norms_matter: jax.Array | bool = True,
    small_rows_matter: jax.Array | bool = False,
    watched: Any = (),
) -> tuple[Measurement, jax.Array | None]:
    """``measure``, and whether ``call.watch`` alarms on any device.

    ``small_rows_matter`` is a bool for each row, or for all: whether its norm is to be right where
    elements may have underflowed.
    """
    small = jnp.asarray(small_norms_matter)
    # What is not used must not be an operand: XLA would keep it alive.
    nothing = jnp.zeros((), call.groups.dtype)
    used = tuple(
        leaf if is_used else nothing for leaf, is_used in zip(leaves, call.is_used, strict=True)
    )
    operands = (used, small, jnp.asarray(small_rows_matter), watched)
    result = _jitted_measure(call)(*operands)
    announce(leaves, Heard(call, (small, watched), result))
    return result
