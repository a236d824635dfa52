"""Optax transformations that keep training alive and tell what happened."""

from optax_guard.clipping.by_norm import ClipByNormState, clip_by_norm
from optax_guard.clipping.by_rms import ClipByRmsState, clip_by_rms
from optax_guard.clipping.by_zscore import ClipByZscoreState, ZscoreHistory, clip_by_zscore
from optax_guard.guarding.conditions import Condition, SpikeState, norm_above, spike
from optax_guard.guarding.guard import GuardState, guard, stabilize
from optax_guard.guarding.microbatch import SkipMicrobatchState, skip_microbatch
from optax_guard.normalizing import NormalizeAndScaleState, normalize_and_scale
from optax_guard.reporting.explain import GuardGaveUp, check, explain
from optax_guard.reporting.metrics import metrics, select, step_ok
from optax_guard.zeroing import ZeroNonfiniteState, zero_nonfinite

__version__ = "0.1.0"

__all__ = [
    "ClipByNormState",
    "ClipByRmsState",
    "ClipByZscoreState",
    "Condition",
    "GuardGaveUp",
    "GuardState",
    "NormalizeAndScaleState",
    "SkipMicrobatchState",
    "SpikeState",
    "ZeroNonfiniteState",
    "ZscoreHistory",
    "check",
    "clip_by_norm",
    "clip_by_rms",
    "clip_by_zscore",
    "explain",
    "guard",
    "metrics",
    "norm_above",
    "normalize_and_scale",
    "select",
    "skip_microbatch",
    "spike",
    "stabilize",
    "step_ok",
    "zero_nonfinite",
]
