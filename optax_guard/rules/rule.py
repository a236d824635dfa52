"""The one update behind every clipping and normalising rule.

A rule knows nothing of pytrees: it maps an array of norms and a history to an array of
limits and a new history. What is here applies it to any scope and keeps the promises that
all rules share: a non-finite norm changes no state and hides nothing, a norm of zero enters
no statistic of its group, what lies below its limit passes bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._core.arrays import increment, root_sum_square, safe_ratio, tree_where
from optax_guard._core.groups import Groups, Scope, make_groups, stack
from optax_guard._core.measure import AxisName, Measurement, measure
from optax_guard._core.rescale import Scaling, rescale
from optax_guard._core.trees import FloatLeaves, float_leaves

_SMALL_NORM = 1e-9  # measured without the second read, norms down to here are right


class Context(NamedTuple):
    """What a rule may look at besides the norms and history of its block.

    Attributes:
      step: int32 scalar, the number of finite steps so far.
      size: number of elements of each group, broadcastable to the norms.
      param_norms: norms of the parameters, grouped as the gradient is; None if not asked for.
      global_norm: scalar, norm over all finite groups, saturated; None if not asked for.
      shares: norm of each group relative to it, never saturated; None if not asked for.
    """

    step: jax.Array
    size: Any
    param_norms: jax.Array | None = None
    global_norm: jax.Array | None = None
    shares: jax.Array | None = None


class Rule(NamedTuple):
    """How limits follow from norms.

    Attributes:
      init: the history of a block, given the shape and dtype of its norms.
      limit: ``(norms, history, context) -> (limits, new history)``; every norm that it sees
        is finite and positive (1 stands in for the others, and what follows is discarded).
      smallest_limit: a lower bound on all limits, ``context -> scalar``, where one is known
        before the norms are; it spares zero gradients their second read.
      needs_params: whether the rule reads ``context.param_norms``.
      param_norm_floor: norms of parameters below it need not be told apart.
      needs_global_norm: whether it reads ``context.global_norm`` or ``context.shares``.
      is_target: whether the limit is the norm to give (normalise) and not the largest allowed.
    """

    init: Callable[[jax.ShapeDtypeStruct], Any]
    limit: Callable[[jax.Array, Any, Context], tuple[jax.Array, Any]]
    smallest_limit: Callable[[Context], Any] | None = None
    needs_params: bool = False
    param_norm_floor: Any = 0.0
    needs_global_norm: bool = False
    is_target: bool = False


def no_history(norms: jax.ShapeDtypeStruct) -> tuple[()]:
    """The history of a rule that remembers nothing."""
    del norms
    return ()


def value_at(value: Any, step: jax.Array, dtype: Any) -> jax.Array:
    """A threshold as an array of the norms' dtype; a schedule is evaluated at ``step``."""
    return jnp.asarray(value(step) if callable(value) else value).astype(dtype)


