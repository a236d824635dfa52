"""Eager checks of factory arguments: each error names argument, allowed range and value."""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from optax_guard._core.calls import is_transformation


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float = 0.0,
    maximum: float = math.inf,
    open_minimum: bool = False,
    open_maximum: bool = False,
    schedule: bool = False,
    optional: bool = False,
    word: str | None = None,
) -> None:
    """Raises unless ``value`` is a real scalar inside the range.

    Only the shape and dtype of a traced value can be checked; its range is not. A
    ``schedule`` (a callable of the step count) or a ``word`` is accepted where the factory says so.
    """
    if schedule and callable(value):
        return _check_schedule(name, value)
    if optional and value is None:
        return
    if isinstance(value, str) and value == word:
        return
    left, right = "(" if open_minimum else "[", ")" if open_maximum else "]"
    allowed = f"a real scalar in {left}{minimum:g}, {maximum:g}{right}"
    if schedule:
        allowed += " or a schedule (a callable of the step count)"
    if word is not None:
        allowed += f' or "{word}"'
    if optional:
        allowed += " or None"
    if not isinstance(value, (numbers.Real, np.ndarray, np.generic, jax.Array)) or isinstance(
        value, (bool, np.bool_)
    ):
        hint = ""
        if callable(value):
            hint = " For a schedule, wrap the factory in optax.inject_hyperparams."
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}.{hint}")
    shape = getattr(value, "shape", ())
    if shape != ():
        raise ValueError(f"{name} must be {allowed}, got an array of shape {shape}.")
    if isinstance(value, Tracer):
        return
    number = _to_float(name, value, allowed)
    too_low = number <= minimum if open_minimum else number < minimum
    too_high = number >= maximum if open_maximum else number > maximum
    if math.isnan(number) or too_low or too_high:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def _check_schedule(name: str, schedule: Callable[..., Any]) -> None:
    """Raises unless it can be called with the step count alone."""
    try:
        inspect.signature(schedule).bind(0)
    except TypeError as error:
        raise TypeError(
            f"The schedule {name} must take the step count and nothing else, got {shown(schedule)}."
        ) from error
    except ValueError:  # a builtin without a signature
        return


def _to_float(name: str, value: Any, allowed: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be {allowed}, got {value!r}.") from error


def check_count(name: str, value: Any, *, minimum: int = 1, optional: bool = False) -> None:
    """Raises unless ``value`` is a static Python integer ``>= minimum``."""
    if optional and value is None:
        return
    allowed = f"an integer >= {minimum}" + (" or None" if optional else "")
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be {allowed} known when the transformation is built, got a JAX array. "
            f'Under optax.inject_hyperparams pass static_args=("{name}",).'
        )
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        hint = " It is fixed when the transformation is built." if callable(value) else ""
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}.{hint}")
    if value < minimum:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {choices}, got {value!r}.")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raises unless ``value`` is a Python bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_scope(scope: Any) -> None:
    """Raises unless ``scope`` names a grouping of elements into norms."""
    if not callable(scope):
        allowed = '"global", "leaf", "unit" or a callable (path, leaf) -> axes | None'
        if not isinstance(scope, str):
            raise TypeError(f"scope must be {allowed}, got {scope!r}.")
        if scope not in ("global", "leaf", "unit"):
            raise ValueError(f"scope must be {allowed}, got {scope!r}.")


def check_callable(name: str, value: Any, signature: str, *, optional: bool = False) -> None:
    """Raises unless ``value`` can be called."""
    if callable(value) or (optional and value is None):
        return
    none = " or None" if optional else ""
    raise TypeError(f"{name} must be a callable {signature}{none}, got {value!r}.")


def check_axis_name(axis_name: Any) -> None:
    """Raises unless ``axis_name`` is None, a name, a tuple of names, or a callable."""
    if callable(axis_name):
        return
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not (names and all(isinstance(n, str) for n in names)):
        raise TypeError(
            "axis_name must be None, a mesh axis name, a tuple of mesh axis names or a callable "
            f"(path, leaf) -> names, got {axis_name!r}."
        )


def check_transformation(name: str, value: Any) -> None:
    """Raises unless ``value`` looks like an Optax gradient transformation."""
    if is_transformation(value):
        return
    hint = ""
    if isinstance(value, Callable):
        hint = " Call the factory first, for example optax.adam(1e-3)."
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        hint = f" Write {name}=og.clip_by_norm({value})." if name == "clip" else ""
    elif isinstance(value, (list, tuple)) and value and all(map(is_transformation, value)):
        hint = " Write optax.chain(...) around several."
    elif is_array_tree(value):
        hint = " Parameters go to init(params) of what this returns."
    raise TypeError(f"{name} must be an optax.GradientTransformation, got {shown(value)}.{hint}")


def is_array_tree(value: Any) -> bool:
    """Whether it is a container that holds arrays only."""
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves)


def shown(value: Any) -> str:
    """A value and its type for an error, without pages of numbers."""
    kind = type(value).__name__
    if not isinstance(value, (np.generic, str)) and is_array_tree(value):
        return f"arrays in a {kind}"
    text = repr(value)
    return f"{text if len(text) <= _LONGEST else text[:_LONGEST] + '...'} of type {kind}"


_LONGEST = 200
STOPS_TRAINING = 'makes every update zero; it does not mean "no limit". For none, leave it out.'


def check_schedule_value(name: str, value: Any) -> None:
    """Raises unless what a schedule returned can be a threshold."""
    is_number = isinstance(value, (numbers.Real, np.ndarray, np.generic, jax.Array))
    shape = getattr(value, "shape", ())
    if not is_number or shape != ():
        what = f"an array of shape {shape}" if is_number else shown(value)
        hint = " Call the factory of the schedule first." if callable(value) else ""
        raise TypeError(
            f"The schedule {name} must return a real scalar for a step count, but returned "
            f"{what}.{hint}"
        )


def warn_of_zero(name: str, value: Any, effect: str) -> None:
    """Warns of a threshold of zero, which is legal and stops everything, when it is built.

    Arrays are not looked at: under ``optax.inject_hyperparams`` every step builds anew.
    """
    if isinstance(value, (int, float)) and value == 0:
        warnings.warn(f"{name}={value} {effect}", stacklevel=3)
