"""How a wrapper calls the optimizer that it wraps."""

from __future__ import annotations

import inspect
from typing import Any

import optax


def tolerant_update(inner: optax.GradientTransformation) -> Any:
    """``inner.update`` without the extra args that it does not take."""
    update = inner.update  # not that of with_extra_args_support: it drops those of MultiSteps
    kinds = inspect.signature(update).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in kinds):
        return update
    names = {parameter.name for parameter in kinds}

    def tolerant(updates, state, params=None, **extra_args):
        known = {name: value for name, value in extra_args.items() if name in names}
        return update(updates, state, params, **known)

    return tolerant


def gradient_like(params: Any) -> Any:
    """The part of ``params`` whose structure the gradients have."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params
