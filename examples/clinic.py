"""The clinic: deep and badly initialised networks, and what each remedy does for them.

    python examples/clinic.py                    # 4 minutes of CPU time
    python examples/clinic.py --full             # every activation, initialisation and remedy
    python examples/clinic.py --case regressor   # 1000-100-10, targets of unscaled size: 2 minutes
    python examples/clinic.py --case classifier [--data DIR]   # 784-128-64-10; MNIST from IDX files

Networks of 20 layers of 32 units, and one of two hidden layers, learn 8x8 digits for 300 steps of
32 by SGD at learning rate 0.1 (Adam and RMSprop 0.002). Expected, test accuracy in per cent, median
of 8 seeds; NaN: no seed has finite parameters at the end; some of the thirteen columns:

                              none lr/10 Adam value norm normalize update  relative
                                                 .5    1         1  ratio    change
    20x32 relu, He              16    32   84    22   58        60     42        53
    20x32 PReLU, He             19    75   91    31   79        79     76        77
    20x32 relu, N(0,1)         NaN   NaN   17     8   12        12     12         8
    64-128-64-10 relu, N(0,1)   74    90   86    96   81        81     94        92
    64-128-64-10 relu, He       97    86   98    97   97        97     97        97
    20x32 tanh + BN, U(±.05)    18    84   77    19   77        77     88        33
    20x32 tanh + BN, He         94    80   93    94   88        88     94        93
    20x32 tanh, U(±.05)          8     8    8     8    8         9      8         8
    20x32 sigmoid, Xavier        9     8    8     9    9        10      9         9
    20x32 tanh, Xavier          82    61   89    84   82        82     84        84

A network that explodes later in training is helped by a clip, more by Adam or RMSprop. A hopeless
initialisation is kept finite and not cured. No scaling of gradients brings back what has vanished
on its way through the layers; Xavier instead of U(±.05), tanh instead of sigmoid, or BatchNorm
does. A clip is not free: a healthy deep network with BatchNorm loses some points. The script ends
with the same advice, drawn from the figures of its own run.

In the regressor (relu, He) the right limit is far from 1: after 300 steps `clip_by_norm(1)`
explains 6 % of the variance, lr/10 95 %, `clip_by_relative_change()` 93 % and
`clip_by_update_ratio`, the default, 74 %, where plain SGD is NaN; with weights from U(±.05) the
default explains 7 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import _demo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.patches import Rectangle
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_guard as og

BATCH_SIZE = 32
DEEP, WIDE = "20x32", "64-128-64-10"
HIDDEN = {DEEP: (32,) * 20, WIDE: (128, 64), "784-128-64-10": (128, 64), "1000-100-10": (100,)}
ACTIVATIONS = ("relu", "leaky_relu", "PReLU", "sigmoid", "tanh")
INITIALISATIONS = {
    "N(0,1)": jax.nn.initializers.normal(1.0),
    "U(±.05)": lambda *args: jax.random.uniform(*args, minval=-0.05, maxval=0.05),
    "Xavier": jax.nn.initializers.glorot_normal(),
    "He": jax.nn.initializers.he_normal(),
}


class Case(NamedTuple):
    """A network before training: a row of the table."""

    network: str
    activation: str
    initialisation: str
    batch_norm: bool = False

    def __str__(self):
        normalised = " + BatchNorm" if self.batch_norm else ""
        return f"{self.network} {self.activation}{normalised}, {self.initialisation}"


MILD = Case(DEEP, "relu", "He")
SEVERE = Case(DEEP, "relu", "N(0,1)")
HEALTHY = Case(WIDE, "relu", "He")
VANISHING = Case(DEEP, "tanh", "U(±.05)")
SATURATED = Case(DEEP, "sigmoid", "Xavier")
CURED = Case(DEEP, "tanh", "Xavier")
CASES = {
    "digits": (
        MILD,
        Case(DEEP, "PReLU", "He"),
        SEVERE,
        Case(WIDE, "relu", "N(0,1)"),
        HEALTHY,
        Case(DEEP, "tanh", "U(±.05)", batch_norm=True),
        Case(DEEP, "tanh", "He", batch_norm=True),
        VANISHING,
        SATURATED,
        CURED,
    ),
    "regressor": tuple(
        Case("1000-100-10", *rest)
        for rest in (
            ("relu", "He"),
            ("relu", "N(0,1)"),
            ("relu", "U(±.05)"),
            ("tanh", "Xavier"),
            ("relu", "He", True),
        )
    ),
    "classifier": tuple(
        Case("784-128-64-10", *rest)
        for rest in (
            ("relu", "He"),
            ("PReLU", "He"),
            ("relu", "N(0,1)"),
            ("sigmoid", "N(0,1)"),
            ("sigmoid", "U(±.05)"),
            ("tanh", "U(±.05)", True),
        )
    ),
}


def every_case() -> tuple[Case, ...]:
    return tuple(
        Case(network, activation, initialisation, batch_norm)
        for network in (DEEP, WIDE)
        for batch_norm in (False, True)
        for activation in ACTIVATIONS
        for initialisation in INITIALISATIONS
    )


def make_remedies() -> dict[str, optax.GradientTransformation]:
    """The columns of ``--full``; SGD has learning rate 0.1 unless the name says otherwise."""
    sgd = optax.sgd(0.1)
    before = {  # what is done to the gradients
        "clip by value .5": optax.clip(0.5),
        "clip_by_norm 1": og.clip_by_norm(1.0),
        "clip_by_norm 1, per array": og.clip_by_norm(1.0, scope=per_array),
        "clip_by_zscore": og.clip_by_zscore(2.5),
        "clip_by_zscore, cap 1": og.clip_by_zscore(2.5, max_norm=1.0),
        "clip_by_percentile": og.clip_by_percentile(10.0),
        "clip_by_median": og.clip_by_median(3.0),
        "clip_by_ema": og.clip_by_ema(scope=per_array),
        "clip_by_param_norm": og.clip_by_param_norm(scope=per_unit),
        "clip_by_max_ema": unstacked(og.clip_by_max_ema()),
        "normalize 1": og.normalize_and_scale(1.0),
        "normalize auto": og.normalize_and_scale("auto"),
        "normalize_by_ema_norm": og.normalize_by_ema_norm(scope=per_array),
        "L1 1e-3": og.add_l1(1e-3),
        "L2 1e-3": optax.add_decayed_weights(1e-3),
    }
    after = {  # what is done to the updates
        "clip_by_relative_change": unstacked(og.clip_by_relative_change()),
        "clip_params ±.5": og.clip_params(-0.5, 0.5),
    }
    return {
        "none": sgd,
        "lr/10": optax.sgd(0.01),
        "Adam": optax.adam(2e-3),
        "RMSprop": optax.rmsprop(2e-3),
        **{name: optax.chain(remedy, sgd) for name, remedy in before.items()},
        **{name: optax.chain(sgd, remedy) for name, remedy in after.items()},
        "4 batches a step": optax.MultiSteps(sgd, 4).gradient_transformation(),
        "clip_by_update_ratio": unstacked(og.clip_by_update_ratio(sgd)),
        "og.stabilize": unstacked(og.stabilize(sgd)),
        "og.stabilize, Adam": unstacked(og.stabilize(optax.adam(2e-3))),
    }


TELLING = (
    *("none", "lr/10", "Adam", "RMSprop", "clip by value .5", "clip_by_norm 1"),
    *("clip_by_zscore", "clip_by_zscore, cap 1", "clip_by_percentile", "clip_by_param_norm"),
    *("clip_by_update_ratio", "clip_by_relative_change", "normalize 1"),
)
QUICK = ("none", "clip_by_norm 1")
QUICK_CASES = (SEVERE, HEALTHY, VANISHING, CURED)
RIVALS = ("none", "lr/10", "Adam", "RMSprop", "og.stabilize, Adam")  # not rules for gradients


class Layers(NamedTuple):
    """Consecutive layers of one shape, stacked, so that they run in a ``scan`` and compile fast.

    What a case has no use for is there all the same; it has no gradient and stays as it is.
    """

    kernel: jax.Array  # [layers, inputs, outputs]
    bias: jax.Array  # [layers, outputs]
    slope: jax.Array  # [layers], of (P)ReLU, for negative inputs
    gain: jax.Array  # [layers, outputs], of BatchNorm
    shift: jax.Array  # [layers, outputs], of BatchNorm


# A rule must see one array, or one unit, for each layer and not for the whole stack.
def per_array(path: str, leaf: Any) -> tuple[int, ...]:
    del path
    return tuple(range(1, leaf.ndim))


def per_unit(path: str, leaf: Any) -> tuple[int, ...]:
    del path
    return (1,) if leaf.ndim == 3 else tuple(range(1, leaf.ndim))


def unstacked(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """For rules without a scope: shows ``inner`` one array for each layer."""

    def split(tree):
        return jax.tree.map(list, tree)

    def join(parts, tree):
        return jax.tree.map(lambda _, part: jnp.stack(part), tree, parts)

    def update(updates, state, params):
        parts, state = inner.update(split(updates), state, split(params))
        return join(parts, updates), state

    return optax.GradientTransformation(lambda params: inner.init(split(params)), update)


class Kind(NamedTuple):
    """Activation and normalisation of a case as data, so that all cases share a compilation."""

    is_sigmoid: jax.Array
    is_tanh: jax.Array
    learns_slope: jax.Array
    has_batch_norm: jax.Array


def make_kind(case: Case) -> Kind:
    return Kind(
        is_sigmoid=np.asarray(case.activation == "sigmoid"),
        is_tanh=np.asarray(case.activation == "tanh"),
        learns_slope=np.asarray(case.activation == "PReLU"),
        has_batch_norm=np.asarray(case.batch_norm),
    )


def make_params(key: jax.Array, case: Case, sizes: Sequence[int]) -> list[Layers]:
    initialise = INITIALISATIONS[case.initialisation]
    slope = {"leaky_relu": 0.01, "PReLU": 0.25}.get(case.activation, 0.0)
    groups = []
    for shape, group in groupby(pairwise(sizes)):
        keys = jax.random.split(jax.random.fold_in(key, len(groups)), len(list(group)))
        kernel = jax.vmap(lambda key, shape=shape: initialise(key, shape, jnp.float32))(keys)
        zeros = jnp.zeros((len(keys), shape[1]))
        groups.append(Layers(kernel, zeros, jnp.full(len(keys), slope), zeros + 1, zeros))
    return groups


def apply_layer(kind: Kind, num_reference: int, inputs: jax.Array, layer: Layers) -> jax.Array:
    """Dense, BatchNorm if the case has it, activation; of inputs ``[samples, features]``.

    The first ``num_reference`` samples give the statistics of BatchNorm: all of the batch in
    training, training samples put in front when testing.
    """
    outputs = inputs @ layer.kernel + layer.bias
    # Selected before and after: a branch that overflows must not reach the gradient of the other.
    given = jnp.where(kind.has_batch_norm, outputs, 0)
    mean, variance = given[:num_reference].mean(axis=0), given[:num_reference].var(axis=0)
    normalised = (given - mean) * jax.lax.rsqrt(variance + 1e-5) * layer.gain + layer.shift
    outputs = jnp.where(kind.has_batch_norm, normalised, outputs)
    slope = jnp.where(kind.learns_slope, layer.slope, jax.lax.stop_gradient(layer.slope))
    rectified = jnp.where(outputs > 0, outputs, slope * outputs)
    tanh = jnp.tanh(jnp.where(kind.is_sigmoid, outputs / 2, outputs))
    saturated = jnp.where(kind.is_sigmoid, (1 + tanh) / 2, tanh)
    return jnp.where(kind.is_tanh | kind.is_sigmoid, saturated, rectified)


def apply(params: list[Layers], kind: Kind, inputs: jax.Array, num_reference: int) -> jax.Array:
    """Outputs of the network ``[samples, outputs]``, linear in the last layer."""
    *hidden, last = params
    step = partial(apply_layer, kind, num_reference)
    for layers in hidden:
        if len(layers.kernel) == 1:
            inputs = step(inputs, jax.tree.map(lambda leaf: leaf[0], layers))
        else:
            inputs, _ = jax.lax.scan(lambda x, layer: (step(x, layer), None), inputs, layers)
    return inputs @ last.kernel[0] + last.bias[0]


def loss_fn(params: list[Layers], kind: Kind, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy for labels, mean squared error for ``[samples, outputs]``."""
    outputs = apply(params, kind, inputs, len(inputs))
    if targets.ndim > 1:
        return jnp.mean((outputs - targets) ** 2)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def score(params: list[Layers], kind: Kind, data: _demo.Dataset) -> jax.Array:
    """Percent of the test labels, or of the variance of the test targets, that comes out right."""
    reference = data.train_images[:1500]
    both = jnp.concatenate([reference, data.test_images])
    outputs = apply(params, kind, both, len(reference))[len(reference) :]
    targets = data.test_labels
    if targets.ndim > 1:
        return 100 * (1 - jnp.mean((outputs - targets) ** 2) / jnp.var(targets, axis=0).mean())
    return 100 * jnp.mean(outputs.argmax(axis=-1) == targets)


