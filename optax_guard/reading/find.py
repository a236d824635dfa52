"""Finds states in what a training loop calls its optimizer state, and what they sit in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_guard._core.calls import is_transformation
from optax_guard._core.find import is_own_state, lost_types
from optax_guard.wrappers.guard_state import GuardState
from optax_guard.wrappers.rollback import RollbackState

_SNAPSHOT = ("snapshot_params", "snapshot_state")


class Found(NamedTuple):
    """A state of this library, or of ``optax.MultiSteps``, and where it sits.

    Attributes:
      state: the state.
      keys: of the groups of ``optax.partition`` and parts of ``optax.named_chain`` around it,
        outermost first.
      around: states of this library, of ``optax.masked`` and of ``optax.MultiSteps`` that it sits
        in, outermost first.
    """

    state: Any
    keys: tuple[str, ...] = ()
    around: tuple[Any, ...] = ()

    @property
    def is_masked(self) -> bool:
        """Whether ``optax.masked`` or ``optax.partition`` hides leaves from it."""
        return any(isinstance(state, optax.MaskedState) for state in self.around)

    @property
    def multi_steps(self) -> tuple[optax.MultiStepsState, ...]:
        """States of ``optax.MultiSteps`` around it."""
        return tuple(state for state in self.around if isinstance(state, optax.MultiStepsState))


def find_states(tree: Any) -> list[Found]:
    """All states of this library at any depth of any pytree, outer ones first.

    The snapshot of a :func:`rollback`, a copy of states, is not looked into.
    """
    return [found for found in _walk(tree, (), ()) if is_own_state(found.state)]


def find_multi_steps(tree: Any) -> list[Found]:
    """All states of ``optax.MultiSteps``."""
    walk = _walk(tree, (), ())
    return [found for found in walk if isinstance(found.state, optax.MultiStepsState)]


def _walk(node: Any, keys: tuple[str, ...], around: tuple[Any, ...]) -> Iterator[Found]:
    if is_own_state(node):
        yield Found(node, keys, around)
        for child in _own_children(node):
            yield from _walk(child, keys, (*around, node))
    elif isinstance(node, (optax.MultiStepsState, optax.MaskedState)):
        if isinstance(node, optax.MultiStepsState):
            yield Found(node, keys, around)
        for child in node:
            yield from _walk(child, keys, (*around, node))
    elif isinstance(node, optax.transforms.PartitionState):
        for key, child in node.inner_states.items():
            yield from _walk(child, (*keys, str(key)), around)
    elif _is_named_chain(node):
        for key, child in node.items():
            yield from _walk(child, (*keys, str(key)), around)
    else:
        for child in jax.tree.leaves(node, is_leaf=lambda part: part is not node and _stops(part)):
            if child is not node and _stops(child):
                yield from _walk(child, keys, around)


def _own_children(state: Any) -> list[Any]:
    """What may hold other states; the conditions of a guard each by itself, without a key."""
    children = []
    for field, child in zip(state._fields, state, strict=True):
        if isinstance(state, RollbackState) and field in _SNAPSHOT:
            continue
        is_conditions = isinstance(state, GuardState) and field == "condition_states"
        children += list(child.values()) if is_conditions else [child]
    return children


def _stops(node: Any) -> bool:
    kinds = (optax.MultiStepsState, optax.MaskedState, optax.transforms.PartitionState)
    return is_own_state(node) or isinstance(node, kinds) or _is_named_chain(node)


def _is_named_chain(node: Any) -> bool:
    """Whether a node is a dict of several optimizer states, which are tuples."""
    if not isinstance(node, dict) or len(node) < 2:
        return False
    return all(isinstance(child, tuple) for child in node.values())


def find_outer_guards(opt_state: Any) -> list[Found]:
    """The guards that sit in no other guard; none is no error."""
    guards = [found for found in find_states(opt_state) if isinstance(found.state, GuardState)]
    return [found for found in guards if not any(isinstance(s, GuardState) for s in found.around)]


def no_state(opt_state: Any, what: str) -> ValueError:
    """The error for something without a state of the kind that is needed."""
    kind = type(opt_state).__name__
    if is_transformation(opt_state):
        return ValueError(
            f"No {what} was found in the given {kind}: that is the transformation. Pass its state, "
            "which tx.init(params) and tx.update(...) return."
        )
    return ValueError(
        lost_types(opt_state)
        or f"No {what} was found in the given {kind}. Wrap the optimizer in og.guard(...) or "
        "og.stabilize(...), and pass the optimizer state."
    )


def find_guards(opt_state: Any) -> list[Found]:
    """The guards in ``opt_state``, or an error that says what to do."""
    guards = [found for found in find_states(opt_state) if isinstance(found.state, GuardState)]
    if not guards:
        raise no_state(opt_state, "guard state")
    return guards


def first_leaf(value: Any) -> jax.Array:
    """An array, taken out of the Flax variable that may hold it."""
    return jnp.asarray(jax.tree.leaves(value)[0])


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
    refuse_traced(function, jax.tree.leaves(tree))


def refuse_traced(function: str, leaves: Sequence[Any]) -> None:
    """The same for single arrays."""
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise TypeError(
            f"og.{function} runs on the host and needs values, not tracers. Call it outside of "
            "jit, with what the jitted function returns; og.metrics and og.step_ok work inside."
        )
