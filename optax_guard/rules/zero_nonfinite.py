"""Zeroing non-finite gradients instead of skipping the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_guard._core.arrays import increment
from optax_guard._core.axes import AxisName, MeshAxes, axes_of_elements
from optax_guard._core.checks import check_axis_name, check_choice
from optax_guard._core.listening import narrow, note
from optax_guard._core.states import Entry, PackedState
from optax_guard._core.transformation import transformation
from optax_guard._core.trees import float_leaves


class _ZeroArrays(NamedTuple):
    integers: Any


class ZeroNonfiniteState(PackedState, _ZeroArrays):
    """State of :func:`zero_nonfinite`: 12 bytes and 4 for each float leaf.

    Attributes:
      integers: int32, packed.
    """

    __slots__ = ()
    steps = Entry("integers", "int32, calls so far")
    zeroed_steps_total = Entry("integers", "int32, calls in which something was zeroed")
    zeroed_elements_total = Entry("integers", "int32, elements zeroed so far, saturating")
    last_zeroed_leaves = Entry(
        "integers",
        "bool ``[float leaves]``, where the last call zeroed something",
        where=lambda state: slice(3, None),
        read=lambda state, stored: stored != 0,
    )


def zero_nonfinite(
    *, scope: str = "element", axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces NaN and Inf by zero, and counts what it replaced.

    ``g <- where(isfinite(g), g, 0)`` for scope ``"element"``; a whole array that holds any
    non-finite element becomes zero for scope ``"leaf"``. Every step is alike, the first included.

    Prefer :func:`guard`: zeroing lets the rest of a broken gradient through. The remaining
    elements of a batch that holds a NaN are often wrong too, momentum and weight decay still move
    the parameters, and second moments forget a little. It is for models in which one array
    goes bad by itself and the others should go on learning. Put it before a clip; a guard behind
    it will see nothing to skip.

    Args:
      scope: ``"element"`` or ``"leaf"``.
      axis_name: mesh axes over which the updates are sharded inside ``pmap`` or
        ``shard_map(check_vma=False)``, so that all devices find the same. Types tell otherwise.

    Returns:
      A transformation of updates of any float or complex dtype. Cost: one more read of the
      gradients, and counting the elements takes about three times as long as a sum on CPU.

    Raises:
      ValueError: if ``scope`` is unknown.
      TypeError: if ``scope`` is no string.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.zero_nonfinite()
      >>> updates, state = tx.update(jnp.array([1.0, jnp.nan]), tx.init(jnp.zeros(2)))
      >>> updates, int(state.zeroed_elements_total)
      (Array([1., 0.], dtype=float32), 1)

    References:
      ``optax.zero_nans`` does this for NaN only, and does not count.
    """
    check_choice("scope", scope, ("element", "leaf"))
    check_axis_name(axis_name)

    def init(params):
        num_leaves = len(float_leaves(params).arrays)
        return ZeroNonfiniteState.pack(
            steps=0,
            zeroed_steps_total=0,
            zeroed_elements_total=0,
            last_zeroed_leaves=jnp.zeros((num_leaves,), jnp.bool_),
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        count = state.last_zeroed_leaves.shape[-1]
        split = float_leaves(updates, params, count=count)
        axes = axes_of_elements(axis_name, split.paths, split.arrays)
        bad = [~jnp.isfinite(leaf) for leaf in split.arrays]
        zeroed = _whole_leaves(bad, axes) if scope == "leaf" else bad
        arrays = [
            jnp.where(is_bad, jnp.zeros_like(leaf), leaf)
            for leaf, is_bad in zip(split.arrays, zeroed, strict=True)
        ]
        is_used, nothing = narrow(split.is_present), jnp.zeros((), jnp.int32)
        counts = axes.count_once(
            [
                jnp.sum(is_bad, dtype=jnp.int32) if used else nothing
                for is_bad, used in zip(zeroed, is_used, strict=True)
            ]
        )
        per_leaf = jnp.stack(counts) if counts else jnp.zeros((0,), jnp.int32)
        note(split.arrays, is_used, per_leaf)
        per_leaf = axes.psum(per_leaf)
        return split.replace(arrays), _record(state, per_leaf)

    return transformation("zero_nonfinite", ZeroNonfiniteState, init, update)


def _whole_leaves(bad: Sequence[jax.Array], axes: MeshAxes) -> list[jax.Array]:
    """For each element whether its array holds a bad one, on any device."""
    if not axes.names or not bad:  # of the sharding of the leaf, which a select demands
        return [is_bad | jnp.any(is_bad) for is_bad in bad]
    found = axes.any(jnp.stack(list(map(jnp.any, bad))))
    return [is_bad | is_any for is_bad, is_any in zip(bad, found, strict=True)]


def _record(state: ZeroNonfiniteState, per_leaf: jax.Array) -> ZeroNonfiniteState:
    largest = jnp.iinfo(jnp.int32).max
    total = state.zeroed_elements_total
    for_all = jnp.sum(per_leaf, dtype=jnp.int32)
    is_any = for_all > 0
    return ZeroNonfiniteState.pack(
        steps=increment(state.steps),
        zeroed_steps_total=jnp.where(
            is_any, increment(state.zeroed_steps_total), state.zeroed_steps_total
        ),
        zeroed_elements_total=jnp.where(total > largest - for_all, largest, total + for_all),
        last_zeroed_leaves=per_leaf > 0,
    )
