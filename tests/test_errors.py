"""Texts of all errors: each names the argument, what is allowed, and what it got."""

from __future__ import annotations

import dataclasses
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
SCHEDULE = " or a schedule (a callable of the step count)"
DECAY = "a real scalar in [0, 1)"
SCALE = "a real scalar in (0, 8.50706e+37]"
ANY = "a real scalar in [-inf, inf]"
SCOPE = '"global", "leaf", "unit" or a callable (path, leaf) -> axes | None'
STATIC = " known when the transformation is built, got a JAX array. Under optax.inject_hyperparams"


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that must fail, and all of the message, or its beginning where it ends in '...'."""

    call: Callable[[], Any]
    error: type[Exception]
    message: str


def number_cases(
    name: str, build: Callable[[Any], Any], allowed: str, *, too_low: Any = -1.0
) -> list[Case]:
    """What every numeric threshold refuses."""
    prefix = f"{name} must be {allowed}, got "
    return [
        Case(lambda: build(too_low), ValueError, f"{prefix}{too_low!r}."),
        Case(lambda: build(math.nan), ValueError, f"{prefix}nan."),
        Case(lambda: build("1"), TypeError, f"{prefix}'1' of type str."),
        Case(lambda: build(True), TypeError, f"{prefix}True of type bool."),
        Case(lambda: build([1.0]), TypeError, f"{prefix}[1.0] of type list."),
        Case(lambda: build(1j), TypeError, f"{prefix}1j of type complex."),
        Case(lambda: build(jnp.ones(2)), ValueError, f"{prefix}an array of shape (2,)."),
        Case(lambda: build(np.ones((1, 1))), ValueError, f"{prefix}an array of shape (1, 1)."),
        Case(lambda: build(jnp.array(-2.0)), ValueError, f"{prefix}Array(-2., dtype=float32..."),
        Case(lambda: build(np.float32("nan")), ValueError, f"{prefix}np.float32(nan)."),
    ]


def count_cases(name: str, build: Callable[[Any], Any], *, optional: bool = False) -> list[Case]:
    """What every static count refuses."""
    allowed = "an integer >= 1" + (" or None" if optional else "")
    prefix = f"{name} must be {allowed}"
    return [
        Case(lambda: build(0), ValueError, f"{prefix}, got 0."),
        Case(lambda: build(-3), ValueError, f"{prefix}, got -3."),
        Case(lambda: build(1.5), TypeError, f"{prefix}, got 1.5 of type float."),
        Case(lambda: build(True), TypeError, f"{prefix}, got True of type bool."),
        Case(
            lambda: build(jnp.array(5)),
            TypeError,
            f'{prefix}{STATIC} pass static_args=("{name}",).',
        ),
    ]


def scope_cases(build: Callable[[Any], Any]) -> list[Case]:
    return [
        Case(lambda: build("rows"), ValueError, f"scope must be {SCOPE}, got 'rows'."),
        Case(lambda: build(None), TypeError, f"scope must be {SCOPE}, got None."),
        Case(lambda: build((0,)), TypeError, f"scope must be {SCOPE}, got (0,)."),
    ]


def axis_name_cases(build: Callable[[Any], Any]) -> list[Case]:
    prefix = "axis_name must be None, a mesh axis name or a tuple of mesh axis names, got "
    return [
        Case(lambda: build(3), TypeError, f"{prefix}3."),
        Case(lambda: build(()), TypeError, f"{prefix}()."),
        Case(lambda: build(("data", 1)), TypeError, f"{prefix}('data', 1)."),
        Case(lambda: build(["data"]), TypeError, f"{prefix}['data']."),
    ]


def transformation_cases(name: str, build: Callable[[Any], Any]) -> list[Case]:
    prefix = f"{name} must be an optax.GradientTransformation, got "
    hint = " Call the factory first, for example optax.adam(1e-3)."
    return [
        Case(lambda: build(3), TypeError, f"{prefix}3 of type int."),
        Case(lambda: build(None), TypeError, f"{prefix}None of type NoneType."),
        Case(
            lambda: build(optax.adam),
            TypeError,
            f"{prefix}{optax.adam!r} of type function.{hint}",
        ),
    ]


def either(name: str, value: Any, allowed: str) -> str:
    return f"{name} must be {allowed}, got {value!r}."


SGD = optax.sgd(0.1)
TARGETS = "one of ('reciprocal', 'mean', 'threshold')"
CONDITIONS = "a condition such as og.spike() or og.norm_above(10.0), or a tuple of them"

CASES = {
    "clip_by_norm": [
        *number_cases("max_norm", og.clip_by_norm, NONNEGATIVE + SCHEDULE),
        *scope_cases(lambda value: og.clip_by_norm(1.0, scope=value)),
        *axis_name_cases(lambda value: og.clip_by_norm(1.0, axis_name=value)),
    ],
    "clip_by_rms": [
        *number_cases("max_rms", og.clip_by_rms, NONNEGATIVE + SCHEDULE),
        *scope_cases(lambda value: og.clip_by_rms(scope=value)),
        *axis_name_cases(lambda value: og.clip_by_rms(axis_name=value)),
    ],
    "clip_by_zscore": [
        *number_cases("z_threshold", og.clip_by_zscore, NONNEGATIVE),
        *scope_cases(lambda value: og.clip_by_zscore(scope=value)),
        *number_cases("decay", lambda value: og.clip_by_zscore(decay=value), DECAY),
        Case(lambda: og.clip_by_zscore(decay=1.0), ValueError, either("decay", 1.0, DECAY)),
        *count_cases("warmup_steps", lambda value: og.clip_by_zscore(warmup_steps=value)),
        Case(
            lambda: og.clip_by_zscore(target="median"),
            ValueError,
            either("target", "median", TARGETS),
        ),
        Case(lambda: og.clip_by_zscore(target=None), TypeError, either("target", None, TARGETS)),
        *number_cases(
            "max_norm", lambda value: og.clip_by_zscore(max_norm=value), NONNEGATIVE + " or None"
        ),
        *number_cases(
            "min_std_ratio", lambda value: og.clip_by_zscore(min_std_ratio=value), FINITE
        ),
        Case(
            lambda: og.clip_by_zscore(min_std_ratio=math.inf),
            ValueError,
            either("min_std_ratio", math.inf, FINITE),
        ),
        *count_cases(
            "rebaseline_after",
            lambda value: og.clip_by_zscore(rebaseline_after=value),
            optional=True,
        ),
        *number_cases("eps", lambda value: og.clip_by_zscore(eps=value), FINITE),
        *axis_name_cases(lambda value: og.clip_by_zscore(axis_name=value)),
    ],
    "normalize_and_scale": [
        *scope_cases(lambda value: og.normalize_and_scale(scope=value)),
        *axis_name_cases(lambda value: og.normalize_and_scale(axis_name=value)),
    ],
    "zero_nonfinite": [
        Case(
            lambda: og.zero_nonfinite(scope="global"),
            ValueError,
            "scope must be one of ('element', 'leaf'), got 'global'.",
        ),
        Case(
            lambda: og.zero_nonfinite(scope=1),
            TypeError,
            "scope must be one of ('element', 'leaf'), got 1.",
        ),
    ],
    "norm_above": number_cases("max_norm", og.norm_above, NONNEGATIVE),
    "spike": [
        *number_cases("sigma", og.spike, FINITE),
        *count_cases("window", lambda value: og.spike(window=value)),
        *count_cases("min_history", lambda value: og.spike(min_history=value), optional=True),
        *count_cases(
            "rebaseline_after", lambda value: og.spike(rebaseline_after=value), optional=True
        ),
        *number_cases("min_std_ratio", lambda value: og.spike(min_std_ratio=value), FINITE),
        Case(
            lambda: og.spike(window=8, min_history=9),
            ValueError,
            "min_history must be at most window = 8, got 9.",
        ),
        Case(
            lambda: og.spike(of="loss"),
            ValueError,
            "of must be one of ('grad_norm', 'value'), got 'loss'.",
        ),
    ],
    "guard": [
        *transformation_cases("inner", og.guard),
        Case(lambda: og.guard(SGD, skip_if=3), TypeError, f"skip_if must be {CONDITIONS}, got 3."),
        Case(
            lambda: og.guard(SGD, skip_if=(og.norm_above(1.0), "x")),
            TypeError,
            f"skip_if must be {CONDITIONS}, got (Condition(...",
        ),
        Case(
            lambda: og.guard(SGD, skip_if=og.spike),
            TypeError,
            f"skip_if must be {CONDITIONS}, got {og.spike!r}.",
        ),
        *count_cases(
            "max_consecutive_skips",
            lambda value: og.guard(SGD, max_consecutive_skips=value),
            optional=True,
        ),
        Case(
            lambda: og.guard(SGD, check_update="yes"),
            TypeError,
            "check_update must be True or False, got 'yes'.",
        ),
        *axis_name_cases(lambda value: og.guard(SGD, axis_name=value)),
    ],
    "stabilize": [
        *transformation_cases("optimizer", og.stabilize),
        *transformation_cases("clip", lambda value: og.stabilize(SGD, clip=value))[::2],
        Case(lambda: og.stabilize(SGD, patience=3), TypeError, "...'patience'..."),
    ],
    "dynamic_loss_scale": [
        *transformation_cases("inner", og.dynamic_loss_scale),
        *number_cases(
            "initial_scale", lambda value: og.dynamic_loss_scale(SGD, initial_scale=value), SCALE
        ),
        *count_cases(
            "growth_interval", lambda value: og.dynamic_loss_scale(SGD, growth_interval=value)
        ),
        *number_cases(
            "factor",
            lambda value: og.dynamic_loss_scale(SGD, factor=value),
            "a real scalar in (1, inf)",
            too_low=1.0,
        ),
        *number_cases(
            "min_scale",
            lambda value: og.dynamic_loss_scale(SGD, min_scale=value),
            SCALE,
            too_low=0.0,
        ),
        *number_cases(
            "max_scale", lambda value: og.dynamic_loss_scale(SGD, max_scale=value), SCALE
        ),
        Case(
            lambda: og.dynamic_loss_scale(SGD, max_scale=math.inf),
            ValueError,
            f"max_scale must be {SCALE}, got inf.",
        ),
        *axis_name_cases(lambda value: og.dynamic_loss_scale(SGD, axis_name=value)),
    ],
    "clip_params": [
        *number_cases("min_value", lambda value: og.clip_params(value, 3.0), ANY, too_low=None)[
            1:8
        ],
        *number_cases("max_value", lambda value: og.clip_params(-3.0, value), ANY, too_low=None)[
            1:8
        ],
        Case(
            lambda: og.clip_params(2.0, -1),
            ValueError,
            "min_value must not be above max_value, got 2.0 and -1.",
        ),
    ],
    "clip_params_by_norm": [
        *number_cases("max_norm", og.clip_params_by_norm, NONNEGATIVE),
        *scope_cases(lambda value: og.clip_params_by_norm(1.0, scope=value)),
        *axis_name_cases(lambda value: og.clip_params_by_norm(1.0, axis_name=value)),
    ],
    "add_l1": [
        *number_cases("strength", og.add_l1, FINITE + SCHEDULE),
        Case(
            lambda: og.add_l1(math.inf),
            ValueError,
            f"strength must be {FINITE}{SCHEDULE}, got inf.",
        ),
    ],
}
EVERY_CASE = [
    pytest.param(case, id=f"{factory}-{number}")
    for factory, cases in CASES.items()
    for number, case in enumerate(cases)
]


def pattern(message: str) -> str:
    """The whole message, with '...' for anything."""
    return "^" + re.escape(message).replace(re.escape("..."), "(?s:.*)") + "$"


@pytest.mark.parametrize("case", EVERY_CASE)
def test_bad_arguments_are_named_with_range_and_value(case):
    with pytest.raises(case.error, match=pattern(case.message)):
        case.call()


# Its range is wider, since "auto" and schedules are allowed as well; the end is what matters.
@pytest.mark.parametrize(
    ("value", "error"),
    [(-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), ((1,), TypeError)],
)
def test_alpha_out_of_range_is_named_with_range_and_value(value, error):
    message = rf"^alpha must be .*a real scalar in \[0, inf\).*, got {re.escape(repr(value))}"
    with pytest.raises(error, match=message):
        og.normalize_and_scale(value)


def test_alpha_that_is_an_unknown_word_is_an_error():
    with pytest.raises((TypeError, ValueError), match=r"^alpha must be .*, got 'fast'"):
        og.normalize_and_scale("fast")


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
        lambda: og.clip_by_norm(0.0),
        lambda: og.clip_by_norm(math.inf),
        lambda: og.clip_by_norm(np.int32(3)),
        lambda: og.clip_by_zscore(decay=0.0, max_norm=0, min_std_ratio=0, eps=0, warmup_steps=1),
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
        r"\(3, 2\)\. Call init\(\) with parameters of the shapes that update\(\) receives\.$"
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
        "params has 1 float leaves, but the guard watches 2. Pass the tree of parameters that "
        "the optimizer was initialised with; with Flax NNX, nnx.state(model, nnx.Param)."
    )
    with pytest.raises(ValueError, match=message):
        og.explain(state, {"a": jnp.ones(1)})
