"""How a guard tells the host of a skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._core.axes import MeshAxes
from optax_guard._core.groups import Groups
from optax_guard._core.trees import FloatLeaves
from optax_guard.wrappers.guard_state import GuardState
from optax_guard.wrappers.reasons import SkipReason


def call_host(
    notify: Callable[..., Any],
    state: GuardState,
    gradients: FloatLeaves,
    groups: Groups,
    axes: MeshAxes,
) -> None:
    """Calls ``notify`` on the host, on a skip only, and from one device."""
    names = np.asarray(groups.row_names(gradients.names()), object)

    def call(step, reason, flags):
        if reason:  # under ``vmap`` every member gets here
            found = tuple(names[np.asarray(flags)])
            notify(int(step), SkipReason(int(reason)), found)

    is_mine = jnp.asarray(True)
    for name in axes.names:
        is_mine &= lax.axis_index(name) == 0
    lax.cond(
        state.last_step_skipped & is_mine,
        lambda *numbers: jax.debug.callback(call, *numbers),
        lambda *numbers: None,
        state.guard_step - 1,  # counted from 0, as in ``explain``
        state.skip_reason,
        state.last_fault_leaves,
    )
