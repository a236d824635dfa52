"""Dynamic loss scaling: float16 gradients kept between underflow and overflow."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from optax_guard._core.arrays import increment, promote, times
from optax_guard._core.axes import AxisName, MeshAxes, resolve_axes
from optax_guard._core.checks import (
    check_axis_name,
    check_count,
    check_number,
    check_transformation,
    shown,
)
from optax_guard._core.find import lost_types, states_of_type
from optax_guard._core.inner import gradient_like, tolerant_update
from optax_guard._core.interpret import run
from optax_guard._core.plan import propose
from optax_guard._core.reader import Reading, make_reader
from optax_guard._core.states import Entry, PackedState, flag
from optax_guard._core.transformation import transformation
from optax_guard._core.trees import float_leaves, is_inexact, strong
from optax_guard.wrappers._verdict import guard_inside

_LARGEST_SCALE = 2.0**126  # its reciprocal is no subnormal float32


class _LossScaleArrays(NamedTuple):
    inner_state: Any
    integers: Any
    numbers: Any


class DynamicLossScaleState(PackedState, _LossScaleArrays):
    """State of :func:`dynamic_loss_scale`: that of the wrapped optimizer, and 28 bytes.

    Attributes:
      inner_state: state of the wrapped optimizer.
      integers: int32, packed.
      numbers: float32, packed.
    """

    __slots__ = ()
    good_steps = Entry("integers", "int32, finite steps since the scale last changed")
    overflows_total = Entry("integers", "int32, steps whose gradients overflowed")
    overflows_in_a_row = Entry("integers", "int32")
    last_step_overflowed = flag("integers", "bool")
    steps = Entry("integers", "int32, calls so far, those included that overflowed")
    last_skip_step = Entry(
        "integers", "int32, ``steps`` at the last skip of the guard inside; 0: none yet"
    )
    loss_scale = Entry("numbers", "float32, what the next loss is to be multiplied by")


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    initial_scale: Any = 2.0**15,
    growth_interval: int = 2000,
    factor: Any = 2.0,
    min_scale: Any = 1.0,
    max_scale: Any = 2.0**24,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the loss scale, and halves the scale when they have overflowed.

    Small gradients are zero in float16; those of ``loss * scale`` are not. With ``S`` the scale::

        finite gradients:  update of inner for gradients / S; at every growth_interval-th such
                           step in a row S <- min(S * factor, max_scale)
        otherwise:         update -0.0, inner state bitwise as it was;
                           S <- max(S / factor, min_scale)

    Let :func:`scale_loss` multiply the loss, with the state that ``update`` will get::

        tx = og.dynamic_loss_scale(og.guard(optax.adam(1e-3)))

        def loss_fn(params):
            return og.scale_loss(forward(params, batch), opt_state)

        grads = jax.grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)

    The first step is like every other; expect a few overflows while the scale comes down.
    A loss passed as ``value=`` goes to ``inner`` untouched, so pass the unscaled one.

    **Put it outside of the guard**, as above. An overflow is then skipped here and changes nothing
    inside, clip histories and the guard's counts included; :func:`step_ok` is false and
    ``overflows_total`` counts it. The guard sees true gradients and skips for its own reasons,
    which change no scale. A gradient that is non-finite at ``min_scale`` is no matter of scale:
    it is handed on to the guard, which skips it, names the layer and gives up in time; and so are
    those of a step whose loss, passed as ``value=``, is non-finite: a fault of the batch, for which
    the scale stays.
    ``guard(dynamic_loss_scale(...))`` would hide overflows from the scale, which then
    never fell; ``init`` of that guard raises. Put it outside of ``optax.MultiSteps``, too, which
    would add the overflow to its mean: ``dynamic_loss_scale(optax.MultiSteps(guard(...), 4))``.

    float16 gradients reach ``inner`` as float32, and so do float16 parameters, its state
    being float32 for them: Adam's second moment of a gradient of 1e-4 is zero in float16. All
    other dtypes (bfloat16, float32, ...) reach it as they are.

    Args:
      inner: the optimizer, guarded if you like.
      initial_scale: scalar in [min_scale, max_scale].
      growth_interval: static integer >= 1; ``static_args=("growth_interval",)`` for
        ``optax.inject_hyperparams``.
      factor: scalar in (1, inf). Powers of two keep every bit of the gradients.
      min_scale: scalar in (0, 2**126].
      max_scale: scalar in [min_scale, 2**126].
      axis_name: mesh axes over which the gradients are sharded inside ``shard_map`` or ``pmap``.

    Returns:
      A transformation that passes extra args on to ``inner``, less those that it does not take.
      Updates have the dtype of the gradients, leaf by leaf (with float16 gradients of float32
      parameters cast the gradients first, or small updates vanish). Cost: one read of the
      gradients, which a guard or clip inside shares, and writing them down unscaled (for AdamW in
      float32 on XLA:CPU about a fifth more bytes a step).

    Raises:
      ValueError: if a number is out of range, or ``initial_scale`` is not between the bounds.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = jnp.ones(2, jnp.float16)
      >>> tx = og.dynamic_loss_scale(optax.sgd(1.0), initial_scale=4096.0)
      >>> state = tx.init(params)
      >>> for gradient in [4096, jnp.inf, 4096]:
      ...     updates, state = tx.update(jnp.full(2, gradient, jnp.float16), state, params)
      ...     print(updates, state.loss_scale)
      [-1. -1.] 4096.0
      [-0. -0.] 2048.0
      [-2. -2.] 2048.0

    References:
      Micikevicius et al., `Mixed precision training <https://arxiv.org/abs/1710.03740>`_, 2018.
      The scalers of Flax and Keras lack a ceiling or a floor; here both hold for any run.
    """
    check_transformation("inner", inner)
    check_count("growth_interval", growth_interval)
    check_number("factor", factor, minimum=1, open_minimum=True, open_maximum=True)
    check_number("min_scale", min_scale, open_minimum=True, maximum=_LARGEST_SCALE)
    check_number("max_scale", max_scale, open_minimum=True, maximum=_LARGEST_SCALE)
    check_number("initial_scale", initial_scale, open_minimum=True, maximum=_LARGEST_SCALE)
    _check_bounds(min_scale, initial_scale, max_scale)
    check_axis_name(axis_name)
    inner_update = tolerant_update(inner)

    def init(params):
        return DynamicLossScaleState.pack(
            inner_state=jax.tree.map(strong, inner.init(_widen(params))),
            good_steps=0,
            overflows_total=0,
            overflows_in_a_row=0,
            last_step_overflowed=False,
            steps=0,
            last_skip_step=0,
            loss_scale=jnp.asarray(initial_scale, jnp.float32),
        )

    def update(updates, state, params=None, **extra_args):
        # No derivative with respect to the scale, which scale_loss has multiplied by: they cancel.
        inverse = lax.stop_gradient(1 / state.loss_scale)
        split = float_leaves(_widen(updates), gradient_like(params))
        axes = resolve_axes(axis_name, split.paths, split.arrays)
        unscaled = split.replace([times(leaf, inverse) for leaf in split.arrays])
        gradients = float_leaves(unscaled, gradient_like(params))
        proposal = propose(inner_update, gradients, state.inner_state, _widen(params), extra_args)
        reader = make_reader(proposal, gradients, axes)
        reading = reader.read(proposal.arguments)
        is_finite, is_for_inner = _judge(reading, extra_args.get("value"), state, axes, min_scale)
        new_updates, inner_state = run(proposal, is_for_inner, reader, reading)
        new_state = _record(state, inner_state, is_finite, is_for_inner)
        return _narrow(new_updates, updates, params), new_state

    def _record(state, inner_state, is_finite, is_for_inner):
        has_overflowed = ~is_finite & ~(is_for_inner & (state.loss_scale > min_scale))
        good_steps = jnp.where(is_finite, increment(state.good_steps), state.good_steps)
        has_grown = is_finite & (good_steps >= growth_interval)
        larger = jnp.minimum(state.loss_scale * factor, max_scale)
        smaller = jnp.maximum(state.loss_scale / factor, min_scale)
        scale = jnp.where(has_grown, larger, jnp.where(has_overflowed, smaller, state.loss_scale))
        total, in_a_row = state.overflows_total, state.overflows_in_a_row
        step = increment(state.steps)
        guard = guard_inside(inner_state)
        has_skipped = is_for_inner & (False if guard is None else guard.last_step_skipped)
        return DynamicLossScaleState.pack(
            inner_state=inner_state,
            good_steps=jnp.where(has_overflowed | has_grown, 0, good_steps),
            overflows_total=jnp.where(has_overflowed, increment(total), total),
            overflows_in_a_row=jnp.where(has_overflowed, increment(in_a_row), 0),
            last_step_overflowed=has_overflowed,
            steps=step,
            last_skip_step=jnp.where(has_skipped, step, state.last_skip_step),
            loss_scale=scale.astype(jnp.float32),
        )

    return transformation("dynamic_loss_scale", DynamicLossScaleState, init, update)


