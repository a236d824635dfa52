"""What a rule decides on norms that were measured: limits, and the histories that follow."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._core.arrays import root_sum_square, safe_ratio, safe_sqrt
from optax_guard._core.axes import MeshAxes
from optax_guard._core.groups import Groups, stack
from optax_guard._core.rescale import Scaling
from optax_guard._core.roots import Measurement
from optax_guard.rules.rule import Context, Rule


def decide(
    rule: Rule,
    measured: Measurement,
    histories: Sequence[Any],
    contexts: Sequence[Context],
    groups: Groups,
    axes: MeshAxes,
) -> tuple[Scaling, list[Any]]:
    """Limits for every group, and the histories that follow if the step is finite."""
    contexts = [
        context._replace(size=size)
        for context, size in zip(contexts, groups.sizes_of_blocks(measured.sizes), strict=True)
    ]
    if rule.needs_global_norm:
        contexts = _with_global_norm(contexts, measured, groups.dtype, axes)
    limits, active, new_histories = [], [], []
    for norms, is_finite, history, context in zip(
        measured.norms, measured.finite, histories, contexts, strict=True
    ):
        usable = is_finite & (norms > 0)
        safe_norms = jnp.where(usable, norms, 1)
        limit, new_history = _pair(rule.limit(safe_norms, history, context))
        limit = jnp.broadcast_to(limit, norms.shape).astype(norms.dtype)
        limits.append(limit)
        active.append(usable if rule.is_target else usable & (safe_norms > limit))
        new_histories.append(jax.tree.map(functools.partial(_let_in, usable), new_history, history))
    return (
        Scaling(measured.norms, measured.scaled, tuple(limits), tuple(active)),
        new_histories,
    )


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            "limit of an og.Rule must return (limits, new history), got "
            f"{type(result).__name__}. Without a history, return limits, history."
        )
    return result


def _let_in(usable: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """The new statistic, where there is one and it fits its dtype."""
    new = jnp.asarray(new).astype(old.dtype)
    is_overflow = jnp.isinf(new) & jnp.isfinite(old)
    return jnp.where(jnp.broadcast_to(usable, new.shape) & ~is_overflow, new, old)


def _with_global_norm(
    contexts: Sequence[Context], measured: Measurement, dtype: np.dtype, axes: MeshAxes
) -> list[Context]:
    """Adds the norm over all finite groups, and each group's share of it."""
    most = jnp.finfo(dtype).max
    triples = list(zip(measured.norms, measured.scaled, measured.finite, strict=True))
    norms = [jnp.where(is_finite, norm, 0) for norm, _, is_finite in triples]
    scaled = [jnp.where(is_finite, small, 0) for _, small, is_finite in triples]
    largest = _largest(norms, dtype, axes)
    is_large = largest > most**0.8
    parts = [jnp.where(is_large, small, norm) for small, norm in zip(scaled, norms, strict=True)]
    of_leaves, unit = stack(list(map(root_sum_square, parts)), dtype), _largest(parts, dtype, axes)
    if axes.has_kept:
        squares = jnp.square(safe_ratio(of_leaves, lax.stop_gradient(unit)))
        total = lax.stop_gradient(unit) * safe_sqrt(axes.total_of_groups(squares))
    else:
        total = root_sum_square(of_leaves)
    past_range = jnp.minimum(largest * safe_ratio(total, unit), most)
    global_norm = jnp.where(is_large, lax.stop_gradient(past_range), total)
    return [
        context._replace(global_norm=global_norm, shares=safe_ratio(part, total))
        for context, part in zip(contexts, parts, strict=True)
    ]


def _largest(blocks: Sequence[jax.Array], dtype: np.dtype, axes: MeshAxes) -> jax.Array:
    largest = jnp.max(stack([jnp.max(block, initial=0) for block in blocks], dtype), initial=0)
    return axes.max(largest) if axes.has_kept else largest
