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


def inexact_leaves(tree: Any) -> list[Any]:
    """The float and complex leaves of a tree."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]


def strong(leaf: Any) -> Any:
    """``leaf`` as an array of the same dtype without JAX's weak type."""
    is_other = isinstance(leaf, jax.ShapeDtypeStruct) or not hasattr(leaf, "dtype")
    if is_other and not isinstance(leaf, (bool, int, float, complex)):
        return leaf
    if isinstance(leaf, np.ndarray) and leaf.dtype == jax.dtypes.float0:
        return leaf
    leaf = jnp.asarray(leaf)
    is_weak = getattr(leaf, "weak_type", False)  # arrays of PRNG keys have no such thing
    return jnp.asarray(leaf, dtype=leaf.dtype) if is_weak else leaf


def is_flax_box(node: Any) -> bool:
    """True for what Flax puts around one array, whose path would otherwise end in "/value"."""
    if not type(node).__module__.startswith("flax."):
        return False
    flat, _ = jax.tree_util.tree_flatten_with_path(node)
    return len(flat) == 1 and flat[0][0] == (jax.tree_util.GetAttrKey("value"),)


def name_of(path: Any) -> str:
    """What reports call the leaf at a path, boxes left out; a single array has no path."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"


def is_placeholder(params: Any) -> bool:
    """Whether these are what ``optax.tree_map_params`` puts in place of parameters.

    It looks for them in the state that ``init`` makes, and compares that with the real one.
    """
    is_container = isinstance(params, (dict, list, tuple, type(None)))
    return not is_container and not jax.tree.leaves(params)


class FloatLeaves(NamedTuple):
    """The inexact leaves of a tree, and what is needed to put changed ones back.

    Attributes:
      arrays: the leaves; zeros stand for those that are missing.
      paths: of the leaves.
      is_present: for each whether the tree has it; false for a gradient that is ``None`` where
        there is a parameter.
      slots: for each node of the flattened tree, which may be another leaf or ``None``, how many
        of the ``arrays`` stand for it.
      nodes: these nodes.
      treedef: the structure that they have.
    """

    arrays: tuple[Any, ...]
    paths: tuple[str, ...]
    is_present: tuple[bool, ...]
    slots: tuple[int, ...]
    nodes: tuple[Any, ...]
    treedef: Any

    def replace(self, arrays: Sequence[Any]) -> Any:
        """The tree with ``arrays`` in place of its inexact leaves, all others untouched."""
        new, nodes = iter(arrays), []
        for node, count in zip(self.nodes, self.slots, strict=True):
            taken = [next(new) for _ in range(count)]
            nodes.append(node if node is None or not taken else taken[0])
        return jax.tree.unflatten(self.treedef, nodes)

    def names(self) -> list[str]:
        """What reports call the leaves: their paths, but for a box that Flax has put around one."""
        found: list[str] = []
        tree = jax.tree.unflatten(self.treedef, self.nodes)
        flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none_or_box)
        for (path, _), count in zip(flat, self.slots, strict=True):
            place = slice(len(found), len(found) + count)
            is_own = count == 1 and self.is_present[place.start]
            found += [name_of(path)] if is_own else self.paths[place]
        return found

    def matching(self, tree: Any) -> tuple[jax.Array, ...]:
        """The leaves of ``tree`` (parameters) that stand where this tree has inexact leaves.

        Where ``tree`` has ``None`` as well, the zeros of ``arrays``.
        """
        found: list[Any] = []
        for part, count in zip(self.treedef.flatten_up_to(tree), self.slots, strict=True):
            if part is None:
                found += self.arrays[len(found) : len(found) + count]
            else:
                found += inexact_leaves(part) if count > 1 else [part] * count
        return tuple(leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in found)


def float_leaves(tree: Any, params: Any = None, *, count: int | None = None) -> FloatLeaves:
    """Splits off the inexact leaves; ``optax.MaskedNode`` is no leaf in JAX.

    A gradient may be ``None`` where there is a parameter. ``params`` tell where that is so; for
    want of them ``count``, the number of leaves that ``init`` saw.

    Args:
      tree: gradients, updates or parameters.
      params: the parameters, which ``tree`` belongs to.
      count: how many leaves there should be.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
    nodes = [node for _, node in flat]
    stand_ins = _stand_ins(nodes, treedef, params, count) if None in map(_as_none, nodes) else {}
    arrays, paths, is_present, slots = [], [], [], []
    for place, (path, node) in enumerate(flat):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = [("", node)] if is_inexact(node) else stand_ins.get(place, [])
        slots.append(len(found))
        for suffix, leaf in found:
            is_array = isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
            arrays.append(leaf if is_array else jnp.asarray(leaf))
            paths.append("/".join(filter(None, (name, suffix))))
            is_present.append(node is not None)
    return FloatLeaves(
        tuple(arrays), tuple(paths), tuple(is_present), tuple(slots), tuple(nodes), treedef
    )


def _is_none(node: Any) -> bool:
    return node is None


def _is_none_or_box(node: Any) -> bool:
    return node is None or is_flax_box(node)


def _as_none(node: Any) -> Any:
    return None if node is None else 0


def _stand_ins(
    nodes: Sequence[Any], treedef: Any, params: Any, count: int | None
) -> dict[int, list[tuple[str, jax.Array]]]:
    """For each ``None`` that stands for parameters: names below it, and zeros of their shapes."""
    places = [place for place, node in enumerate(nodes) if node is None]
    if params is not None:
        try:
            parts = treedef.flatten_up_to(params)
        except ValueError:  # of another structure; the rest of the update will tell
            parts = [None] * len(nodes)
        return {place: _zeros_like(parts[place]) for place in places}
    num_present = sum(map(is_inexact, nodes))
    if count is not None and num_present + len(places) == count:
        return {place: [("", jnp.zeros(()))] for place in places}
    return {}


def _zeros_like(part: Any) -> list[tuple[str, jax.Array]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(part)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), jnp.zeros(leaf.shape, leaf.dtype))
        for path, leaf in flat
        if is_inexact(leaf)
    ]
