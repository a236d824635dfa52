"""Finds out whether parameters and optimizer state are finite, with few and cheap reductions.

A parameter and its moments have the same shape (and sharding), so one sum judges them together:
a third of the kernels to compile and to launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_guard._trees import is_inexact


def inexact_leaves(tree: Any) -> list[Any]:
    """The float and complex leaves of a tree."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]


def stack_flags(flags: Sequence[jax.Array]) -> jax.Array:
    """One bool vector of scalars; empty for none."""
    return jnp.stack(flags) if flags else jnp.zeros((0,), jnp.bool_)


def is_nonfinite(leaf: jax.Array) -> jax.Array:
    """Whether any element of an array is NaN or Inf."""
    return ~jnp.isfinite(jnp.sum(_zero_or_nan(leaf)))


def nonfinite_groups(like: Sequence[Any], *trees: Any) -> jax.Array:
    """Whether any element is NaN or Inf, for each group of arrays.

    The n-th leaf of a shape in ``like`` makes a group with the n-th leaf of that shape in each
    tree, and with every further n-th one, as second moments follow first. Whatever has another
    shape is a group of its own.

    Args:
      like: arrays shaped like the parameters.
      *trees: pytrees to look at.

    Returns:
      bool ``[groups]``. The groups of ``like`` come first, whether or not anything joins them.
    """
    counts: dict[tuple[int, ...], int] = {}
    groups: dict[Any, list[Any]] = {}
    for leaf in like:
        groups[leaf.shape, counts.get(leaf.shape, 0)] = []
        counts[leaf.shape] = counts.get(leaf.shape, 0) + 1
    for index, tree in enumerate(trees):
        seen = dict.fromkeys(counts, 0)
        for place, leaf in enumerate(inexact_leaves(tree)):
            if leaf.shape not in counts:
                groups[index, place] = [leaf]
                continue
            groups[leaf.shape, seen[leaf.shape] % counts[leaf.shape]].append(leaf)
            seen[leaf.shape] += 1
    return stack_flags([_any_is_nonfinite(group) for group in groups.values()])


def _any_is_nonfinite(group: Sequence[jax.Array]) -> jax.Array:
    if not group:
        return jnp.asarray(False)
    return ~jnp.isfinite(jnp.sum(sum(map(_zero_or_nan, group[1:]), _zero_or_nan(group[0]))))


def _zero_or_nan(leaf: jax.Array) -> jax.Array:
    # x - x is 0 for every finite x, however large, and NaN for every other. Unlike all(isfinite)
    # its sum reads x once and compiles to a library call on CPU.
    if jnp.iscomplexobj(leaf):
        return _zero_or_nan(leaf.real) + _zero_or_nan(leaf.imag)
    return (leaf - leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32))
