"""Clipping so that no step changes the weights by more than a small part of themselves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._core.arrays import safe_ratio, tree_where
from optax_guard._core.axes import AxisName, parameters, resolve_axes, state_of_optimizer
from optax_guard._core.calls import check_number_of_rows
from optax_guard._core.checks import (
    check_axis_name,
    check_callable,
    check_count,
    check_number,
    check_transformation,
)
from optax_guard._core.groups import Stacked, make_groups
from optax_guard._core.inner import gradient_like, tolerant_update
from optax_guard._core.listening import narrow
from optax_guard._core.measure import measure
from optax_guard._core.rescale import Scaling, rescale
from optax_guard._core.states import counted
from optax_guard._core.statistics import FirstNorms, add_to_first, no_first_norms
from optax_guard._core.transformation import require_params, transformation
from optax_guard._core.trees import float_leaves, strong
from optax_guard.wrappers._probe import Probe
from optax_guard.wrappers._update_ratio import (
    EARLY_STEPS,
    FEWEST_RECENT,
    NUM_RECENT,
    ClipByUpdateRatioState,
    Parts,
    add_to_recent,
    check_window,
    initial_norms,
    measured_response,
    num_rows,
    ratio_limit,
    refuse_accumulation,
    usual_norm,
)

_LONGEST_PROBE = 1e12


def clip_by_update_ratio(
    optimizer: optax.GradientTransformation,
    *,
    max_ratio: Any = 0.05,
    median_ratio: Any = 3.0,
    max_norm: Any = 1.0,
    warmup_steps: int = 100,
    measure_every: int = 100,
    stacked: Stacked = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales gradients down so that no step changes the weights by more than a small part of them.

    With ``n`` the global norm of the gradient, ``g_l`` and ``theta_l`` gradient and parameters of
    each array ``l`` of rank 2 and more that was not zero at ``init``::

        q(x)     =  sqrt(sum over l of (|x_l| / max(|theta_l at init|, |theta_l|))**2)
        response =  q(update(g) - update(0)) / q(g)     how strongly the optimizer answers
        r(c)     =  c / (response * q(g))               what a change by c allows, over the norm,
        s(c)     =  r(c) * min(1, r(c))**0.1            and a little less far beyond it
        usual    =  min(median of the first `warmup_steps` norms n, n included,
                        median of the last 100 limits, once there are 50)
        m        =  max(median_ratio * usual, n * s(0.15 * max_ratio))
        m        <- m * min(1, 60 m / n)                after the first 50 norms
        g        <- g * min(1, m / n, s(max_ratio))
        n        <= max_norm, too, in the first 3 steps

    ``update`` is that of ``optimizer``, weight by weight. The first limit knows what norms are
    usual in this run and were so lately, as they were after the cut, so that it cannot follow an
    explosion; but a gradient that changes the weights by 0.15 of `max_ratio` or less is never
    touched, however much norms have risen. Far beyond the limit it falls again, so that a gross
    outlier counts for next to nothing. The second limit knows when a step is too large for the
    weights that it meets. It needs no history, so that the very first step is bounded, and no
    choice of units: multiplying the loss by 64 and dividing the learning rate by 64 changes
    nothing, other than for a limit on the norm. What goes far beyond it is trusted a little less,
    by the power 0.1. The last limit is for optimizers that a single enormous first gradient would
    leave with enormous second moments.

    Adam and all that divide by the size of gradients, or take their sign, bound their steps
    themselves; there the second limit would only make directions noisy, since shorter gradients
    soon make as long steps. It is left out where a gradient 1000 times as long moves the weights
    by less than 500 times as much.

    Both are measured by evaluating ``optimizer`` three times more, once without a gradient, in
    steps 0, 1, 2, 4, 8, ... and in every ``measure_every``-th, with the norms of the weights.
    For plain SGD the response is the learning rate, with momentum and weight decay too, since
    these answer as well where there is no gradient. It follows schedules at this pace. While it
    is zero (a warm-up that begins at zero), or where no array counts (parameters all of rank 0 and
    1, or zero at ``init``), only the first limit is left.

    Args:
      optimizer: what turns gradients into updates, with its learning rate.
      max_ratio: scalar in (0, inf), largest change of the weights in one step, relative to their
        norm, root sum square over the arrays; that of a gradient alone, without momentum.
      median_ratio: scalar in (0, inf], in units of the median norm.
      max_norm: scalar in (0, inf], limit on the norm in the first 3 steps, where arrays count.
      warmup_steps: static integer >= 1.
      measure_every: static integer >= 1.
      stacked: ``(path, leaf) -> bool | int``, which arrays stack layers along axis 0, or along how
        many leading axes; each layer then counts as an array. None: none does.
      axis_name: mesh axes over which gradients and parameters are sharded inside ``shard_map``.

    Returns:
      A transformation that passes extra args on to ``optimizer``, less those that it does not
      take. Updates are what ``optimizer`` makes of the clipped gradients; statistics are float32
      (float64 for float64 leaves). A non-finite gradient reaches ``optimizer`` as it is and
      changes no statistic. Without ``params`` in ``update``, norms are those at ``init``. The
      response counts as a constant in derivatives. Under ``optax.inject_hyperparams`` let the
      factory make the optimizer:
      ``inject_hyperparams(lambda max_ratio: clip_by_update_ratio(sgd, max_ratio=max_ratio))``.
      To accumulate gradients, write ``optax.MultiSteps(clip_by_update_ratio(...), k)``; the other
      way round is refused by ``init``, as is ``optax.apply_every`` in ``optimizer``.
      Cost: one read of the gradients, which a guard around it shares; in the steps that measure
      three more evaluations of ``optimizer`` (in all steps under ``vmap``), which make compiling
      longer; 840 bytes of state, 12 more for each array.

    Raises:
      ValueError: if a number is not positive, NaN or no scalar, or a count is out of range; from
        ``init``, around ``optax.MultiSteps`` or ``optax.apply_every``.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = 2 * jnp.eye(2)  # of norm 2.83: a step may be 0.1 times as long
      >>> tx = og.clip_by_update_ratio(optax.sgd(1.0), max_ratio=0.1)
      >>> updates, state = tx.update(jnp.full((2, 2), 0.1), tx.init(params), params)
      >>> updates.round(3)  # of norm 0.2
      Array([[-0.1, -0.1],
             [-0.1, -0.1]], dtype=float32)
      >>> updates, state = tx.update(jnp.full((2, 2), 0.5), state, params)
      >>> updates.round(3)  # of norm 0.25 instead of 1
      Array([[-0.125, -0.125],
             [-0.125, -0.125]], dtype=float32)

    References:
      The rule is this library's. You, Gitman & Ginsburg, `Large batch training of convolutional
      networks <https://arxiv.org/abs/1708.03888>`_ (LARS), 2017, give every layer an update
      proportional to the norm of its weights; here that is a bound, and the direction stays.
    """
    check_transformation("optimizer", optimizer)
    check_number("max_ratio", max_ratio, open_minimum=True, open_maximum=True)
    check_number("median_ratio", median_ratio, open_minimum=True)
    check_number("max_norm", max_norm, open_minimum=True)
    check_count("warmup_steps", warmup_steps)
    check_count("measure_every", measure_every)
    check_callable("stacked", stacked, "(path, leaf) -> bool | int", optional=True)
    check_axis_name(axis_name)
    return clip_with_parts(
        optimizer,
        Parts(),
        max_ratio=max_ratio,
        median_ratio=median_ratio,
        max_norm=max_norm,
        warmup_steps=warmup_steps,
        measure_every=measure_every,
        stacked=stacked,
        axis_name=axis_name,
    )


