"""Optax transformations that keep training alive and tell what happened."""

from optax_guard import states
from optax_guard.reading.adopt import adopt
from optax_guard.reading.diagnose import Diagnosis, diagnose
from optax_guard.reading.explain import GuardGaveUp, check, explain
from optax_guard.reading.metrics import layer_norms, metrics, select, step_ok
from optax_guard.reading.unwrap import unwrap
from optax_guard.rules.add_l1 import add_l1
from optax_guard.rules.clip_by_ema import clip_by_ema
from optax_guard.rules.clip_by_max_ema import clip_by_max_ema
from optax_guard.rules.clip_by_median import clip_by_median
from optax_guard.rules.clip_by_norm import clip_by_norm
from optax_guard.rules.clip_by_param_norm import clip_by_param_norm
from optax_guard.rules.clip_by_percentile import clip_by_percentile
from optax_guard.rules.clip_by_relative_change import clip_by_relative_change
from optax_guard.rules.clip_by_rms import clip_by_rms
from optax_guard.rules.clip_by_zscore import clip_by_zscore
from optax_guard.rules.clip_params import clip_params
from optax_guard.rules.clip_params_by_norm import clip_params_by_norm
from optax_guard.rules.limit_norms import limit_norms
from optax_guard.rules.normalize_and_scale import normalize_and_scale
from optax_guard.rules.normalize_by_ema_norm import normalize_by_ema_norm
from optax_guard.rules.rule import Rule
from optax_guard.rules.zero_nonfinite import zero_nonfinite
from optax_guard.runlog.history import History
from optax_guard.wrappers.backoff import backoff
from optax_guard.wrappers.clip_by_update_ratio import clip_by_update_ratio
from optax_guard.wrappers.conditions import Condition, norm_above
from optax_guard.wrappers.guard import guard
from optax_guard.wrappers.loss_scale import dynamic_loss_scale, scale_loss
from optax_guard.wrappers.microbatch import skip_microbatch
from optax_guard.wrappers.reasons import SkipReason
from optax_guard.wrappers.rollback import rollback
from optax_guard.wrappers.spike import spike
from optax_guard.wrappers.stabilize import stabilize

__version__ = "0.2.0"

__all__ = [
    "Condition",
    "Diagnosis",
    "GuardGaveUp",
    "History",
    "Rule",
    "SkipReason",
    "add_l1",
    "adopt",
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
    "layer_norms",
    "limit_norms",
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
    "states",
    "step_ok",
    "unwrap",
    "zero_nonfinite",
]

for _name in __all__:
    if callable(_public := globals()[_name]):
        _public.__module__ = __name__
