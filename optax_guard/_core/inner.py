"""How a wrapper calls the optimizer that it wraps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
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
    """The name of a part of the optimizer that needs the true length of the gradient, or None."""
    for function in _functions_of(optimizer):
        name = factory_of(function)
        if name.startswith("optax.") and name.removeprefix("optax.") in _USE_LENGTH:
            return name.removeprefix("optax.")
    return None


# What limits gradients, and would limit steps behind the learning rate.
_CLIPS_OF_GRADIENTS = frozenset(
    {
        "clip_by_norm",
        "clip_by_zscore",
        "clip_by_percentile",
        "clip_by_median",
        "clip_by_ema",
        "clip_by_param_norm",
        "clip_by_max_ema",
    }
)


def clip_behind_learning_rate(optimizer: optax.GradientTransformation) -> str | None:
    """The name of a clip of this library that a chain has behind a learning rate, or None."""
    for function in _functions_of(optimizer):
        has_direction = has_rate = False
        for part in parts_of(function):
            name = factory_of(part)
            if has_rate and name in _CLIPS_OF_GRADIENTS:
                return name
            step_size = _cells(part).get("step_size")
            has_rate |= isinstance(step_size, float) and step_size < 0
            has_rate |= has_direction and name == "optax.scale_by_schedule"
            has_direction |= name == "optax.trace" or name.startswith("optax.scale_by_")
    return None


def parts_of(update: Any) -> list[Any]:
    """The functions that a chain of Optax calls one after the other; the function itself of others.

    Optax's transformations are closures, whose names and parts tell what they were made by.
    """
    name = factory_of(update)
    if name == "optax.with_extra_args_support" and "tx" in _cells(update):
        return parts_of(_cells(update)["tx"].update)
    if name == "optax.chain" and "update_fns" in _cells(update):
        return [part for inner in _cells(update)["update_fns"] for part in parts_of(inner)]
    return [update]


def factory_of(update: Any) -> str:
    """What made a function: ``"optax.trace"``, or ``"clip_by_norm"`` for one of this library."""
    name = getattr(update, "__qualname__", "").partition(".")[0]
    module = getattr(update, "__module__", None) or ""
    package = module.partition(".")[0]
    return name if package == _PACKAGE else f"{package}.{name}"


_PACKAGE = __name__.partition(".")[0]


def _cells(function: Any) -> dict[str, Any]:
    """The variables that a closure holds, by name."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _functions_of(optimizer: optax.GradientTransformation) -> Iterator[Any]:
    """All functions that ``update`` is made of."""
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
            yield item
            function = getattr(item, "__func__", item)
            waiting += _cells(function).values()
            waiting += [getattr(item, "__wrapped__", None), getattr(item, "func", None)]
