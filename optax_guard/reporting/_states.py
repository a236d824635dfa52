"""Finds the states of this library in whatever a training loop calls its optimizer state."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

State = TypeVar("State")
_PACKAGE = __name__.partition(".")[0]


def is_own_state(node: Any) -> bool:
    """True for a NamedTuple that this library defines."""
    module = type(node).__module__
    is_own = module == _PACKAGE or module.startswith(_PACKAGE + ".")
    return is_own and isinstance(node, tuple) and hasattr(node, "_fields")


def own_states(tree: Any) -> list[Any]:
    """All states of this library at any depth of any pytree, outer ones first."""
    found = [tree] if is_own_state(tree) else []
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: node is not tree and is_own_state(node))
    for node in nodes:
        if node is not tree and is_own_state(node):
            found += own_states(node)
    return found


def states_of_type(tree: Any, state_type: type[State]) -> list[State]:
    """Those of one type."""
    return [state for state in own_states(tree) if isinstance(state, state_type)]
