"""One row for every public transformation; ``test_contract.py`` runs over all of them.

A new transformation is one ``Row`` here. Thresholds are chosen so that ordinary gradients (see
``tree`` and ``gradients``) are clipped, and windows so short that a few steps pass through the
warm-up and out of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og


@dataclasses.dataclass(frozen=True)
class Inject:
    """How ``optax.inject_hyperparams`` is applied to a factory.

    Attributes:
      factory: what is passed to ``optax.inject_hyperparams``.
      traced: hyperparameters that become entries of the state, numbers only.
      fixed: the remaining arguments.
      static_args: as the docstring of the factory shows them.
    """

    factory: Callable[..., Any]
    traced: dict[str, float]
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    static_args: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """A transformation under contract.

    Attributes:
      name: pytest id.
      make: builds it; must accept ``axis_name=``.
      wrap: for a wrapper, ``make`` with the inner optimizer as an argument; None for chainables.
      on_bad: what a non-finite gradient leads to: "passes" (stays non-finite, the whole state
        bitwise unchanged), "zeroes" (replaced), "skips" (updates -0.0, inner state unchanged),
        "reacts" (skips, and goes on differently after it).
      needs_params: whether ``update`` must be given params.
      is_variant: another row goes the same way but for a detail; this one is tested only with
        ``-m slow``.
      is_smooth: false where an inner optimizer has no finite derivative at zero of its own.
      inject: how its thresholds are injected; None where it has none.
    """

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    wrap: Callable[..., optax.GradientTransformationExtraArgs] | None = None
    on_bad: str = "passes"
    needs_params: bool = False
    is_variant: bool = False
    is_smooth: bool = True
    inject: Inject | None = None


def tree(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, Any]:
    """Parameters of ranks 1, 2 and 4; axis 0 of each is 16, two rows for each of 8 devices."""
    rng = np.random.default_rng(seed)
    shapes = {"bias": (16,), "conv": (16, 1, 1, 2), "kernel": (16, 3)}
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = {name: value + 1j * rng.normal(size=value.shape) for name, value in values.items()}
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}


def gradients(step: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Ordinary gradients; every fifth step is 100 times longer."""
    factor = 100.0 if step % 5 == 4 else 1.0
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(factor, dtype), tree(dtype, seed=step + 1))


def by_columns(path: str, leaf: Any) -> tuple[int, ...] | None:
    """A scope callable: axis 0 of matrices, all of the rest."""
    del path
    return (0,) if leaf.ndim == 2 else None


def _momentum(learning_rate: Any = 0.1) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=0.9)


def _wrapper(
    name: str,
    wrap: Callable[..., optax.GradientTransformationExtraArgs],
    inner: optax.GradientTransformation | None = None,
    **options: Any,
) -> Row:
    inner = _momentum() if inner is None else inner
    options = {"on_bad": "skips", **options}
    return Row(name, lambda **kw: wrap(inner, **kw), wrap=wrap, **options)


def rule_of_ones_own(**options: Any) -> optax.GradientTransformationExtraArgs:
    """With a history of two numbers a group, one of them a count."""

    def init(norms):
        return {"calls": jnp.zeros(norms.shape, jnp.int32), "last": jnp.ones(norms.shape)}

    def limit(norms, history, context):
        limits = 2 * history["last"]
        return limits, {"calls": history["calls"] + 1, "last": jnp.minimum(norms, limits)}

    return og.limit_norms(og.Rule(limit, init), name="rule_of_ones_own", **options)


