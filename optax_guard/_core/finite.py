"""Finds out whether parameters and optimizer state are finite, with few and cheap reductions.

A parameter and its moments have the same shape (and sharding), so one sum judges them together:
a third of the kernels to compile and to launch. Small arrays are judged in stacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.arrays import promote
from optax_guard._core.batches import can_be_stacked, load, make_batches
from optax_guard._core.trees import inexact_leaves


def stack_flags(flags: Sequence[jax.Array]) -> jax.Array:
    """One bool vector of scalars; empty for none."""
    return jnp.stack(flags) if flags else jnp.zeros((0,), jnp.bool_)


def is_nonfinite(leaf: jax.Array) -> jax.Array:
    """Whether any element of an array is NaN or Inf."""
    leaf = jnp.asarray(leaf)  # parameters may be Python numbers
    return ~jnp.isfinite(jnp.sum(_zero_or_nan(leaf)))


def any_nonfinite(
    shapes: Sequence[tuple[int, ...]], is_exempt: jax.Array, state: Any, params: Any = None
) -> jax.Array:
    """Whether any element of optimizer state or parameters is NaN or Inf.

    Large arrays that are shaped like a parameter are judged in groups: the n-th one of a shape in
    ``shapes`` stands for the n-th parameter of that shape, the n-th leaf of the state of that
    shape, and every further n-th one, as second moments follow first. All others are judged one
    by one: a best loss that starts at +inf must not lend its exemption to a scalar parameter.

    Args:
      shapes: of the parameters.
      is_exempt: bool for each float leaf of state, then of parameters; groups with such a leaf do
        not count.
      state: optimizer state.
      params: parameters, if they are to be looked at.
    """
    in_state = inexact_leaves(state)
    leaves = [*in_state, *inexact_leaves(params)]
    small = [index for index, leaf in enumerate(leaves) if can_be_stacked(leaf)]
    batches = make_batches([leaves[index] for index in small])
    stacks = [[small[place] for place in batch] for batch in batches]
    groups = _groups_of_large(shapes, leaves, len(in_state))

    place_of_leaf = np.zeros(len(leaves), int)
    members = [*([index] for stack in stacks for index in stack), *groups]
    for place, group in enumerate(members):
        place_of_leaf[group] = place
    sums = [_finite_sums(load(stack, leaves)) for stack in stacks]
    sums += [_finite_sum([leaves[index] for index in group]) for group in groups]
    flags = ~jnp.isfinite(jnp.concatenate(sums)) if sums else jnp.zeros((0,), jnp.bool_)
    # Parameters may be missing now, or have been missing at ``init``.
    num_exempt = len(leaves) if len(leaves) == is_exempt.shape[0] else len(in_state)
    exempt = jnp.zeros_like(flags).at[place_of_leaf[:num_exempt]].max(is_exempt[:num_exempt])
    return jnp.any(flags & ~exempt)


def _groups_of_large(
    shapes: Sequence[tuple[int, ...]], leaves: Sequence[Any], num_state: int
) -> list[list[int]]:
    """Indices of the large leaves of a state of ``num_state`` leaves and of the parameters."""
    counts = Counter(shape for shape in shapes if shape)
    groups: dict[Any, list[int]] = {}
    seen: Counter[Any] = Counter()
    for index, leaf in enumerate(leaves):
        if can_be_stacked(leaf):
            continue
        key: Any = index
        if leaf.shape in counts:
            tree = index < num_state
            key = (leaf.shape, seen[tree, leaf.shape] % counts[leaf.shape])
            seen[tree, leaf.shape] += 1
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _finite_sums(stack: jax.Array) -> jax.Array:
    """For each array of a stack zero if all its elements are finite, else NaN."""
    return jnp.sum(_zero_or_nan(stack), axis=tuple(range(1, stack.ndim))).astype(jnp.float32)


def _finite_sum(group: Sequence[jax.Array]) -> jax.Array:
    """``[1]``: zero if all elements of arrays of one shape are finite, else NaN."""
    total = sum(map(_zero_or_nan, group[1:]), _zero_or_nan(group[0]))
    return jnp.sum(total).astype(jnp.float32).reshape(1)


def _zero_or_nan(leaf: jax.Array) -> jax.Array:
    # x - x is 0 for every finite x, however large, and NaN for every other. Unlike all(isfinite)
    # its sum reads x once and compiles to a library call on CPU.
    if jnp.iscomplexobj(leaf):
        return _zero_or_nan(leaf.real) + _zero_or_nan(leaf.imag)
    return (leaf - leaf).astype(promote(leaf.dtype, jnp.float32))
