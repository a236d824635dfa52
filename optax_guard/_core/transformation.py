"""What every public transformation has in common: its form, and how it runs without ``jit``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer


def transformation(init: Any, update: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """The transformation, whose ``update`` compiles itself once where nobody has compiled it.

    Many scripts put only the gradient under ``jit``. Step by step, the branches of an update would
    be compiled anew at every call, each leaving memory behind.
    """

    @functools.partial(jax.jit, static_argnums=4)
    def compiled(updates, state, params, dynamic, static):
        return update(updates, state, params, **dynamic, **dict(static))

    @functools.wraps(update)
    def run(updates, state, params=None, **extra_args):
        arguments = (updates, state, params)
        if _all_concrete(arguments):
            dynamic, static = {}, []
            for name, value in extra_args.items():
                if _all_concrete(value):
                    dynamic[name] = value
                else:
                    static.append((name, value))
            if all(map(_can_be_static, static)):
                return compiled(*arguments, dynamic, tuple(static))
        return update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, run)


def _all_concrete(tree: Any) -> bool:
    """Whether all leaves are arrays and numbers with values."""
    return all(
        isinstance(leaf, _VALUES) and not isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)
    )


_VALUES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def _can_be_static(pair: tuple[str, Any]) -> bool:
    leaves = jax.tree.leaves(pair)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return False
    try:
        hash(pair)
    except TypeError:
        return False
    return True


def require_params(params: Any, name: str, purpose: str) -> None:
    """Raises if ``update`` was called without the parameters that it needs."""
    if params is None:
        raise ValueError(
            f"{name} {purpose}, but update() was called without params. Call "
            "update(updates, state, params)."
        )


def require_state(state: Any, state_type: type, name: str, updates: Any = None) -> None:
    """Raises unless ``state`` is one that this transformation made."""
    if isinstance(state, state_type):
        return
    if isinstance(updates, state_type):
        raise TypeError(
            f"{name} was given its state first and the gradients second. Call "
            "update(grads, state, params)."
        )
    kind = type(state).__name__
    if callable(getattr(state, "update", None)) and callable(getattr(state, "init", None)):
        kind += ", a transformation"
    raise TypeError(
        f"This state is of another transformation: {name} was given a {kind} where its own "
        f"{state_type.__name__} belongs. Pass what {name}(...).init(params) or the last update() "
        "returned; to carry a state over a change of the optimizer, "
        "og.adopt(new_tx.init(params), old_state)."
    )
