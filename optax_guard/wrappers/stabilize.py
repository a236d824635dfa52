"""The one-liner: a clip and a guard around an optimizer."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import optax

from optax_guard._core.checks import check_transformation
from optax_guard._core.inner import tolerant_update, uses_length
from optax_guard.wrappers.clip_by_update_ratio import clip_by_update_ratio
from optax_guard.wrappers.guard import guard


def stabilize(
    optimizer: optax.GradientTransformation,
    *,
    clip: optax.GradientTransformation | None = None,
    **guard_options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Clips gradients and guards the optimizer: ``guard(chain(clip, optimizer))``.

    A step with a NaN or an Inf in it is skipped as if it had not been. A gradient much longer than
    those before, or one that would change the weights by more than a twentieth of themselves, is
    shortened.

    Without ``clip`` it is ``guard(clip_by_update_ratio(optimizer))``, a rule with nothing to tune
    that does not depend on the units of the loss, and that leaves the length of steps to Adam and
    other optimizers that bound it themselves. Beside a norm of 1 and no clip (``benchmarks/`` and
    ``examples/``; plain SGD but for the faults, which meet momentum; accuracy in per cent):

    ======================================================  =========  ======  ====
    task                                                    stabilize  norm 1  none
    ======================================================  =========  ======  ====
    recurrent network that explodes, seeds solved of 16            16      16     0
    worst of four faults, from step 0, 20 or 60 on               96.9    97.2  dead
    healthy, 5000 MNIST images, points lost                     -0.06    1.16     0
    20 layers of 32 relu units, He                                 42      58    16
    64-128-64-10, weights from N(0, 1)                             94      81    74
    ======================================================  =========  ======  ====

    It loses most on the fourth line, a badly conditioned network. Beside no clip it costs a small
    language model at most 0.01 nats with six optimizers of seven (schedule-free at too high a rate
    loses 0.09); beside a norm of 1 it is up to 0.08 nats behind with Lion, Muon, SOAP and momentum.
    Where norms rise for good reasons and stay (a second loss, a curriculum), it ends within a third
    of the loss without a clip; look at ``recent_clip_rate`` in :func:`metrics`.
    Bursts of bad batches at the usual loss are shortened too little: ``skip_if=spike()`` leaves
    them out.

    Args:
      optimizer: the optimizer to protect.
      clip: what to put before it; None for :func:`clip_by_update_ratio` around it, and
        ``optax.identity()`` for none.
      **guard_options: passed to :func:`guard`; ``axis_name`` and ``stacked`` are given to the
        default clip, too.

    Around optimizers that read a step size off the length of the gradient or search along it
    (Polyak, mechanize, momo, COCOB, L-BFGS and other line searches) it only guards, and warns.
    ``stabilize(optax.MultiSteps(...))`` is refused by ``init``: write
    ``optax.MultiSteps(og.stabilize(optimizer), k)``.

    Returns:
      A transformation; see :func:`guard` for its state and cost. Clip and guard share one
      read of the gradients. The default clip evaluates ``optimizer`` three times more in the steps
      0, 1, 2, 4, 8, ... and in every hundredth, and takes longer to compile;
      ``clip=clip_by_norm(1.0)`` does not.

    Raises:
      TypeError: if ``optimizer`` or ``clip`` is no transformation; see also :func:`guard`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = jnp.eye(2)
      >>> tx = og.stabilize(optax.sgd(1.0), clip=og.clip_by_norm(1.0))
      >>> updates, _ = tx.update(30 * params, tx.init(params), params)
      >>> updates.round(3)
      Array([[-0.707, -0.   ],
             [-0.   , -0.707]], dtype=float32)
      >>> tx = og.stabilize(optax.sgd(1.0))
      >>> updates, _ = tx.update(0.01 * params, tx.init(params), params)
      >>> updates.round(3)
      Array([[-0.01, -0.  ],
             [-0.  , -0.01]], dtype=float32)
    """
    check_transformation("optimizer", optimizer)
    _check_options(guard_options)
    axis_name, stacked = guard_options.get("axis_name"), guard_options.get("stacked")
    if clip is not None:
        check_transformation("clip", clip)
        update = tolerant_update(optimizer)
        tolerant = optax.GradientTransformationExtraArgs(optimizer.init, update)
        return guard(optax.chain(clip, tolerant), **guard_options)
    name = uses_length(optimizer)
    if name is None:
        clipped = clip_by_update_ratio(optimizer, axis_name=axis_name, stacked=stacked)
        return guard(clipped, **guard_options)
    warnings.warn(
        f"stabilize only guards this optimizer and does not clip: {name} reads a step size off the "
        "length of the gradient or searches along it, which a clip would falsify. Write "
        "og.guard(optimizer) to say so, or pass a clip=.",
        stacklevel=2,
    )
    return guard(optimizer, **guard_options)


def _check_options(options: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(guard).parameters if name != "inner"]
    for name in options:
        if name not in known:
            hint = ""
            if name in inspect.signature(clip_by_update_ratio).parameters or "norm" in name:
                hint = (
                    " For another limit pass a clip, such as clip=og.clip_by_norm(1.0), or write "
                    "og.guard(og.clip_by_update_ratio(optimizer, ...))."
                )
            raise TypeError(
                f"stabilize has no argument {name!r}. Besides clip it takes those of og.guard: "
                f"{', '.join(known)}.{hint}"
            )