def train(
    optimizer: optax.GradientTransformation,
    data: _demo.Dataset,
    kind: Kind,
    params: list[Layers],
    order: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One run over the batches ``order [steps, BATCH_SIZE]``: score, and whether it is finite."""

    def train_step(carry, rows):
        params, opt_state = carry
        batch = data.train_images[rows], data.train_labels[rows]
        grads = jax.grad(loss_fn)(params, kind, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(train_step, (params, optimizer.init(params)), order)
    return score(params, kind, data), jnp.isfinite(optax.global_norm(params))


class Ward(NamedTuple):
    """The cases of one network, stacked: ``[cases, seeds, ...]``, ``kinds`` without seeds."""

    cases: list[Case]
    kinds: Kind
    params: list[Layers]
    order: jax.Array  # int32 [seeds, steps, BATCH_SIZE]


def make_ward(cases: Iterable[Case], data: _demo.Dataset, seeds: int, steps: int) -> Ward:
    cases = list(cases)
    outputs = data.train_labels.shape[1] if data.train_labels.ndim > 1 else 10
    sizes = (data.train_images.shape[1], *HIDDEN[cases[0].network], outputs)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    make = jax.jit(jax.vmap(lambda key: [make_params(key, case, sizes) for case in cases]))
    kinds, params = stack(*map(make_kind, cases)), stack(*make(keys))
    return Ward(cases, kinds, params, make_order(data, seeds, steps))


def stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def make_order(data: _demo.Dataset, seeds: int, steps: int) -> jax.Array:
    """Samples of each step, every epoch shuffled anew; those left over at its end are left out."""
    per_epoch = len(data.train_labels) // BATCH_SIZE
    orders = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        epochs = [
            rng.permutation(len(data.train_labels))[: per_epoch * BATCH_SIZE]
            for _ in range(-(-steps // per_epoch))
        ]
        orders.append(np.concatenate(epochs).reshape(-1, BATCH_SIZE)[:steps])
    return jnp.asarray(np.array(orders, np.int32))


def first_diagnosis(ward: Ward, data: _demo.Dataset, index: int) -> og.Diagnosis:
    """What :func:`og.diagnose` says of the weights' first gradients, of the first seed."""
    kinds, all_params, order = jax.device_get((ward.kinds, ward.params, ward.order))
    kind = jax.tree.map(lambda leaf: leaf[index], kinds)
    params = jax.tree.map(lambda leaf: leaf[index, 0], all_params)
    rows = order[0, 0]
    grads = _gradient(params, kind, data.train_images[rows], data.train_labels[rows])
    grads = jax.device_get(grads)
    weights = [[list(layers.kernel) for layers in tree] for tree in (grads, params)]
    return og.diagnose(*weights)


_gradient = jax.jit(jax.grad(loss_fn))


class Results(NamedTuple):
    """What :func:`main` returns; arrays are ``[cases, seeds]``, for each remedy."""

    cases: list[Case]
    score: dict[str, np.ndarray]  # percent, -inf for NaN
    is_finite: dict[str, np.ndarray]  # whether the parameters are finite at the end
    diagnosis: list[og.Diagnosis]  # of the first gradients, for each case

    def median(self, case: Case, remedy: str) -> float:
        return float(np.median(self.score[remedy][self.cases.index(case)]))

    def num_lost(self, case: Case, remedy: str) -> int:
        return int(np.sum(~self.is_finite[remedy][self.cases.index(case)]))


def train_all(
    cases: Sequence[Case],
    remedies: Sequence[str],
    data: _demo.Dataset,
    *,
    seeds: int,
    steps: int,
    console: Console,
) -> Results:
    """Every remedy, and for each of them all cases and seeds of a network at once."""
    data = jax.tree.map(jnp.asarray, data)
    networks = dict.fromkeys(case.network for case in cases)
    wards = [
        make_ward([case for case in cases if case.network == network], data, seeds, steps)
        for network in networks
    ]
    optimizers = make_remedies()
    scores, finite = {}, {}
    for name in track(remedies, "Treating", console=console):
        over_seeds = jax.vmap(partial(train, optimizers[name]), (None, None, 0, 0))
        over_cases = jax.jit(jax.vmap(over_seeds, (None, 0, 0, None)))
        runs = [over_cases(data, ward.kinds, ward.params, ward.order) for ward in wards]
        found, finite[name] = map(np.concatenate, zip(*jax.device_get(runs), strict=True))
        scores[name] = np.nan_to_num(found, nan=-np.inf, neginf=-np.inf, posinf=-np.inf)
    ordered = [case for ward in wards for case in ward.cases]
    rows = [ordered.index(case) for case in cases]
    diagnosis = [first_diagnosis(ward, data, i) for ward in wards for i in range(len(ward.cases))]
    return Results(
        cases=list(cases),
        score={name: array[rows] for name, array in scores.items()},
        is_finite={name: array[rows] for name, array in finite.items()},
        diagnosis=[diagnosis[row] for row in rows],
    )


def cell(results: Results, case: Case, remedy: str) -> str:
    """Median in per cent; NaN if no seed survived, otherwise the number that did not."""
    lost = results.num_lost(case, remedy)
    if lost == len(results.score[remedy][0]):
        return "NaN"
    median = results.median(case, remedy)
    text = f"{round(median)}" if median > -0.5 else "< 0"
    return f"{text} ({lost} NaN)" if lost else text


def make_table(results: Results, title: str) -> Table:
    """Cases as columns would be too wide for a terminal: remedies are rows here."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for number in range(1, len(results.cases) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    for name in results.score:
        cells = (cell(results, case, name) for case in results.cases)
        table.add_row(name, *(text.replace(" (", "\n(") for text in cells))
    return table


def describe(results: Results) -> list[str]:
    """The cases with their numbers, and what :func:`og.diagnose` said before the first step."""
    return [
        f"{number:2d}  {case}: {diagnosis.verdict}, first gradient of norm {diagnosis.norm:.2g}"
        for number, (case, diagnosis) in enumerate(
            zip(results.cases, results.diagnosis, strict=True), start=1
        )
    ]


def best_remedy(results: Results, case: Case, names: Iterable[str]) -> str:
    """The remedy with the highest median among those that keep the most seeds finite."""
    return max(names, key=lambda n: (-results.num_lost(case, n), results.median(case, n)))


def advise(results: Results) -> list[str]:
    """What to use when, from the figures of this very run."""
    healthy, treatable, hopeless = [], [], []
    rules = [name for name in results.score if name not in RIVALS]
    quote = partial(cell, results)
    for case in results.cases:
        best = best_remedy(results, case, results.score)
        gain = results.median(case, best) - results.median(case, "none")
        text = f"{case}: none {quote(case, 'none')}"
        if results.median(case, best) < 60:
            hopeless.append(f"{text}, at best {best} {quote(case, best)}{_way_out(results, case)}")
        elif gain < 5 and not results.num_lost(case, "none"):
            harmed = min(rules, key=partial(results.median, case))
            healthy.append(f"{text}; most harm by {harmed} {quote(case, harmed)}")
        else:
            rule = best_remedy(results, case, rules)
            treatable.append(f"{text}, {rule} {quote(case, rule)}, best {best} {quote(case, best)}")
    heads = (
        "Needs no remedy",
        "Cured, or much better, with a remedy",
        "Beyond all of these remedies: change the network",
    )
    groups = zip(heads, (healthy, treatable, hopeless), strict=True)
    return [line for head, found in groups if found for line in (head, *(f"  {x}" for x in found))]


def _way_out(results: Results, case: Case) -> str:
    """The best case that differs in one of activation, initialisation and BatchNorm."""
    near = [
        (results.median(other, remedy), other, remedy)
        for other in results.cases
        for remedy in results.score
        if sum(a != b for a, b in zip(case, other, strict=True)) == 1
        and case.network == other.network
    ]
    if not near:
        return ""
    _, other, remedy = max(near, key=lambda found: found[0])
    change = [str(b) for a, b in zip(case[1:], other[1:], strict=True) if a != b]
    change = ["BatchNorm" if text == "True" else text for text in change]
    return f"; with {change[0]} instead: {remedy} {cell(results, other, remedy)}"


def to_cells(results: Results) -> list[dict]:
    """What ``--json`` writes for ``python -m benchmarks.summary``: per cent of the test data."""
    return [
        {
            "rule": name,
            "case": str(case),
            "value": _number(np.median(scores)),
            "low": _number(scores.min()),
            "high": _number(scores.max()),
            "nonfinite_seeds": results.num_lost(case, name),
            "seeds": len(scores),
        }
        for name, of_cases in results.score.items()
        for case, scores in zip(results.cases, of_cases, strict=True)
    ]


def _number(value: Any) -> float | None:
    """JSON knows no infinity."""
    return float(value) if np.isfinite(value) else None


def save_json(path: Path, args: argparse.Namespace, results: Results) -> None:
    record = {
        "benchmark": "clinic",
        "versions": {
            "jax": jax.__version__,
            "optax": optax.__version__,
            "optax_guard": og.__version__,
        },
        "device": jax.devices()[0].device_kind,
        "arguments": {"case": args.case, "steps": args.steps, "seeds": args.seeds},
        "cells": to_cells(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def plot(results: Results, title: str, path: Path) -> None:
    """A heat map: a row for each case, a column for each remedy."""
    names = list(results.score)
    width, height = 3.9 + 0.42 * len(names), 1.9 + 0.31 * len(results.cases)
    with _demo.figure_at(path, width, height) as figure:
        axis = figure.subplots()
        medians = np.array([[results.median(c, name) for name in names] for c in results.cases])
        image = axis.imshow(np.clip(medians, 0, 100), cmap="cividis", vmin=0, vmax=100)
        image.axes.set_aspect("auto")
        for row, case in enumerate(results.cases):
            for column, name in enumerate(names):
                text = cell(results, case, name)
                is_lost = text == "NaN"
                if is_lost:
                    corner = (column - 0.5, row - 0.5)
                    style = {"facecolor": "white", "edgecolor": _demo.VERMILION, "linewidth": 0}
                    axis.add_patch(Rectangle(corner, 1, 1, hatch="////", **style))
                is_dark = not is_lost and medians[row, column] < 55
                color = "white" if is_dark else "black"
                frame = {"facecolor": "white", "edgecolor": "none", "pad": 1} if is_lost else None
                place = {"ha": "center", "va": "center", "fontsize": 9 if len(text) < 5 else 7}
                axis.text(
                    *(column, row, text.replace(" (", "\n(")), color=color, bbox=frame, **place
                )
        labels = [
            f"{case}  [{diagnosis.verdict}]"
            for case, diagnosis in zip(results.cases, results.diagnosis, strict=True)
        ]
        axis.set_yticks(range(len(labels)), labels)
        axis.set_xticks(range(len(names)), names, rotation=38, ha="left", rotation_mode="anchor")
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        figure.supxlabel(title, fontsize=9)


def make_data(args: argparse.Namespace) -> _demo.Dataset:
    if args.case == "regressor":
        return make_regression()
    if args.data:
        return _demo.load_idx_folder(args.data)
    data = _demo.load_digits()
    return data if args.case == "digits" else enlarged(data)


def enlarged(data: _demo.Dataset) -> _demo.Dataset:
    """Digits of 8x8 pixels as 28x28: each pixel three times, and a margin of two."""

    def enlarge(images):
        large = np.kron(images.reshape(-1, 8, 8), np.ones((1, 3, 3), np.float32))
        return np.pad(large, ((0, 0), (2, 2), (2, 2))).reshape(len(images), 784)

    return data._replace(
        train_images=enlarge(data.train_images), test_images=enlarge(data.test_images)
    )


def make_regression() -> _demo.Dataset:
    """1000 normal features; ten targets, a linear teacher of 20 of them each, plus noise.

    Nothing is scaled: a target has a standard deviation of about 45, which is what makes plain SGD
    explode.
    """
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5000, 1000)).astype(np.float32)
    teacher = rng.normal(0, 10, (1000, 10)) * (np.arange(1000)[:, None] < 20)
    targets = features @ teacher + rng.normal(0, 1, (5000, 10))
    targets = targets.astype(np.float32)
    return _demo.Dataset(features[:4000], targets[:4000], features[4000:], targets[4000:])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="2 seeds, 60 steps, two remedies, four cases")
    add("--full", action="store_true", help="80 cases, 24 remedies, digits only: about an hour")
    add("--case", choices=list(CASES), default="digits", help="network and data")
    add("--remedies", nargs="+", choices=list(make_remedies()), help="default: the telling ones")
    add("--seeds", type=int, help="default 8")
    add("--steps", type=int, help="default 300")
    add("--data", type=Path, help="folder with IDX files, for --case classifier")
    add("--json", type=Path, help="write the cells there")
    add("--out", type=Path, help="picture; default examples/figures/clinic.png")
    args = parser.parse_args(argv)
    if args.data and args.case != "classifier":
        parser.error("--data needs --case classifier; the other cases bring their data along.")
    if args.full and args.case != "digits":
        parser.error("--full is about digits; leave --case out, or name --remedies.")
    args.seeds = args.seeds or (2 if args.quick else 8)
    args.steps = args.steps or (60 if args.quick else 300)
    names = list(make_remedies()) if args.full else list(QUICK if args.quick else TELLING)
    args.remedies = list(dict.fromkeys(["none", *(args.remedies or names)]))
    suffix = "_full" if args.full else "" if args.case == "digits" else f"_{args.case}"
    args.out = args.out or Path(__file__).parent / "figures" / f"clinic{suffix}.png"
    return args


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse(argv)
    console = Console()
    is_short = args.quick and args.case == "digits"
    cases = every_case() if args.full else QUICK_CASES if is_short else CASES[args.case]
    results = train_all(
        cases, args.remedies, make_data(args), seeds=args.seeds, steps=args.steps, console=console
    )
    measure = "variance explained" if args.case == "regressor" else "accuracy"
    title = f"Test {measure} %, median of {args.seeds} seeds, {args.steps} steps"
    plot(results, title, args.out)
    if args.json:
        save_json(args.json, args, results)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if len(cases) <= 12:  # no terminal is as wide as --full; the picture and --json have it
        console.print(make_table(results, title))
    for line in (*describe(results), "", *advise(results), "", f"Figure: {args.out}"):
        say(line)
    return results


if __name__ == "__main__":
    main()
