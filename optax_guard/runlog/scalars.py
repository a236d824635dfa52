"""The scalars that a training loop records along."""

from __future__ import annotations

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.checks import shown
from optax_guard._core.find import own_states
from optax_guard.reading.find import refuse_traced, refuse_tracers
from optax_guard.runlog.fetch import FAULT_LEAVES, FAULT_STEPS, LEAF_NORMS, STEP, Record

_RESERVED = (STEP, LEAF_NORMS, FAULT_LEAVES, FAULT_STEPS)


def split_scalars(scalars: dict[str, Any]) -> tuple[Record, dict[str, Any]]:
    """Numbers of the host, and arrays still to be fetched.

    Raises:
      ValueError: if a value is no scalar, or has a reserved name.
      TypeError: if a value is no real number, or a tracer.
    """
    known: Record = {}
    arrays = {}
    refuse_traced("History.append", list(scalars.values()))
    for name, value in scalars.items():
        if name in _RESERVED:
            raise ValueError(f"{name!r} is a name that og.History uses itself; take another one.")
        if isinstance(value, jax.Array) and value.ndim == 0 and _is_real(value.dtype):
            arrays[name] = value
            continue
        refuse_tracers("History.append", value)
        if np.ndim(value):
            raise ValueError(
                f"{name} must be a scalar, got an array of shape {np.shape(value)}. Record its "
                "mean, or its elements under names of their own."
            )
        elif isinstance(value, (np.ndarray, np.generic)) and _is_real(value.dtype):
            known[name] = _to_python(value)
        elif isinstance(value, bool):
            known[name] = value
        elif isinstance(value, numbers.Real):
            known[name] = int(value) if isinstance(value, numbers.Integral) else float(value)
        else:
            raise TypeError(
                f"{name} must be a real number, got {value!r} of type {type(value).__name__}."
            )
    return known, arrays


def check_step(step: Any) -> None:
    """Raises unless a step is a whole number, or a scalar array of them."""
    is_integer = isinstance(step, numbers.Integral) and not isinstance(step, bool)
    if isinstance(step, (jax.Array, np.ndarray)) and np.ndim(step) == 0:
        is_integer = np.issubdtype(step.dtype, np.integer)
    if not is_integer:
        hint = ""
        if own_states(step):
            hint = " The state comes second: history.append(step, opt_state, loss=loss)."
        raise TypeError(f"step must be an integer, got {shown(step)}.{hint}")


@functools.cache
def _is_real(dtype: Any) -> bool:
    real = (jnp.floating, jnp.integer, jnp.bool_)
    return dtype.kind in "fiub" or any(jnp.issubdtype(dtype, kind) for kind in real)


def _to_python(value: Any) -> bool | int | float:
    if value.dtype == bool:
        return bool(value)
    return float(value) if jnp.issubdtype(value.dtype, jnp.floating) else int(value)
