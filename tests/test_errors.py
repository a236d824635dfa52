"""Texts of all errors: each names the argument, what is allowed, and what it got."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og

NONNEGATIVE = "a real scalar in [0, inf]"
FINITE = "a real scalar in [0, inf)"
POSITIVE = "a real scalar in (0, inf]"
SCHEDULE = " or a schedule (a callable of the step count)"
DECAY = "a real scalar in [0, 1)"
SCALE = "a real scalar in (0, 8.50706e+37]"
ANY = "a real scalar in [-inf, inf]"
COUNT = "an integer >= 1"
SCOPE = '"global", "leaf", "unit" or a callable (path, leaf) -> axes | None'
AXES = "None, a mesh axis name, a tuple of mesh axis names or a callable (path, leaf) -> names"
STACKED = "a callable (path, leaf) -> bool | int or None"
TRANSFORMATION = "an optax.GradientTransformation"
CONDITIONS = "a condition such as og.spike() or og.norm_above(10.0), or a tuple of them"
CALL_FIRST = " Call the factory first, for example optax.adam(1e-3)."
STATIC = " known when the transformation is built, got a JAX array. Under optax.inject_hyperparams"
SGD = optax.sgd(0.1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that must fail, and all of the message, or its beginning where it ends in '...'."""

    call: Callable[[], Any]
    error: type[Exception]
    message: str


# Each check in depth, at one argument of many

NUMBER = f"max_norm must be {NONNEGATIVE}{SCHEDULE}, got "
WINDOW = f"window must be {COUNT}"
IN_DEPTH = [
    *(
        Case(lambda value=value: og.clip_by_norm(value), error, NUMBER + got)
        for value, error, got in (
            (-1.0, ValueError, "-1.0."),
            (math.nan, ValueError, "nan."),
            ("1", TypeError, "'1' of type str."),
            (True, TypeError, "True of type bool."),
            ([1.0], TypeError, "[1.0] of type list."),
            (1j, TypeError, "1j of type complex."),
            (np.ones((1, 1)), ValueError, "an array of shape (1, 1)."),
            (jnp.array(-2.0), ValueError, "Array(-2., dtype=float32..."),
            (np.float32("nan"), ValueError, "np.float32(nan)."),
        )
    ),
    *(
        Case(lambda value=value: og.clip_by_percentile(window=value), error, WINDOW + got)
        for value, error, got in (
            (0, ValueError, ", got 0."),
            (1.5, TypeError, ", got 1.5 of type float."),
            (True, TypeError, ", got True of type bool."),
            (jnp.array(5), TypeError, f'{STATIC} pass static_args=("window",).'),
        )
    ),
    *(
        Case(lambda value=value: og.clip_by_norm(1.0, scope=value), error, f"scope must be {got}")
        for value, error, got in (
            ("rows", ValueError, f"{SCOPE}, got 'rows'."),
            (None, TypeError, f"{SCOPE}, got None."),
        )
    ),
    *(
        Case(
            lambda value=value: og.clip_by_norm(1.0, axis_name=value),
            TypeError,
            f"axis_name must be {AXES}, got {value!r}.",
        )
        for value in (3, (), ("data", 1), ["data"])
    ),
    *(
        Case(
            lambda value=value: og.guard(value), TypeError, f"inner must be {TRANSFORMATION}, {got}"
        )
        for value, got in (
            (3, "got 3 of type int."),
            (None, "got None of type NoneType."),
            (optax.adam, f"got {optax.adam!r} of type function.{CALL_FIRST}"),
        )
    ),
]

# For every other argument one wrong value


def refused(build: Callable[..., Any], name: str, value: Any, allowed: str, tail: str = "") -> Case:
    """``build(name=value)``; a number or a string is out of range, all else of the wrong type."""
    is_value = isinstance(value, (float, int, str)) and not isinstance(value, bool)
    error = ValueError if is_value else TypeError
    kind = "" if is_value or not tail else tail
    return Case(
        lambda: build(**{name: value}), error, f"{name} must be {allowed}, got {value!r}{kind}."
    )


