"""How strongly an optimizer answers to a gradient, measured by evaluating it three times more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._core.arrays import is_partitioned, promote, replicated, times
from optax_guard._core.axes import MeshAxes
from optax_guard._core.collectives import vary_over
from optax_guard._core.groups import Groups
from optax_guard._core.inner import gradient_like
from optax_guard._core.trees import float_leaves
from optax_guard.wrappers._notify import quietly

FAR = 1e3  # times the gradient: where an optimizer that bounds its steps answers no more than once


def count_as_weights(groups: Groups) -> np.ndarray:
    """For each leaf whether a layer of it is a matrix or more."""
    pairs = zip(groups.shapes, groups.depths, strict=True)
    return np.array([len(shape) - depth >= 2 for shape, depth in pairs], np.bool_)


class Probe(NamedTuple):
    """Evaluates the optimizer to see how strongly it answers to a gradient."""

    update: Any
    extra_args: dict[str, Any]
    groups: Groups
    axes: MeshAxes

    def squared_sums(self, gradients, scale, inner_state, params) -> jax.Array:
        """Of what this gradient alone adds to the update, of what `FAR` times it adds, of params.

        The response of an optimizer with momentum or weight decay to no gradient is subtracted.

        Returns:
          float32 ``[rows, 3]``; on each device those of its own shards.
        """
        # Without the barriers XLA:GPU turns the branch into a select, and evaluates it always.
        gradients, params = jax.tree.map(_barrier, (gradients, params))
        split = float_leaves(gradients, gradient_like(params))
        zeros = [jnp.zeros_like(leaf) for leaf in split.arrays]
        weights = zeros if params is None else split.matching(gradient_like(params))

        def answer(arrays):
            gradients = split.replace(arrays)
            with quietly():
                moved, _ = self.update(gradients, inner_state, params, **self.extra_args)
            return split.matching(gradient_like(moved))

        resting = answer(zeros)

        def added_by(scale):
            moved = answer([times(leaf, scale) for leaf in split.arrays])
            rows = self._rows(list(map(_change, moved, resting)), weights)
            return vary_over(rows, self.axes.names)

        # Not in a loop, whose invariants XLA would write to memory.
        near, far = added_by(scale), added_by(FAR * scale)
        return jnp.stack([near[:, 0], far[:, 0], near[:, 1]], axis=1)

    def nothing(self, gradients, scale, inner_state, params) -> jax.Array:
        """Zeros of the same type."""
        del gradients, scale, inner_state, params
        return vary_over(jnp.zeros((sum(self.groups.rows), 3), jnp.float32), self.axes.names)

    def _rows(self, changes: Sequence[jax.Array], weights: Sequence[jax.Array]) -> jax.Array:
        counts = count_as_weights(self.groups)
        parts = [jnp.zeros((0, 2), jnp.float32)]
        for i, (change, weight) in enumerate(zip(changes, weights, strict=True)):
            zeros = jnp.zeros((self.groups.rows[i], 2), jnp.float32)
            depth = self.groups.depths[i]
            parts.append(_squared_sums(change, weight, depth) if counts[i] else zeros)
        parts = [parts[0], *self.axes.count_once(parts[1:])]
        return jnp.concatenate(parts)


def _barrier(leaf: Any) -> Any:
    is_array = isinstance(leaf, jax.Array) and leaf.dtype != jax.dtypes.float0
    return lax.optimization_barrier(leaf) if is_array else leaf


def _change(moved: jax.Array, resting: jax.Array) -> jax.Array:
    wide = promote(moved.dtype, jnp.float32)
    return moved.astype(wide) - resting.astype(wide)


def _squared_sums(change: jax.Array, weights: jax.Array, depth: int) -> jax.Array:
    """Those of both, for each layer of a stack: float32 ``[layers, 2]``.

    Both in one reduction, because XLA on CPU writes an array as large as ``weights`` to memory for
    two separate ones. It adds one by one in float32: first within rows, so that the rounding does
    not pile up. Split along the rows, its partial sums would be gathered; the separate ones are
    all-reduced.
    """
    rest = tuple(range(depth, weights.ndim))
    if is_partitioned(weights):
        sums = [jnp.sum(_squares(leaf), axis=rest) for leaf in (change, weights)]
        return jnp.stack([replicated(part).reshape(-1) for part in sums], axis=-1)
    zero = jnp.zeros((), jnp.float32)
    rows = lax.reduce(
        (_squares(change), _squares(weights)),
        (zero, zero),
        lambda total, term: (total[0] + term[0], total[1] + term[1]),
        (weights.ndim - 1,),
    )
    return jnp.stack([jnp.sum(row, axis=rest[:-1]).reshape(-1) for row in rows], axis=-1)


def _squares(leaf: jax.Array) -> jax.Array:
    return jnp.square(jnp.abs(leaf).astype(jnp.float32))
