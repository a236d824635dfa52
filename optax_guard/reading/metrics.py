"""Numbers for a training log, read off an optimizer state on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.checks import shown
from optax_guard._core.find import factory_name, own_states
from optax_guard._core.states import PackedState
from optax_guard.reading.find import (
    Found,
    find_guards,
    find_outer_guards,
    find_states,
    first_leaf,
    no_state,
)
from optax_guard.reading.names import gradient_leaves, guard_rows
from optax_guard.wrappers.guard_state import GuardState
from optax_guard.wrappers.loss_scale import DynamicLossScaleState
from optax_guard.wrappers.microbatch import SkipMicrobatchState


def metrics(opt_state: Any, *, prefix: str = "guard/") -> dict[str, jax.Array]:
    """Collects the scalars of every state of this library.

    They are called::

        guard/<field>                   of a guard
        guard/<factory>/<field>         of any other state: guard/clip_by_norm/clipped_total
        guard/<group>/...               within a group of optax.partition, or a part of
                                        optax.named_chain: guard/embed/skipped_total
        guard/.../2/<field>             of the second of a kind with the same name, counted from
                                        outside: guard/2/skipped_total, guard/clip_by_norm/2/steps

    Args:
      opt_state: any pytree that holds optimizer states at any depth: an Optax state, a Linen
        ``TrainState``, an ``nnx.Optimizer``, an Equinox module; a dict of several states, whose
        keys then are groups as well.
      prefix: put in place of ``guard/``.

    Returns:
      Scalar arrays by name. For an ensemble, whose state has a batch axis from ``jax.vmap``, each
      array has that axis. The keys depend on the structure of the state only. Pure, callable under
      ``jit``; nothing is transferred to the host, and a state of NumPy arrays gives such. The
      snapshot that :func:`rollback` keeps has no metrics of its own.

    Raises:
      ValueError: if there is no state of this library in ``opt_state``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.stabilize(optax.sgd(0.1), clip=og.clip_by_norm(1.0))
      >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> found = og.metrics(state)
      >>> float(found["guard/grad_norm"]), int(found["guard/clip_by_norm/clipped_total"])
      (5.0, 1)
    """
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be text such as 'guard/', got {shown(prefix)}.")
    states = find_states(opt_state)
    if not states:
        raise no_state(opt_state, "state of optax_guard")
    places = places_of(states, prefix)
    return {
        place + field: value
        for place, found in zip(places, states, strict=True)
        for field, value in _scalars(found.state)
    }


def places_of(states: Sequence[Found], prefix: str) -> list[str]:
    """What :func:`metrics` puts before the fields of each of all states, as found."""
    places: list[str] = []
    for found in states:
        is_guard = isinstance(found.state, GuardState)
        parts = found.keys if is_guard else (*found.keys, factory_name(type(found.state)))
        place = prefix + "".join(f"{part}/" for part in parts)
        places.append(next(name for name in _numbered(place) if name not in places))
    return places


def label_of(place: str) -> str:
    """``"embed/clip_by_norm 2"`` for ``"embed/clip_by_norm/2/"``, the second of a kind."""
    head, _, number = place.rstrip("/").rpartition("/")
    return f"{head} {number}" if head and number.isdigit() else f"{head}/{number}".lstrip("/")


def _numbered(place: str) -> Iterator[str]:
    yield place
    number = 2
    while True:
        yield f"{place}{number}/"
        number += 1


def _scalars(state: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of each number in a state; one that packs none holds nothing else."""
    if isinstance(state, PackedState):
        for name, entry in state._entries.items():
            if entry.where is None:
                yield name, getattr(state, name)
    else:
        for name, value in zip(state._fields, state, strict=True):
            leaf = jax.tree.leaves(value)[0]
            yield name, leaf if isinstance(leaf, np.ndarray) else jnp.asarray(leaf)


def layer_norms(opt_state: Any, params: Any) -> dict[str, jax.Array]:
    """The norm of the gradient of every layer, as the guards saw it last, ready for a logger.

    Args:
      opt_state: any pytree that holds a :class:`GuardState`.
      params: the parameters, with the batch axis of an ensemble if the state has one; with Flax NNX
        ``nnx.state(model, nnx.Param)``.

    Returns:
      Scalar arrays by path, ``"layers/kernel[3]"`` for a layer of a stack; with its axis for an
      ensemble. Before any clipping; 0 for gradients that are unused, NaN or inf for non-finite
      ones. Of guards one in another only the outermost is read. Leaves behind ``optax.masked`` or
      ``optax.partition`` that nothing tells the names of are numbered within their group. Pure,
      callable under ``jit``.

    Raises:
      ValueError: if there is no guard in ``opt_state``, or ``params`` does not match it.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> tx = og.guard(optax.sgd(0.1))
      >>> _, state = tx.update(params, tx.init(params))
      >>> {name: float(norm) for name, norm in og.layer_norms(state, params).items()}
      {'bias': 1.41421..., 'kernel': 2.0}
    """
    leaves = gradient_leaves(params)
    result: dict[str, jax.Array] = {}
    for guard in find_outer_guards(opt_state) or find_guards(opt_state):
        rows = guard_rows(guard, leaves)
        norms = guard.state.leaf_norms
        within = "".join(f"{key}/" for key in guard.keys)
        for index, name in enumerate(rows.names):
            # Of guards in a row only the first sees the gradients themselves.
            result.setdefault(name if rows.are_known else within + name, norms[..., index])
    return result


