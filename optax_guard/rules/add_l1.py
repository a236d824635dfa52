"""The subgradient of an L1 penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._core.arrays import increment, promote, tree_where
from optax_guard._core.axes import AxisName, axes_of_elements
from optax_guard._core.checks import check_axis_name, check_number, shown
from optax_guard._core.groups import make_groups
from optax_guard._core.listening import narrow
from optax_guard._core.measure import measure
from optax_guard._core.transformation import require_params, transformation
from optax_guard._core.trees import float_leaves
from optax_guard.rules.rule import value_at


class AddL1State(NamedTuple):
    """State of :func:`add_l1`: one scalar.

    Attributes:
      steps: int32, finite steps seen (the argument of a schedule).
    """

    steps: Any


def add_l1(
    strength: Any,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds the subgradient of ``strength * sum(|p|)`` to the updates.

    For each element, with ``p`` the parameter::

        u  <-  u + strength * sign(p)        sign(0) = 0; p / |p| for a complex p

    The pull has the same size on large and small weights, so that those that the loss does not
    need go to zero and stay within one step's length of it: about
    ``learning_rate * strength``. They oscillate there, and do not become exactly zero. The other
    penalty, ``optax.add_decayed_weights`` (L2), pulls in proportion to a weight: it keeps large
    weights small and makes none vanish. Take L1 to find out which inputs or units matter, L2 to
    keep weights from growing; ``chain(add_l1(a), add_decayed_weights(b))`` is the elastic net.

    Before the optimizer it is part of the loss, and Adam rescales it as it does every gradient;
    between ``scale_by_adam`` and the learning rate it is decoupled, as weight decay is in AdamW::

        optax.chain(optax.scale_by_adam(), og.add_l1(1e-4), optax.scale_by_learning_rate(1e-3))

    Non-finite updates stay non-finite and leave the state as it was.

    Args:
      strength: scalar in [0, inf), or a schedule of the number of finite steps before this one.
      mask: a tree of bools as the parameters (or a prefix of it), or a callable that makes one of
        them: false where nothing is to be added, often for biases and scales. None: everywhere.
      axis_name: mesh axes over which the updates are sharded inside ``pmap`` or
        ``shard_map(check_vma=False)``, so that all devices count the same. Types tell otherwise.

    Returns:
      A transformation of updates of any float or complex dtype, each returned in its own and
      computed in float32 at least. Its ``update`` needs ``params``. Cost: one read of the
      parameters and, unless a guard shares it, one of the updates; 4 bytes of state.

    Raises:
      ValueError: if ``strength`` is negative, not finite or no scalar; from ``update``, if it is
        called without ``params``.
      TypeError: if ``strength`` is no number, or ``mask`` no tree of bools.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> params = jnp.array([5.0, -0.1, 0.0])
      >>> tx = og.add_l1(0.01)
      >>> tx.update(jnp.zeros(3), tx.init(params), params)[0]
      Array([ 0.01, -0.01,  0.  ], dtype=float32)

    References:
      Tibshirani, *Regression shrinkage and selection via the lasso*, 1996. Exact zeros take a
      proximal step instead: ``p <- sign(p) * max(|p| - learning_rate * strength, 0)``.
    """
    check_number("strength", strength, open_maximum=True, schedule=True)
    check_axis_name(axis_name)

    def init(params):
        del params
        return AddL1State(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        require_params(params, "add_l1", "adds a function of the parameters")
        split = float_leaves(updates)
        arrays = [
            _pulled(leaf, param, strength, state.steps)
            for leaf, param in zip(split.arrays, split.matching(params), strict=True)
        ]
        groups = make_groups("global", split.paths, split.arrays)
        axes = axes_of_elements(axis_name, split.paths, split.arrays)
        measured = measure(
            split.arrays,
            groups,
            axes=axes,
            is_used=narrow(split.is_present),
            small_norms_matter=False,
        )
        is_finite = jnp.all(measured.leaf_finite)
        new_state = AddL1State(increment(state.steps))
        return split.replace(arrays), tree_where(is_finite, new_state, state)

    if mask is not None and not callable(mask) and not _are_flags(mask):
        raise TypeError(
            "mask must be a pytree of bools with the structure of the parameters, or a callable "
            f"params -> such a tree, got {shown(mask)}."
        )
    everywhere = transformation("add_l1", AddL1State, init, update)
    return everywhere if mask is None else optax.masked(everywhere, mask)


def _are_flags(mask: Any) -> bool:
    return all(isinstance(flag, (bool, np.bool_)) for flag in jax.tree.leaves(mask))


def _pulled(update: jax.Array, param: jax.Array, strength: Any, step: jax.Array) -> jax.Array:
    wide = promote(update.dtype, param.dtype, jnp.float32)
    pull = value_at(strength, step, jnp.finfo(wide).dtype, "strength") * jnp.sign(param).astype(
        wide
    )
    pulled = (update.astype(wide) + pull).astype(update.dtype)
    return jnp.where(param == 0, update, pulled)  # keeps every bit, the sign of zero included
