"""Numbers for a training log, read off an optimizer state on the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from optax_guard._core.find import is_own_state, own_states, states_of_type
from optax_guard.reading.find import find_guards
from optax_guard.wrappers.guard import GuardState
from optax_guard.wrappers.loss_scale import DynamicLossScaleState


def metrics(opt_state: Any, *, prefix: str = "guard/") -> dict[str, jax.Array]:
    """Collects the scalars of every state of this library.

    Args:
      opt_state: any pytree that holds optimizer states at any depth: an Optax state, a Linen
        ``TrainState``, an ``nnx.Optimizer``, an Equinox module.
      prefix: put before each name.

    Returns:
      ``{prefix + field: scalar array}``. The keys depend on the structure of the state only. The
      second state of a kind gets ``prefix + "2/"``, and so on. Pure, callable under ``jit``;
      nothing is transferred to the host. For a state with a batch axis (an ensemble made by
      ``jax.vmap``) call ``jax.vmap(og.metrics)(opt_state)``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1))
      >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> float(og.metrics(state)["guard/grad_norm"])
      5.0
    """
    result = {}
    seen: Counter[str] = Counter()
    for state in own_states(opt_state):
        kind = type(state).__name__
        seen[kind] += 1
        place = prefix if seen[kind] == 1 else f"{prefix}{seen[kind]}/"
        for field, value in zip(state._fields, state, strict=True):
            scalar = _as_scalar(value)
            if scalar is not None and field != "inner_state":
                result[place + field] = scalar
    return result


def _as_scalar(value: Any) -> jax.Array | None:
    """The field as an array if it is a single number, also when Flax has wrapped it."""
    if is_own_state(value):
        return None
    leaves = jax.tree.leaves(value)
    is_scalar = len(leaves) == 1 and jnp.shape(leaves[0]) == () and not isinstance(value, tuple)
    return jnp.asarray(leaves[0]) if is_scalar else None


def step_ok(opt_state: Any) -> jax.Array:
    """Tells whether the last step was accepted by every guard and overflowed no loss scale.

    Args:
      opt_state: any pytree that holds at least one :class:`GuardState` or
        :class:`DynamicLossScaleState`.

    Returns:
      bool scalar array; callable under ``jit``.

    Raises:
      ValueError: if there is neither in ``opt_state``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1))
      >>> _, state = tx.update(jnp.array([jnp.inf]), tx.init(jnp.zeros(1)))
      >>> bool(og.step_ok(state))
      False
    """
    scales = states_of_type(opt_state, DynamicLossScaleState)
    skipped = [first_leaf(state.last_step_overflowed) for state in scales]
    if not scales or states_of_type(opt_state, GuardState):
        skipped += [first_leaf(state.last_step_skipped) for state in guard_states(opt_state)]
    return ~jnp.any(jnp.stack(skipped))


def guard_states(opt_state: Any) -> list[GuardState]:
    """The guards in ``opt_state``, or an error that says what to do."""
    return [found.state for found in find_guards(opt_state)]


def first_leaf(value: Any) -> jax.Array:
    """An array, taken out of the Flax variable that may hold it."""
    return jnp.asarray(jax.tree.leaves(value)[0])


def select(ok: jax.Array, new: Any, old: Any) -> Any:
    """Keeps ``new`` if ``ok``, else ``old``, leaf by leaf and bit for bit.

    For what a training step changes outside the optimizer: BatchNorm statistics, EMA weights,
    step counters, PRNG keys.

    In Flax NNX copy the old values before the forward pass, with
    ``jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))``: ``nnx.state`` alone shares the live
    variables, so that what was read before shows what is written after, and ``old`` is ``new``.

    Args:
      ok: bool scalar, as :func:`step_ok` gives.
      new: pytree of arrays.
      old: pytree of the same structure, shapes and dtypes.

    Returns:
      The chosen tree.

    Raises:
      ValueError: if the structures differ.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> og.select(jnp.array(False), {"mean": jnp.full(1, jnp.nan)}, {"mean": jnp.zeros(1)})
      {'mean': Array([0.], dtype=float32)}
    """
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
