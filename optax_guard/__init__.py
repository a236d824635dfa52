"""Optax transformations that keep training alive and tell what happened."""

from optax_guard.reading.diagnose import Diagnosis, DiagnosisRow, diagnose
from optax_guard.reading.explain import GuardGaveUp, check, explain
from optax_guard.reading.metrics import metrics, select, step_ok
from optax_guard.rules.add_l1 import AddL1State, add_l1
from optax_guard.rules.clip_by_ema import ClipByEmaState, EmaHistory, clip_by_ema
from optax_guard.rules.clip_by_max_ema import ClipByMaxEmaState, clip_by_max_ema
from optax_guard.rules.clip_by_median import ClipByMedianState, MedianHistory, clip_by_median
from optax_guard.rules.clip_by_norm import ClipByNormState, clip_by_norm
from optax_guard.rules.clip_by_param_norm import ClipByParamNormState, clip_by_param_norm
from optax_guard.rules.clip_by_percentile import (
    ClipByPercentileState,
    PercentileHistory,
    clip_by_percentile,
)
from optax_guard.rules.clip_by_relative_change import (
    ClipByRelativeChangeState,
    clip_by_relative_change,
)
from optax_guard.rules.clip_by_rms import ClipByRmsState, clip_by_rms
from optax_guard.rules.clip_by_zscore import ClipByZscoreState, ZscoreHistory, clip_by_zscore
from optax_guard.rules.clip_params import ClipParamsState, clip_params
from optax_guard.rules.clip_params_by_norm import ClipParamsByNormState, clip_params_by_norm
from optax_guard.rules.normalize_and_scale import NormalizeAndScaleState, normalize_and_scale
from optax_guard.rules.normalize_by_ema_norm import (
    EmaNormHistory,
    NormalizeByEmaNormState,
    normalize_by_ema_norm,
)
from optax_guard.rules.zero_nonfinite import ZeroNonfiniteState, zero_nonfinite
from optax_guard.runlog.history import History
from optax_guard.wrappers.backoff import BackoffState, backoff
from optax_guard.wrappers.clip_by_update_ratio import (
    ClipByUpdateRatioState,
    UpdateRatioHistory,
    clip_by_update_ratio,
)
from optax_guard.wrappers.conditions import Condition, SpikeState, norm_above, spike
from optax_guard.wrappers.guard import GuardState, guard
from optax_guard.wrappers.loss_scale import DynamicLossScaleState, dynamic_loss_scale, scale_loss
from optax_guard.wrappers.microbatch import SkipMicrobatchState, skip_microbatch
from optax_guard.wrappers.rollback import RollbackState, rollback
from optax_guard.wrappers.stabilize import stabilize

__version__ = "0.1.0"

__all__ = [
    "AddL1State",
    "BackoffState",
    "ClipByEmaState",
    "ClipByMaxEmaState",
    "ClipByMedianState",
    "ClipByNormState",
    "ClipByParamNormState",
    "ClipByPercentileState",
    "ClipByRelativeChangeState",
    "ClipByRmsState",
    "ClipByUpdateRatioState",
    "ClipByZscoreState",
    "ClipParamsByNormState",
    "ClipParamsState",
    "Condition",
    "Diagnosis",
    "DiagnosisRow",
    "DynamicLossScaleState",
    "EmaHistory",
    "EmaNormHistory",
    "GuardGaveUp",
    "GuardState",
    "History",
    "MedianHistory",
    "NormalizeAndScaleState",
    "NormalizeByEmaNormState",
    "PercentileHistory",
    "RollbackState",
    "SkipMicrobatchState",
    "SpikeState",
    "UpdateRatioHistory",
    "ZeroNonfiniteState",
    "ZscoreHistory",
    "add_l1",
    "backoff",
    "check",
    "clip_by_ema",
    "clip_by_max_ema",
    "clip_by_median",
    "clip_by_norm",
    "clip_by_param_norm",
    "clip_by_percentile",
    "clip_by_relative_change",
    "clip_by_rms",
    "clip_by_update_ratio",
    "clip_by_zscore",
    "clip_params",
    "clip_params_by_norm",
    "diagnose",
    "dynamic_loss_scale",
    "explain",
    "guard",
    "metrics",
    "norm_above",
    "normalize_and_scale",
    "normalize_by_ema_norm",
    "rollback",
    "scale_loss",
    "select",
    "skip_microbatch",
    "spike",
    "stabilize",
    "step_ok",
    "zero_nonfinite",
]
