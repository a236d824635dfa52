"""What a rule is: from norms and a history to limits and a new history.

A rule knows nothing of pytrees; ``limit_norms`` applies it to any scope.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._core.checks import check_schedule_value


class Context(NamedTuple):
    """What a rule may look at besides the norms and history of its block.

    Attributes:
      step: int32 scalar, the number of finite steps so far.
      size: number of elements of each group, broadcastable to the norms; None in
        ``smallest_limit``.
      param_norms: norms of the parameters, grouped as the gradient is; None if not asked for.
      global_norm: scalar, norm over all finite groups, saturated; None if not asked for.
      shares: norm of each group relative to it, never saturated; None if not asked for.
    """

    step: jax.Array
    size: Any = None
    param_norms: jax.Array | None = None
    global_norm: jax.Array | None = None
    shares: jax.Array | None = None


def no_history(norms: jax.ShapeDtypeStruct) -> tuple[()]:
    """The history of a rule that remembers nothing."""
    del norms
    return ()


class Rule(NamedTuple):
    """How limits follow from norms; :func:`limit_norms` makes a transformation of it.

    Attributes:
      limit: ``(norms, history, context) -> (limits, new history)``, arrays of one shape; every
        norm that it sees is finite and positive (1 stands in for the others, and what follows
        is discarded).
      init: the history of a block, given the shape and dtype of its norms: any pytree of arrays
        ``[..., *norms.shape]``. Counts in it stay at 2**24 once they are there.
      smallest_limit: a lower bound on all limits, ``context -> scalar``, where one is known
        before the norms are; it spares zero gradients their second read.
      needs_params: whether the rule reads ``context.param_norms``.
      param_norm_floor: norms of parameters below it need not be told apart.
      needs_global_norm: whether it reads ``context.global_norm`` or ``context.shares``.
      is_target: whether the limit is the norm to give (normalise) and not the largest allowed.
    """

    limit: Callable[[jax.Array, Any, Context], tuple[jax.Array, Any]]
    init: Callable[[jax.ShapeDtypeStruct], Any] = no_history
    smallest_limit: Callable[[Context], Any] | None = None
    needs_params: bool = False
    param_norm_floor: Any = 0.0
    needs_global_norm: bool = False
    is_target: bool = False


def value_at(value: Any, step: jax.Array, dtype: Any, name: str = "") -> jax.Array:
    """A threshold as an array of the norms' dtype; a schedule is evaluated at ``step``."""
    if callable(value):
        value = value(step)
        check_schedule_value(name, value)
    return jnp.asarray(value).astype(dtype)
