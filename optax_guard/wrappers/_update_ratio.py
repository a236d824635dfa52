"""What :func:`clip_by_update_ratio` remembers, and the limits that it draws from it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._core.arrays import root_sum_square, safe_ratio, tree_where
from optax_guard._core.axes import AxisName, resolve_axes_at_init
from optax_guard._core.calls import ToldError
from optax_guard._core.groups import Groups
from optax_guard._core.measure import measure
from optax_guard._core.states import Entry, PackedState
from optax_guard._core.statistics import FirstNorms, add_to_window, median_of
from optax_guard._core.trees import FloatLeaves
from optax_guard.wrappers._probe import FAR, Probe, count_as_weights

NUM_RECENT, FEWEST_RECENT = 100, 50
EARLY_STEPS = 3  # the median of as many norms is a usual one, whichever of them is wrong


class Parts(NamedTuple):
    """The numbers of the rule that are not arguments; `benchmarks/ablations.py` leaves each out.

    Attributes:
      distrust: power of the excess by which a gradient far beyond the ratio limit is cut shorter.
      harmless: part of ``max_ratio`` up to which no gradient is touched.
      gross: times the usual limit beyond which a gradient counts for less and less.
      bounded: part of the response at which an optimizer bounds its steps itself.
    """

    distrust: float = 0.1
    harmless: float = 0.15
    gross: float = 60.0
    bounded: float = 0.5


class _UpdateRatioArrays(NamedTuple):
    inner_state: Any
    integers: Any
    numbers: Any


_NUM_INTEGERS, _NUM_SCALARS = 4, 6
_NUM_FIXED = _NUM_SCALARS + NUM_RECENT


def num_rows(state: Any) -> int:
    """Rows of the norms of weights: the vector ends with the first norms, whose number it tells."""
    return jax.tree.leaves(state.integers)[0].shape[-1] - _NUM_INTEGERS


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
    linearity = Entry(
        "numbers",
        "the response to a gradient 1000 times as long, relative to ``response``: 1 for SGD, "
        "almost 0 for Adam and others that bound their steps. 1: not known yet",
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
        where=lambda state: slice(_NUM_FIXED, _NUM_FIXED + num_rows(state)),
    )
    weight_norms = Entry(
        "numbers",
        "``[rows]``, the larger of these and those measured last",
        where=lambda state: slice(_NUM_FIXED + num_rows(state), _NUM_FIXED + 2 * num_rows(state)),
    )
    first_norms = Entry(
        "numbers",
        "``[warmup_steps]``, the first norms",
        where=lambda state: slice(_NUM_FIXED + 2 * num_rows(state), None),
    )


def initial_norms(split: FloatLeaves, groups: Groups, axis_name: AxisName) -> jax.Array:
    """Norms of matrices and tensors; 0 for the others, whose size says nothing about their step."""
    is_weight = np.repeat(count_as_weights(groups), groups.rows)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in split.arrays):
        return jnp.zeros(is_weight.shape, jnp.float32)
    axes = resolve_axes_at_init(axis_name, split.paths, split.arrays)
    norms = measure(split.arrays, groups, axes=axes).leaf_norms
    return jnp.where(is_weight & jnp.isfinite(norms), norms, 0)


def usual_norm(first: FirstNorms, state: ClipByUpdateRatioState) -> jax.Array:
    """The smaller of two medians: that of the first norms, and that of the last limits."""
    count = state.recent_count
    recent = median_of(state.recent_norms, jnp.maximum(count, 1))
    recent = jnp.where(count >= FEWEST_RECENT, recent, jnp.inf)
    return jnp.minimum(first.median, lax.stop_gradient(recent).astype(first.median.dtype))


def add_to_recent(limit: jax.Array, is_usable: jax.Array, state: ClipByUpdateRatioState) -> Any:
    """The last norms and their count with this step, a norm as it is after the cut."""
    recent = (state.recent_norms, state.recent_count)
    entered = add_to_window(*recent, lax.stop_gradient(limit).astype(recent[0].dtype))
    return tree_where(is_usable, entered, recent)


class Response(NamedTuple):
    """How the optimizer answers; see the state."""

    response: jax.Array
    linearity: jax.Array
    weight_norms: jax.Array


def measured_response(
    probe: Probe,
    is_due: jax.Array,
    probed: tuple[Any, ...],
    gradient_norms: jax.Array,
    state: ClipByUpdateRatioState,
) -> Response:
    """What the probe finds; as it was where nothing is due.

    Args:
      probe: evaluates the optimizer.
      is_due: bool.
      probed: what it is given.
      gradient_norms: ``[rows]``, of what the change answers to.
      state: before this step.
    """

    def before():  # in the branches, so that one vector goes into them
        return Response(state.response, state.linearity, state.weight_norms)

    def found(squared_sums):
        return _response_to(gradient_norms, jnp.sqrt(squared_sums), state.initial_norms, before())

    if not probe.axes.names:
        return lax.cond(
            is_due,
            lambda *probed: found(probe.squared_sums(*probed)),
            lambda *_: before(),
            *probed,
        )
    # All devices communicate in every step, and none of them in a branch.
    sums = probe.axes.psum(lax.cond(is_due, probe.squared_sums, probe.nothing, *probed))
    return tree_where(is_due, found(sums), before())


def _response_to(
    gradient_norms: jax.Array, norms: jax.Array, initial: jax.Array, before: Response
) -> Response:
    """From ``norms [rows, 3]`` of the change, the change by a far gradient and the weights."""
    change_norms, far_norms, weight_norms = norms.T
    is_new = (initial > 0) & jnp.isfinite(weight_norms)
    weight_norms = jnp.where(is_new, jnp.maximum(initial, weight_norms), before.weight_norms)

    def relative(lengths):
        return root_sum_square(safe_ratio(lengths, weight_norms))

    change = relative(change_norms)
    response = safe_ratio(change, relative(gradient_norms))
    linearity = safe_ratio(relative(far_norms), FAR * change)
    # No change at all is no answer: a guard inside has skipped so long a gradient.
    knows_far = (change > 0) & (linearity > 0) & jnp.isfinite(linearity)
    return Response(
        jnp.where(jnp.isfinite(response), response, before.response),
        jnp.where(knows_far, linearity, before.linearity),
        weight_norms,
    )


def ratio_limit(
    change: Any, known: Response, norm: jax.Array, leaf_norms: jax.Array, distrust: float
) -> jax.Array:
    """The gradient norm at which the weights change by ``change``; inf if not known."""
    most = jnp.finfo(jnp.float32).max
    ratios = jnp.minimum(safe_ratio(leaf_norms, known.weight_norms), most)
    ratio = root_sum_square(ratios)
    is_known = (ratio > 0) & (known.response > 0)
    allowed = safe_ratio(jnp.asarray(change, norm.dtype), ratio)
    allowed = jnp.where(is_known, safe_ratio(allowed, known.response), 1)
    factor = allowed * jnp.minimum(allowed, 1) ** distrust
    return jnp.where(is_known, factor * norm, jnp.inf)


def refuse_accumulation(inner_state: Any) -> None:
    """Updates that are zero but for the last of a window tell no response."""
    kinds = (optax.MultiStepsState, optax.ApplyEvery)
    nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, kinds))
    name = next((type(node).__name__ for node in nodes if isinstance(node, kinds)), None)
    start = "clip_by_update_ratio, the default clip of stabilize, cannot see what optax."
    if name == "MultiStepsState":
        raise ValueError(
            f"{start}MultiSteps will do with a micro-batch. Write "
            "optax.MultiSteps(og.stabilize(optimizer), k) instead of "
            "og.stabilize(optax.MultiSteps(optimizer, k)), and "
            "should_skip_update_fn=og.skip_microbatch to leave out bad micro-batches."
        )
    if name is not None:
        raise ValueError(
            f"{start}apply_every will do with an update. Write "
            "optax.chain(og.stabilize(optimizer), optax.apply_every(k)) instead of "
            "og.stabilize(optax.chain(optimizer, optax.apply_every(k)))."
        )


def check_window(state: ClipByUpdateRatioState, warmup_steps: int) -> None:
    """Raises unless the state keeps so many first norms."""
    if state.first_norms.shape[-1] != warmup_steps:
        raise ToldError(
            "This state is of another transformation: clip_by_update_ratio was given one with "
            f"warmup_steps={state.first_norms.shape[-1]}, and has {warmup_steps}. Make a new one "
            "with init(params), and carry the old one over with "
            "og.adopt(new_tx.init(params), old_state)."
        )
