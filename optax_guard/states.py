"""Classes of the states that the transformations of this library make.

Every rule that limits or sets norms has a ``RuleState`` under the name of its factory. What a
packed state holds is read by name: ``state.skipped_total``; see the entries of its class.
"""

from optax_guard._core.states import PackedState, RuleState, rule_state
from optax_guard.rules.add_l1 import AddL1State
from optax_guard.rules.zero_nonfinite import ZeroNonfiniteState
from optax_guard.wrappers._update_ratio import (
    ClipByUpdateRatioState as ClipByUpdateRatioState,
)
from optax_guard.wrappers.backoff import BackoffState
from optax_guard.wrappers.guard_state import GuardState
from optax_guard.wrappers.loss_scale import DynamicLossScaleState
from optax_guard.wrappers.microbatch import SkipMicrobatchState
from optax_guard.wrappers.rollback import RollbackState
from optax_guard.wrappers.spike import SpikeState

ClipByNormState = rule_state("clip_by_norm")
ClipByRmsState = rule_state("clip_by_rms")
ClipByZscoreState = rule_state("clip_by_zscore")
ClipByPercentileState = rule_state("clip_by_percentile")
ClipByMedianState = rule_state("clip_by_median")
ClipByEmaState = rule_state("clip_by_ema")
ClipByParamNormState = rule_state("clip_by_param_norm")
ClipByMaxEmaState = rule_state("clip_by_max_ema")
ClipByRelativeChangeState = rule_state("clip_by_relative_change")
ClipParamsState = rule_state("clip_params")
ClipParamsByNormState = rule_state("clip_params_by_norm")
NormalizeAndScaleState = rule_state("normalize_and_scale")
NormalizeByEmaNormState = rule_state("normalize_by_ema_norm")

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
    "DynamicLossScaleState",
    "GuardState",
    "NormalizeAndScaleState",
    "NormalizeByEmaNormState",
    "PackedState",
    "RollbackState",
    "RuleState",
    "SkipMicrobatchState",
    "SpikeState",
    "ZeroNonfiniteState",
]