def scale_loss(loss: Any, opt_state: Any) -> jax.Array:
    """Multiplies a loss by the scale that :func:`dynamic_loss_scale` keeps.

    Args:
      loss: real array of any shape, usually a scalar.
      opt_state: any pytree that holds one :class:`DynamicLossScaleState` at any depth: an Optax
        state, a Linen ``TrainState``, an ``nnx.Optimizer``.

    Returns:
      ``loss * loss_scale`` in float32 (float64 for float64 losses), so that it does not overflow
      itself. Callable under ``jit`` and ``grad``; no derivative with respect to the scale.

    Raises:
      ValueError: if ``opt_state`` holds no loss scale, or several.
      TypeError: if ``loss`` is no array or number.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.dynamic_loss_scale(optax.sgd(0.1), initial_scale=1024.0)
      >>> og.scale_loss(jnp.float16(0.5), tx.init(jnp.zeros(2)))
      Array(512., dtype=float32)
    """
    states = states_of_type(opt_state, DynamicLossScaleState)
    if len(states) != 1:
        raise ValueError(
            lost_types(opt_state)
            or f"scale_loss needs an optimizer state with one loss scale; {len(states)} were found "
            f"in the given {type(opt_state).__name__}. Wrap the optimizer once, in "
            "og.dynamic_loss_scale(...), and pass its state: og.scale_loss(loss, opt_state)."
        )
    if not isinstance(loss, (jax.Array, np.ndarray, np.generic, int, float)):
        raise TypeError(
            f"loss must be a real array, got {shown(loss)}. Of (loss, aux) pass the loss: "
            "return og.scale_loss(loss, opt_state), aux."
        )
    scale = states[0].loss_scale
    loss = jnp.asarray(loss)
    return loss.astype(promote(loss.dtype, jnp.float32)) * lax.stop_gradient(scale)


