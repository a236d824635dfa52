"""Carries a run over a change of its transformations. Host side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.calls import is_transformation
from optax_guard._core.find import optimizer_part
from optax_guard.reading._nodes import (
    Node,
    Path,
    Unit,
    choose,
    find_units,
    is_in_own,
    make_node,
    name_of,
    owner_of,
    same_shape,
)
from optax_guard.reading.find import refuse_tracers
from optax_guard.reading.names import condition_names, num_rows
from optax_guard.wrappers.guard_state import GuardState
from optax_guard.wrappers.rollback import RollbackState

_ROW_ENTRIES = ("last_fault_leaves", "unused_leaves", "leaf_norms", "last_fault_norms")


def adopt(new_state: Any, old_state: Any) -> Any:
    """Carries a run over a change of its transformations.

    For a guard or a loss scale put around an optimizer that has been trained for a while, a clip
    swapped, a condition added, other options::

        new_tx = og.guard(optax.adam(1e-3), skip_if=og.spike())
        opt_state = og.adopt(new_tx.init(params), old_state)

    Every state in ``new_state`` takes the arrays of the one in ``old_state`` that has the same type
    and shapes: moments, schedule counts, PRNG keys, the history of a clip. Where there are several,
    the one at the same place is preferred, wrappers of this library aside, and else the first. A
    guard takes the counters of the old one also if its rows or conditions differ, and the states of
    conditions by their names. What is new stays as ``init`` made it; a new :func:`rollback` takes
    its snapshot of what was carried over. Wrappers, clips and conditions of this library that are
    gone are dropped; to lose anything else is an error.

    Args:
      new_state: what ``init`` of the new transformation returned, given the present parameters.
      old_state: the state of the old one, or what Orbax or Flax restore of it without being told
        its types: dicts of fields, lists or dicts with the keys "0", "1". Those are told apart by
        the names of their fields and by shapes only, so that two clips which remember arrays of the
        same shapes are taken for the same.

    Returns:
      A state of the structure, dtypes and placement of ``new_state``. Arrays of ``old_state`` are
      not copied where they fit, so donate only one of the two.

    Raises:
      ValueError: if a state of an optimizer in ``old_state`` holds arrays and has no counterpart;
        it is named. Nothing is carried then.
      TypeError: if one of them is no state, or if called inside ``jit``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = jnp.zeros(2)
      >>> optimizer = optax.adam(0.1)
      >>> _, old = optimizer.update(jnp.ones(2), optimizer.init(params))
      >>> state = og.adopt(og.guard(optimizer).init(params), old)
      >>> int(og.unwrap(state)[0].count), int(state.guard_step)
      (1, 0)
    """
    refuse_tracers("adopt", (new_state, old_state))
    for name, state in (("new_state", new_state), ("old_state", old_state)):
        if state is None or is_transformation(state):
            raise TypeError(
                f"{name} must be an optimizer state, got a {type(state).__name__}. Call "
                "og.adopt(new_tx.init(params), old_state)."
            )
    new, old = make_node(new_state), make_node(old_state)
    carrier = _Carrier()
    carrier.carry(new, old)
    carrier.refuse_losses(old)
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: carrier.taken.get(tuple(map(name_of, path)), leaf), new_state
    )
    return _with_new_snapshots(state, carrier.has_snapshot)


class _Carrier:
    """Arrays on their way from one state to another.

    Attributes:
      taken: new arrays by their path in the new state.
      used: paths of arrays in the old state that have found a place.
      has_snapshot: paths of the rollbacks in the new state that took their snapshot over.
    """

    def __init__(self) -> None:
        self.taken: dict[Path, Any] = {}
        self.used: set[Path] = set()
        self.has_snapshot: set[Path] = set()

    def carry(self, new: Node, old: Node) -> None:
        """Finds a place for the arrays below ``old`` among those below ``new``."""
        units, loose = find_units(new)
        nodes = [node for node in old.walk() if not is_in_own(old, node)]
        self._carry_units([unit for unit in units if not unit.node.is_guard], nodes)
        guards = [unit.node for unit in units if unit.node.is_guard]
        olds = [node for node in nodes if node.is_guard]
        for guard, node in choose([(guard, node) for guard in guards for node in olds]):
            self._carry_guard(guard, node)
        free = [node for node in nodes if node.children is None and node.path not in self.used]
        alike = [(a, b) for a in loose for b in free if _is_alike(a, b)]
        for leaf, node in choose(alike):
            self._take(leaf, node)

    def _carry_units(self, units: Sequence[Unit], nodes: Sequence[Node]) -> None:
        found = {}
        for unit in units:
            for node in nodes:
                leaves = unit.found_in(node)
                if leaves is not None:
                    found[unit.node, node] = unit, leaves
        for pair in choose(list(found)):
            unit, leaves = found[pair]
            for path, leaf in leaves.items():
                self._take(unit.leaves[path], leaf)
            if unit.node.is_rollback:
                self._carry_snapshot(*pair)

    def _take(self, new: Node, old: Node) -> None:
        self.taken[new.path] = _like(old.source, new.source)
        self.used.add(old.path)

    def _carry_snapshot(self, new: Node, old: Node) -> None:
        olds, news = old.children or {}, new.children or {}
        params, old_params = (nodes["snapshot_params"].leaves() for nodes in (news, olds))
        if set(params) != set(old_params):
            return
        if all(same_shape(leaf, old_params[path]) for path, leaf in params.items()):
            for path, leaf in params.items():
                self._take(leaf, old_params[path])
            self.carry(news["snapshot_state"], olds["snapshot_state"])
            self.has_snapshot.add(new.path)

    def _carry_guard(self, new: Node, old: Node) -> None:
        """Counters and conditions; rows too if they are the same."""
        state, before = _as_guard(new), _as_guard(old)
        if np.shape(state.integers)[:-1] != np.shape(before.integers)[:-1]:
            return
        names = [name for name, entry in GuardState._entries.items() if entry.where is None]
        if state.stack_depths == before.stack_depths and num_rows(state) == num_rows(before):
            names += _ROW_ENTRIES
        values = {name: getattr(before, name) for name in names}
        pairs = _same_conditions(state, before)
        for name in ("skip_condition", "last_fault_condition"):
            values[name] = _renumber(values[name], pairs, len(before.condition_states))
        state = state._replace(**values)
        for field in ("integers", "numbers"):
            (leaf,) = (new.children or {})[field].leaves().values()
            self.taken[leaf.path] = _like(getattr(state, field), leaf.source)
        self._carry_conditions(new, old, pairs)

    def _carry_conditions(self, new: Node, old: Node, pairs: dict[int, int]) -> None:
        news, olds = _conditions(new), _conditions(old)
        for place, old_place in pairs.items():
            leaves = news[sorted(news)[place]].leaves()
            old_leaves = olds[sorted(olds)[old_place]].leaves()
            if set(leaves) == set(old_leaves) and all(
                same_shape(leaf, old_leaves[path]) for path, leaf in leaves.items()
            ):
                for path, leaf in leaves.items():
                    self._take(leaf, old_leaves[path])

    def refuse_losses(self, old: Node) -> None:
        """Raises if arrays of an optimizer have found no place."""
        lost: dict[str, list[str]] = {}
        for node in old.walk():
            is_lost = node.children is None and node.path not in self.used
            if is_lost and not is_in_own(old, node) and "skip_state" not in node.path:
                owner = owner_of(old, node)
                name = "/".join(node.path[len(owner.path) :]) or "an array"
                shown = f"{name} {tuple(np.shape(node.source))}"
                lost.setdefault(_title(owner), []).append(shown)
        if not lost:
            return
        texts = []
        for title, arrays in lost.items():
            more = f" and {len(arrays) - 3} more" if len(arrays) > 3 else ""
            texts.append(f"{title} with {', '.join(arrays[:3])}{more}")
        inside = ", such as old_state.inner_state" if hasattr(old.source, "inner_state") else ""
        raise ValueError(
            f"adopt found no place in new_state for what old_state holds: {'; '.join(texts)}. The "
            "new transformation has no such state, or one of other shapes. Make it with the same "
            "optimizer and parameters; or, to leave this behind on purpose, put optax.EmptyState() "
            "in its place in old_state, or pass only the part of old_state that is to be carried"
            f"{inside}."
        )


def _is_alike(new: Node, old: Node) -> bool:
    return new.place[-1:] == old.place[-1:] and same_shape(new, old)


def _as_guard(node: Node) -> GuardState:
    """A guard without what it wraps, also from a dict."""
    children = node.children or {}
    integers, numbers = (
        jax.tree.leaves(children[name].source)[0] for name in ("integers", "numbers")
    )
    stacks = children["stacks"].children if "stacks" in children else None
    conditions = dict.fromkeys(_conditions(node), ())
    return GuardState((), integers, numbers, conditions, dict.fromkeys(stacks or {}, ()))


def _conditions(guard: Node) -> dict[str, Node]:
    return (guard.children or {})["condition_states"].children or {}


def _same_conditions(new: GuardState, old: GuardState) -> dict[int, int]:
    """From the place of each new condition to that of the old one of its name, in order."""
    free = list(enumerate(condition_names(old)))
    pairs = {}
    for place, name in enumerate(condition_names(new)):
        found = next((item for item in free if item[1] == name), None)
        if found is not None:
            free.remove(found)
            pairs[place] = found[0]
    return pairs


def _renumber(old_index: Any, pairs: dict[int, int], num_old: int) -> jax.Array:
    """The new place of an old condition; -1 for none and for one that is gone."""
    table = np.full(num_old + 1, -1, np.int32)  # the last one is that of -1
    for new, old in pairs.items():
        table[old] = new
    return jnp.asarray(table)[jnp.asarray(old_index)]


def _like(value: Any, template: Any) -> Any:
    """An array with the dtype of another one, and on its devices unless it has devices."""
    dtype = getattr(template, "dtype", None)
    if not isinstance(value, jax.Array) and isinstance(template, jax.Array):
        value = jnp.asarray(value, dtype)
        is_spread = len(template.sharding.device_set) > 1
        return jax.device_put(value, template.sharding) if is_spread else value
    return value if dtype is None or value.dtype == dtype else value.astype(dtype)


def _title(owner: Node) -> str:
    where = "/".join(owner.path)
    at = f" at {where}" if where else ""
    if owner.state_type is not None:
        return f"{owner.state_type.__name__}{at}"
    if owner.children is None:
        return f"an array{at}"
    return f"a state of the fields {', '.join(owner.children)}{at}"


def _with_new_snapshots(state: Any, has_snapshot: set[Path]) -> Any:
    """Lets rollbacks that have no snapshot of the old run take one of what was carried over."""

    def take(path, node):
        if isinstance(node, RollbackState) and tuple(map(name_of, path)) not in has_snapshot:
            copies = jax.tree.map(jnp.copy, optimizer_part(node.inner_state))
            return node._replace(snapshot_state=copies)
        return node

    return jax.tree_util.tree_map_with_path(
        take, state, is_leaf=lambda node: isinstance(node, RollbackState)
    )