ROWS = [
    # Clips
    Row(
        "clip_by_norm",
        lambda **kw: og.clip_by_norm(1.0, **kw),
        inject=Inject(og.clip_by_norm, {"max_norm": 1.0}),
    ),
    Row("clip_by_norm-leaf", lambda **kw: og.clip_by_norm(1.0, scope="leaf", **kw)),
    Row(
        "clip_by_norm-unit",
        lambda **kw: og.clip_by_norm(1.0, scope="unit", **kw),
        inject=Inject(og.clip_by_norm, {"max_norm": 1.0}, {"scope": "unit"}),
    ),
    Row(
        "clip_by_norm-callable",
        lambda **kw: og.clip_by_norm(1.0, scope=by_columns, **kw),
        is_variant=True,
        inject=Inject(og.clip_by_norm, {"max_norm": 1.0}, {"scope": by_columns}, ("scope",)),
    ),
    Row(
        "clip_by_norm-schedule",
        lambda **kw: og.clip_by_norm(optax.linear_schedule(2.0, 1.0, 3), **kw),
        is_variant=True,
    ),
    Row(
        "clip_by_rms",
        lambda **kw: og.clip_by_rms(0.5, **kw),
        inject=Inject(og.clip_by_rms, {"max_rms": 0.5}),
    ),
    Row(
        "clip_by_rms-global",
        lambda **kw: og.clip_by_rms(0.5, scope="global", **kw),
        is_variant=True,
    ),
    Row(
        "clip_by_zscore",
        lambda **kw: og.clip_by_zscore(2.5, warmup_steps=2, rebaseline_after=3, **kw),
        inject=Inject(
            og.clip_by_zscore,
            {"z_threshold": 2.5, "decay": 0.9, "min_std_ratio": 0.02, "eps": 1e-6, "max_norm": 9.0},
            {"warmup_steps": 2, "rebaseline_after": 3},
            ("warmup_steps", "rebaseline_after"),
        ),
    ),
    Row(
        "clip_by_zscore-unit",
        lambda **kw: og.clip_by_zscore(
            2.5, scope="unit", warmup_steps=2, target="threshold", max_norm=3.0, **kw
        ),
        is_variant=True,
    ),
    Row(
        "clip_by_percentile",
        lambda **kw: og.clip_by_percentile(30.0, window=5, **kw),
        inject=Inject(
            og.clip_by_percentile, {"percentile": 30.0}, {"window": 5}, static_args=("window",)
        ),
    ),
    Row(
        "clip_by_percentile-unit",
        lambda **kw: og.clip_by_percentile(50.0, scope="unit", window=3, **kw),
        is_variant=True,
    ),
    Row(
        "clip_by_median",
        lambda **kw: og.clip_by_median(0.5, warmup_steps=3, observe_steps=1, **kw),
        inject=Inject(
            og.clip_by_median,
            {"ratio": 0.5},
            {"warmup_steps": 3, "observe_steps": 1},
            ("warmup_steps", "observe_steps"),
        ),
    ),
    Row(
        "clip_by_median-leaf",
        lambda **kw: og.clip_by_median(0.5, scope="leaf", warmup_steps=3, observe_steps=0, **kw),
        is_variant=True,
    ),
    Row(
        "clip_by_ema",
        lambda **kw: og.clip_by_ema(1.05, warmup_steps=2, rebaseline_after=3, **kw),
        inject=Inject(
            og.clip_by_ema,
            {"ratio": 1.05, "decay": 0.9, "warmup_max_norm": 2.0},
            {"warmup_steps": 2, "rebaseline_after": 3},
            ("warmup_steps", "rebaseline_after"),
        ),
    ),
    Row(
        "clip_by_ema-global",
        lambda **kw: og.clip_by_ema(scope="global", warmup_steps=1, **kw),
        is_variant=True,
    ),
    Row("clip_by_ema-unit", lambda **kw: og.clip_by_ema(scope="unit", warmup_steps=2, **kw)),
    Row(
        "clip_by_param_norm",
        lambda **kw: og.clip_by_param_norm(0.1, **kw),
        needs_params=True,
        inject=Inject(og.clip_by_param_norm, {"ratio": 0.1, "eps": 1e-3}),
    ),
    Row(
        "clip_by_param_norm-leaf",
        lambda **kw: og.clip_by_param_norm(0.1, scope="leaf", **kw),
        needs_params=True,
        is_variant=True,
    ),
    Row(
        "clip_by_max_ema",
        lambda **kw: og.clip_by_max_ema(0.9, **kw),
        inject=Inject(og.clip_by_max_ema, {"decay": 0.9}),
    ),
    Row(
        "clip_by_relative_change",
        lambda **kw: og.clip_by_relative_change(0.1, **kw),
        needs_params=True,
        inject=Inject(og.clip_by_relative_change, {"max_relative": 0.1, "max_absolute": 0.02}),
    ),
    _wrapper(
        "clip_by_update_ratio",
        lambda inner, **kw: og.clip_by_update_ratio(
            inner, max_ratio=0.04, warmup_steps=3, measure_every=3, **kw
        ),
        optax.sgd(0.1),
        on_bad="passes",
        inject=Inject(
            lambda ratio: og.clip_by_update_ratio(optax.sgd(0.1), max_ratio=ratio), {"ratio": 0.04}
        ),
    ),
    Row("limit_norms", lambda **kw: rule_of_ones_own(scope="leaf", **kw)),
    Row("limit_norms-unit", lambda **kw: rule_of_ones_own(scope="unit", **kw), is_variant=True),
    # Normalising
    Row(
        "normalize_and_scale",
        lambda **kw: og.normalize_and_scale(1.0, **kw),
        inject=Inject(og.normalize_and_scale, {"alpha": 1.0}),
    ),
    Row(
        "normalize_and_scale-leaf",
        lambda **kw: og.normalize_and_scale(scope="leaf", **kw),
        is_variant=True,
    ),
    Row("normalize_and_scale-auto", lambda **kw: og.normalize_and_scale("auto", **kw)),
    Row(
        "normalize_by_ema_norm",
        lambda **kw: og.normalize_by_ema_norm(**kw),
        inject=Inject(og.normalize_by_ema_norm, {"b1": 0.5, "b2": 0.8, "eps": 1e-4}),
    ),
    Row(
        "normalize_by_ema_norm-unit",
        lambda **kw: og.normalize_by_ema_norm(scope="unit", **kw),
        is_variant=True,
    ),
    # Zeroing
    Row("zero_nonfinite", og.zero_nonfinite, on_bad="zeroes"),
    Row(
        "zero_nonfinite-leaf",
        lambda **kw: og.zero_nonfinite(scope="leaf", **kw),
        on_bad="zeroes",
        is_variant=True,
    ),
    # Wrappers
    _wrapper(
        "guard-adam",
        lambda inner, **kw: og.guard(inner, **kw),
        optax.adam(0.1),
        is_smooth=False,  # sqrt(nu) at nu = 0
        inject=Inject(lambda lr: og.guard(optax.adam(lr)), {"lr": 0.1}),
    ),
    _wrapper(
        "guard-conditions",
        lambda inner, **kw: og.guard(
            inner,
            skip_if=(og.norm_above(1e6), og.spike(6.0, window=4, rebaseline_after=3)),
            **kw,
        ),
        inject=Inject(
            # The longest gradient has a norm of about 1000.
            lambda max_norm: og.guard(_momentum(), skip_if=og.norm_above(max_norm)),
            {"max_norm": 1500.0},
        ),
    ),
    _wrapper("guard-check_update", lambda inner, **kw: og.guard(inner, check_update=True, **kw)),
    _wrapper(
        "stabilize",
        lambda inner, **kw: og.stabilize(inner, **kw),
        is_variant=True,  # of clip_by_update_ratio
        inject=Inject(lambda lr: og.stabilize(_momentum(lr)), {"lr": 0.1}),
    ),
    # Loss scaling and recovery
    _wrapper(
        "dynamic_loss_scale",
        lambda inner, **kw: og.dynamic_loss_scale(inner, initial_scale=1.0, min_scale=0.25, **kw),
        on_bad="reacts",
        inject=Inject(lambda lr: og.dynamic_loss_scale(_momentum(lr)), {"lr": 0.1}),
    ),
    _wrapper(
        "dynamic_loss_scale-guard",
        lambda inner, **kw: og.dynamic_loss_scale(
            og.guard(inner, **kw), initial_scale=1.0, min_scale=0.25, growth_interval=2, **kw
        ),
        on_bad="reacts",
        is_variant=True,
    ),
    _wrapper(
        "backoff",
        lambda inner, **kw: og.backoff(og.guard(inner, **kw), recovery_steps=5),
        on_bad="reacts",
        inject=Inject(
            lambda factor: og.backoff(og.guard(_momentum()), factor=factor, recovery_steps=5),
            {"factor": 0.5},
        ),
    ),
    _wrapper(
        "rollback",
        lambda inner, **kw: og.rollback(og.guard(inner, **kw), every=1, after_skips=2, **kw),
        on_bad="reacts",
        needs_params=True,
        inject=Inject(lambda lr: og.rollback(og.guard(_momentum(lr))), {"lr": 0.1}),
    ),
    _wrapper(
        "rollback-backoff",
        lambda inner, **kw: og.rollback(
            og.backoff(og.guard(inner, **kw)), every=1, after_skips=1, **kw
        ),
        on_bad="returns",
        needs_params=True,
        is_variant=True,
    ),
    # Constraints
    Row(
        "clip_params",
        lambda **kw: og.clip_params(-1.0, 0.5, **kw),
        needs_params=True,
        inject=Inject(og.clip_params, {"min_value": -1.0, "max_value": 0.5}),
    ),
    Row(
        "clip_params_by_norm",
        lambda **kw: og.clip_params_by_norm(2.0, **kw),
        needs_params=True,
        inject=Inject(og.clip_params_by_norm, {"max_norm": 2.0}),
    ),
    Row(
        "clip_params_by_norm-global",
        lambda **kw: og.clip_params_by_norm(2.0, scope="global", **kw),
        needs_params=True,
        is_variant=True,
    ),
    Row(
        "add_l1",
        lambda **kw: og.add_l1(0.1, **kw),
        needs_params=True,
        inject=Inject(og.add_l1, {"strength": 0.1}),
    ),
    Row(
        "add_l1-mask",
        lambda **kw: og.add_l1(
            optax.linear_schedule(0.2, 0.1, 3),
            lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
            **kw,
        ),
        needs_params=True,
        is_variant=True,
    ),
]
