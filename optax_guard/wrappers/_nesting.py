"""What sits inside a guard and cannot do there what it is for.

What would be lost in silence is an error; what is legal and futile is said once, when the state is
made. A guard sees what is inside it, and nothing of what it stands in.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import optax

from optax_guard._core.find import (
    factory_name,
    is_clip_state,
    is_own_state,
    is_wrapper_state,
    own_states,
)
from optax_guard._core.groups import Groups
from optax_guard._core.inner import clip_behind_learning_rate, factory_of, parts_of
from optax_guard._core.states import RuleState
from optax_guard.wrappers.guard_state import GuardState

_OPTAX_CLIPS = ("clip", "clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip")


def check_nesting(inner: optax.GradientTransformation, inner_state: Any) -> None:
    """Refuses and warns.

    Raises:
      ValueError: if a wrapper that acts on bad steps sits where it sees none.
    """
    for state in own_states(inner_state):
        if is_wrapper_state(state) and not isinstance(state, GuardState):
            name = factory_name(type(state))
            raise ValueError(
                f"{name} inside of a guard would never see a bad step: the guard skips those, and "
                f"all that is in it stays as it was. Write og.{name}(og.guard(optimizer)) instead "
                f"of og.guard(og.{name}(optimizer))."
            )
    for text in _futile(inner, inner_state):
        warnings.warn(text, stacklevel=5)


def warn_of_no_stack(params: Any, groups: Groups) -> None:
    """Warns if ``stacked`` names no array at all, though all of them are there to be named."""
    is_masked = any(
        isinstance(node, optax.MaskedNode)
        for node in jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    )
    if groups.depths and not any(groups.depths) and not is_masked:
        warnings.warn(
            "stacked returned False for every array, so no layer will be named by its number. The "
            "paths that it gets are like those of og.layer_norms(state, params).",
            stacklevel=5,
        )


def _futile(inner: optax.GradientTransformation, inner_state: Any) -> Iterator[str]:
    in_a_row = list(_in_a_row(inner_state))
    if isinstance(_behind_clip(inner_state), GuardState):
        yield (
            "A guard around a guard has nothing left to skip; one is enough, and counts every "
            "step. Write og.guard(optimizer, ...) with the conditions of both."
        )
    if any(isinstance(state, optax.ApplyIfFiniteState) for state in in_a_row):
        yield (
            "optax.apply_if_finite inside of a guard has nothing left to skip, and costs copies of "
            "the optimizer's state. Leave it out."
        )
    first = in_a_row[0] if in_a_row else None
    if type(first).__name__ in ("ZeroNansState", "ZeroNonfiniteState"):
        name = "optax.zero_nans" if isinstance(first, optax.ZeroNansState) else "zero_nonfinite"
        yield (
            f"{name} as the first thing inside of a guard has nothing left to zero: the guard "
            "skips such steps. Leave it out; or, to zero instead of skipping, leave out the guard."
        )
    # Around optax.identity a guard is how to measure gradients, and no mistake in itself.
    factories = [factory_of(part) for part in parts_of(inner.update)]
    if factories and all(_is_clip(factory, inner_state) for factory in factories):
        yield (
            "This guard holds clips only, so a skipped step reaches the optimizer behind it as "
            "zeros, which move momentum and schedules. Put the optimizer inside: "
            "og.guard(optax.chain(clip, optimizer))."
        )
    misplaced = clip_behind_learning_rate(inner)
    if misplaced is not None:
        yield (
            f"{misplaced} stands behind the learning rate, so it limits steps and not gradients, "
            "which the optimizer has taken into its moments uncut. Write "
            f"optax.chain({misplaced}(...), optimizer); to limit steps, put it in front of "
            "optax.scale_by_learning_rate, or use og.clip_by_relative_change."
        )


def _is_clip(factory: str, inner_state: Any) -> bool:
    if factory.startswith("optax."):
        return factory.removeprefix("optax.") in _OPTAX_CLIPS
    parts = inner_state if type(inner_state) is tuple else (inner_state,)
    names = [part.factory for part in parts if isinstance(part, RuleState)]
    return factory in names


def _behind_clip(state: Any) -> Any:
    """What a clip that wraps the optimizer wraps; others as they are."""
    is_wrapping = is_own_state(state) and is_clip_state(state) and "inner_state" in state._fields
    return state.inner_state if is_wrapping else state


def _in_a_row(state: Any) -> Iterator[Any]:
    """The states that see the same gradients one after the other; no groups, no windows."""
    if type(state) is tuple:
        for part in state:
            yield from _in_a_row(part)
        return
    yield state
    if _behind_clip(state) is not state:
        yield from _in_a_row(_behind_clip(state))
