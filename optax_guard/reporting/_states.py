"""Finds states in what a training loop calls its optimizer state, and what hides leaves of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from optax_guard._states import is_own_state
from optax_guard.guarding.guard import GuardState


class Found(NamedTuple):
    """A state, and whether ``optax.masked`` or ``optax.partition`` hides leaves from it."""

    state: Any
    is_masked: bool


def find_states(tree: Any, *, is_masked: bool = False) -> list[Found]:
    """All states of this library at any depth of any pytree, outer ones first."""

    def is_inner(node):
        return node is not tree and (is_own_state(node) or isinstance(node, optax.MaskedState))

    found = [Found(tree, is_masked)] if is_own_state(tree) else []
    is_masked = is_masked or isinstance(tree, optax.MaskedState)
    for node in jax.tree.leaves(tree, is_leaf=is_inner):
        if is_inner(node):
            found += find_states(node, is_masked=is_masked)
    return found


def find_guards(opt_state: Any) -> list[Found]:
    """The guards in ``opt_state``, or an error that says what to do."""
    guards = [found for found in find_states(opt_state) if isinstance(found.state, GuardState)]
    if not guards:
        raise ValueError(
            f"No guard state was found in the given {type(opt_state).__name__}. Wrap the "
            "optimizer in og.guard(...) or og.stabilize(...), and pass the optimizer state."
        )
    return guards
