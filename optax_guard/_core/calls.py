"""Whether ``init`` and ``update`` were called with what they take, and what to write if not.

Only what is certainly wrong is refused: parameters and gradients look the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from optax_guard._core.find import is_own_state
from optax_guard._core.skeleton import Skeleton, difference, same_arrays, skeleton
from optax_guard._core.trees import FloatLeaves

_ARRAYS_OF_MODELS = (
    'With Flax Linen pass variables["params"], with Flax NNX nnx.state(model, nnx.Param), with '
    "Equinox eqx.filter(model, eqx.is_inexact_array)."
)


def is_transformation(value: Any) -> bool:
    """Whether it is made of ``init`` and ``update``."""
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def is_optimizer_state(value: Any) -> bool:
    """True for a state of this library or of Optax, and for the tuple that a chain makes of them.

    States deeper in a tree are none of its concern: somebody may train them.
    """
    if type(value) is tuple:
        return any(map(is_optimizer_state, value))
    kind = type(value)
    is_optax = kind.__module__.partition(".")[0] == "optax" and kind.__name__.endswith("State")
    return is_own_state(value) or (is_optax and isinstance(value, tuple))


def check_params(name: str, params: Any) -> None:
    """Raises if what ``init`` was given cannot be parameters.

    Raises:
      TypeError: if they are a transformation, a state, or no arrays at all.
    """
    what = _what_is_no_params(params)
    if what is not None:
        raise TypeError(
            f"init of {name} takes the parameters, a pytree of arrays, but got {what}. "
            "Call init(params)."
        )


def explain_failed_init(name: str, params: Any, error: Exception) -> None:
    """Raises an error that names the leaf that is no array, if that may be why ``init`` failed."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if _is_foreign(leaf):
            place = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"init of {name} takes a pytree of arrays, but {place!r} is of type "
                f"{type(leaf).__name__}. {_ARRAYS_OF_MODELS}"
            ) from error


def check_call(
    name: str, state_type: type, updates: Any, state: Any, params: Any, rest: Sequence[Any]
) -> None:
    """Raises if the arguments of ``update`` are in each other's place, or none of its own.

    Raises:
      TypeError: saying what was given where, and what to write.
    """
    call = "Call update(grads, state, params)"
    if rest:
        raise TypeError(
            f"update of {name} takes updates, state and params by place, and all else by name; got "
            f"{len(rest)} more. {call[:-1]}, value=loss)."
        )
    if not isinstance(state, state_type):
        raise TypeError(_wrong_state(name, state_type, updates, state, params))
    if updates is None or is_optimizer_state(updates) or is_transformation(updates):
        kind = "None" if updates is None else f"a {type(updates).__name__}"
        raise TypeError(f"{name} was given {kind} where the gradients belong. {call}.")
    if params is None:
        return
    what = _what_is_no_params(params)
    if what is None and _is_loss(params) and not _is_leaf(updates):
        what = f"a single number. The loss goes by name: {call[5:-1]}, value=loss)"
    if what is not None:
        raise TypeError(f"{name} was given as params {what}. {call}.")
    if _is_value_and_grad(updates, params):
        raise TypeError(
            f"{name} was given (loss, gradients) where the gradients belong. Write "
            "loss, grads = jax.value_and_grad(loss_fn)(params), and then "
            "update(grads, state, params, value=loss)."
        )


class ToldError(TypeError, ValueError):
    """Says what is wrong with the call; passes through all that would explain it once more."""


def check_skeleton(name: str, own: Skeleton | None, state: Any) -> None:
    """Raises if a state holds other states than this transformation makes.

    Raises:
      ToldError: naming the first two that differ.
    """
    found = skeleton(state)
    if own is not None and own != found:
        raise ToldError(
            f"This state is of another transformation: the {type(state).__name__} given to {name} "
            f"holds {difference(own, found)}. {_MAKE_ANOTHER}"
        )


def check_arrays(name: str, own: Any, state: Any, error: Exception) -> None:
    """Raises if a state has arrays of other shapes than this transformation would make.

    Raises:
      ToldError: naming the first one, from the error that this led to.
    """
    if own is None or same_arrays(own, state):
        return
    pairs = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), np.shape(leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    ]
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(own)[0]
    }
    where = next((path for path, shape in pairs if shapes.get(path) != shape), "")
    shape = dict(pairs).get(where, "another structure")
    raise ToldError(
        f"This state is of another transformation, or was made for other parameters: {name} was "
        f"given one with {shape} at {where!r}, and would make one with "
        f"{shapes.get(where, 'no array there')}. {_MAKE_ANOTHER}"
    ) from error


