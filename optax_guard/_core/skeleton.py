"""Which states a state is made of, whatever arrays they hold: what tells two optimizers apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from optax_guard._core.find import is_own_state

Skeleton = tuple[Any, ...]


def skeleton(state: Any) -> Skeleton | None:
    """Nested names of the states in a state; None where there is none.

    Those of conditions are left out: a guard looks at them itself, and names them.
    """
    if isinstance(state, dict):
        parts = [(str(key), found) for key, part in state.items() if (found := skeleton(part))]
        return tuple(sorted(parts)) or None
    if not isinstance(state, (tuple, list)):
        return None
    kind = type(state)
    names = getattr(kind, "_fields", range(len(state)))
    pairs = zip(names, state, strict=True)
    found = tuple(filter(None, (skeleton(part) for name, part in pairs if name not in _OTHERS)))
    is_state = hasattr(kind, "_fields") and (kind.__name__.endswith("State") or is_own_state(state))
    return (kind.__name__, *found) if is_state else found or None


_OTHERS = ("condition_states",)


def skeleton_of_init(init: Callable[[Any], Any], params: Any) -> Skeleton | None:
    """What ``init`` would make; None if it cannot be found out."""
    state = shapes_of_init(init, params)
    return None if state is None else skeleton(state)


def shapes_of_init(init: Callable[[Any], Any], params: Any) -> Any:
    """The state that ``init`` would make, without values; None if it cannot be found out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are said when a state is made
        try:
            return jax.eval_shape(init, params)
        except Exception:  # of whatever is inside: a check must not break what works without it
            return None


def difference(own: Skeleton, other: Skeleton | None) -> str:
    """In words the first place where two skeletons differ."""
    owns, others = list(_names(own)), list(_names(other or ()))
    place = next((i for i, (a, b) in enumerate(zip(owns, others, strict=False)) if a != b), None)
    if place is None:
        place = min(len(owns), len(others))
    mine, theirs = (names[place] if place < len(names) else "nothing" for names in (owns, others))
    return f"{theirs} where its own has {mine}"


def _names(parts: Any) -> Iterator[str]:
    if isinstance(parts, str):
        yield parts
        return
    for part in parts:
        yield from _names(part)


def same_arrays(one: Any, other: Any) -> bool:
    """Whether two states have the same structure and shapes."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (one, other)]
    return shapes[0] == shapes[1]
