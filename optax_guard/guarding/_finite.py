"""Finds out whether parameters and optimizer state are finite, with few and cheap reductions.

A parameter and its moments have the same shape (and sharding), so one sum judges them together:
a third of the kernels to compile and to launch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


def any_nonfinite(
    like: Sequence[Any], is_exempt: jax.Array, state: Any, params: Any = None
) -> jax.Array:
    """Whether any element of optimizer state or parameters is NaN or Inf.

    The n-th leaf of a shape in ``like`` stands for a group: the n-th parameter of that shape, the
    n-th leaf of the state of that shape, and every further n-th one, as second moments follow
    first. Whatever has another shape is a group of its own, and so is every scalar: a best loss
    that starts at +inf must not lend its exemption to a scalar parameter and its moments.

    Args:
      like: arrays shaped like the parameters.
      is_exempt: bool ``[float leaves of state]``; groups with such a leaf do not count.
      state: optimizer state.
      params: parameters, if they are to be looked at.
    """
    counts = Counter(leaf.shape for leaf in like if leaf.ndim > 0)
    groups: dict[Any, list[Any]] = {}
    keys = []
    for name, tree in (("state", state), ("params", params)):
        seen: Counter[tuple[int, ...]] = Counter()
        for place, leaf in enumerate(inexact_leaves(tree)):
            key = (name, place)
            if leaf.shape in counts:
                key = (leaf.shape, seen[leaf.shape] % counts[leaf.shape])
                seen[leaf.shape] += 1
            groups.setdefault(key, []).append(leaf)
            keys.append(key)
    sums = [_finite_sum(group) for group in groups.values()]
    flags = ~jnp.isfinite(jnp.stack(sums)) if sums else jnp.zeros((0,), jnp.bool_)
    order = {key: index for index, key in enumerate(groups)}
    group_of_leaf = np.asarray([order[key] for key in keys[: is_exempt.size]], int)
    return jnp.any(flags & ~jnp.zeros_like(flags).at[group_of_leaf].max(is_exempt))


def _finite_sum(group: Sequence[jax.Array]) -> jax.Array:
    """Zero if all elements of arrays of one shape are finite, else NaN."""
    total = sum(map(_zero_or_nan, group[1:]), _zero_or_nan(group[0]))
    return jnp.sum(total).astype(jnp.float32)


def _zero_or_nan(leaf: jax.Array) -> jax.Array:
    # x - x is 0 for every finite x, however large, and NaN for every other. Unlike all(isfinite)
    # its sum reads x once and compiles to a library call on CPU.
    if jnp.iscomplexobj(leaf):
        return _zero_or_nan(leaf.real) + _zero_or_nan(leaf.imag)
    return (leaf - leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32))
