"""Norms of gradients beside those of their parameters, from gradients or from a state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.find import factory_name, is_clip_state, own_states
from optax_guard._core.groups import make_groups
from optax_guard._core.measure import measure
from optax_guard._core.rescale import RANGES
from optax_guard.reading.clips import OF_UPDATES, scope_of
from optax_guard.reading.find import Found, find_outer_guards, refuse_batched
from optax_guard.reading.names import NamedLeaf, Row, gradient_leaves, guard_rows


class Reading(NamedTuple):
    """Numbers of one row.

    ``zeros`` is None if they were not counted; ``is_coarse`` if a norm of 0 may be a tiny one.
    """

    path: str
    shape: tuple[int, ...]
    norm: float
    param_norm: float
    zeros: float | None
    is_used: bool = True
    is_coarse: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rms(self) -> float:
        return self.norm / math.sqrt(self.size) if self.size else 0.0

    @property
    def param_rms(self) -> float:
        """Zero also for parameters that are not finite: they are no measure of anything."""
        is_known = self.size > 0 and math.isfinite(self.param_norm)
        return self.param_norm / math.sqrt(self.size) if is_known else 0.0


def from_state(opt_state: Any, leaves: Sequence[NamedLeaf]) -> list[Reading] | None:
    """What the outermost guards measured last; None where there is no guard."""
    guards = find_outer_guards(opt_state)
    if not guards:
        return None
    params = {leaf.name: jnp.asarray(leaf.leaf) for leaf in leaves}
    watched = [_watched_by(guard, leaves, params) for guard in guards]
    numbers = jax.device_get([own.numbers for own in watched])
    readings: dict[str, list[Reading]] = {}
    for own, (step, *columns) in zip(watched, numbers, strict=True):
        if step == 0:
            raise ValueError("The guard has seen no gradients yet. Pass the state after an update.")
        found: dict[str, list[Reading]] = {}
        for row, shape, norm, is_unused, param in zip(own.rows, own.shapes, *columns, strict=True):
            used = not is_unused
            reading = Reading(
                row.name, shape, float(norm), _norm(param), None, used, own.are_coarse
            )
            found.setdefault(row.leaf or row.name, []).append(reading)
        readings = found | readings  # of guards in a row only the first sees the gradients
    return [reading for name in params for reading in readings.get(name, ())]


class _Watched(NamedTuple):
    """What a guard watches.

    Attributes:
      rows: leaves and layers.
      shapes: of each row.
      numbers: steps of the guard; for each row the norm, whether it is unused, and what
        ``_numbers`` gives for the parameter.
      are_coarse: whether a norm below 1e-19 may read as 0.
    """

    rows: Sequence[Row]
    shapes: Sequence[tuple[int, ...]]
    numbers: tuple[Any, Any, Any, Sequence[jax.Array]]
    are_coarse: bool


def _watched_by(
    guard: Found, leaves: Sequence[NamedLeaf], params: Mapping[str, jax.Array]
) -> _Watched:
    state = guard.state
    refuse_batched("diagnose", state.guard_step)
    known = guard_rows(guard, leaves)
    if not known.are_known:
        raise ValueError(
            "The guard sits inside optax.masked or optax.partition, and the state of its "
            "optimizer does not tell which leaves it watches. Pass the gradients instead."
        )
    own = [params[row.leaf or row.name][row.layer] for row in known.rows]
    of_params = [_numbers(param) for param in own]
    numbers = (state.guard_step, state.leaf_norms, state.unused_leaves, of_params)
    shapes = [param.shape for param in own]
    return _Watched(known.rows, shapes, numbers, _shares_units(state.inner_state))


def _shares_units(inner_state: Any) -> bool:
    """Whether a guard shares the measurement of a clip by units, which is not looked at again.

    A unit is often dead, and to read all gradients a second time for it would double their cost.
    """
    clips = [state for state in own_states(inner_state) if is_clip_state(state)]
    seeing = [state for state in clips if factory_name(type(state)) not in OF_UPDATES]
    return any(scope_of(state) == "unit" for state in seeing)


def from_gradients(grads: Any, leaves: Sequence[NamedLeaf]) -> list[Reading]:
    own = {leaf.name: jnp.asarray(leaf.leaf) for leaf in gradient_leaves(grads)}
    params = {leaf.name: jnp.asarray(leaf.leaf) for leaf in leaves}
    for name, leaf in own.items():
        expected = params.get(name)
        if expected is None or expected.shape != leaf.shape:
            other = "not there" if expected is None else f"of shape {expected.shape} there"
            raise ValueError(
                "diagnose takes gradients that match params, or a state that holds a guard; but "
                f"{name} of shape {leaf.shape} is {other}. Pass the parameters that the gradients "
                "are for; with Flax NNX, nnx.state(model, nnx.Param)."
            )
    numbers = jax.device_get([_all_numbers(own), _all_numbers(params)])
    return [
        _reading_of(name, param, numbers[0].get(name), numbers[1][name])
        for name, param in params.items()
    ]


def _all_numbers(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _numbers(array) for name, array in arrays.items()}


def _reading_of(
    name: str, param: jax.Array, numbers: np.ndarray | None, of_param: np.ndarray
) -> Reading:
    if numbers is None:
        return Reading(name, param.shape, 0.0, _norm(of_param), math.nan, is_used=False)
    zeros = 1 - float(numbers[2]) / param.size if param.size else 0.0
    return Reading(name, param.shape, _norm(numbers), _norm(of_param), zeros)


@jax.jit
def _numbers(array: jax.Array) -> jax.Array:
    """Norm, norm times a small power of two, and how many elements are not zero.

    The norm is NaN where an element is not finite. Compiled once for each shape in a model.
    """
    measured = measure([array], make_groups("leaf", [""], [array]))
    norm = jnp.where(measured.leaf_finite, measured.norms[0], jnp.nan)[0]
    count = jnp.count_nonzero(array)  # an integer: a float32 mean stops counting at 2**24
    return jnp.stack([norm, measured.scaled[0][0], count.astype(norm.dtype)])


def _norm(numbers: np.ndarray) -> float:
    """The norm; one past float32 was saturated."""
    norm, scaled, _ = numbers
    if norm == np.finfo(np.float32).max and numbers.dtype == np.float32:
        return float(scaled) / RANGES[np.dtype("float32")].down
    return float(norm)
