"""Which layers have gradients that explode, vanish, are dead or non-finite. Host side."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from optax_guard._core.calls import is_transformation
from optax_guard._core.checks import check_number
from optax_guard._core.find import lost_types
from optax_guard.reading._readings import Reading, from_gradients, from_state
from optax_guard.reading.find import no_state, refuse_tracers
from optax_guard.reading.names import gradient_leaves
from optax_guard.reading.tables import plain_table, short

_SEVERITY = ("unused", "ok", "vanishing", "dead", "exploding", "nonfinite")
_MOST_ROWS = 40
_USUAL_BIAS = 10.0  # the gradient of a slope that a whole PReLU layer shares reaches 5 in health


class DiagnosisRow(NamedTuple):
    """What the gradient of one array looks like, or of one layer in an array that stacks layers.

    Attributes:
      path: its name, as in ``"dense1/kernel"`` or ``"layers/kernel[3]"``.
      shape: of the array, or the layer.
      norm: Euclidean norm of its gradient; NaN if an element is not finite, 0 if it is unused.
      rms: root mean square of the gradient's elements.
      share: of the squared norm of all finite gradients, so that shares add up to 1.
      ratio: the norm divided by that of the parameter; inf for a parameter of zeros.
      verdict: ``"ok"``, ``"vanishing"``, ``"dead"``, ``"exploding"``, ``"nonfinite"``, or
        ``"unused"``.
    """

    path: str
    shape: tuple[int, ...]
    norm: float
    rms: float
    share: float
    ratio: float
    verdict: str


@dataclasses.dataclass(frozen=True, repr=False)
class Diagnosis:
    """What :func:`diagnose` found; prints as a table with the worst layers first.

    Attributes:
      rows: one :class:`DiagnosisRow` for each float array, in the order of the parameters.
      zeros: for each row the fraction of elements that are exactly zero, NaN for an unused one;
        empty if a state was diagnosed, which keeps norms only.
      norm: of all finite gradients together.
    """

    rows: list[DiagnosisRow]
    zeros: tuple[float, ...]
    norm: float

    @property
    def verdict(self) -> str:
        """The worst of the rows: nonfinite, then exploding, dead, vanishing, ok, unused."""
        return max((row.verdict for row in self.rows), key=_SEVERITY.index, default="ok")

    def __repr__(self) -> str:
        counts = {word: sum(row.verdict == word for row in self.rows) for word in _SEVERITY[::-1]}
        found = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        count = len(self.rows)
        head = f"{self.verdict}: {found or 'none'} of {count} arrays, norm {self.norm:.3g}"
        zeros = self.zeros or (None,) * count
        pairs = sorted(zip(self.rows, zeros, strict=True), key=lambda pair: _badness(pair[0]))
        cells = [_cells(row, zero) for row, zero in pairs[:_MOST_ROWS]]
        columns = ("array", "shape", "norm", "rms", "share", "ratio", "zeros", "verdict")
        more = count - len(cells)
        tail = f"\n... and {more} more, none of them worse; .rows has all" if more > 0 else ""
        return f"{head}\n{plain_table(columns, cells)}{tail}"


def _cells(row: DiagnosisRow, zeros: float | None) -> list[str]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    fraction = "-" if zeros is None or math.isnan(zeros) else f"{zeros:.0%}"
    return [row.path, shape, *map(short, row[2:6]), fraction, row.verdict]


def diagnose(
    grads_or_state: Any,
    params: Any,
    *,
    exploding_ratio: float = 2.0,
    vanishing_ratio: float = 1e-6,
    dead_fraction: float = 1.0,
) -> Diagnosis:
    """Judges the gradient of every array, relative to the array itself.

    With ``g`` the RMS of a gradient and ``p`` that of its parameter, the first that holds::

        unused      there is no gradient (None), or it reaches no output of the optimizer
        nonfinite   any element of the gradient is NaN or Inf
        dead        at least dead_fraction of its elements are exactly zero
        exploding   g > exploding_ratio * max(p, usual)
        vanishing   g < vanishing_ratio * p

    ``usual`` is the median of ``p`` over the weights (arrays of rank 2 and more), or 10 for the
    biases, gains and slopes beside them: what starts at or near zero may well have a longer
    gradient. Where ``p`` is zero that median (1 for want of weights) stands for it. A bias before a
    normalisation has a gradient of rounding errors only, and so is not called vanishing beside a
    weight of its layer that is not.

    **At initialisation**, on the first gradients, this tells whether signals survive the way
    through the layers. The largest ``g / max(p, usual)`` of a weight over 100 seeds, batches of 32
    digits, is at most 0.5 (2 layers, He), 0.1 (20 tanh layers, Xavier) and 1.5 (20 tanh layers,
    BatchNorm, He), all of which train. It is 4 in the median, 1.7 at least (2 layers, N(0, 1)), at
    least 3.7 (20 layers, BatchNorm, U(-0.05, 0.05)) and at least 1e10 (20 layers, N(0, 1)), none
    of which trains well; a seed in fifty of the first passes as ok. For U(-0.05, 0.05) without
    BatchNorm the smallest ``g / p`` is below 1e-18; below 1e-6 a step of plain SGD at a learning
    rate of 0.1 is lost in the rounding of float32. A healthy first gradient is no promise: what a
    large learning rate does later it cannot show.

    **Later in training** small ratios are what convergence looks like. Divide by a loss scale
    first; a guard inside :func:`dynamic_loss_scale` sees gradients without it.

    Args:
      grads_or_state: gradients, with the structure of ``params`` (leaves may be missing or None),
        or any pytree with a :func:`guard` in it, for the norms that the outermost guards saw last,
        layer by layer where ``guard(stacked=...)`` says so.
      params: the parameters; with Flax NNX ``nnx.state(model, nnx.Param)``.
      exploding_ratio: in (0, inf].
      vanishing_ratio: in [0, exploding_ratio).
      dead_fraction: in (0, 1]. A state does not count zeros: there a norm of 0 is dead, but
        vanishing beside a clip of scope "unit", which lets norms below 1e-19 read as 0.

    Returns:
      A :class:`Diagnosis`. Norms are right from 1e-37 to 3e38, and those of a state as
      :class:`GuardState` keeps them. Cost: one read of gradients and parameters on their
      device, and one transfer of six numbers for each array; not for use inside ``jit``. The
      first call compiles a function for each shape of array.

    Raises:
      ValueError: if gradients and parameters do not match, a state has seen no step or tells no
        names, or a threshold is out of range.
      TypeError: if a threshold is no number, or if called inside ``jit``.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> params = {"dense1": jnp.ones((2, 2)), "dense2": jnp.ones((2, 2))}
      >>> gradients = {"dense1": jnp.full((2, 2), 0.1), "dense2": jnp.full((2, 2), 1e30)}
      >>> print(og.diagnose(gradients, params))
      exploding: 1 exploding, 1 ok of 2 arrays, norm 2e+30
      array   shape   norm    rms  share  ratio  zeros    verdict
      dense2    2x2  2e+30  1e+30      1  1e+30     0%  exploding
      dense1    2x2    0.2    0.1  1e-62    0.1     0%         ok

    References:
      The ratio is that of LARS (You, Gitman & Ginsburg, `Large batch training of convolutional
      networks <https://arxiv.org/abs/1708.03888>`_, 2017). How signals get lost on their way:
      Glorot & Bengio, `Understanding the difficulty of training deep feedforward neural
      networks <https://proceedings.mlr.press/v9/glorot10a.html>`_, 2010. The limits are ours.
    """
    check_number("exploding_ratio", exploding_ratio, open_minimum=True)
    check_number("vanishing_ratio", vanishing_ratio, maximum=exploding_ratio, open_maximum=True)
    check_number("dead_fraction", dead_fraction, maximum=1.0, open_minimum=True)
    refuse_tracers("diagnose", (grads_or_state, params))
    if is_transformation(grads_or_state):
        raise no_state(grads_or_state, "guard state")
    leaves = gradient_leaves(params)
    readings = from_state(grads_or_state, leaves)
    if readings is None:
        if lost_types(grads_or_state):
            raise no_state(grads_or_state, "guard state")
        readings = from_gradients(grads_or_state, leaves)
    limits = _Limits(float(exploding_ratio), float(vanishing_ratio), float(dead_fraction))
    return _judge(readings, limits)


class _Limits(NamedTuple):
    exploding_ratio: float
    vanishing_ratio: float
    dead_fraction: float


def _judge(readings: Sequence[Reading], limits: _Limits) -> Diagnosis:
    total = math.hypot(*(reading.norm for reading in readings if math.isfinite(reading.norm)))
    weights = [r.param_rms for r in readings if len(r.shape) > 1 and r.param_rms > 0]
    median = statistics.median(weights) if weights else None
    rows = [
        DiagnosisRow(
            path=reading.path,
            shape=reading.shape,
            norm=reading.norm,
            rms=reading.rms,
            share=(reading.norm / total) ** 2 if total else 0.0 * reading.norm,
            ratio=_ratio(reading),
            verdict=_verdict(reading, median, limits),
        )
        for reading in readings
    ]
    rows = [row._replace(verdict="ok") if _is_cancelled(row, rows) else row for row in rows]
    zeros = tuple(reading.zeros for reading in readings if reading.zeros is not None)
    return Diagnosis(rows, zeros, total)


def _ratio(reading: Reading) -> float:
    if reading.param_norm == 0:
        return math.inf if reading.norm > 0 else math.nan
    return reading.norm / reading.param_norm


def _verdict(reading: Reading, median: float | None, limits: _Limits) -> str:
    if not reading.is_used:
        return "unused"
    if not math.isfinite(reading.norm):
        return "nonfinite"
    zeros = float(reading.norm == 0) if reading.zeros is None else reading.zeros
    if not reading.size:
        return "ok"
    if zeros >= limits.dead_fraction:
        return "vanishing" if reading.is_coarse else "dead"
    own = reading.param_rms or median or 1.0
    is_weight = median is None or len(reading.shape) > 1
    usual = (median or 0.0) if is_weight else _USUAL_BIAS
    if reading.rms > limits.exploding_ratio * max(own, usual):
        return "exploding"
    return "vanishing" if reading.rms < limits.vanishing_ratio * own else "ok"


def _is_cancelled(row: DiagnosisRow, rows: Sequence[DiagnosisRow]) -> bool:
    """Whether a small gradient is what rounding leaves of a sum that cancels.

    The gradient of a bias before a normalisation is such a sum: about 1e-8 of that of the kernel.
    """
    if row.verdict != "vanishing":
        return False
    layer = row.path.rpartition("/")[0]
    return any(
        other.path.rpartition("/")[0] == layer
        and len(other.shape) > len(row.shape)
        and other.verdict in ("ok", "exploding")
        and row.rms > 1e-10 * other.rms
        for other in rows
    )


def _badness(row: DiagnosisRow) -> tuple[float, float]:
    """Sorts the worst rows first, and among equals those of large or, if vanishing, small ratio."""
    is_known = math.isfinite(row.ratio)
    if row.verdict == "vanishing":
        return -_SEVERITY.index(row.verdict), row.ratio if is_known else math.inf
    return -_SEVERITY.index(row.verdict), -row.ratio if is_known else 0.0
