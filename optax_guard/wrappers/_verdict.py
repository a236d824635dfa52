"""What the guards inside a wrapped optimizer decided about the last step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._core.find import is_wrapper_state, states_of_type
from optax_guard.wrappers.guard_state import GuardState


class Verdict(NamedTuple):
    """Both false where no guard was asked, as when a loss scale has overflowed.

    Attributes:
      is_skipped: bool, any guard skipped the step.
      is_healthy: bool, a guard accepted the step and none skipped it.
    """

    is_skipped: jax.Array
    is_healthy: jax.Array


def require_guard(inner_state: Any, name: str) -> None:
    """Raises unless there is a guard in ``inner_state``."""
    if not states_of_type(inner_state, GuardState):
        raise ValueError(
            f"{name} acts on what a guard decides, but there is no guard inside of it. Write "
            f"og.{name}(og.guard(optimizer)) or og.{name}(og.stabilize(optimizer))."
        )


def verdict(old_state: Any, new_state: Any) -> Verdict:
    """The guards' decision in the step that led from one state to the other."""
    is_skipped = has_acted = jnp.asarray(False)
    olds, news = (states_of_type(state, GuardState) for state in (old_state, new_state))
    for old, new in zip(olds, news, strict=True):
        # A guard that was not called keeps the verdict of an earlier step.
        acted = new.guard_step != old.guard_step
        has_acted |= acted
        is_skipped |= acted & new.last_step_skipped
    return Verdict(is_skipped, has_acted & ~is_skipped)


def guard_inside(state: Any) -> GuardState | None:
    """The guard that every bad step that is handed on to this state meets first."""
    while is_wrapper_state(state):
        if isinstance(state, GuardState):
            return state
        state = state.inner_state
    return None
