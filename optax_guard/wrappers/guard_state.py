"""The state of a guard, and what its packed entries mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from optax_guard._core.states import Entry, PackedState, flag, norm
from optax_guard._core.sums import MeasureCall


class _GuardArrays(NamedTuple):
    inner_state: Any
    integers: Any
    numbers: Any
    condition_states: Any
    stacks: Any


def rows_of(state: Any, start: int, number: int) -> slice:
    """Where the ``number``-th run of rows is, in a vector whose runs begin at ``start``."""
    count = (np.shape(jax.tree.leaves(state.numbers)[0])[-1] - 1) // 2
    return slice(start + number * count, start + (number + 1) * count)


_NUM_COUNTERS = 10


class GuardState(PackedState, _GuardArrays):
    """State of :func:`guard`: that of the wrapped optimizer, and two arrays.

    They take 44 bytes, 16 for each row (float leaf, or layer of a stacked one), and 4 for each
    float leaf of parameters and inner state.

    Attributes:
      inner_state: state of the wrapped optimizer.
      integers: int32, packed.
      numbers: float32, packed.
      condition_states: ``{"place name": state}`` of each condition in ``skip_if``.
      stacks: ``{"leaf:depth ...": ()}``, which leaves stack layers, and along how many leading
        axes; empty for none. No array, so that it is known inside ``jit``.
    """

    __slots__ = ()

    guard_step = Entry("integers", "int32, calls so far, skipped ones included")
    skipped_total = Entry("integers", "int32, skipped calls so far")
    skipped_in_a_row = Entry("integers", "int32, skipped calls since the last accepted one")
    last_step_skipped = flag("integers", "bool, whether the last call was skipped")
    skip_reason = Entry("integers", "int32, bits of the last call's :class:`SkipReason`")
    skip_condition = Entry(
        "integers", "int32, which of ``skip_if`` was the first to reject the last call; -1: none"
    )
    gave_up = flag("integers", "bool, latched by too many skips in a row, or by reason 16")
    last_fault_step = Entry("integers", "int32, ``guard_step`` at the last skip; 0: none yet")
    last_fault_reason = Entry("integers", "int32, reason of the last skip")
    last_fault_condition = Entry("integers", "int32, ``skip_condition`` of the last skip")
    last_fault_leaves = Entry(
        "integers",
        "bool ``[rows]``, which gradients were non-finite at the last skip",
        where=lambda state: rows_of(state, _NUM_COUNTERS, 0),
        read=lambda state, stored: stored != 0,
    )
    unused_leaves = Entry(
        "integers",
        "bool ``[rows]``, which gradients reach no output of the wrapped optimizer",
        where=lambda state: rows_of(state, _NUM_COUNTERS, 1),
        read=lambda state, stored: stored != 0,
    )
    initially_nonfinite = Entry(
        "integers",
        "bool for each float leaf of inner state and parameters: not finite at ``init``, such as "
        "a best loss of +inf or a mask of -inf; it never counts as a fault",
        where=lambda state: slice(rows_of(state, _NUM_COUNTERS, 2).start, None),
        read=lambda state, stored: stored != 0,
    )
    grad_norm = norm("numbers", "float32, global norm of the last gradients, before any clip")
    leaf_norms = norm(
        "numbers",
        "float32 ``[rows]``, norms of the last gradients, leaf by leaf in order, or layer by "
        "layer where a leaf stacks layers; 0 for those that are unused",
        where=lambda state: rows_of(state, 1, 0),
    )
    last_fault_norms = norm(
        "numbers",
        "float32 ``[rows]``, the same at the last skip",
        where=lambda state: rows_of(state, 1, 1),
    )

    @property
    def stack_depths(self) -> dict[int, int]:
        """Along how many leading axes an array stacks layers, by the place of its leaf."""
        pairs = [pair.split(":") for key in self.stacks for pair in key.split()]
        return {int(leaf): int(depth) for leaf, depth in pairs}


def stacks_of(depths: tuple[int, ...]) -> dict[str, tuple[()]]:
    """``GuardState.stacks`` from the depth of each leaf."""
    pairs = [f"{leaf}:{depth}" for leaf, depth in enumerate(depths) if depth]
    return {" ".join(pairs): ()} if pairs else {}


def unused_rows(call: MeasureCall) -> np.ndarray:
    """Which rows are not measured, as is known when the step is traced."""
    return np.repeat(~np.asarray(call.is_used, np.bool_), call.groups.rows)
