"""What the numbers of a record mean, which is said once a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._core.find import factory_name, is_clip_state
from optax_guard.reading.find import Found, find_outer_guards, find_states
from optax_guard.reading.metrics import metrics
from optax_guard.reading.names import NamedLeaf, condition_names, guard_rows
from optax_guard.wrappers.clip_by_update_ratio import ClipByUpdateRatioState
from optax_guard.wrappers.guard_state import GuardState

# Rules that by default give each array, unit or element a factor of its own, or see no gradient.
_PER_GROUP = (
    "clip_by_rms",
    "clip_by_param_norm",
    "clip_by_relative_change",
    "clip_by_max_ema",
    "clip_params",
    "clip_params_by_norm",
)


class About(NamedTuple):
    """What is said once about all records of a run.

    Attributes:
      leaf_names: of the elements of ``leaf_norms``.
      conditions: names of the conditions of each guard that has some, by the place of its metrics,
        such as ``"guard/"``.
      windows: places of the states inside ``optax.MultiSteps``, called once a window.
      uniform: places of the clips whose factor is that of the whole gradient.
    """

    leaf_names: tuple[str, ...] = ()
    conditions: dict[str, tuple[str, ...]] = {}  # noqa: RUF012 - never changed
    windows: tuple[str, ...] = ()
    uniform: tuple[str, ...] = ()


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
    states, places = find_states(opt_state), _places(opt_state, owned)
    names: list[str] = []
    for guard in find_outer_guards(opt_state):
        names += guard_rows(guard, params).names
    pairs = list(zip(places, states, strict=True))
    guards = [(place, found) for place, found in pairs if isinstance(found.state, GuardState)]
    conditions = {place: condition_names(found.state) for place, found in guards}
    leaves, counted = jax.tree.leaves(opt_state), find_states(indexed)
    ours = {place for own in owned for place in own}
    foreign = [i for i, leaf in enumerate(leaves) if i not in ours and _is_tensor(leaf)]
    return About(
        leaf_names=tuple(names),
        conditions={place: found for place, found in conditions.items() if found},
        windows=tuple(place for place, found in pairs if found.multi_steps),
        uniform=tuple(
            place
            for (place, found), known in zip(pairs, counted, strict=True)
            if is_clip_state(found.state)
            and _has_one_factor(found.state)
            and _sees_all(found, known, foreign)
        ),
    )


def _places(opt_state: Any, owned: Sequence[Sequence[int]]) -> list[str]:
    """What :func:`metrics` puts before the fields of each state."""
    leaves, treedef = jax.tree.flatten(opt_state)
    marked: list[Any] = [None] * len(leaves)
    for number, own in enumerate(owned):
        for place in own:
            dtype = jnp.result_type(leaves[place])
            marked[place] = np.full(np.shape(leaves[place]), number, dtype)
    found: dict[int, str] = {}
    for name, value in metrics(treedef.unflatten(marked)).items():
        value = np.asarray(value)
        if value.dtype != bool:  # a flag does not tell one number from another
            found.setdefault(int(value), name[: name.rindex("/") + 1])
    return [found.get(number, "") for number in range(len(owned))]


def _is_tensor(leaf: Any) -> bool:
    return np.ndim(leaf) > 0 and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _has_one_factor(state: Any) -> bool:
    """Whether a clip scales all that it sees by the same factor, as far as its state tells."""
    if isinstance(state, ClipByUpdateRatioState):
        return True
    if factory_name(type(state)) in _PER_GROUP:
        return False
    history = jax.tree.leaves(state.history)
    is_global = not isinstance(state.history, tuple) and all(np.ndim(leaf) == 1 for leaf in history)
    return is_global or not history


def _sees_all(clip: Found, indexed: Found, foreign: Sequence[int]) -> bool:
    """Whether a clip gets all gradients of a guard, and not some of them, or updates."""
    guard = next((state for state in clip.around[::-1] if isinstance(state, GuardState)), None)
    if guard is None:
        return not clip.is_masked and not clip.multi_steps
    depth = next(i for i, state in enumerate(clip.around) if state is guard)
    if any(isinstance(s, (optax.MaskedState, optax.MultiStepsState)) for s in clip.around[depth:]):
        return False
    first = min(jax.tree.leaves(indexed.state))
    start = min(jax.tree.leaves(indexed.around[depth]))
    return not any(start <= place < first for place in foreign)
