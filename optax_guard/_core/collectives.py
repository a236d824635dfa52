"""Sums and maxima over mesh axes; the identity where there are none."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def vary_over(value: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """The same, of the type of what differs over these axes."""
    for name in names:
        value += 0 * lax.axis_index(name).astype(value.dtype)
    return value


def where_first(term: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """The same on the first device along these axes, zeros on the others."""
    for name in names:
        term = jnp.where(lax.axis_index(name) == 0, term, jnp.zeros_like(term))
    return term


def psum(tree: Any, names: tuple[str, ...]) -> Any:
    """One ``lax.psum`` of all arrays of a tree, which share a dtype."""
    leaves, treedef = jax.tree.flatten(tree)
    if not names or not leaves:
        return tree
    flat = lax.psum(jnp.concatenate([leaf.reshape(-1) for leaf in leaves]), names)
    parts = jnp.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(
        treedef, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def pmax(values: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """``lax.pmax`` with a derivative."""
    return lax.pmax(values, names)


@pmax.defjvp
def _pmax_jvp(names, primals, tangents):
    # JAX has none. Where several devices hold the maximum, the mean, as within one array.
    (values,), (dots,) = primals, tangents
    largest = pmax(values, names)
    is_mine = values == largest
    dot, count = psum((jnp.where(is_mine, dots, 0), is_mine.astype(dots.dtype)), names)
    return largest, dot / jnp.maximum(count, 1)