def _judge(
    reading: Reading, value: Any, state: DynamicLossScaleState, axes: MeshAxes, min_scale: Any
) -> tuple[jax.Array, jax.Array]:
    """Whether the gradients are finite, and whether the step is for the optimizer inside.

    A guard inside gets what no scale can mend: gradients that are non-finite at the smallest
    scale, or beside a loss that is.
    """
    is_finite = jnp.all(reading.leaf_finite)
    is_for_inner = is_finite
    if guard_inside(state.inner_state) is not None:
        is_for_inner |= state.loss_scale <= min_scale
        if value is not None:
            is_for_inner |= axes.any(~jnp.isfinite(jnp.asarray(value)).all())
    # Through a branch, so that XLA does not repeat what led to it in the loop of every leaf.
    is_for_inner = lax.cond(is_for_inner, lambda: True, lambda: False)
    return is_finite, is_for_inner


def _check_bounds(min_scale: Any, initial_scale: Any, max_scale: Any) -> None:
    scales = (min_scale, initial_scale, max_scale)
    if any(isinstance(scale, Tracer) for scale in scales):
        return
    if not float(min_scale) <= float(initial_scale) <= float(max_scale):
        raise ValueError(
            "initial_scale must be in [min_scale, max_scale], got "
            f"initial_scale={initial_scale!r}, min_scale={min_scale!r}, max_scale={max_scale!r}."
        )


def _widen(tree: Any) -> Any:
    """``tree`` with its float16 leaves in float32."""
    split = float_leaves(tree)
    return split.replace(
        [x.astype(jnp.float32) if x.dtype == jnp.float16 else x for x in split.arrays]
    )


def _narrow(updates: Any, gradients: Any, params: Any) -> Any:
    """``updates`` in the dtypes of the gradients; of the parameters if only they are alike."""
    treedef = jax.tree.structure(updates)
    like = next((t for t in (gradients, params) if jax.tree.structure(t) == treedef), updates)

    def cast(update, own):
        return update.astype(own.dtype) if is_inexact(update) and is_inexact(own) else update

    return jax.tree.map(cast, updates, like)
