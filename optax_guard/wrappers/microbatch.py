"""Leaves a bad micro-batch out of the mean that ``optax.MultiSteps`` accumulates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._core.axes import AxisName, resolve_axes
from optax_guard._core.groups import make_groups
from optax_guard._core.measure import measure
from optax_guard._core.states import Entry, PackedState, flag, norm
from optax_guard._core.trees import float_leaves


class _MicrobatchArrays(NamedTuple):
    integers: Any
    numbers: Any


class SkipMicrobatchState(PackedState, _MicrobatchArrays):
    """What :func:`skip_microbatch` saw of the last micro-batch; ``MultiStepsState.skip_state``.

    Attributes:
      integers: int32, packed.
      numbers: float32, packed.
    """

    __slots__ = ()
    microbatch_skipped = flag("integers", "bool, whether it was left out")
    microbatch_bad_leaves = Entry(
        "integers",
        "bool ``[float leaves]``, which of them were non-finite",
        where=lambda state: slice(1, None),
        read=lambda state, stored: stored != 0,
    )
    microbatch_norm = norm(
        "numbers", "float32, global norm of its gradients; not finite if it was left out"
    )
    microbatch_leaf_norms = norm(
        "numbers",
        "float32 ``[float leaves]``, norms of the leaves in order",
        where=lambda state: slice(1, None),
    )


def skip_microbatch(
    updates: Any, gradient_step: Any, params: Any, *, axis_name: AxisName = None
) -> tuple[jax.Array, SkipMicrobatchState]:
    """Tells ``optax.MultiSteps`` to leave a micro-batch with a NaN or Inf out of its window.

    A rejected micro-batch changes neither the accumulated mean nor ``mini_step``: the window
    simply waits for one micro-batch more. So every update is the mean of ``every_k_schedule``
    finite micro-batches, the first one included, and no good gradient is lost.

    Which nesting to use:

    * ``MultiSteps(guard(optimizer), k, should_skip_update_fn=skip_microbatch)``: this function
      judges micro-batches, the guard judges the mean of a window, which is what its ``skip_if``
      conditions and its count of skips should see. A window whose mean the guard rejects is lost,
      and only that one.
    * ``guard(MultiSteps(optimizer, k))``: the guard judges every micro-batch and leaves the bad
      ones out by itself; this function is not needed. Its conditions see the noisier norms of
      single micro-batches.
    * ``MultiSteps(guard(optimizer), k)`` alone does not work. ``MultiSteps`` empties its
      accumulator by multiplying it with 0, so that a NaN stays in it for good; the guard then
      skips every window until it gives up.

    ``MultiSteps`` shows this function no loss. A NaN loss beside finite gradients is seen by the
    guard only: outside always, inside with the last micro-batch of a window, which then is lost.

    A sum that overflows although every micro-batch is finite (``use_grad_mean=False``) spoils the
    accumulator in the same way; only ``guard(MultiSteps(...), check_update=True)`` sees it coming.

    Args:
      updates: gradients of one micro-batch.
      gradient_step: ignored.
      params: ignored.
      axis_name: mesh axes over which the updates are sharded inside ``shard_map`` or ``pmap``, to
        be bound with ``functools.partial``. Then call ``init`` inside of it as well.

    Returns:
      bool scalar, true to leave the micro-batch out, and what was seen of it. Nothing is counted
      here, since ``MultiSteps`` keeps only the last answer. Cost: one read of the gradients.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=og.skip_microbatch)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in [1.0, jnp.nan, 3.0]:
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(updates, bool(state.skip_state.microbatch_skipped))
      [-0.] False
      [0.] True
      [-2.] False

    References:
      ``optax.skip_not_finite`` does the same with a count of the non-finite elements, which costs
      several reads, and without naming the leaves.
    """
    del gradient_step, params
    split = float_leaves(updates)
    groups = make_groups("global", split.paths, split.arrays)
    axes = resolve_axes(axis_name, split.paths, split.arrays)
    measured = measure(split.arrays, groups, axes=axes)
    should_skip = ~jnp.all(measured.leaf_finite)
    return should_skip, SkipMicrobatchState.pack(
        microbatch_skipped=should_skip,
        microbatch_bad_leaves=~measured.leaf_finite,
        microbatch_norm=measured.norm.astype(jnp.float32),
        microbatch_leaf_norms=measured.leaf_norms,
    )