_MAKE_ANOTHER = (
    "Make a new one with init(params); to carry the old one over a change of the optimizer, "
    "og.adopt(new_tx.init(params), old_state)."
)


def check_number_of_rows(name: str, gradients: FloatLeaves, count: int, expected: int) -> None:
    """Raises unless the gradients have as many rows (arrays, layers) as ``init`` saw.

    Raises:
      ToldError: naming the arrays that there are.
    """
    if count == expected:
        return
    paths = gradients.paths
    shown = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
    raise ToldError(
        f"This state of {name} was made for {expected} norms, these gradients have {count} "
        f"({shown}). Call init() with parameters of the shapes that update() receives; a gradient "
        "may be None, but not missing. Inside shard_map an array that stacked= names must not be "
        "split along the axes that stack its layers."
    )


def explain_failed_update(name: str, gradients: FloatLeaves, params: Any, error: Exception) -> None:
    """Raises an error on where gradients and parameters differ, if that may be why it failed.

    Raises:
      ValueError: naming the array.
    """
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        if not _is_foreign(leaf)
    }
    for path, array in zip(gradients.paths, gradients.arrays, strict=True):
        if shapes and shapes.get(path) != array.shape:
            there = f"has the shape {shapes[path]}" if path in shapes else "is not there"
            raise ValueError(
                f"The gradients given to {name} do not match params: {path!r} of the shape "
                f"{array.shape} {there} in params. Pass the gradients of these very parameters: "
                "update(grads, state, params)."
            ) from error


def _wrong_state(name: str, state_type: type, updates: Any, state: Any, params: Any) -> str:
    if isinstance(updates, state_type):
        return (
            f"{name} was given its state first and the gradients second. Call "
            "update(grads, state, params)."
        )
    if isinstance(params, state_type):
        return (
            f"{name} was given its state third, where the parameters belong. Call "
            "update(grads, state, params)."
        )
    kind = type(state).__name__
    if is_transformation(state):
        kind += ", a transformation"
    elif type(state) is tuple and any(isinstance(part, state_type) for part in state):
        place = next(i for i, part in enumerate(state) if isinstance(part, state_type))
        kind += f" that has it at [{place}]"
    elif isinstance(state, str) or (
        isinstance(state, dict) and set(state_type._fields) <= set(state)  # type: ignore[attr-defined]
    ):
        kind = "dict of its fields" if isinstance(state, dict) else "key of a dict of states"
        return (
            f"{name} was given a {kind}, as a checkpoint is restored without a target, where its "
            f"own {state_type.__name__} belongs. Restore it into tx.init(params), or pass "
            "og.adopt(tx.init(params), restored)."
        )
    return (
        f"This state is of another transformation: {name} was given a {kind} where its own "
        f"{state_type.__name__} belongs. Pass what {name}(...).init(params) or the last update() "
        "returned; to carry a state over a change of the optimizer, "
        "og.adopt(new_tx.init(params), old_state)."
    )


def _what_is_no_params(value: Any) -> str | None:
    """What it is instead; None for what may be parameters."""
    kind = type(value).__name__
    if is_transformation(value):
        return f"a {kind}, the transformation"
    if is_optimizer_state(value):
        return f"a {kind}, an optimizer state"
    if hasattr(value, "opt_state") and hasattr(value, "params"):
        return f"a {kind}, which holds an optimizer state; pass its params"
    if _is_leaf(value) and _is_foreign(value):
        return f"a {kind}. {_ARRAYS_OF_MODELS[:-1]}"
    return None


def _is_leaf(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return False
    leaves = jax.tree.leaves(value)
    return len(leaves) == 1 and leaves[0] is value


def _is_foreign(leaf: Any) -> bool:
    """Whether a leaf is neither array nor number; a Linen module has a dtype, but no shape."""
    is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    return not is_array and not isinstance(leaf, (bool, int, float, complex))


def _is_loss(value: Any) -> bool:
    return _is_leaf(value) and not _is_foreign(value) and np.ndim(value) == 0


def _is_value_and_grad(updates: Any, params: Any) -> bool:
    """Whether they are the result of ``jax.value_and_grad``, as the parameters tell."""
    if type(updates) is not tuple or len(updates) != 2:
        return False
    is_like = [jax.tree.structure(tree) == jax.tree.structure(params) for tree in updates]
    return is_like[1] and jax.tree.structure(updates) != jax.tree.structure(params)
