"""Copies the numbers of an optimizer state without waiting for the step that makes them."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard.reading.find import find_outer_guards, refuse_batched, refuse_tracers
from optax_guard.reading.metrics import first_leaf, metrics
from optax_guard.reading.names import NamedLeaf, guard_leaf_names

STEP = "step"
LEAF_NORMS = "leaf_norms"
_WORD = np.dtype(np.uint32)

Record = dict[str, Any]


class Layout(NamedTuple):
    """Where the numbers of a state are found among its leaves.

    Attributes:
      metrics: ``(name, position)`` of each scalar.
      norms: position of the ``leaf_norms`` of each outermost guard.
      leaf_names: of all elements of ``leaf_norms``.
    """

    metrics: tuple[tuple[str, int], ...]
    norms: tuple[int, ...]
    leaf_names: tuple[str, ...]


def find_layout(opt_state: Any, params: Sequence[NamedLeaf] | None) -> Layout:
    """Looks for the numbers of ``opt_state`` once, so that later steps need not."""
    leaves, treedef = jax.tree.flatten(opt_state)
    guards = find_outer_guards(opt_state)
    for guard in guards:
        refuse_batched("History.append", first_leaf(guard.state.guard_step))
    # The same tree with the position of each leaf as its value; scalars stay scalars.
    shapes = ((1,) * np.ndim(leaf) for leaf in leaves)
    positions = treedef.unflatten([np.full(shape, i) for i, shape in enumerate(shapes)])
    scalars = tuple((name, int(position)) for name, position in metrics(positions).items())
    if not scalars:
        raise ValueError(
            f"No state of optax_guard was found in the given {type(opt_state).__name__}. Pass the "
            "optimizer state of og.guard(...) or og.stabilize(...), or None to record only the "
            "scalars given by name."
        )
    norms = tuple(
        int(first_leaf(guard.state.leaf_norms).item()) for guard in find_outer_guards(positions)
    )
    names = [name for guard in guards for name in guard_leaf_names(guard, params).names]
    return Layout(scalars, norms, tuple(names))


class Pending:
    """Numbers on their way to the host, as one small array."""

    def __init__(self, names: Sequence[str], arrays: Sequence[Any], known: Record):
        """Starts the copy; ``known`` are the numbers that are on the host already."""
        self._known = known
        # Slices in steps of words, and what they hold.
        self._parts = [
            (name, array.size, array.dtype) for name, array in zip(names, arrays, strict=True)
        ]
        self._packed: Any = None
        if arrays:
            # A new buffer, which nobody donates.
            self._packed = _pack(_on_one_device(arrays))
            self._packed.copy_to_host_async()

    def is_ready(self) -> bool:
        """True if :meth:`get` would not wait."""
        return self._packed is None or self._packed.is_ready()

    def get(self) -> Record:
        """The numbers as Python numbers, and ``leaf_norms`` as a list."""
        if self._packed is None:
            return dict(self._known)
        record, norms, start = dict(self._known), None, 0
        words = np.asarray(self._packed)
        for name, size, dtype in self._parts:
            carrier = _carrier(dtype)
            stop = start + size * carrier.itemsize // _WORD.itemsize
            values = words[start:stop].view(carrier).tolist()
            start = stop
            if name == LEAF_NORMS:
                norms = [*(norms or ()), *values]
            else:
                record[name] = bool(values[0]) if dtype.kind == "b" else values[0]
        return record if norms is None else record | {LEAF_NORMS: norms}


@functools.cache
def _carrier(dtype: Any) -> np.dtype:
    """What an array travels as: something whose bytes are whole words."""
    dtype = np.dtype(dtype)
    if dtype.itemsize >= 4:
        return dtype
    return np.dtype(np.float32 if jnp.issubdtype(dtype, jnp.floating) else np.int32)


@jax.jit
def _pack(arrays: Sequence[Any]) -> jax.Array:
    """All of them, bit for bit, in one vector: one transfer instead of twenty."""
    carried = [jnp.ravel(array).astype(_carrier(array.dtype)) for array in arrays]
    words = [jnp.ravel(lax.bitcast_convert_type(array, _WORD)) for array in carried]
    # Written one after the other: XLA:CPU takes ten times as long for a concatenation.
    packed, start = jnp.zeros(sum(part.size for part in words), _WORD), 0
    for part in words:
        packed = lax.dynamic_update_slice(packed, part, (start,))
        start += part.size
    return packed


def _on_one_device(arrays: Sequence[Any]) -> list[Any]:
    """The copy on one local device of what is replicated over several."""
    if jax.device_count() == 1:
        return list(arrays)
    local = [_local_copy(array) for array in arrays]
    devices = {array.device for array in local if isinstance(array, jax.Array)}
    if len(devices) > 1:
        first = next(array.device for array in local if isinstance(array, jax.Array))
        return [jax.device_put(array, first) for array in local]
    return local


def _local_copy(array: Any) -> Any:
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    return jax.device_put(array, jax.local_devices()[0])


def split_scalars(scalars: dict[str, Any]) -> tuple[Record, dict[str, Any]]:
    """Numbers of the host, and arrays still to be fetched.

    Raises:
      ValueError: if a value is no scalar, or has a reserved name.
      TypeError: if a value is no real number, or a tracer.
    """
    known: Record = {}
    arrays = {}
    refuse_tracers("History.append", list(scalars.values()))
    for name, value in scalars.items():
        if name in (STEP, LEAF_NORMS):
            raise ValueError(f"{name!r} is a name that og.History uses itself; take another one.")
        if isinstance(value, jax.Array) and value.ndim == 0 and _is_real(value.dtype):
            arrays[name] = value
        elif np.ndim(value):
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


def _is_real(dtype: Any) -> bool:
    real = (jnp.floating, jnp.integer, jnp.bool_)
    return dtype.kind in "fiub" or any(jnp.issubdtype(dtype, kind) for kind in real)


def _to_python(value: Any) -> bool | int | float:
    if value.dtype == bool:
        return bool(value)
    return float(value) if jnp.issubdtype(value.dtype, jnp.floating) else int(value)
