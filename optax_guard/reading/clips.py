"""What to think of a clip that cuts most steps, and whose norms it limits."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from optax_guard._core.find import factory_name
from optax_guard.wrappers.clip_by_update_ratio import ClipByUpdateRatioState

# Rules that cut or set most norms as they should: to a low percentile, to a little more than the
# moving average, to a set that the parameters are to stay in.
_BY_DESIGN = (
    "clip_by_percentile",
    "clip_by_max_ema",
    "clip_by_ema",
    "normalize_and_scale",
    "normalize_by_ema_norm",
    "clip_params",
    "clip_params_by_norm",
)
# Those that are not global unless one says so; the last four do not tell in their state.
_USUAL_SCOPES = {
    "clip_by_rms": "leaf",
    "clip_by_ema": "leaf",
    "clip_by_param_norm": "unit",
    "normalize_by_ema_norm": "leaf",
    "clip_by_max_ema": "leaf",
    "clip_by_relative_change": "leaf",
    "clip_params": "leaf",
    "clip_params_by_norm": "unit",
}
_SILENT = tuple(_USUAL_SCOPES)[-4:]
# What the optimizer makes of gradients is all that these see.
OF_UPDATES = ("clip_by_relative_change", "clip_params", "clip_params_by_norm")

PARTS = {"global": "gradient", "leaf": "array", "unit": "unit"}
_OFTEN, _FEWEST_STEPS = 0.5, 100
_HARD = 0.5  # of many groups one may well be cut in most steps; by more than this is another matter


def scope_of(state: Any) -> str:
    """``"global"``, ``"leaf"`` or ``"unit"`` (any other), as the state of a clip tells."""
    name = factory_name(type(state))
    if isinstance(state, ClipByUpdateRatioState):
        return "global"
    if name in _SILENT:
        return _USUAL_SCOPES[name]
    history = state.history
    if isinstance(history, dict):
        return next(iter(history))
    if isinstance(history, tuple):
        return "unit" if history else "global"
    return "leaf" if np.ndim(jax.tree.leaves(history)[0]) > 1 else "global"


def with_scope(label: str, factory: str, scope: str) -> str:
    """``"clip_by_norm by leaf"``; the label alone for the scope that the rule usually has."""
    return label if scope == _USUAL_SCOPES.get(factory, "global") else f"{label} by {scope}"


def needs_a_word(factory: str, scope: str, steps: float, rate: float, scale: float) -> bool:
    """Whether a clip cut so many of about the last 100 steps that someone should know.

    Args:
      factory: its name.
      scope: as :func:`scope_of` gives.
      steps: that it has seen.
      rate: ``recent_clip_rate``.
      scale: ``recent_scale``.
    """
    is_often = steps >= _FEWEST_STEPS and rate > _OFTEN
    return is_often and factory not in _BY_DESIGN and (scope == "global" or scale < _HARD)


def advice(factory: str, scope: str, scale: float, early: float = 0.0, late: float = 0.0) -> str:
    """The likely cause, and what to try.

    Args:
      factory: name of the rule.
      scope: as :func:`scope_of` gives.
      scale: mean of the smallest factors.
      early: usual norm of all gradients at first; 0 if it is not known.
      late: the same now.
    """
    if factory == "clip_by_update_ratio":
        return (
            "Most steps would have changed the weights by more than max_ratio of them: the "
            f"learning rate is too high. Try {scale:.1g} times it, or a warm-up."
        )
    if late > 3 * early > 0:
        return (
            f"The gradient norm has grown from about {early:.2g} to {late:.2g}: the learning rate "
            "is likely too high. Try a third of it, or a warm-up; the threshold only hides it."
        )
    if scope != "global":
        what = PARTS[scope]
        return (
            f"In most steps some {what} is longer than its limit, the worst of them "
            f"{1 / max(scale, 1e-38):.2g} times. Either the limit lies below the usual norm of one "
            f"{what}, or one layer explodes: og.diagnose and og.layer_norms tell which. Try a "
            "larger limit, or a lower learning rate."
        )
    usual = f" (recent gradients had a norm of about {late:.2g})" if late > 0 else ""
    return (
        f"The threshold lies below the usual norm{usual}, so it, and not the gradient, sets the "
        "length of most steps. Try a threshold a few times that norm, or og.stabilize's own clip; "
        "if the loss is unstable then, a lower learning rate."
    )