def with_sgd(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(wrapper, SGD)


def guarded(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(wrapper, og.guard(SGD))


REST = {
    "clip_by_rms": [
        refused(og.clip_by_rms, "max_rms", -1.0, NONNEGATIVE + SCHEDULE),
    ],
    "clip_by_zscore": [
        refused(og.clip_by_zscore, "z_threshold", -1.0, NONNEGATIVE),
        refused(og.clip_by_zscore, "decay", 1.0, DECAY),
        refused(og.clip_by_zscore, "warmup_steps", 0, COUNT),
        refused(
            og.clip_by_zscore, "target", "median", "one of ('reciprocal', 'mean', 'threshold')"
        ),
        refused(og.clip_by_zscore, "target", None, "one of ('reciprocal', 'mean', 'threshold')"),
        refused(og.clip_by_zscore, "max_norm", -1.0, NONNEGATIVE + " or None"),
        refused(og.clip_by_zscore, "min_std_ratio", math.inf, FINITE),
        refused(og.clip_by_zscore, "rebaseline_after", 0, COUNT + " or None"),
        refused(og.clip_by_zscore, "eps", -1.0, FINITE),
    ],
    "clip_by_percentile": [
        refused(og.clip_by_percentile, "percentile", 101.0, "a real scalar in [0, 100]"),
    ],
    "clip_by_median": [
        refused(og.clip_by_median, "ratio", math.inf, FINITE),
        refused(og.clip_by_median, "warmup_steps", 0, COUNT),
        refused(og.clip_by_median, "observe_steps", -1, "an integer >= 0"),
    ],
    "clip_by_ema": [
        refused(og.clip_by_ema, "ratio", -1.0, FINITE),
        refused(og.clip_by_ema, "decay", -0.1, DECAY),
        refused(og.clip_by_ema, "warmup_steps", 0, COUNT),
        refused(og.clip_by_ema, "warmup_max_norm", -1.0, NONNEGATIVE),
        refused(og.clip_by_ema, "rebaseline_after", 0, COUNT + " or None"),
    ],
    "clip_by_param_norm": [
        refused(og.clip_by_param_norm, "ratio", -1.0, FINITE),
        refused(og.clip_by_param_norm, "eps", -1.0, FINITE),
    ],
    "clip_by_max_ema": [refused(og.clip_by_max_ema, "decay", 1.0, DECAY)],
    "clip_by_relative_change": [
        refused(og.clip_by_relative_change, "max_relative", math.inf, FINITE),
        refused(og.clip_by_relative_change, "max_absolute", -1.0, FINITE),
    ],
    "clip_by_update_ratio": [
        refused(og.clip_by_update_ratio, "optimizer", None, TRANSFORMATION, " of type NoneType"),
        refused(with_sgd(og.clip_by_update_ratio), "max_ratio", 0.0, "a real scalar in (0, inf)"),
        refused(with_sgd(og.clip_by_update_ratio), "median_ratio", 0.0, POSITIVE),
        refused(with_sgd(og.clip_by_update_ratio), "max_norm", 0.0, POSITIVE),
        refused(with_sgd(og.clip_by_update_ratio), "warmup_steps", 0, COUNT),
        refused(with_sgd(og.clip_by_update_ratio), "measure_every", 0, COUNT),
        refused(with_sgd(og.clip_by_update_ratio), "stacked", (1,), STACKED),
    ],
    "normalize_and_scale": [
        refused(og.normalize_and_scale, "alpha", math.inf, FINITE + SCHEDULE + ' or "auto"'),
        refused(og.normalize_and_scale, "decay", 1.0, DECAY),
        Case(
            lambda: og.normalize_and_scale("fast"),
            TypeError,
            f"alpha must be {FINITE}{SCHEDULE} or \"auto\", got 'fast' of type str.",
        ),
    ],
    "normalize_by_ema_norm": [
        refused(og.normalize_by_ema_norm, "b1", 1.0, DECAY),
        refused(og.normalize_by_ema_norm, "b2", 1.0, DECAY),
        refused(og.normalize_by_ema_norm, "eps", -1.0, FINITE),
    ],
    "zero_nonfinite": [
        refused(og.zero_nonfinite, "scope", "global", "one of ('element', 'leaf')"),
    ],
    "limit_norms": [
        Case(
            lambda: og.limit_norms("mine", name="mine"),
            TypeError,
            "rule must be an og.Rule(limit, init), got 'mine' of type str.",
        ),
        Case(
            lambda: og.limit_norms(og.Rule(max), name="my rule"),
            ValueError,
            "name must be an identifier such as 'clip_by_mine', got 'my rule'.",
        ),
    ],
    "norm_above": [refused(og.norm_above, "max_norm", -1.0, NONNEGATIVE)],
    "spike": [
        refused(og.spike, "sigma", math.inf, FINITE),
        refused(og.spike, "window", 0, COUNT),
        refused(og.spike, "min_history", 0, COUNT + " or None"),
        refused(og.spike, "rebaseline_after", 0, COUNT + " or None"),
        refused(og.spike, "min_std_ratio", -1.0, FINITE),
        refused(og.spike, "of", "loss", "one of ('grad_norm', 'value')"),
        Case(
            lambda: og.spike(window=8, min_history=9),
            ValueError,
            "min_history must be at most window = 8, got 9.",
        ),
    ],
    "guard": [
        *(
            Case(
                lambda value=value: og.guard(SGD, skip_if=value),
                TypeError,
                f"skip_if must be {CONDITIONS}, got {got}",
            )
            for value, got in (
                (3, "3 of type int. Write og.norm_above(3)."),
                ((og.norm_above(1.0), "x"), "'x' of type str."),
                (og.spike, f"{og.spike!r} of type function. Call it first: og.spike(...)."),
            )
        ),
        refused(with_sgd(og.guard), "max_consecutive_skips", 0, COUNT + " or None"),
        Case(
            lambda: og.guard(SGD, check_update="yes"),
            TypeError,
            "check_update must be True or False, got 'yes'.",
        ),
        refused(with_sgd(og.guard), "stacked", (1,), STACKED),
        refused(
            with_sgd(og.guard), "notify", (1,), "a callable (step, reason, names) -> None or None"
        ),
    ],
    "stabilize": [
        refused(og.stabilize, "optimizer", None, TRANSFORMATION, " of type NoneType"),
        Case(
            lambda: og.stabilize(SGD, clip=3),
            TypeError,
            f"clip must be {TRANSFORMATION}, got 3 of type int. Write clip=og.clip_by_norm(3).",
        ),
        Case(
            lambda: og.stabilize(SGD, patience=3),
            TypeError,
            "stabilize has no argument 'patience'. Besides clip it takes those of og.guard: "
            "skip_if, max_consecutive_skips, check_update, stacked, notify, axis_name.",
        ),
        Case(
            lambda: og.stabilize(SGD, max_norm=3.0),
            TypeError,
            "...axis_name. For another limit pass a clip, such as clip=og.clip_by_norm(1.0), or "
            "write og.guard(og.clip_by_update_ratio(optimizer, ...)).",
        ),
    ],
    "dynamic_loss_scale": [
        refused(og.dynamic_loss_scale, "inner", None, TRANSFORMATION, " of type NoneType"),
        refused(with_sgd(og.dynamic_loss_scale), "initial_scale", 0.0, SCALE),
        refused(with_sgd(og.dynamic_loss_scale), "growth_interval", 0, COUNT),
        refused(with_sgd(og.dynamic_loss_scale), "factor", 1.0, "a real scalar in (1, inf)"),
        refused(with_sgd(og.dynamic_loss_scale), "min_scale", 0.0, SCALE),
        refused(with_sgd(og.dynamic_loss_scale), "max_scale", math.inf, SCALE),
        Case(
            lambda: og.dynamic_loss_scale(SGD, initial_scale=2.0, min_scale=4.0),
            ValueError,
            "initial_scale must be in [min_scale, max_scale], got initial_scale=2.0, "
            "min_scale=4.0, max_scale=16777216.0.",
        ),
    ],
    "backoff": [
        refused(og.backoff, "inner", None, TRANSFORMATION, " of type NoneType"),
        refused(guarded(og.backoff), "factor", 1.5, "a real scalar in (0, 1]"),
        refused(guarded(og.backoff), "recovery_steps", 0, COUNT),
    ],
    "rollback": [
        refused(og.rollback, "inner", None, TRANSFORMATION, " of type NoneType"),
        refused(guarded(og.rollback), "every", 0, COUNT),
        refused(guarded(og.rollback), "after_skips", -1, COUNT),
    ],
    "clip_params": [
        Case(
            lambda: og.clip_params(math.nan, 3.0), ValueError, f"min_value must be {ANY}, got nan."
        ),
        Case(
            lambda: og.clip_params(-3.0, math.nan), ValueError, f"max_value must be {ANY}, got nan."
        ),
        Case(
            lambda: og.clip_params(2.0, -1),
            ValueError,
            "min_value must not be above max_value, got 2.0 and -1.",
        ),
    ],
    "clip_params_by_norm": [refused(og.clip_params_by_norm, "max_norm", -1.0, NONNEGATIVE)],
    "add_l1": [refused(og.add_l1, "strength", math.inf, FINITE + SCHEDULE)],
}
# Arguments of many factories
SHARED = {
    "scope": [
        *(getattr(og, f"clip_by_{rule}") for rule in ("zscore", "percentile", "median", "ema")),
        *(og.clip_by_rms, og.clip_by_param_norm, og.normalize_and_scale, og.normalize_by_ema_norm),
        functools.partial(og.clip_params_by_norm, 1.0),
        functools.partial(og.limit_norms, og.Rule(max), name="mine"),
    ],
}
SHARED["axis_name"] = [
    *SHARED["scope"],
    *map(with_sgd, (og.guard, og.stabilize, og.clip_by_update_ratio, og.dynamic_loss_scale)),
    guarded(og.rollback),
]
REST |= {
    name: [refused(build, name, (0,), allowed) for build in SHARED[name]]
    for name, allowed in (("scope", SCOPE), ("axis_name", AXES))
}
EVERY_CASE = [
    pytest.param(case, id=f"{name}-{number}")
    for name, cases in {"in depth": IN_DEPTH, **REST}.items()
    for number, case in enumerate(cases)
]


def pattern(message: str) -> str:
    """The whole message, with '...' for anything."""
    return "^" + re.escape(message).replace(re.escape("..."), "(?s:.*)") + "$"


@pytest.mark.parametrize("case", EVERY_CASE)
def test_bad_arguments_are_named_with_range_and_value(case):
    with pytest.raises(case.error, match=pattern(case.message)):
        case.call()


@pytest.mark.parametrize(
    "build",
    [
        og.clip_by_norm,
        og.clip_by_rms,
        og.clip_by_zscore,
        og.normalize_and_scale,
        lambda value: og.guard(SGD, skip_if=og.norm_above(value)),
        lambda value: og.guard(SGD, skip_if=og.spike(value)),
        lambda value: og.dynamic_loss_scale(SGD, initial_scale=value),
        lambda value: og.clip_params(1.0, value),
        og.clip_params_by_norm,
        og.add_l1,
    ],
)
def test_traced_values_are_not_checked_but_traced_shapes_are(build):
    jax.eval_shape(lambda value: build(value).init(jnp.ones(2)), -1.0)
    with pytest.raises(ValueError, match=r"got an array of shape \(2,\)\."):
        jax.eval_shape(lambda value: build(value).init(jnp.ones(2)), jnp.ones(2))


@pytest.mark.parametrize(
    "build",
    [
        lambda: og.clip_by_norm(1e-45),
        lambda: og.clip_by_norm(math.inf),
        lambda: og.clip_by_norm(np.int32(3)),
        lambda: og.clip_by_zscore(decay=0.0, max_norm=1, min_std_ratio=0, eps=0, warmup_steps=1),
        lambda: og.clip_by_zscore(warmup_steps=np.int64(3), rebaseline_after=None),
        lambda: og.clip_by_norm(1.0, axis_name=("data", "model")),
        lambda: og.guard(SGD, max_consecutive_skips=None, skip_if=[og.norm_above(1)]),
        lambda: og.spike(0, window=1, min_history=1, rebaseline_after=1, min_std_ratio=0),
        lambda: og.dynamic_loss_scale(SGD, initial_scale=2.0, min_scale=2.0, max_scale=2.0),
        lambda: og.clip_params(-math.inf, np.int32(3)),
        lambda: og.clip_params(2, 2.0),
        lambda: og.clip_params_by_norm(0),
        lambda: og.add_l1(0),
    ],
)
def test_ends_of_the_ranges_are_allowed(build):
    build()


# Errors at update


def test_changed_structure_of_the_inner_state_is_named():
    inner = optax.GradientTransformation(
        lambda params: {"a": jnp.zeros(())}, lambda updates, state, params=None: (updates, {})
    )
    tx = og.guard(inner)
    message = (
        r"^The wrapped optimizer changes the structure of its state in update\(\), so a skipped "
        r"step could not restore it\. Give it a state whose structure is fixed by init\(\)\. From "
        r"init\(\): .*'a'.*From update\(\): PyTreeDef"
    )
    with pytest.raises(TypeError, match=message):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_changed_shape_of_the_inner_state_is_named():
    tx = og.guard(optax.trace(0.9))
    state = tx.init({"w": jnp.ones(2)})
    message = (
        r"^The wrapped optimizer changes the shape of its state at .*'w'.* from \(2,\) to "
        r"\(3, 2\)\. Call init\(\) with parameters of the shapes that update\(\) receives\."
    )
    with pytest.raises(TypeError, match=message):
        tx.update({"w": jnp.ones((3, 2))}, state)


@pytest.mark.parametrize("function", [og.step_ok, og.check, og.explain])
def test_state_without_a_guard_is_an_error_with_a_remedy(function):
    message = re.escape(
        "No guard state was found in the given tuple. Wrap the optimizer in og.guard(...) or "
        "og.stabilize(...), and pass the optimizer state."
    )
    with pytest.raises(ValueError, match=message):
        function(optax.adam(0.1).init(jnp.ones(2)))


def test_parameters_that_do_not_fit_the_guard_are_an_error():
    tx = og.guard(optax.sgd(0.1))
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    _, state = tx.update(jax.tree.map(lambda leaf: leaf * jnp.nan, params), tx.init(params))
    message = re.escape(
        "params has 1 float leaves, but the guard watches 2 float leaves and layers of stacked "
        "ones. Pass the tree of parameters that the optimizer was initialised with; with Flax NNX, "
        "nnx.state(model, nnx.Param)."
    )
    with pytest.raises(ValueError, match=message):
        og.explain(state, {"a": jnp.ones(1)})


def test_a_state_of_another_transformation_is_named():
    tx, gradients = og.guard(SGD), jnp.ones(2)
    message = re.escape(
        "This state is of another transformation: guard was given a ClipByZscoreState where its "
        "own GuardState belongs. Pass what guard(...).init(params) or the last update() returned; "
        "to carry a state over a change of the optimizer, og.adopt(new_tx.init(params), old_state)."
    )
    with pytest.raises(TypeError, match=f"^{message}"):
        tx.update(gradients, og.clip_by_zscore().init(gradients))
    message = "guard was given a GradientTransformationExtraArgs, a transformation where its own"
    with pytest.raises(TypeError, match=message):
        tx.update(gradients, tx)


def test_gradients_and_state_in_each_others_place_are_named():
    tx = og.clip_by_norm(1.0)
    message = re.escape(
        "clip_by_norm was given its state first and the gradients second. Call "
        "update(grads, state, params)."
    )
    with pytest.raises(TypeError, match=f"^{message}"):
        tx.update(tx.init(jnp.ones(2)), jnp.ones(2))


@pytest.mark.parametrize("scope", ["global", "leaf", "unit"])
def test_a_history_of_other_arrays_or_arguments_is_named_with_its_shapes(scope):
    state = og.clip_by_percentile(window=5, scope=scope).init({"w": jnp.ones((2, 3))})
    tx = og.clip_by_percentile(window=7, scope=scope)
    groups = {"global": (), "leaf": (1,), "unit": (1, 3)}[scope]
    shapes = [[(rows, *groups)] for rows in (6, 8)]
    message = re.escape(
        "This state of clip_by_percentile was made for other arrays, or with other arguments: its "
        f"history has the shapes {shapes[0]}, these updates and arguments need {shapes[1]}. "
        "Make a new one with init(params); where gradients are None, pass params to update()."
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        tx.update({"w": jnp.ones((2, 3))}, state)


def test_a_fraction_for_a_percentile_is_a_warning_that_says_what_to_write():
    with pytest.warns(UserWarning, match=r"^percentile=0.1 is below .*write percentile=10\.$"):
        og.clip_by_percentile(0.1)
