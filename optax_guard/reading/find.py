"""Finds states in what a training loop calls its optimizer state, and what hides leaves of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.core import Tracer

from optax_guard._core.find import is_own_state
from optax_guard.wrappers.guard import GuardState


class Found(NamedTuple):
    """A state, and whether ``optax.masked`` or ``optax.partition`` hides leaves from it."""

    state: Any
    is_masked: bool


def find_states(
    tree: Any, *, is_masked: bool = False, not_inside: tuple[type, ...] = ()
) -> list[Found]:
    """All states of this library at any depth of any pytree, outer ones first.

    Args:
      tree: any pytree.
      is_masked: whether ``tree`` itself comes from inside a mask.
      not_inside: types of states that are not looked into.
    """

    def is_inner(node):
        return node is not tree and (is_own_state(node) or isinstance(node, optax.MaskedState))

    found = [Found(tree, is_masked)] if is_own_state(tree) else []
    if isinstance(tree, not_inside):
        return found
    is_masked = is_masked or isinstance(tree, optax.MaskedState)
    for node in jax.tree.leaves(tree, is_leaf=is_inner):
        if is_inner(node):
            found += find_states(node, is_masked=is_masked, not_inside=not_inside)
    return found


def find_outer_guards(opt_state: Any) -> list[Found]:
    """The guards that sit in no other guard; none is no error."""
    states = find_states(opt_state, not_inside=(GuardState,))
    return [found for found in states if isinstance(found.state, GuardState)]


def refuse_batched(function: str, count: Any) -> None:
    """Raises if a scalar field of a state has got a batch axis from ``jax.vmap``."""
    if np.ndim(count):
        raise ValueError(
            f"og.{function} reads the state of one model, but this one has a batch axis of shape "
            f"{np.shape(count)}. Pick a member of the ensemble first, with its parameters: "
            "jax.tree.map(lambda leaf: leaf[0], (opt_state, params))."
        )


def refuse_tracers(function: str, tree: Any) -> None:
    """Raises inside ``jit`` for a function of the host."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"og.{function} runs on the host and needs values, not tracers. Call it outside of "
            "jit, with what the jitted function returns; og.metrics and og.step_ok work inside."
        )


def find_guards(opt_state: Any) -> list[Found]:
    """The guards in ``opt_state``, or an error that says what to do."""
    guards = [found for found in find_states(opt_state) if isinstance(found.state, GuardState)]
    if not guards:
        raise ValueError(
            f"No guard state was found in the given {type(opt_state).__name__}. Wrap the "
            "optimizer in og.guard(...) or og.stabilize(...), and pass the optimizer state."
        )
    return guards
