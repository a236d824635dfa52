"""What the library reads of a pytree of updates: its inexact leaves, with their paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def is_inexact(leaf: Any) -> bool:
    """True for float and complex arrays and numbers; false for int, bool, float0 and PRNG keys."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, (float, complex))
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def strong(leaf: Any) -> Any:
    """``leaf`` as an array of the same dtype without JAX's weak type."""
    if isinstance(leaf, np.ndarray) and leaf.dtype == jax.dtypes.float0:
        return leaf
    leaf = jnp.asarray(leaf)
    is_weak = getattr(leaf, "weak_type", False)  # arrays of PRNG keys have no such thing
    return jnp.asarray(leaf, dtype=leaf.dtype) if is_weak else leaf


class FloatLeaves(NamedTuple):
    """The inexact leaves of a tree, and what is needed to put changed ones back."""

    arrays: tuple[Any, ...]
    paths: tuple[str, ...]
    every_leaf: tuple[Any, ...]
    treedef: Any

    def replace(self, arrays: Sequence[Any]) -> Any:
        """The tree with ``arrays`` in place of its inexact leaves, all others untouched."""
        new = iter(arrays)
        leaves = [next(new) if is_inexact(leaf) else leaf for leaf in self.every_leaf]
        return jax.tree.unflatten(self.treedef, leaves)

    def matching(self, tree: Any) -> tuple[jax.Array, ...]:
        """The leaves of ``tree`` (parameters) that stand where this tree has inexact leaves."""
        leaves = self.treedef.flatten_up_to(tree)
        pairs = zip(leaves, self.every_leaf, strict=True)
        return tuple(jnp.asarray(leaf) for leaf, own in pairs if is_inexact(own))


def float_leaves(tree: Any) -> FloatLeaves:
    """Splits off the inexact leaves; ``None`` and ``optax.MaskedNode`` are no leaves in JAX."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    arrays, paths = [], []
    for path, leaf in flat:
        if is_inexact(leaf):
            is_spec = isinstance(leaf, jax.ShapeDtypeStruct)
            arrays.append(leaf if is_spec else jnp.asarray(leaf))
            paths.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    return FloatLeaves(tuple(arrays), tuple(paths), tuple(leaf for _, leaf in flat), treedef)
