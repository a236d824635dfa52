"""Clipping so that no step changes the weights by more than a small part of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._core.arrays import (
    increment,
    is_partitioned,
    root_sum_square,
    safe_ratio,
    times,
    tree_where,
)
from optax_guard._core.checks import (
    check_axis_name,
    check_count,
    check_number,
    check_transformation,
)
from optax_guard._core.groups import make_groups, stack
from optax_guard._core.inner import gradient_like, tolerant_update
from optax_guard._core.measure import AxisName, measure, psum
from optax_guard._core.rescale import Scaling, rescale
from optax_guard._core.statistics import FirstNorms, add_to_first, no_first_norms
from optax_guard._core.trees import float_leaves, strong

_DISTRUST = 0.1  # power of the excess by which a gradient far beyond the limit is cut shorter still
_EARLY_STEPS = 3  # the median of as many norms is a usual one, whichever of them is wrong
_LONGEST_PROBE = 1e12


class UpdateRatioHistory(NamedTuple):
    """The first gradient norms.

    Attributes:
      update_ratio_norm_count: int32, norms let in so far, at most ``warmup_steps``.
      update_ratio_first_norms: ``[warmup_steps]``, these norms.
      update_ratio_median: their median; constant once all have come.
    """

    update_ratio_norm_count: jax.Array
    update_ratio_first_norms: jax.Array
    update_ratio_median: jax.Array


class ClipByUpdateRatioState(NamedTuple):
    """State of :func:`clip_by_update_ratio`: the optimizer's and 424 + 8 * leaves bytes.

    Attributes:
      update_ratio_inner: state of the wrapped optimizer.
      update_ratio_steps: int32, finite steps seen.
      update_ratio_clipped_total: int32, steps in which the gradients were scaled down.
      update_ratio_last_scale: float32, factor applied in the last finite step.
      update_ratio_response: float32, by how much the weights changed, relative to their norms, for
        a gradient of which every array is as long as its weights; with plain SGD the learning
        rate. 0: not known yet.
      update_ratio_initial_norms: float32 ``[float leaves]``, norms of the weights at ``init``; 0
        for the arrays that do not count.
      update_ratio_weight_norms: float32 ``[float leaves]``, the larger of these norms and those
        measured last.
      update_ratio_history: an :class:`UpdateRatioHistory`.
    """

    update_ratio_inner: Any
    update_ratio_steps: jax.Array
    update_ratio_clipped_total: jax.Array
    update_ratio_last_scale: jax.Array
    update_ratio_response: jax.Array
    update_ratio_initial_norms: jax.Array
    update_ratio_weight_norms: jax.Array
    update_ratio_history: UpdateRatioHistory


def clip_by_update_ratio(
    optimizer: optax.GradientTransformation,
    *,
    max_ratio: Any = 0.03,
    median_ratio: Any = 3.0,
    max_norm: Any = 1.0,
    warmup_steps: int = 100,
    measure_every: int = 100,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales gradients down so that no step changes the weights by more than a small part of them.

    With ``n`` the global norm of the gradient, ``g_l`` and ``theta_l`` gradient and parameters of
    each array ``l`` of rank 2 and more that was not zero at ``init``::

        q(x)     =  sqrt(sum over l of (|x_l| / max(|theta_l at init|, |theta_l|))**2)
        response =  q(update(g) - update(0)) / q(g)     how strongly the optimizer answers
        r        =  max_ratio / (response * q(g))       what max_ratio allows, over the norm
        median   =  median of the first `warmup_steps` norms n, or of those so far, n included
        g        <- g * min(1, median_ratio * median / n, r * min(1, r)**0.1)
        n        <= max_norm, too, in the first 3 steps

    ``update`` is that of ``optimizer``, weight by weight. The first limit knows what norms are
    usual in this run; it is frozen after ``warmup_steps`` and so cannot follow an explosion. The
    second knows when a step is too large for the weights that it meets. It needs no history, so
    that the very first step is bounded, and no choice of units: multiplying the loss by 64 and
    dividing the learning rate by 64 changes nothing, other than for a limit on the norm. What
    goes far beyond it is trusted a little less, by the power 0.1. The third limit is for
    optimizers that a single enormous first gradient would leave with enormous second moments.

    The response is measured by evaluating ``optimizer`` twice more, once without a gradient, in
    steps 0, 1, 2, 4, 8, ... and in every ``measure_every``-th, each time with the norms of the
    weights. For plain SGD it is the learning rate, with momentum and weight decay too, since
    these answer as well where there is no gradient. It follows schedules at this pace. While it
    is zero (a warm-up that begins at zero) the second limit is off. Where no array counts (a
    linear model that starts at zero), ``max_norm`` takes its place.

    With Adam and other optimizers that divide by the size of gradients, only the direction of a
    clipped step counts; the limits keep long gradients out of the moments.

    Args:
      optimizer: what turns gradients into updates, with its learning rate.
      max_ratio: scalar in (0, inf), largest change of the weights in one step, relative to their
        norm, root sum square over the arrays; that of a gradient alone, without momentum.
      median_ratio: scalar in (0, inf], in units of the median norm.
      max_norm: scalar in (0, inf], limit on the norm in the first 3 steps; in all, for parameters
        that are all of rank 0 and 1, or zero at ``init``.
      warmup_steps: static integer >= 1.
      measure_every: static integer >= 1.
      axis_name: mesh axes over which gradients and parameters are sharded inside ``shard_map``.

    Returns:
      A transformation that passes extra args on to ``optimizer``, less those that it does not
      take. Updates are what ``optimizer`` makes of the clipped gradients; statistics are float32
      (float64 for float64 leaves). A non-finite gradient reaches ``optimizer`` as it is and
      changes no statistic. Without ``params`` in ``update``, norms are those at ``init``. The
      response counts as a constant in derivatives. Under ``optax.inject_hyperparams`` let the
      factory make the optimizer:
      ``inject_hyperparams(lambda max_ratio: clip_by_update_ratio(sgd, max_ratio=max_ratio))``.
      To accumulate gradients, write ``optax.MultiSteps(clip_by_update_ratio(...), k)``. An array
      that stacks layers (for ``lax.scan``) counts as one.
      Cost: one read of the gradients, which a guard around it shares; in the steps that measure
      two more evaluations of ``optimizer`` (in all steps under ``vmap``), which make compiling
      longer; 424 bytes of state, 8 more for each array.

    Raises:
      ValueError: if a number is not positive, NaN or no scalar, or a count is out of range.
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
    check_axis_name(axis_name)
    inner_update = tolerant_update(optimizer)

    def init(params):
        split = float_leaves(gradient_like(params))
        groups = make_groups("global", split.paths, split.arrays)
        norms = _initial_norms(split.arrays, axis_name)
        return ClipByUpdateRatioState(
            update_ratio_inner=jax.tree.map(strong, optimizer.init(params)),
            update_ratio_steps=jnp.zeros((), jnp.int32),
            update_ratio_clipped_total=jnp.zeros((), jnp.int32),
            update_ratio_last_scale=jnp.ones((), jnp.float32),
            update_ratio_response=jnp.zeros((), jnp.float32),
            update_ratio_initial_norms=norms,
            update_ratio_weight_norms=jnp.array(norms),  # a buffer of its own, for donation
            update_ratio_history=UpdateRatioHistory(
                *no_first_norms(groups.blocks[0], warmup_steps)
            ),
        )

    def update(updates, state, params=None, **extra_args):
        split = float_leaves(updates)
        groups = make_groups("global", split.paths, split.arrays)
        measured = measure(split.arrays, groups, axis_name=axis_name, small_norms_matter=False)
        (norm,), is_finite = measured.norms, jnp.all(measured.leaf_finite)
        is_usable = is_finite & (norm > 0)
        safe_norm = jnp.where(is_usable, norm, 1)

        first = FirstNorms(*state.update_ratio_history)
        first = tree_where(is_usable, add_to_first(first, safe_norm), first)
        median_limit = jnp.asarray(median_ratio, norm.dtype) * first.median

        # As long a gradient as the first limit lets through, and one whose squares fit float32.
        scale = jnp.minimum(1, safe_ratio(jnp.minimum(median_limit, _LONGEST_PROBE), safe_norm))
        step = state.update_ratio_steps
        is_power_of_two = (step & (step - 1)) == 0  # and 0
        is_due = is_usable & (is_power_of_two | (step % measure_every == 0))
        sums = lax.cond(
            is_due,
            lambda *operands: _probe(inner_update, extra_args, *operands),
            _no_probe,
            *lax.stop_gradient((updates, scale, state.update_ratio_inner, params)),
        )
        leaf_norms = jnp.where(is_finite, measured.leaf_norms, 0)
        response, weight_norms = _response(
            jnp.sqrt(psum(sums, axis_name)), lax.stop_gradient(leaf_norms * scale), is_due, state
        )
        ratio_limit = _ratio_limit(max_ratio, response, norm, leaf_norms, weight_norms)
        has_weights = jnp.any(weight_norms > 0)
        limit = jnp.minimum(median_limit, jnp.where(has_weights, ratio_limit, max_norm))
        limit = jnp.where(first.count <= _EARLY_STEPS, jnp.minimum(limit, max_norm), limit)
        limit = jnp.minimum(limit, safe_norm).astype(norm.dtype)
        is_over = is_usable & (safe_norm > limit)
        scaling = Scaling((norm,), measured.scaled, (limit,), (is_over,))
        clipped = split.replace(rescale(split.arrays, scaling, groups))
        new_updates, inner_state = inner_update(
            clipped, state.update_ratio_inner, params, **extra_args
        )

        total = state.update_ratio_clipped_total
        factor = lax.stop_gradient(jnp.where(is_over, limit / safe_norm, 1))
        new_state = ClipByUpdateRatioState(
            update_ratio_inner=(),
            update_ratio_steps=increment(step),
            update_ratio_clipped_total=jnp.where(is_over, increment(total), total),
            update_ratio_last_scale=factor.astype(jnp.float32),
            update_ratio_response=response,
            update_ratio_initial_norms=state.update_ratio_initial_norms,
            update_ratio_weight_norms=weight_norms,
            update_ratio_history=UpdateRatioHistory(*first),
        )
        new_state = tree_where(is_finite, new_state, state._replace(update_ratio_inner=()))
        return new_updates, new_state._replace(update_ratio_inner=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _initial_norms(leaves: Sequence[jax.Array], axis_name: AxisName) -> jax.Array:
    """Norms of matrices and tensors; 0 for the others, whose size says nothing about their step."""
    groups = make_groups("global", [], leaves)
    try:
        norms = measure(leaves, groups, axis_name=axis_name).leaf_norms
    except NameError:  # JAX: the axis is unbound, ``init`` was called outside of shard_map
        norms = measure(leaves, groups).leaf_norms
    is_weight = np.array([leaf.ndim >= 2 for leaf in leaves], np.bool_)
    return jnp.where(is_weight & jnp.isfinite(norms), norms, 0)


def _probe(update, extra_args, gradients, scale, inner_state, params) -> jax.Array:
    """Squared sums of what this gradient alone adds to the update, and of the parameters.

    The response of an optimizer with momentum or weight decay to no gradient is subtracted.

    Returns:
      float32 ``[leaves, 2]``; on each device those of its own shards.
    """
    split = float_leaves(gradients)
    scaled = split.replace([times(leaf, scale) for leaf in split.arrays])
    zeros = [jnp.zeros_like(leaf) for leaf in split.arrays]
    moved, _ = update(scaled, inner_state, params, **extra_args)
    resting, _ = update(split.replace(zeros), inner_state, params, **extra_args)
    moved, resting = (float_leaves(gradient_like(tree)).arrays for tree in (moved, resting))
    weights = zeros if params is None else split.matching(gradient_like(params))
    sums = [_squared_sums(*arrays) for arrays in zip(moved, resting, weights, strict=True)]
    return stack(sums, jnp.float32).reshape(-1, 2) + _varying_zero(
        (gradients, scale, inner_state, params)
    )


def _no_probe(gradients, scale, inner_state, params) -> jax.Array:
    zero = _varying_zero((gradients, scale, inner_state, params))
    return jnp.broadcast_to(zero, (len(float_leaves(gradients).arrays), 2))


def _varying_zero(tree: Any) -> jax.Array:
    """0, varying over the mesh axes over which an array of ``tree`` does."""
    leaves = float_leaves(tree).arrays
    return sum((jnp.sum(_squares(leaf.reshape(-1)[:0])) for leaf in leaves), jnp.zeros(()))


def _squared_sums(moved: jax.Array, resting: jax.Array, weights: jax.Array) -> jax.Array:
    """Of ``moved - resting`` and of ``weights``; zeros for arrays that do not count.

    Both in one reduction, because XLA on CPU writes an array as large as ``weights`` to memory for
    two separate ones. It adds one by one in float32: first within rows, so that the rounding does
    not pile up. Split along the rows, its partial sums would be gathered; the separate ones are
    all-reduced.
    """
    if weights.ndim < 2:
        return jnp.zeros((2,), jnp.float32)
    change = moved.astype(jnp.promote_types(moved.dtype, jnp.float32)) - resting
    if is_partitioned(weights):
        return jnp.stack([jnp.sum(_squares(change)), jnp.sum(_squares(weights))])
    zero = jnp.zeros((), jnp.float32)
    rows = lax.reduce(
        (_squares(change), _squares(weights)),
        (zero, zero),
        lambda total, term: (total[0] + term[0], total[1] + term[1]),
        (weights.ndim - 1,),
    )
    return jnp.stack([jnp.sum(row) for row in rows])


def _squares(leaf: jax.Array) -> jax.Array:
    return jnp.square(jnp.abs(leaf).astype(jnp.float32))


def _response(norms, gradient_norms, is_due, state) -> tuple[jax.Array, jax.Array]:
    """Response and weight norms after this step, as they were where nothing was measured."""
    change_norms, weight_norms = norms.T
    initial = state.update_ratio_initial_norms
    is_new = is_due & (initial > 0) & jnp.isfinite(weight_norms)
    weight_norms = jnp.where(
        is_new, jnp.maximum(initial, weight_norms), state.update_ratio_weight_norms
    )
    change = root_sum_square(safe_ratio(change_norms, weight_norms))
    response = safe_ratio(change, root_sum_square(safe_ratio(gradient_norms, weight_norms)))
    is_new = is_due & jnp.isfinite(response)
    return jnp.where(is_new, response, state.update_ratio_response), weight_norms


def _ratio_limit(max_ratio, response, norm, leaf_norms, weight_norms) -> jax.Array:
    """The gradient norm at which the weights change by ``max_ratio``; inf if not known."""
    most = jnp.finfo(jnp.float32).max
    ratios = jnp.minimum(safe_ratio(leaf_norms, weight_norms), most)
    ratio = root_sum_square(ratios)
    is_known = (ratio > 0) & (response > 0)
    allowed = safe_ratio(jnp.asarray(max_ratio, norm.dtype), ratio)
    allowed = jnp.where(is_known, safe_ratio(allowed, response), 1)
    factor = allowed * jnp.minimum(allowed, 1) ** _DISTRUST
    return jnp.where(is_known, factor * norm, jnp.inf)
