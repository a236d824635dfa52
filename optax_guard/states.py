"""Classes of the states that the transformations of this library make.

Every rule that limits or sets norms has a ``RuleState`` under the name of its factory. What a
packed state holds is read by name: ``state.skipped_total``; see the entries of its class.
"""

from optax_guard._core.states import rule_state

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

__all__ = [name for name in dir() if name.endswith("State")]