def step_ok(opt_state: Any) -> jax.Array:
    """Tells whether the last step was accepted by every guard and overflowed no loss scale.

    Inside ``optax.MultiSteps`` a step is a micro-batch: it is fine unless :func:`skip_microbatch`
    left it out, or it completed a window that the guard inside skipped.

    Args:
      opt_state: any pytree that holds at least one :class:`GuardState`,
        :class:`DynamicLossScaleState` or :class:`SkipMicrobatchState`.

    Returns:
      bool array, a scalar; for an ensemble, whose state has a batch axis from ``jax.vmap``, with
      that axis. Callable under ``jit``.

    Raises:
      ValueError: if there is none of them in ``opt_state``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1))
      >>> _, state = tx.update(jnp.array([jnp.inf]), tx.init(jnp.zeros(1)))
      >>> bool(og.step_ok(state))
      False
    """
    bad = [flag for found in find_states(opt_state) for flag in _bad_flags(found)]
    if not bad:
        find_guards(opt_state)  # raises
    return ~functools.reduce(jnp.logical_or, bad)


def _bad_flags(found: Found) -> list[jax.Array]:
    """What a state says against the last step."""
    state = found.state
    if isinstance(state, SkipMicrobatchState):
        return [jnp.asarray(state.microbatch_skipped)]
    if isinstance(state, GuardState):
        is_bad = jnp.asarray(state.last_step_skipped)
    elif isinstance(state, DynamicLossScaleState):
        is_bad = jnp.asarray(state.last_step_overflowed)
    else:
        return []
    for outer in found.multi_steps:  # between two windows nothing is asked of what is inside
        is_bad &= first_leaf(outer.mini_step) == 0
    return [is_bad]


def select(ok: jax.Array, new: Any, old: Any) -> Any:
    """Keeps ``new`` if ``ok``, else ``old``, leaf by leaf and bit for bit.

    For what a training step changes outside the optimizer: BatchNorm statistics, EMA weights,
    step counters, PRNG keys.

    In Flax NNX copy the old values before the forward pass, with
    ``jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))``: ``nnx.state`` alone shares the live
    variables, so that what was read before shows what is written after, and ``old`` is ``new``.

    Args:
      ok: bool array as :func:`step_ok` gives: a scalar, or ``[members]`` for an ensemble.
      new: pytree of arrays; for an ensemble the leading axes of each are those of ``ok``.
      old: pytree of the same structure, shapes and dtypes.

    Returns:
      The chosen tree; for an ensemble chosen member by member.

    Raises:
      ValueError: if structures or shapes differ, or an array has not the leading axes of ``ok``.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> og.select(jnp.array(False), {"mean": jnp.full(1, jnp.nan)}, {"mean": jnp.zeros(1)})
      {'mean': Array([0.], dtype=float32)}
      >>> og.select(jnp.array([True, False]), jnp.ones((2, 1)), jnp.zeros((2, 1)))
      Array([[1.], [0.]], dtype=float32)
    """
    ok = _as_verdict(ok)
    structures = jax.tree.structure(new), jax.tree.structure(old)
    if structures[0] != structures[1]:
        raise ValueError(
            "select needs two trees of the same structure, got new with {} and old with {}. Pass "
            "the same part of the model after and before the step.".format(*structures)
        )

    def choose(path, after, before):
        shape = jnp.shape(after)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if shape != jnp.shape(before):
            raise ValueError(
                f"select needs arrays of the same shape, but {name!r} is {shape} in new and "
                f"{jnp.shape(before)} in old. Pass the same part of the model after and before."
            )
        if shape[: ok.ndim] != ok.shape:
            raise ValueError(
                f"ok of shape {ok.shape} chooses members of an ensemble along the first axes, but "
                f"{name!r} has the shape {shape}. Move the axis of the members to the front, or "
                "pass ok.all() for what all members share."
            )
        return jnp.where(ok.reshape(ok.shape + (1,) * (len(shape) - ok.ndim)), after, before)

    return jax.tree_util.tree_map_with_path(choose, new, old)


def _as_verdict(ok: Any) -> jax.Array:
    """``ok`` as a bool array.

    Raises:
      TypeError: if it is anything else, such as one of the trees or a loss.
    """
    is_array = isinstance(ok, (jax.Array, np.ndarray, np.generic, bool))
    dtype = jnp.asarray(ok).dtype if is_array else None
    if dtype is None or not (dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer)):
        kind = f"an array of {dtype}" if is_array else f"a {type(ok).__name__}"
        hint = ", which og.step_ok gives for it" if not is_array and own_states(ok) else ""
        raise TypeError(
            f"ok must be a bool array{hint}, but is {kind}. Call og.select(ok, new, old) with "
            "ok = og.step_ok(opt_state)."
        )
    return jnp.asarray(ok).astype(jnp.bool_)