def clip_with_parts(
    optimizer: optax.GradientTransformation,
    parts: Parts,
    *,
    max_ratio: Any = 0.05,
    median_ratio: Any = 3.0,
    max_norm: Any = 1.0,
    warmup_steps: int = 100,
    measure_every: int = 100,
    stacked: Stacked = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """The same with other numbers inside, to see what each is for."""
    inner_update = tolerant_update(optimizer)

    def groups_of(split):
        return make_groups("global", split.paths, split.arrays, stacked=stacked)

    def init(params):
        split = float_leaves(gradient_like(params))
        groups = groups_of(split)
        norms = initial_norms(split, groups, axis_name)
        inner_state = jax.tree.map(strong, optimizer.init(params))
        refuse_accumulation(inner_state)
        first = no_first_norms(groups.blocks[0], warmup_steps)
        return ClipByUpdateRatioState.pack(
            inner_state=inner_state,
            steps=0,
            clipped_total=0,
            first_count=0,
            recent_count=0,
            is_weight=norms > 0,
            last_scale=1.0,
            recent_clip_rate=0.0,
            recent_scale=1.0,
            response=0.0,
            linearity=1.0,
            first_median=first.median,
            recent_norms=jnp.zeros((NUM_RECENT,), groups.dtype),
            initial_norms=norms,
            weight_norms=norms,
            first_norms=first.values,
        )

    def update(updates, state, params=None, **extra_args):
        split = float_leaves(updates, gradient_like(params), count=num_rows(state))
        if not all(split.is_present):
            purpose = "needs the parameters where gradients are None"
            require_params(params, "clip_by_update_ratio", purpose)
        also = parameters(params) | state_of_optimizer(state.inner_state)
        axes = resolve_axes(axis_name, split.paths, split.arrays, also=also)
        groups = groups_of(split)
        check_number_of_rows("clip_by_update_ratio", split, sum(groups.rows), num_rows(state))
        check_window(state, warmup_steps)
        measured = measure(
            split.arrays,
            groups,
            axes=axes,
            is_used=narrow(split.is_present),
            small_norms_matter=False,
        )
        (norm,), is_finite = measured.norms, jnp.all(measured.leaf_finite)
        is_usable = is_finite & (norm > 0)
        safe_norm = jnp.where(is_usable, norm, 1)
        first = FirstNorms(state.first_count, state.first_norms, state.first_median)
        first = tree_where(is_usable, add_to_first(first, safe_norm), first)
        outlier_limit = jnp.asarray(median_ratio, norm.dtype) * usual_norm(first, state)

        # As long a gradient as the first limit lets through, and one whose squares fit float32.
        scale = jnp.minimum(1, safe_ratio(jnp.minimum(outlier_limit, _LONGEST_PROBE), safe_norm))
        is_power_of_two = (state.steps & (state.steps - 1)) == 0  # and 0
        is_due = is_usable & (is_power_of_two | (state.steps % measure_every == 0))
        leaf_norms = jnp.where(is_finite, measured.leaf_norms, 0)
        known = measured_response(
            Probe(inner_update, extra_args, groups, axes),
            is_due,
            lax.stop_gradient((updates, scale, state.inner_state, params)),
            lax.stop_gradient(leaf_norms * scale),
            state,
        )

        def change_limit(change):
            return ratio_limit(change, known, norm, leaf_norms, parts.distrust)

        floor = change_limit(jnp.asarray(max_ratio) * parts.harmless)
        outlier_limit = jnp.maximum(outlier_limit, jnp.where(jnp.isfinite(floor), floor, 0))
        shrinking = jnp.minimum(1, safe_ratio(parts.gross * outlier_limit, safe_norm))
        outlier_limit *= jnp.where(state.recent_count >= FEWEST_RECENT, shrinking, 1)
        bounds_itself = known.linearity < parts.bounded
        limit = jnp.minimum(
            outlier_limit, jnp.where(bounds_itself, jnp.inf, change_limit(max_ratio))
        )
        is_early = (state.recent_count < EARLY_STEPS) & jnp.any(state.is_weight)
        limit = jnp.where(is_early, jnp.minimum(limit, max_norm), limit)
        limit = jnp.minimum(limit, safe_norm).astype(norm.dtype)
        is_over = is_usable & (safe_norm > limit)
        scaling = Scaling((norm,), measured.scaled, (limit,), (is_over,))
        clipped = split.replace(rescale(split.arrays, scaling, groups))
        new_updates, inner_state = inner_update(clipped, state.inner_state, params, **extra_args)

        recent_norms, recent_count = add_to_recent(limit, is_usable, state)
        new_state = ClipByUpdateRatioState.pack(
            **counted(state, is_over, jnp.where(is_over, limit / safe_norm, 1)),
            **known._asdict(),
            inner_state=(),
            first_count=first.count,
            recent_count=recent_count,
            is_weight=state.is_weight,
            first_median=first.median,
            recent_norms=recent_norms,
            initial_norms=state.initial_norms,
            first_norms=first.values,
        )
        new_state = tree_where(is_finite, new_state, state._replace(inner_state=()))
        return new_updates, new_state._replace(inner_state=inner_state)

    return transformation("clip_by_update_ratio", ClipByUpdateRatioState, init, update)
