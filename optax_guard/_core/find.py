"""Finds the states of this library in whatever a training loop calls its optimizer state."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import jax

State = TypeVar("State")
_PACKAGE = __name__.partition(".")[0]


def is_own_state(node: Any) -> bool:
    """True for a NamedTuple that this library defines."""
    module = type(node).__module__
    is_own = module == _PACKAGE or module.startswith(_PACKAGE + ".")
    return is_own and isinstance(node, tuple) and hasattr(node, "_fields")


def is_wrapper_state(node: Any) -> bool:
    """True for the state of a wrapper of this library, such as ``guard``.

    A clip that knows the optimizer behind it is none: its history belongs to the run.
    """
    return is_own_state(node) and "inner_state" in node._fields and not is_clip_state(node)


def is_clip_state(node: Any) -> bool:
    """True for the state of a rule that cuts or sets norms."""
    return is_own_state(node) and hasattr(type(node), "recent_clip_rate")


def own_states(tree: Any) -> list[Any]:
    """All states of this library at any depth of any pytree, outer ones first."""
    found = [tree] if is_own_state(tree) else []
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: node is not tree and is_own_state(node))
    for node in nodes:
        if node is not tree and is_own_state(node):
            found += own_states(node)
    return found


def lost_types(tree: Any) -> str:
    """What to do about states of this library that have become dicts of their fields; else "".

    Checkpoints restored without a target are that, and ``nnx.state`` of an optimizer.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    if own_states(tree) or not any(map(_is_packed_vector, flat)):
        return ""
    return (
        f"The given {type(tree).__name__} holds a state as dicts of its fields, as a checkpoint is "
        "restored without a target. Restore it into tx.init(params), or pass "
        "og.adopt(tx.init(params), restored); with Flax NNX pass optimizer.opt_state."
    )


def _is_packed_vector(item: tuple[Any, Any]) -> bool:
    return "integers" in jax.tree_util.keystr(item[0], simple=True, separator="/").split("/")


def states_of_type(tree: Any, state_type: type[State]) -> list[State]:
    """Those of one type."""
    return [state for state in own_states(tree) if isinstance(state, state_type)]


def factory_name(state_type: type) -> str:
    """``"dynamic_loss_scale"`` for ``DynamicLossScaleState``."""
    if hasattr(state_type, "factory"):
        return state_type.factory
    return re.sub(r"(?<!^)(?=[A-Z])", "_", state_type.__name__.removesuffix("State")).lower()


def optimizer_part(state: Any) -> Any:
    """``state`` without the bookkeeping of this library's wrappers: what they wrap instead."""

    def strip(node):
        return optimizer_part(node.inner_state) if is_wrapper_state(node) else node

    return jax.tree.map(strip, state, is_leaf=is_wrapper_state)


def with_optimizer_part(state: Any, part: Any) -> Any:
    """``state`` with ``part``, which has the structure that ``optimizer_part`` gives, in place."""

    def insert(node, new):
        if not is_wrapper_state(node):
            return new
        return node._replace(inner_state=with_optimizer_part(node.inner_state, new))

    return jax.tree.map(insert, state, part, is_leaf=is_wrapper_state)
