"""Optimizer states as plain trees of named nodes, whatever they were restored as.

Checkpoints give back a NamedTuple as a dict of its fields and a tuple as a list, or as a dict with
the keys "0", "1". As nodes all of these look alike; only some of them know their type.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.find import is_own_state

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A node of a pytree.

    Attributes:
      source: what it was made of.
      path: where it stands.
      place: the same without the wrappers of this library.
      children: by name; None for a leaf.
    """

    source: Any
    path: Path
    place: Path
    children: dict[str, Node] | None

    @property
    def state_type(self) -> type | None:
        """Its class if it is an optimizer state and knows that it is one."""
        kind = type(self.source)
        is_named = isinstance(self.source, tuple) and hasattr(kind, "_fields")
        is_state = is_named and (kind.__name__.endswith("State") or is_own_state(self.source))
        return kind if is_state else None

    @property
    def is_own(self) -> bool:
        """Whether it is a state of this library, by its type or the names of its fields."""
        if self.children is None:
            return False
        if self.state_type is not None:
            return is_own_state(self.source)
        return "integers" in self.children or set(self.children) == {"steps"}

    def has(self, *names: str) -> bool:
        """Whether it has children of these names."""
        return self.children is not None and all(name in self.children for name in names)

    @property
    def is_guard(self) -> bool:
        """Whether it is the state of a guard."""
        return self.is_own and self.has("inner_state", "condition_states")

    @property
    def is_rollback(self) -> bool:
        """Whether it is the state of a rollback."""
        return self.is_own and self.has("inner_state", "snapshot_params", "snapshot_state")

    @property
    def is_multi_steps(self) -> bool:
        """Whether it is the state of ``optax.MultiSteps``.

        Its ``skip_state`` is the last answer of a function, and read by nobody but reports.
        """
        return self.has("mini_step", "gradient_step", "acc_grads", "skip_state")

    @property
    def is_list(self) -> bool:
        """Whether its children are numbered."""
        return bool(self.children) and all(name.isdecimal() for name in self.children or ())

    def parts(self) -> Iterator[Node]:
        """Its children, less the snapshot of a rollback, which is a copy of a state."""
        for name, child in (self.children or {}).items():
            if not (self.is_rollback and name in ("snapshot_params", "snapshot_state")):
                yield child

    def walk(self) -> Iterator[Node]:
        """The node and all below it."""
        yield self
        for part in self.parts():
            yield from part.walk()

    def leaves(self) -> dict[Path, Node]:
        """All leaves below, by their path from here."""
        start = len(self.path)
        return {node.path[start:]: node for node in self.walk() if node.children is None}


