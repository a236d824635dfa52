"""What the wrappers of this library wrap."""

from __future__ import annotations

from typing import Any

import jax

from optax_guard._core.calls import is_transformation
from optax_guard._core.find import is_own_state, lost_types


def unwrap(opt_state: Any) -> Any:
    """The state with every wrapper of this library replaced by what it wraps.

    For functions that want the state of the optimizer itself::

        optax.contrib.schedule_free_eval_params(og.unwrap(state), params)
        og.unwrap(state).hyperparams["learning_rate"]
        optax.MultiSteps(...).has_updated(og.unwrap(state))

    :func:`guard`, :func:`dynamic_loss_scale`, :func:`backoff`, :func:`rollback` and
    :func:`clip_by_update_ratio` wrap, and so does :func:`stabilize`, which is made of them, at any
    depth. ``guard(chain(clip, adam))`` leaves the state of the chain.

    Args:
      opt_state: the optimizer's state, or any pytree that holds it.

    Returns:
      The same arrays without those of the wrappers. Callable under ``jit``. It cannot be given to
      ``update``.

    Raises:
      TypeError: if it is given the transformation.
      ValueError: if states have lost their types, in a checkpoint restored without a target.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.inject_hyperparams(optax.adam)(learning_rate=0.5))
      >>> float(og.unwrap(tx.init(jnp.zeros(2))).hyperparams["learning_rate"])
      0.5
    """
    if is_transformation(opt_state):
        raise TypeError(
            f"unwrap takes an optimizer state, but got a {type(opt_state).__name__}, the "
            "transformation. Pass what its init(params) or update(...) returned."
        )
    if lost_types(opt_state):
        raise ValueError(lost_types(opt_state))

    def strip(node):
        return unwrap(node.inner_state) if _wraps(node) else node

    return jax.tree.map(strip, opt_state, is_leaf=_wraps)


def _wraps(node: Any) -> bool:
    return is_own_state(node) and "inner_state" in node._fields
