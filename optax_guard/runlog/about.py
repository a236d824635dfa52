"""What the numbers of a record mean, which is said once a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._core.find import factory_name, is_clip_state
from optax_guard.reading.clips import OF_UPDATES, scope_of
from optax_guard.reading.find import Found, find_outer_guards, find_states
from optax_guard.reading.metrics import places_of
from optax_guard.reading.names import NamedLeaf, condition_names, guard_rows
from optax_guard.wrappers.guard_state import GuardState


class About(NamedTuple):
    """What is said once about all records of a run.

    Attributes:
      leaf_names: of the elements of ``leaf_norms``.
      conditions: names of the conditions of each guard that has some, by the place of its metrics,
        such as ``"guard/"``.
      windows: places of the states inside ``optax.MultiSteps``, called once a window.
      uniform: places of the clips whose factor is that of the whole gradient.
      partial: places of those that cut some of it, or each part by a factor of its own, before the
        optimizer gets it.
      scopes: ``"leaf"`` or ``"unit"``, by the place of each clip that is not global.
    """

    leaf_names: tuple[str, ...] = ()
    conditions: dict[str, tuple[str, ...]] = {}  # noqa: RUF012 - never changed
    windows: tuple[str, ...] = ()
    uniform: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    scopes: dict[str, str] = {}  # noqa: RUF012 - never changed


def describe(
    opt_state: Any,
    indexed: Any,
    owned: Sequence[Sequence[int]],
    params: Sequence[NamedLeaf] | None,
) -> About:
    """Looks at a state of which nothing but structure and shapes counts.

    Args:
      opt_state: the state.
      indexed: the same with its leaves counted.
      owned: for each state of this library which leaves are its packed vectors.
      params: names and shapes of the parameters, or None.
    """
    states = find_states(opt_state)
    places = places_of(states, "guard/")
    names: list[str] = []
    for guard in find_outer_guards(opt_state):
        names += guard_rows(guard, params).names
    pairs = list(zip(places, states, strict=True))
    guards = [(place, found) for place, found in pairs if isinstance(found.state, GuardState)]
    conditions = {place: condition_names(found.state) for place, found in guards}
    leaves, counted = jax.tree.leaves(opt_state), find_states(indexed)
    ours = {place for own in owned for place in own}
    foreign = [i for i, leaf in enumerate(leaves) if i not in ours and _is_tensor(leaf)]
    clips = [
        (place, found, known)
        for (place, found), known in zip(pairs, counted, strict=True)
        if is_clip_state(found.state)
    ]
    scopes = {place: scope_of(found.state) for place, found, _ in clips}
    seen = {place: _seen_by(found, known, foreign) for place, found, known in clips}
    return About(
        leaf_names=tuple(names),
        conditions={place: found for place, found in conditions.items() if found},
        windows=tuple(place for place, found in pairs if found.multi_steps),
        uniform=tuple(p for p in seen if seen[p] == "all" and scopes[p] == "global"),
        partial=tuple(
            p for p in seen if seen[p] == "some" or (seen[p] == "all" and scopes[p] != "global")
        ),
        scopes={place: scope for place, scope in scopes.items() if scope != "global"},
    )


def _is_tensor(leaf: Any) -> bool:
    return np.ndim(leaf) > 0 and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _seen_by(clip: Found, indexed: Found, foreign: Sequence[int]) -> str:
    """``"all"`` or ``"some"`` of the gradients of a guard, or ``"updates"``."""
    guard = next((state for state in clip.around[::-1] if isinstance(state, GuardState)), None)
    if guard is None:
        return "some" if clip.is_masked or clip.multi_steps else "all"
    depth = next(i for i, state in enumerate(clip.around) if state is guard)
    if any(isinstance(s, (optax.MaskedState, optax.MultiStepsState)) for s in clip.around[depth:]):
        return "some"
    if factory_name(type(clip.state)) in OF_UPDATES:
        return "updates"
    first = min(jax.tree.leaves(indexed.state))
    start = min(jax.tree.leaves(indexed.around[depth]))
    return "updates" if any(start <= place < first for place in foreign) else "all"
