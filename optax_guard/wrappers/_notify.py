"""How a guard tells the host of a skip."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax

from optax_guard._core.axes import MeshAxes
from optax_guard._core.groups import Groups
from optax_guard._core.trees import FloatLeaves
from optax_guard.wrappers.guard_state import GuardState
from optax_guard.wrappers.reasons import SkipReason

_IS_QUIET = contextvars.ContextVar("is_quiet", default=False)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No guard calls in a step that is traced for its verdict only."""
    token = _IS_QUIET.set(True)
    try:
        yield
    finally:
        _IS_QUIET.reset(token)


def call_host(
    notify: Callable[..., Any],
    state: GuardState,
    gradients: FloatLeaves,
    groups: Groups,
    axes: MeshAxes,
) -> GuardState:
    """Calls ``notify`` on the host, on a skip only, and from one device; returns the state.

    Outside of ``shard_map`` and ``pmap``, where types and part of the axes forbid it, the call
    hands the state's numbers back, which makes it data to JAX. For a call that returns nothing JAX
    leaves its fast way into compiled functions, at every step.
    """
    if _IS_QUIET.get():
        return state
    names = np.asarray(groups.row_names(gradients.names()), object)

    def call(step, reason, flags):
        if reason:  # under ``vmap`` every member gets here
            found = tuple(names[np.asarray(flags)])
            notify(int(step), SkipReason(int(reason)), found)

    def call_and_return(integers, *told):
        call(*told)
        return np.asarray(integers)

    step = state.guard_step - 1  # counted from 0, as in ``explain``
    told = (step, state.skip_reason, state.last_fault_leaves)
    if not (axes.names or jax.sharding.get_abstract_mesh().manual_axes):
        outline = jax.ShapeDtypeStruct(state.integers.shape, state.integers.dtype)

        def tell(*operands):
            return jax.pure_callback(call_and_return, outline, *operands, vmap_method="sequential")

        operands = (state.integers, *told)
        integers = lax.cond(state.last_step_skipped, tell, lambda first, *_: first, *operands)
        return state._replace(integers=integers)
    is_mine = state.last_step_skipped
    for name in axes.names:
        is_mine &= lax.axis_index(name) == 0
    lax.cond(is_mine, lambda *told: jax.debug.callback(call, *told), lambda *_: None, *told)
    return state
