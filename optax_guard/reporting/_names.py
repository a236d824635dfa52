"""What to call the leaves of a tree of parameters in a message."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from optax_guard._trees import is_inexact


class NamedLeaf(NamedTuple):
    """An inexact leaf and its path, as in ``"linear1/kernel"``."""

    name: str
    leaf: Any


def named_leaves(params: Any) -> list[NamedLeaf]:
    """The inexact leaves of ``params`` in order, under the names that their author gave them."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_flax_box)
    result = []
    for path, node in flat:
        leaf = jax.tree.leaves(node)[0] if _is_flax_box(node) else node
        if is_inexact(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            result.append(NamedLeaf(name or "params", leaf))  # a single array has no path
    return result


def _is_flax_box(node: Any) -> bool:
    """True for what Flax puts around one array, whose path would otherwise end in "/value"."""
    if not type(node).__module__.startswith("flax."):
        return False
    flat, _ = jax.tree_util.tree_flatten_with_path(node)
    return len(flat) == 1 and flat[0][0] == (jax.tree_util.GetAttrKey("value"),)