def make_node(tree: Any, path: Path = (), place: Path = ()) -> Node:
    """The nodes of a pytree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)
    if len(flat) == 1 and flat[0][0] == ():
        return Node(tree, path, place, None)
    children = {name_of(key): child for (key, *_), child in flat}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # also those that hold nothing
        children = dict(zip(tree._fields, tree, strict=True))  # type: ignore[attr-defined]
    elif isinstance(tree, dict):
        children = {str(name): child for name, child in tree.items()}
    node = Node(tree, path, place, dict.fromkeys(children))  # type: ignore[arg-type]
    is_wrapper = node.is_own and node.has("inner_state")
    for name, child in children.items():
        below = place if is_wrapper and name == "inner_state" else (*place, name)
        node.children[name] = make_node(child, (*path, name), below)  # type: ignore[index]
    return node


def name_of(key: Any) -> str:
    """A key of a path as text."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """A state whose arrays are carried together; states inside of it are units of their own.

    Attributes:
      node: the state.
      leaves: its own arrays, by their path from there.
      open_fields: fields in which there are other states.
    """

    node: Node
    leaves: dict[Path, Node]
    open_fields: frozenset[str]

    def found_in(self, node: Node) -> dict[Path, Node] | None:
        """The same arrays below another node, if that may be the same state."""
        kind, other = self.node.state_type, node.state_type
        if kind is None or node.children is None or not self.leaves:
            return None
        if other is not None and (kind.__name__, kind.__module__) != (
            other.__name__,
            other.__module__,
        ):
            return None
        if not set(node.children) <= set(self.node.children or ()):
            return None
        free = {*self.open_fields, *(("skip_state",) if node.is_multi_steps else ())}
        found = node.leaves()
        own = {path for path in found if path[0] not in free}
        expected = {path for path in self.leaves if path[0] not in free}
        needed = {path: leaf for path, leaf in self.leaves.items() if path[0] != "skip_state"}
        if own != expected or not set(needed) <= set(found):
            return None
        if any(not same_shape(leaf, found[path]) for path, leaf in needed.items()):
            return None
        return {path: found[path] for path in needed}


def same_shape(one: Node, other: Node) -> bool:
    """Whether two leaves have the same shape, and both or neither are PRNG keys."""
    kinds = [
        jnp.issubdtype(getattr(node.source, "dtype", np.int32), jax.dtypes.prng_key)
        for node in (one, other)
    ]
    return np.shape(one.source) == np.shape(other.source) and kinds[0] == kinds[1]


def find_units(root: Node) -> tuple[list[Unit], list[Node]]:
    """All states below a node, and the leaves that are in none."""
    units: list[Unit] = []
    loose: list[Node] = []
    loose += _own_leaves(root, units, loose)
    return units, loose


def _own_leaves(node: Node, units: list[Unit], loose: list[Node]) -> list[Node]:
    """The leaves below a node that are in no state; the states are added to ``units``."""
    if node.state_type is not None:
        _add_unit(node, units, loose)
        return []
    if node.children is None:
        return [node]
    return [leaf for part in node.parts() for leaf in _own_leaves(part, units, loose)]


def _add_unit(node: Node, units: list[Unit], loose: list[Node]) -> None:
    """Adds a state and those within. What a wrapper of this library wraps is none of its own."""
    start, own, inner, wrapped = len(node.path), {}, [], set()
    for part in node.parts():
        if node.is_guard and part.path[-1] == "condition_states":
            continue  # these go by their names
        leaves = _own_leaves(part, inner, loose)
        if node.is_own and part.path[-1] == "inner_state":
            wrapped = {"inner_state"}
            loose += leaves
        else:
            own |= {leaf.path[start:]: leaf for leaf in leaves}
    open_fields = wrapped | {unit.node.path[start] for unit in inner}
    units += [Unit(node, own, frozenset(open_fields)), *inner]


def choose(pairs: Sequence[tuple[Node, Node]]) -> list[tuple[Node, Node]]:
    """Of possible pairs those of the most similar places, each node once, in order else."""
    chosen, seen = [], set()
    for new, old in sorted(pairs, key=lambda pair: -_similarity(*pair)):  # stable
        if id(new) not in seen and id(old) not in seen:
            chosen.append((new, old))
            seen |= {id(new), id(old)}
    return chosen


def _similarity(new: Node, old: Node) -> float:
    """Length of the common end of two places; infinite for the same one."""
    if new.place == old.place:
        return np.inf
    same = 0
    for one, other in zip(reversed(new.place), reversed(old.place), strict=False):
        if one != other:
            break
        same += 1
    return same


def _ancestors(root: Node, node: Node) -> list[Node]:
    """From the root to the node itself."""
    found = [root]
    for name in node.path[len(root.path) :]:
        found.append((found[-1].children or {})[name])
    return found


def is_in_own(root: Node, node: Node) -> bool:
    """Whether a node lies within a state of this library, and not in what that wraps."""
    line = _ancestors(root, node)
    return any(
        outer.is_own and child.path[-1] != "inner_state"
        for outer, child in itertools.pairwise(line)
    )


def owner_of(root: Node, leaf: Node) -> Node:
    """The innermost state that holds a leaf; a guess where there are dicts only."""
    line = _ancestors(root, leaf)
    typed = [node for node in line if node.state_type is not None]
    if typed:
        return typed[-1]
    owner = root
    for node, child in itertools.pairwise(line):
        holds_states = node.is_list or node.path[-1:] == ("inner_states",)
        if not (holds_states or child.path[-1].endswith(("state", "states"))):
            break
        owner = child
    return owner
