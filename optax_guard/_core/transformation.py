"""What every public transformation has in common: its form, and how it runs without ``jit``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from optax_guard._core.calls import (
    ToldError,
    check_arrays,
    check_call,
    check_params,
    check_skeleton,
    explain_failed_init,
)
from optax_guard._core.skeleton import shapes_of_init, skeleton, skeleton_of_init


def transformation(
    name: str, state_type: type, init: Callable[[Any], Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """The transformation, whose ``update`` compiles itself once where nobody has compiled it.

    Many scripts put only the gradient under ``jit``. Step by step, the branches of an update would
    be compiled anew at every call, each leaving memory behind.

    Args:
      name: of the factory, for errors about wrong arguments.
      state_type: what ``update`` takes as its state.
      init: makes one.
      update: of an Optax transformation with extra args.
    """
    made: list[Any] = []  # the skeleton of what init makes, from its first call on
    fixed = _Fixed()

    def checked(updates, state, params, **extra_args):
        """``update``; in a compiled function all but that is done once, when it is traced."""
        like_params = updates if params is None else params
        own = made[0] if made else skeleton_of_init(init, like_params)
        if own != skeleton(state):  # it may have been made for other parameters than the last
            own = skeleton_of_init(init, like_params)
        check_skeleton(name, own, state)
        try:
            return update(updates, state, params, **extra_args)
        except ToldError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if params is not None or not _has_none(updates):  # which then tell the shapes of all
                check_arrays(name, shapes_of_init(init, like_params), state, error)
            raise

    @functools.partial(jax.jit, static_argnums=4)
    def compiled(updates, state, params, dynamic, static):
        return checked(updates, state, params, **dynamic, **dict(static))

    @functools.wraps(init)
    def start(params):
        check_params(name, params)
        try:
            state = init(params)
        except (TypeError, AttributeError) as error:
            explain_failed_init(name, params, error)
            raise
        made[:] = [skeleton(state)]
        return state

    @functools.wraps(update)
    def run(updates, state, params=None, *rest, **extra_args):
        check_call(name, state_type, updates, state, params, rest)
        arguments = (updates, state, params)
        if _all_concrete(arguments):
            dynamic, static = {}, []
            for key, value in extra_args.items():
                if _all_concrete(value):
                    dynamic[key] = value
                else:
                    static.append((key, value))
            if all(map(_can_be_static, static)):
                key = tuple(static)
                if key not in fixed.seen and len(fixed.seen) >= _MOST_PROGRAMS:
                    # There is a new value_fn at every step, or the like.
                    compiled.clear_cache()  # type: ignore[attr-defined]
                    fixed.seen.clear()
                fixed.seen.add(key)
                return compiled(*arguments, dynamic, key)
        return checked(updates, state, params, **extra_args)

    run.__qualname__ = f"{name}.<locals>.update"  # also of rules that share a factory
    return optax.GradientTransformationExtraArgs(start, run)


class _Fixed:
    """Extra args without values that an update was compiled for.

    Not a bare set: Optimistix takes closures apart, and wants to hash what it finds.
    """

    def __init__(self) -> None:
        self.seen: set[Any] = set()


_MOST_PROGRAMS = 16  # each of them holds memory, of which a process may map 65530 pieces


def _all_concrete(tree: Any) -> bool:
    """Whether all leaves are arrays and numbers with values."""
    return all(
        isinstance(leaf, _VALUES) and not isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)
    )


_VALUES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def _has_none(tree: Any) -> bool:
    return any(leaf is None for leaf in jax.tree.leaves(tree, is_leaf=lambda part: part is None))


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
        raise ToldError(
            f"{name} {purpose}, but update() was called without params. Call "
            "update(updates, state, params)."
        )
