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


# Factories of Optax whose steps depend on the length of the gradient, or on values along it.
_USE_LENGTH = frozenset(
    {
        "polyak_sgd",
        "scale_by_polyak",
        "mechanize",
        "momo",
        "momo_adam",
        "cocob",
        "scale_by_cocob",
        "scale_by_lbfgs",
        "scale_by_zoom_linesearch",
        "scale_by_backtracking_linesearch",
    }
)


def uses_length(optimizer: optax.GradientTransformation) -> str | None:
    """The name of a part of the optimizer that needs the true length of the gradient, or None.

    Optax's transformations are closures, whose names and parts tell what they were made by.
    """
    seen: set[int] = set()
    waiting: list[Any] = [optimizer.update]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (tuple, list)):
            waiting += item
        elif callable(item):
            factory = getattr(item, "__qualname__", "").partition(".")[0]
            if factory in _USE_LENGTH and getattr(item, "__module__", "").startswith("optax."):
                return factory
            function = getattr(item, "__func__", item)
            waiting += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
            waiting += [getattr(item, "__wrapped__", None), getattr(item, "func", None)]
    return None
