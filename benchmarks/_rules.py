"""Every rule of the library at its defaults, put round an optimizer; and the way to the examples.

A rule is a function of an optimizer, so that one may come before it, after it or around it. Another
one is one more line; its name is the one that `python -m benchmarks.summary` knows it by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import optax

import optax_guard as og

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # as `python examples/...` has it

import _demo
import mlp_digits

__all__ = ["ADAPTIVE", "PEERS", "RULES", "Rule", "_demo", "mlp_digits"]

Rule = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def before(*clips: optax.GradientTransformation) -> Rule:
    """The clips act on the gradients."""
    return lambda optimizer: optax.chain(*clips, optimizer)


def after(clip: optax.GradientTransformation) -> Rule:
    """The clip acts on the updates."""
    return lambda optimizer: optax.chain(optimizer, clip)


PEERS: dict[str, Rule] = {
    "none": before(),
    "optax.apply_if_finite": partial(optax.apply_if_finite, max_consecutive_errors=5),
    "optax.zero_nans+clip": before(optax.zero_nans(), optax.clip_by_global_norm(1.0)),
    "optax.adaptive_grad_clip": before(optax.adaptive_grad_clip(0.01)),
}
# With statistics of the run, or, for lengths of one, with none.
ADAPTIVE: dict[str, Rule] = {
    "clip_by_zscore": before(og.clip_by_zscore()),
    "clip_by_zscore_capped": before(og.clip_by_zscore(max_norm=1.0)),
    "clip_by_percentile": before(og.clip_by_percentile()),
    "clip_by_median": before(og.clip_by_median()),
    "clip_by_ema": before(og.clip_by_ema()),
    "clip_by_max_ema": before(og.clip_by_max_ema()),
    "clip_by_update_ratio": og.clip_by_update_ratio,
    "normalize_by_ema_norm": before(og.normalize_by_ema_norm()),
    "normalize_and_scale": before(og.normalize_and_scale(1.0)),
    "normalize_and_scale_auto": before(og.normalize_and_scale("auto")),
}
RULES: dict[str, Rule] = {
    "og.stabilize": og.stabilize,
    "clip_by_norm": before(og.clip_by_norm(1.0)),
    "clip_by_rms": before(og.clip_by_rms()),
    "clip_by_param_norm": before(og.clip_by_param_norm()),
    "clip_by_relative_change": after(og.clip_by_relative_change()),
    **ADAPTIVE,
    "normalize_and_scale_0.1": before(og.normalize_and_scale(0.1)),
    "normalize_and_scale_0.01": before(og.normalize_and_scale(0.01)),
}
