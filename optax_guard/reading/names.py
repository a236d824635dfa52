"""What to call the leaves of a tree of parameters in a message."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._core.groups import row_suffixes
from optax_guard._core.trees import is_flax_box, is_inexact, name_of
from optax_guard.reading.find import Found
from optax_guard.wrappers.guard_state import GuardState


class NamedLeaf(NamedTuple):
    """An inexact leaf and its path, as in ``"linear1/kernel"``."""

    name: str
    leaf: Any


def named_leaves(params: Any) -> list[NamedLeaf]:
    """The inexact leaves of ``params`` in order, under the names that their author gave them."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_flax_box)
    result = []
    for path, node in flat:
        leaf = jax.tree.leaves(node)[0] if is_flax_box(node) else node
        if is_inexact(leaf):
            result.append(NamedLeaf(name_of(path), leaf))
    return result


def gradient_leaves(params: Any) -> list[NamedLeaf]:
    """The leaves of ``params`` that have gradients, which for lookahead are the fast ones."""
    return named_leaves(params.fast if isinstance(params, optax.LookaheadParams) else params)


class Row(NamedTuple):
    """A leaf that a guard watches, or one layer of a leaf that stacks layers.

    Attributes:
      name: such as ``"layers/kernel[3]"``.
      leaf: the name of the leaf; None if it is not known.
      layer: place of the layer in it; empty for a leaf that stacks none.
    """

    name: str
    leaf: str | None = None
    layer: tuple[int, ...] = ()


class Rows(NamedTuple):
    """The rows of a guard; numbered where nothing better is known."""

    rows: tuple[Row, ...]
    are_known: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Of each row."""
        return tuple(row.name for row in self.rows)

    @classmethod
    def numbered(cls, count: int) -> Rows:
        """Rows for want of parameters."""
        return cls(tuple(Row(f"leaf {index}") for index in range(count)), are_known=False)


def guard_rows(guard: Found, leaves: Sequence[NamedLeaf] | None) -> Rows:
    """The rows that a guard watches, in the order of its ``leaf_norms``.

    Inside ``optax.masked`` and ``optax.partition`` a guard sees only some leaves; which ones
    follows from the moments of its inner optimizer, if it keeps any.

    Args:
      guard: a guard state.
      leaves: those of all parameters, or None; of an ensemble with or without its axis.

    Raises:
      ValueError: if the guard watches other leaves and no mask is the reason.
    """
    count = num_rows(guard.state)
    if leaves is None:
        return Rows.numbered(count)
    candidates = [leaves]
    if guard.is_masked:
        candidates.insert(0, _within(guard.state.inner_state, leaves))
    batch = np.ndim(guard.state.guard_step)
    for watched, axes in itertools.product(candidates, {batch: (), 0: ()}):
        rows = _match(guard.state, watched, count, axes)
        if rows is not None:
            return Rows(rows, are_known=True)
    if guard.is_masked:
        return Rows.numbered(count)
    what = "float leaves" if count <= len(leaves) else "float leaves and layers of stacked ones"
    raise ValueError(
        f"params has {len(leaves)} float leaves, but the guard watches {count} {what}. Pass the "
        "tree of parameters that the optimizer was initialised with; with Flax NNX, "
        "nnx.state(model, nnx.Param)."
    )


def num_rows(state: GuardState) -> int:
    """How many leaves a guard watches, a stacked one counting once a layer."""
    return np.shape(state.leaf_norms)[-1]


def _match(
    state: GuardState, leaves: Sequence[NamedLeaf], count: int, batch: int
) -> tuple[Row, ...] | None:
    """The rows of these leaves, behind ``batch`` axes, if there are ``count`` of them."""
    depths = state.stack_depths
    rows: list[Row] = []
    for index, (name, leaf) in enumerate(leaves):
        layers = jnp.shape(leaf)[batch:][: depths.get(index, 0)]
        places = zip(row_suffixes(layers), np.ndindex(*layers), strict=True)
        rows += [Row(name + suffix, name, place) for suffix, place in places]
    return tuple(rows) if len(rows) == count else None


def _within(inner_state: Any, leaves: Sequence[NamedLeaf]) -> list[NamedLeaf]:
    """The parameters that ``inner_state`` keeps arrays for, in their order."""
    shapes = {leaf.name: jnp.shape(leaf.leaf) for leaf in leaves}
    found = set()
    for path, array in named_leaves(inner_state):
        parts = path.split("/")  # such as 0/mu/dense/kernel, whose longest known end counts
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        name = next((end for end in ends if shapes.get(end) == jnp.shape(array)), None)
        found.add(name)
    return [leaf for leaf in leaves if leaf.name in found]


def condition_names(state: GuardState) -> tuple[str, ...]:
    """What the conditions in ``skip_if`` are called, in their order."""
    return tuple(key.partition(" ")[2] for key in sorted(state.condition_states))


def network_order(names: Sequence[str]) -> np.ndarray:
    """Indices that list names as a network has its layers: ``Dense_2`` before ``Dense_10``.

    JAX sorts the keys of a dict as text. Names that differ in their numbers only are sorted by
    these; all others stay in order. Of stacked layers all arrays of the first come first.
    """
    ranks: dict[tuple[str, str], int] = {}
    keys = []
    for name in unrolled(names):
        key, parent = [], ""
        for part in name.split("/"):
            stem = re.sub(r"\d+", "#", part)
            rank = ranks.setdefault((parent, stem), len(ranks))
            key.append((rank, tuple(map(int, re.findall(r"\d+", part)))))
            parent += "/" + part
        keys.append(key)
    return np.array(sorted(range(len(names)), key=keys.__getitem__), dtype=int)


def unrolled(names: Sequence[str]) -> list[str]:
    """Names with the number of a stacked layer where it has one in a network without a stack.

    ``"layers/mlp/kernel[3]"`` becomes ``"layers[3]/mlp/kernel"``: the number goes to the outermost
    part below which all is stacked, in as many layers.
    """
    split = [_STACKED.fullmatch(name) for name in names]
    parts = [found["path"].split("/") for found in split if found]
    kinds: dict[str, set[Any]] = {}  # below each part, of how many layers, or None
    last = {found["path"]: found["layer"] for found in split if found}
    for name, found in zip(names, split, strict=True):
        path = found["path"] if found else name
        for end in range(len(path.split("/"))):
            above = "/".join(path.split("/")[:end])
            kinds.setdefault(above, set()).add(last.get(path))
    lowest = int(min(map(len, parts), default=0) > 1)
    return [
        _unrolled(found["path"].split("/"), found["layer"], kinds, lowest) if found else name
        for name, found in zip(names, split, strict=True)
    ]


_STACKED = re.compile(r"(?P<path>.*[^\]])(?P<layer>(\[\d+\])+)")


def _unrolled(parts: Sequence[str], layer: str, kinds: Mapping[str, set[Any]], lowest: int) -> str:
    for depth in range(lowest, len(parts)):
        above = kinds["/".join(parts[:depth])]
        if len(above) == 1:
            head = "/".join(parts[:depth])
            return "/".join([head + layer, *parts[depth:]])
    return "/".join(parts) + layer
