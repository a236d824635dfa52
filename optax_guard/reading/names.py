"""What to call the leaves of a tree of parameters in a message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_guard._core.trees import is_inexact
from optax_guard.reading.find import Found
from optax_guard.wrappers.guard import GuardState


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


class LeafNames(NamedTuple):
    """What the leaves that a guard watches are called; numbers where nothing better is known."""

    names: tuple[str, ...]
    are_known: bool

    @classmethod
    def numbered(cls, count: int) -> LeafNames:
        """Names for want of parameters."""
        return cls(tuple(f"leaf {index}" for index in range(count)), are_known=False)


def gradient_leaves(params: Any) -> list[NamedLeaf]:
    """The leaves of ``params`` that have gradients, which for lookahead are the fast ones."""
    return named_leaves(params.fast if isinstance(params, optax.LookaheadParams) else params)


def guard_leaf_names(guard: Found, leaves: Sequence[NamedLeaf] | None) -> LeafNames:
    """Names of the leaves that a guard watches.

    Inside ``optax.masked`` and ``optax.partition`` a guard sees only some leaves; which ones
    follows from the moments of its inner optimizer, if it keeps any.

    Args:
      guard: a guard state.
      leaves: those of all parameters, or None.

    Raises:
      ValueError: if the guard watches another number of leaves and no mask is the reason.
    """
    state: GuardState = guard.state
    count = num_watched(state)
    if leaves is None:
        return LeafNames.numbered(count)
    if len(leaves) == count:
        return LeafNames(tuple(leaf.name for leaf in leaves), are_known=True)
    if guard.is_masked:
        seen = _names_within(state.inner_state, leaves)
        known = len(seen) == count
        return LeafNames(seen, are_known=True) if known else LeafNames.numbered(count)
    raise ValueError(
        f"params has {len(leaves)} float leaves, but the guard watches {count}. Pass the "
        "tree of parameters that the optimizer was initialised with; with Flax NNX, "
        "nnx.state(model, nnx.Param)."
    )


def num_watched(state: GuardState) -> int:
    """How many leaves a guard watches."""
    return jnp.size(jax.tree.leaves(state.last_fault_leaves)[0])


def _names_within(inner_state: Any, leaves: Sequence[NamedLeaf]) -> tuple[str, ...]:
    """Names of the parameters that ``inner_state`` keeps arrays for, in their order."""
    shapes = {leaf.name: jnp.shape(leaf.leaf) for leaf in leaves}
    found = set()
    for path, array in named_leaves(inner_state):
        parts = path.split("/")  # such as 0/mu/dense/kernel, whose longest known end counts
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        name = next((end for end in ends if shapes.get(end) == jnp.shape(array)), None)
        found.add(name)
    return tuple(name for name in shapes if name in found)


def _is_flax_box(node: Any) -> bool:
    """True for what Flax puts around one array, whose path would otherwise end in "/value"."""
    if not type(node).__module__.startswith("flax."):
        return False
    flat, _ = jax.tree_util.tree_flatten_with_path(node)
    return len(flat) == 1 and flat[0][0] == (jax.tree_util.GetAttrKey("value"),)
