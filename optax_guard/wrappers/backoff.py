"""Smaller steps for a while after a skipped one."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_guard._core.arrays import times
from optax_guard._core.checks import check_count, check_number, check_transformation
from optax_guard._core.find import states_of_type
from optax_guard._core.inner import tolerant_update
from optax_guard._core.states import Entry, PackedState
from optax_guard._core.transformation import transformation
from optax_guard._core.trees import float_leaves, strong
from optax_guard.wrappers._verdict import require_guard, verdict
from optax_guard.wrappers.rollback import RollbackState

_MOST_SKIPS = 20  # remembered, so that hundreds of skips do not take forever to come back from


class _BackoffArrays(NamedTuple):
    inner_state: Any
    integers: Any
    numbers: Any


class BackoffState(PackedState, _BackoffArrays):
    """State of :func:`backoff`: that of the wrapped guard, and 8 bytes.

    Attributes:
      inner_state: state of the wrapped guard.
      integers: int32, packed.
      numbers: float32, packed.
    """

    __slots__ = ()
    steps_left = Entry("integers", "int32, healthy steps until the factor is 1 again")
    factor = Entry("numbers", "float32, what the next update will be multiplied by")


def backoff(
    inner: optax.GradientTransformation, *, factor: Any = 0.5, recovery_steps: int = 100
) -> optax.GradientTransformationExtraArgs:
    """Shrinks updates after a skipped step, then lets them grow back.

    A guard inside ``inner`` decides what is skipped. With ``n`` healthy steps left to full size::

        healthy step:  u <- u * factor**(n / recovery_steps),  then  n <- max(n - 1, 0)
        skipped step:  u stays zero,  n <- min(n + recovery_steps, 20 * recovery_steps)

    So a skip multiplies the following update by ``factor``, and each healthy step makes them grow
    by ``(1 / factor)**(1 / recovery_steps)``, up to 1; at 1 they pass bit for bit. The first
    step is like every other.

    It rescues a run whose learning rate is too high *if steps are skipped while the parameters
    are still good*: give the guard a condition that sees the instability coming::

        og.backoff(og.guard(optax.adam(1e-2), skip_if=og.spike(6.0)))

    It does not rescue parameters that are already so large that every gradient is non-finite:
    then no step follows that could be made smaller. :func:`rollback` does, and with both, the
    run that is taken back goes on with smaller steps::

        og.rollback(og.backoff(og.guard(optimizer)))

    Momentum and second moments inside are those of full steps. For single bad batches a guard
    alone is enough, and smaller steps after them only cost time. The overflow of a loss scale is
    no skip of the guard, and changes nothing here.

    Args:
      inner: a guarded optimizer; the guard may sit at any depth.
      factor: scalar in (0, 1].
      recovery_steps: static integer >= 1.

    Returns:
      A transformation that passes extra args on to ``inner``, less those that it does not take.
      Updates keep the dtype that ``inner`` gives them, multiplied in float32 at least. Cost: one
      multiplication, which XLA fuses into the optimizer; 8 bytes of state.

    Raises:
      ValueError: if ``factor`` or ``recovery_steps`` is out of range; from ``init``, if there is
        no guard in ``inner``, or a :func:`rollback`, whose return would be made smaller, too.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.backoff(og.guard(optax.sgd(1.0)), recovery_steps=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in [1.0, jnp.nan, 1.0, 1.0, 1.0]:
      ...     updates, state = tx.update(jnp.array([gradient]), state)
      ...     print(updates.round(3))
      [-1.]
      [-0.]
      [-0.5]
      [-0.707]
      [-1.]

    References:
      Keras' ``ReduceLROnPlateau`` and the restarts of training logs (OPT-175B's, for one) lower
      the learning rate by hand or for good. Additive increase and multiplicative decrease:
      Jacobson, *Congestion avoidance and control*, 1988; here both are multiplicative.
    """
    check_transformation("inner", inner)
    check_number("factor", factor, open_minimum=True, maximum=1)
    check_count("recovery_steps", recovery_steps)
    inner_update = tolerant_update(inner)

    def init(params):
        inner_state = jax.tree.map(strong, inner.init(params))
        require_guard(inner_state, "backoff")
        if states_of_type(inner_state, RollbackState):
            raise ValueError(
                "backoff(rollback(...)) would shrink the update that returns to the snapshot. "
                "Write og.rollback(og.backoff(og.guard(optimizer)))."
            )
        return BackoffState.pack(inner_state=inner_state, steps_left=0, factor=1.0)

    def factor_after(steps_left):
        share = steps_left.astype(jnp.float32) / recovery_steps
        power = jnp.asarray(factor, jnp.float32) ** share
        return jnp.where(steps_left == 0, 1, power).astype(jnp.float32)

    def update(updates, state, params=None, **extra_args):
        updates, inner_state = inner_update(updates, state.inner_state, params, **extra_args)
        scale = factor_after(state.steps_left)
        split = float_leaves(updates)
        scaled = split.replace([times(leaf, scale) for leaf in split.arrays])

        is_skipped, is_healthy = verdict(state.inner_state, inner_state)
        left, most = state.steps_left, _MOST_SKIPS * recovery_steps
        more = jnp.where(left > most - recovery_steps, most, left + recovery_steps)
        left = jnp.where(is_skipped, more, jnp.where(is_healthy, jnp.maximum(left - 1, 0), left))
        return scaled, BackoffState.pack(
            inner_state=inner_state, steps_left=left, factor=factor_after(left)
        )

    return transformation("backoff", BackoffState, init, update)
