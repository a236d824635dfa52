"""The one update behind every clipping and normalising rule.

It applies a rule to any scope and keeps the promises that all rules share: a non-finite norm
changes no state and hides nothing, a norm of zero enters no statistic of its group, what lies
below its limit passes bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._core.arrays import tree_where
from optax_guard._core.axes import (
    NO_AXES,
    AxisName,
    MeshAxes,
    parameters,
    resolve_axes,
    resolve_axes_at_init,
)
from optax_guard._core.batches import can_be_flat
from optax_guard._core.checks import (
    check_axis_name,
    check_callable,
    check_scope,
    shown,
)
from optax_guard._core.groups import Groups, Scope, make_groups
from optax_guard._core.listening import narrow
from optax_guard._core.measure import measure
from optax_guard._core.rescale import Scaling, rescale_and_split
from optax_guard._core.roots import combine
from optax_guard._core.states import count_step, rule_state, start_counting
from optax_guard._core.transformation import require_params, transformation
from optax_guard._core.trees import FloatLeaves, float_leaves, is_placeholder
from optax_guard.rules._decision import decide
from optax_guard.rules._packing import pack, unpack_all
from optax_guard.rules.rule import Context, Rule, no_history

_SCOPES = {"leaf": "leaf", "each": "unit"}
_SMALL_NORM = 1e-9  # measured without the second read, norms down to here are right


def limit_norms(
    rule: Rule,
    *,
    name: str,
    scope: Scope = "global",
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates to the limits that a rule of your own sets.

    For each group, with ``n`` its Euclidean norm::

        limit, history  <-  rule.limit(n, history, context)
        g               <-  g * min(1, limit / n)       (g * limit / n with is_target)

    The first step is like every other. A norm that is not finite changes no state and passes
    through for a guard to see; a norm of zero enters no history.

    Args:
      rule: limits from norms.
      name: what :func:`metrics` and reports call it, in lower case with underscores; also that of
        its class of states, in words joined by capitals.
      scope: ``"global"``, ``"leaf"``, ``"unit"``, or a callable ``(path, leaf) -> axes | None``.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map``, or a callable
        ``(path, leaf) -> names | None``. One that splits an array between its groups, so that
        each device has whole ones, is left out; the history of these groups is then sharded, too.
        Without types (``pmap``, ``check_vma=False``) what is left out is held by every device.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own, with the
      state of every rule here, ``og.states.RuleState``. Norms and history are float32 (float64 for
      float64 leaves). Cost: one read of the updates, which a guard around it shares.

    Raises:
      ValueError: if ``scope`` or ``name`` is no such thing; from ``update``, if the rule needs
        parameters and gets none.
      TypeError: if ``rule`` is no :class:`Rule`.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> def clip_by_last(ratio, *, scope="global", axis_name=None):
      ...     def init(norms):
      ...         return jnp.full(norms.shape, jnp.inf, norms.dtype)  # the last norm
      ...
      ...     def limit(norms, last, context):
      ...         limits = ratio * last
      ...         return limits, jnp.minimum(norms, limits)
      ...
      ...     rule = og.Rule(limit, init)
      ...     return og.limit_norms(rule, name="clip_by_last", scope=scope, axis_name=axis_name)
      >>> tx = clip_by_last(2.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 1.5, 100.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> updates, int(og.metrics(state)["guard/clip_by_last/clipped_total"])
      (Array([3.], dtype=float32), 1)
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be an og.Rule(limit, init), got {shown(rule)}.")
    check_callable("rule.limit", rule.limit, "(norms, history, context) -> (limits, history)")
    check_callable("rule.init", rule.init, "(norms) -> history")
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"name must be an identifier such as 'clip_by_mine', got {name!r}.")
    check_scope(scope)
    check_axis_name(axis_name)
    state_type = rule_state(name)

    def groups_of(split):
        return make_groups(scope, split.paths, split.arrays, is_sharded=axis_name is not None)

    def init(params):
        split = float_leaves(params)
        groups = groups_of(split)
        nothing: Any = () if groups.kind == "global" else {_SCOPES[groups.kind]: ()}
        if groups.kind != "each":
            history = pack(rule.init(groups.blocks[0]), groups.blocks[0])
        elif is_placeholder(params):
            history = jnp.zeros(())
        else:
            axes = NO_AXES
            if callable(axis_name):
                axes = resolve_axes_at_init(axis_name, split.paths, split.arrays, may_be_kept=True)
            history = tuple(
                axes.vary(index, pack(rule.init(block), block))
                for index, block in enumerate(groups.blocks)
            )
        return start_counting(state_type, history if jax.tree.leaves(history) else nothing)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        split = float_leaves(updates, params, count=_num_histories(state.history))
        groups = groups_of(split)
        is_each = groups.kind == "each"
        axes = resolve_axes(
            axis_name,
            split.paths,
            split.arrays,
            also=parameters(params) if rule.needs_params else None,
            may_be_kept=is_each,
        )
        if is_each:
            is_flat = bool(split.arrays) and can_be_flat(split.arrays) and not axes.has_kept
            groups = groups._replace(is_flat=is_flat)
        is_used = narrow(split.is_present)
        contexts = _contexts(rule, groups, split, params, is_used, state.steps, axes, name)
        measured = measure(
            split.arrays,
            groups,
            axes=axes,
            is_used=is_used,
            small_norms_matter=_small_norms_matter(rule, contexts),
        )
        histories = unpack_all(rule.init, state.history, groups, name)
        scaling, new_histories = decide(rule, measured, histories, contexts, groups, axes)
        is_cut, scale = _any_cut(scaling), _smallest_factor(scaling)
        if axes.has_kept:
            is_cut, scale = axes.any(is_cut), -axes.max(-scale)
        is_finite = jnp.all(measured.leaf_finite)
        packed = [tuple(map(pack, each, groups.blocks)) for each in (new_histories, histories)]
        history, old = (tree if groups.kind == "each" else tree[0] for tree in packed)
        history = tree_where(is_finite, history, old)
        flat = history[0] if groups.is_flat and jax.tree.leaves(history) else None
        arrays, parts = rescale_and_split(split.arrays, scaling, groups, flat, is_cut)
        counted = count_step(
            state,
            is_cut=is_cut,
            scale=scale,
            history=state.history,
        )
        new_state = tree_where(is_finite, counted, state)
        if jax.tree.leaves(state.history):
            new_state = new_state._replace(history=history if flat is None else tuple(parts))
        return split.replace(arrays), new_state

    return transformation(name, state_type, init, update)


def _num_histories(history: Any) -> int | None:
    """Number of leaves that ``init`` saw, where the state tells."""
    if isinstance(history, dict):
        return None
    if isinstance(history, tuple):
        return len(history) or None
    return history.shape[-1] if history.ndim > 1 else None


def _contexts(
    rule: Rule,
    groups: Groups,
    split: FloatLeaves,
    params: Any,
    is_used: Sequence[bool],
    step: jax.Array,
    axes: MeshAxes,
    name: str,
) -> list[Context]:
    param_norms: Sequence[jax.Array | None] = [None] * len(groups.blocks)
    if rule.needs_params:
        require_params(params, name, "compares updates with parameters")
        # Zero biases would be read a second time, to tell their norm from 1e-30, at every step.
        measured = measure(
            split.matching(params),
            groups,
            axes=axes,
            is_used=is_used,
            small_norms_matter=jnp.asarray(rule.param_norm_floor) < _SMALL_NORM,
        )
        param_norms = measured.norms
        if groups.kind == "global":
            # A mask of -inf among them must not lift the limit for all.
            is_infinite = ~measured.leaf_finite & jnp.isinf(measured.leaf_norms)
            rest = combine(
                jnp.where(is_infinite, 0, measured.leaf_norms), measured.leaf_finite | is_infinite
            )
            param_norms = [jnp.where(jnp.any(is_infinite), rest, measured.norm)]
    return [Context(step, param_norms=norms) for norms in param_norms]


def _small_norms_matter(rule: Rule, contexts: Sequence[Context]) -> jax.Array | bool:
    if rule.smallest_limit is None:
        # Statistics leave out what is zero, and need be right only where squares fit float32.
        return rule.is_target or rule.init is no_history
    bounds = [jnp.min(jnp.asarray(rule.smallest_limit(c)), initial=np.inf) for c in contexts]
    return jnp.min(jnp.stack(bounds)) < _SMALL_NORM if bounds else False


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
