"""Clipping so that no step changes the weights by more than a small part of themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._core.arrays import (
    root_sum_square,
    safe_ratio,
    tree_where,
)
from optax_guard._core.axes import AxisName, resolve_axes, resolve_axes_at_init
from optax_guard._core.checks import (
    check_axis_name,
    check_callable,
    check_count,
    check_number,
    check_transformation,
)
from optax_guard._core.groups import Groups, Stacked, make_groups
from optax_guard._core.inner import gradient_like, tolerant_update
from optax_guard._core.measure import measure
from optax_guard._core.rescale import Scaling, rescale
from optax_guard._core.states import Entry, PackedState, counted
from optax_guard._core.statistics import (
    FirstNorms,
    add_to_first,
    add_to_window,
    median_of,
    no_first_norms,
)
from optax_guard._core.transformation import require_state, transformation
from optax_guard._core.trees import FloatLeaves, float_leaves, strong
from optax_guard.wrappers._probe import Probe, count_as_weights

_DISTRUST = 0.1  # power of the excess by which a gradient far beyond the limit is cut shorter still
_EARLY_STEPS = 3  # the median of as many norms is a usual one, whichever of them is wrong
_LONGEST_PROBE = 1e12
_NUM_RECENT, _FEWEST_RECENT = 100, 50
_HARMLESS = 0.06  # part of max_ratio up to which no gradient is touched
_GROSS = 60.0  # times the usual limit beyond which a gradient counts for less and less


class _UpdateRatioArrays(NamedTuple):
    inner_state: Any
    integers: Any
    numbers: Any


_NUM_SCALARS = 5
_NUM_FIXED = _NUM_SCALARS + _NUM_RECENT


def _num_rows(state: Any) -> int:
    """Rows of the norms of weights: the vector ends with the first norms, whose number it tells."""
    return jax.tree.leaves(state.integers)[0].shape[-1] - _NUM_INTEGERS


_NUM_INTEGERS = 4


class ClipByUpdateRatioState(PackedState, _UpdateRatioArrays):
    """State of :func:`clip_by_update_ratio`: the optimizer's, and two arrays.

    Attributes:
      inner_state: state of the wrapped optimizer.
      integers: int32, packed.
      numbers: float32, packed.
    """

    __slots__ = ()

    steps = Entry("integers", "int32, finite steps seen")
    clipped_total = Entry("integers", "int32, steps in which the gradients were scaled down")
    first_count = Entry("integers", "int32, norms in ``first_norms``")
    recent_count = Entry("integers", "int32, limits in ``recent_norms``; stays within [100, 200)")
    is_weight = Entry(
        "integers",
        "bool ``[rows]``, whether the array counts",
        where=lambda state: slice(_NUM_INTEGERS, None),
        read=lambda state, stored: stored != 0,
    )
    last_scale = Entry("numbers", "factor applied in the last finite step")
    recent_clip_rate = Entry("numbers", "share of steps cut, over about the last 100")
    recent_scale = Entry("numbers", "mean factor, over about the last 100 steps")
    response = Entry(
        "numbers",
        "by how much the weights changed, relative to their norms, for a gradient of which every "
        "array is as long as its weights; with plain SGD the learning rate. 0: not known yet",
    )
    first_median = Entry("numbers", "median of the first norms; constant once all have come")
    recent_norms = Entry(
        "numbers",
        "``[100]``, the last norms as they were after the cut",
        where=lambda state: slice(_NUM_SCALARS, _NUM_FIXED),
    )
    initial_norms = Entry(
        "numbers",
        "``[rows]``, norms of the weights at ``init``; 0 for arrays that do not count",
        where=lambda state: slice(_NUM_FIXED, _NUM_FIXED + _num_rows(state)),
    )
    weight_norms = Entry(
        "numbers",
        "``[rows]``, the larger of these and those measured last",
        where=lambda state: slice(_NUM_FIXED + _num_rows(state), _NUM_FIXED + 2 * _num_rows(state)),
    )
    first_norms = Entry(
        "numbers",
        "``[warmup_steps]``, the first norms",
        where=lambda state: slice(_NUM_FIXED + 2 * _num_rows(state), None),
    )


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
        m        =  max(median_ratio * usual, n * s(0.06 * max_ratio))
        m        <- m * min(1, 60 m / n)                after the first 50 norms
        g        <- g * min(1, m / n, s(max_ratio))
        n        <= max_norm, too, in the first 3 steps

    ``update`` is that of ``optimizer``, weight by weight. The first limit knows what norms are
    usual in this run and were so lately, as they were after the cut, so that it cannot follow an
    explosion; but a gradient that changes the weights by 0.06 of `max_ratio` or less is never
    touched, however much norms have risen. Far beyond that limit it falls again, so that a gross
    outlier counts for next to nothing. The second knows when a step is too large for the weights
    that it meets. It needs no history, so that the very first step is bounded, and no choice of
    units: multiplying the loss by 64 and dividing the learning rate by 64 changes nothing, other
    than for a limit on the norm. What goes far beyond it is trusted a little less, by the power
    0.1. The last limit is for optimizers that a single enormous first gradient would leave with
    enormous second moments.

    The response is measured by evaluating ``optimizer`` twice more, once without a gradient, in
    steps 0, 1, 2, 4, 8, ... and in every ``measure_every``-th, each time with the norms of the
    weights. For plain SGD it is the learning rate, with momentum and weight decay too, since
    these answer as well where there is no gradient. It follows schedules at this pace. While it
    is zero (a warm-up that begins at zero), or where no array counts (parameters all of rank 0 and
    1, or zero at ``init``), only the first limit is left.

    With Adam and other optimizers that divide by the size of gradients, only the direction of a
    clipped step counts; the limits keep long gradients out of the moments.

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
      way round is refused by ``init``.
      Cost: one read of the gradients, which a guard around it shares; in the steps that measure
      two more evaluations of ``optimizer`` (in all steps under ``vmap``), which make compiling
      longer; 836 bytes of state, 12 more for each array.

    Raises:
      ValueError: if a number is not positive, NaN or no scalar, or a count is out of range; from
        ``init``, around ``optax.MultiSteps``.
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
    inner_update = tolerant_update(optimizer)

    def groups_of(split):
        return make_groups("global", split.paths, split.arrays, stacked=stacked)

    def init(params):
        split = float_leaves(gradient_like(params))
        groups = groups_of(split)
        norms = _initial_norms(split, groups, axis_name)
        inner_state = jax.tree.map(strong, optimizer.init(params))
        _refuse_multi_steps(inner_state)
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
            first_median=first.median,
            recent_norms=jnp.zeros((_NUM_RECENT,), groups.dtype),
            initial_norms=norms,
            weight_norms=norms,
            first_norms=first.values,
        )

    def update(updates, state, params=None, **extra_args):
        require_state(state, ClipByUpdateRatioState, "clip_by_update_ratio")
        split = float_leaves(updates, gradient_like(params), count=_num_rows(state))
        axes = resolve_axes(axis_name, split.paths, split.arrays)
        groups = groups_of(split)
        measured = measure(
            split.arrays,
            groups,
            axes=axes,
            is_used=split.is_present,
            small_norms_matter=False,
        )
        (norm,), is_finite = measured.norms, jnp.all(measured.leaf_finite)
        is_usable = is_finite & (norm > 0)
        safe_norm = jnp.where(is_usable, norm, 1)

        first = FirstNorms(state.first_count, state.first_norms, state.first_median)
        first = tree_where(is_usable, add_to_first(first, safe_norm), first)
        usual = _usual_norm(first, state)
        median_limit = jnp.asarray(median_ratio, norm.dtype) * usual

        # As long a gradient as the first limit lets through, and one whose squares fit float32.
        scale = jnp.minimum(1, safe_ratio(jnp.minimum(median_limit, _LONGEST_PROBE), safe_norm))
        is_power_of_two = (state.steps & (state.steps - 1)) == 0  # and 0
        is_due = is_usable & (is_power_of_two | (state.steps % measure_every == 0))
        probe = Probe(inner_update, extra_args, groups, axes)
        sums = lax.cond(
            is_due,
            probe.squared_sums,
            probe.nothing,
            *lax.stop_gradient((updates, scale, state.inner_state, params)),
        )
        leaf_norms = jnp.where(is_finite, measured.leaf_norms, 0)
        response, weight_norms = _response(
            jnp.sqrt(axes.psum(sums)), lax.stop_gradient(leaf_norms * scale), is_due, state
        )

        def ratio_limit(change):
            return _ratio_limit(change, response, norm, leaf_norms, weight_norms)

        ceiling = ratio_limit(max_ratio)
        floor = ratio_limit(jnp.asarray(max_ratio) * _HARMLESS)
        median_limit = jnp.maximum(median_limit, jnp.where(jnp.isfinite(floor), floor, 0))
        shrinking = jnp.minimum(1, safe_ratio(_GROSS * median_limit, safe_norm))
        median_limit *= jnp.where(state.recent_count >= _FEWEST_RECENT, shrinking, 1)
        limit = jnp.minimum(median_limit, ceiling)
        is_early = (state.recent_count < _EARLY_STEPS) & jnp.any(state.is_weight)
        limit = jnp.where(is_early, jnp.minimum(limit, max_norm), limit)
        limit = jnp.minimum(limit, safe_norm).astype(norm.dtype)
        is_over = is_usable & (safe_norm > limit)
        scaling = Scaling((norm,), measured.scaled, (limit,), (is_over,))
        clipped = split.replace(rescale(split.arrays, scaling, groups))
        new_updates, inner_state = inner_update(clipped, state.inner_state, params, **extra_args)

        recent = (state.recent_norms, state.recent_count)
        entered = add_to_window(*recent, lax.stop_gradient(limit).astype(recent[0].dtype))
        recent_norms, recent_count = tree_where(is_usable, entered, recent)
        new_state = ClipByUpdateRatioState.pack(
            **counted(state, is_over, jnp.where(is_over, limit / safe_norm, 1)),
            inner_state=(),
            first_count=first.count,
            recent_count=recent_count,
            is_weight=state.is_weight,
            response=response,
            first_median=first.median,
            recent_norms=recent_norms,
            initial_norms=state.initial_norms,
            weight_norms=weight_norms,
            first_norms=first.values,
        )
        new_state = tree_where(is_finite, new_state, state._replace(inner_state=()))
        return new_updates, new_state._replace(inner_state=inner_state)

    return transformation(init, update)


def _refuse_multi_steps(inner_state: Any) -> None:
    """Its updates are zero but for the last of a window, so they tell no response."""

    def is_accumulating(node):
        return isinstance(node, optax.MultiStepsState)

    nodes = jax.tree.leaves(inner_state, is_leaf=is_accumulating)
    if any(map(is_accumulating, nodes)):
        raise ValueError(
            "clip_by_update_ratio, the default clip of stabilize, cannot see what optax.MultiSteps "
            "will do with a micro-batch. Write optax.MultiSteps(og.stabilize(optimizer), k) "
            "instead of og.stabilize(optax.MultiSteps(optimizer, k)), and "
            "should_skip_update_fn=og.skip_microbatch to leave out bad micro-batches."
        )


def _usual_norm(first: FirstNorms, state: ClipByUpdateRatioState) -> jax.Array:
    """The smaller of two medians: that of the first norms, and that of the last limits."""
    count = state.recent_count
    recent = median_of(state.recent_norms, jnp.maximum(count, 1))
    recent = jnp.where(count >= _FEWEST_RECENT, recent, jnp.inf)
    return jnp.minimum(first.median, lax.stop_gradient(recent).astype(first.median.dtype))


def _initial_norms(split: FloatLeaves, groups: Groups, axis_name: AxisName) -> jax.Array:
    """Norms of matrices and tensors; 0 for the others, whose size says nothing about their step."""
    is_weight = np.repeat(count_as_weights(groups), groups.rows)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in split.arrays):
        return jnp.zeros(is_weight.shape, jnp.float32)
    axes = resolve_axes_at_init(axis_name, split.paths, split.arrays)
    norms = measure(split.arrays, groups, axes=axes).leaf_norms
    return jnp.where(is_weight & jnp.isfinite(norms), norms, 0)


def _response(norms, gradient_norms, is_due, state) -> tuple[jax.Array, jax.Array]:
    """Response and weight norms after this step, as they were where nothing was measured."""
    change_norms, weight_norms = norms.T
    initial = state.initial_norms
    is_new = is_due & (initial > 0) & jnp.isfinite(weight_norms)
    weight_norms = jnp.where(is_new, jnp.maximum(initial, weight_norms), state.weight_norms)
    change = root_sum_square(safe_ratio(change_norms, weight_norms))
    response = safe_ratio(change, root_sum_square(safe_ratio(gradient_norms, weight_norms)))
    is_new = is_due & jnp.isfinite(response)
    return jnp.where(is_new, response, state.response), weight_norms


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