def limit_norms(
    rule: Rule,
    state_type: Callable[..., Any],
    *,
    name: str,
    scope: Scope,
    axis_name: AxisName,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that applies ``rule``.

    Args:
      rule: limits from norms.
      state_type: NamedTuple of four fields: number of finite steps, number of steps in which
        something was cut, smallest factor of the last finite step, history.
      name: public name of the factory, for messages.
      scope: which elements share a norm.
      axis_name: mesh axes over which the updates are sharded.
    """

    def init(params):
        split = float_leaves(params)
        groups = make_groups(scope, split.paths, split.arrays, is_sharded=axis_name is not None)
        histories = tuple(rule.init(block) for block in groups.blocks)
        return state_type(
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
            jnp.ones((), jnp.float32),
            histories if groups.kind == "each" else histories[0],
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        step, cut_total, _, history = state
        split = float_leaves(updates)
        groups = make_groups(scope, split.paths, split.arrays, is_sharded=axis_name is not None)
        contexts = _contexts(rule, groups, split, params, step, axis_name, name)
        measured = measure(
            split.arrays,
            groups,
            axis_name=axis_name,
            small_norms_matter=_small_norms_matter(rule, contexts),
        )
        histories = history if groups.kind == "each" else (history,)
        scaling, new_histories = _decide(rule, measured, histories, contexts, groups)
        arrays = rescale(split.arrays, scaling, groups)

        is_finite = jnp.all(measured.leaf_finite)
        new_state = state_type(
            increment(step),
            jnp.where(_any_cut(scaling), increment(cut_total), cut_total),
            _smallest_factor(scaling),
            tuple(new_histories) if groups.kind == "each" else new_histories[0],
        )
        return split.replace(arrays), tree_where(is_finite, new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _contexts(
    rule: Rule,
    groups: Groups,
    split: FloatLeaves,
    params: Any,
    step: jax.Array,
    axis_name: AxisName,
    name: str,
) -> list[Context]:
    num_shards = 1 if axis_name is None else lax.psum(1, axis_name)
    param_norms: Sequence[jax.Array | None] = [None] * len(groups.blocks)
    if rule.needs_params:
        if params is None:
            raise ValueError(
                f"{name} compares updates with parameters, but update() was called without "
                "params. Call update(updates, state, params)."
            )
        arrays = split.matching(params)
        # Zero biases would be read a second time, to tell their norm from 1e-30, at every step.
        small_norms_matter = jnp.asarray(rule.param_norm_floor) < _SMALL_NORM
        param_norms = measure(
            arrays, groups, axis_name=axis_name, small_norms_matter=small_norms_matter
        ).norms
    return [
        Context(step, size * num_shards, norms)
        for size, norms in zip(groups.sizes, param_norms, strict=True)
    ]


def _small_norms_matter(rule: Rule, contexts: Sequence[Context]) -> jax.Array | bool:
    if rule.smallest_limit is None:
        return True
    bounds = [jnp.min(jnp.asarray(rule.smallest_limit(c)), initial=np.inf) for c in contexts]
    return jnp.min(jnp.stack(bounds)) < _SMALL_NORM if bounds else False


def _decide(
    rule: Rule,
    measured: Measurement,
    histories: Sequence[Any],
    contexts: Sequence[Context],
    groups: Groups,
) -> tuple[Scaling, list[Any]]:
    """Limits for every group, and the histories that follow if the step is finite."""
    if rule.needs_global_norm:
        contexts = _with_global_norm(contexts, measured, groups.dtype)
    limits, active, new_histories = [], [], []
    for norms, is_finite, history, context in zip(
        measured.norms, measured.finite, histories, contexts, strict=True
    ):
        usable = is_finite & (norms > 0)
        safe_norms = jnp.where(usable, norms, 1)
        limit, new_history = rule.limit(safe_norms, history, context)
        limit = jnp.broadcast_to(limit, norms.shape).astype(norms.dtype)
        limits.append(limit)
        active.append(usable if rule.is_target else usable & (safe_norms > limit))
        new_histories.append(tree_where(usable, new_history, history))
    return (
        Scaling(measured.norms, measured.scaled, tuple(limits), tuple(active)),
        new_histories,
    )


def _with_global_norm(
    contexts: Sequence[Context], measured: Measurement, dtype: np.dtype
) -> list[Context]:
    """Adds the norm over all finite groups, and each group's share of it."""
    most = jnp.finfo(dtype).max
    triples = list(zip(measured.norms, measured.scaled, measured.finite, strict=True))
    norms = [jnp.where(is_finite, norm, 0) for norm, _, is_finite in triples]
    scaled = [jnp.where(is_finite, small, 0) for _, small, is_finite in triples]
    largest = _largest(norms, dtype)
    is_large = largest > most**0.8
    parts = [jnp.where(is_large, small, norm) for small, norm in zip(scaled, norms, strict=True)]
    total = root_sum_square(stack([root_sum_square(part) for part in parts], dtype))
    past_range = jnp.minimum(largest * safe_ratio(total, _largest(parts, dtype)), most)
    global_norm = jnp.where(is_large, lax.stop_gradient(past_range), total)
    return [
        context._replace(global_norm=global_norm, shares=safe_ratio(part, total))
        for context, part in zip(contexts, parts, strict=True)
    ]


def _largest(blocks: Sequence[jax.Array], dtype: np.dtype) -> jax.Array:
    return jnp.max(stack([jnp.max(block, initial=0) for block in blocks], dtype), initial=0)


def _any_cut(scaling: Scaling) -> jax.Array:
    cut = [jnp.any(active) for active in scaling.active]
    return jnp.any(jnp.stack(cut)) if cut else jnp.asarray(False)


def _smallest_factor(scaling: Scaling) -> jax.Array:
    """For the report only, hence without derivative."""
    smallest = [
        jnp.min(jnp.where(active, limits / jnp.where(active, norms, 1), 1))
        for norms, limits, active in zip(scaling.norms, scaling.limits, scaling.active, strict=True)
        if norms.size
    ]
    if not smallest:
        return jnp.ones((), jnp.float32)
    return lax.stop_gradient(jnp.min(jnp.stack(smallest)).astype(jnp.float32))
