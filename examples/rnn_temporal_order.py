"""Exploding gradients in a recurrent network: the temporal order problem.

    python examples/rnn_temporal_order.py                   # 5 minutes of CPU time
    python examples/rnn_temporal_order.py --methods none clip_by_norm --seeds 4
    python examples/rnn_temporal_order.py --methods all     # every rule, and rivals; 20 minutes
    python examples/rnn_temporal_order.py --lengths 20 30 40 50               # half an hour
    python examples/rnn_temporal_order.py --lengths 20 --lr 0.01 --methods none clip_by_norm

A and B occur in a sequence of 30 symbols, once early and once in the middle; which came when must
be told at the end. One layer of 50 tanh units, plain SGD with learning rate 0.1, 6000 updates on
fresh batches of 20. A seed has solved it when under 1 % of 10,000 fresh sequences are wrong; the
table gives the 95 % interval of the rate after Wilson (16/16: 81-100 %, 14/16: 64-97 %). Expected
of 16 seeds, and the range of three runs whose arithmetic differed in the last bit only (versions,
fusion); near an explosion that is enough to change the fate of a seed:

                             solved    range   median error %   worst error %
    none                       0/16        0            75.23           77.66
    clip_by_norm              16/16    15-16             0.00            0.00
    normalize_and_scale        7/16      1-7             3.34           75.63
    clip_by_zscore             5/16      5-8            47.62           75.12
    clip_by_zscore_capped     16/16    14-16             0.00            0.02
    clip_by_median            16/16    15-16             0.00            0.00  (two runs)
    clip_by_update_ratio      16/16                      0.00            0.00
    normalize_and_scale_auto  14/16       14             0.00           20.47  (two runs)
    normalize_by_ema_norm     15/16                      0.00            3.22
    adam                      13/16                      0.00           75.47
    clip_by_ema                9/16                      0.03           75.63
    clip_by_percentile        12/16                      0.00           58.39
    clip_by_relative_change   14/16                      0.00           54.69
    clip_by_param_norm         5/16                     37.27           57.66
    clip_by_max_ema            4/16                     71.34           88.15
    clip_by_rms                0/16                     75.11           75.63

All methods are guarded, and no step is skipped: these gradients explode without overflowing, which
takes a clip, not a guard. Normalised steps find the solution and walk out of it again, since their
length never shrinks. The z-score rule learns its limit from norms that have exploded already; it
needs the cap, or the median of the first norms, which is frozen. "adam" is Adam(0.002).

Seeds of 16 that are solved in the same 6000 updates, by length:

                             20     30     40     50
    none                      2      0      0      0
    clip_by_norm             16     16      4      0
    clip_by_median           16     16      4      0
    clip_by_update_ratio            16
    clip_by_zscore_capped    16  14-16      6
    normalize_and_scale      12      7      2

Clipping is no cure-all: at 50 it takes more updates, and with `--lengths 20 --lr 0.01`, 13 of 16
seeds succeed with each of these clips and without.

Reference: Pascanu, Mikolov & Bengio, On the difficulty of training recurrent neural networks,
2013, https://arxiv.org/abs/1211.5063, section 4.1.1.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _demo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import optax_guard as og

BATCH_SIZE = 20
NUM_SYMBOLS, NUM_CLASSES = 6, 4  # A, B and four distractors; AA, BA, AB, BB
NUM_TEST, NUM_CURVE = 10_000, 500  # fresh sequences for the verdict, and for a point of the curve
SOLVED = 1.0  # percent of sequences that may be wrong


class TanhRNN(nnx.Module):
    """One layer of tanh units; all weights from N(0, 0.1), as in the paper."""

    def __init__(self, hidden: int = 50, *, rngs: nnx.Rngs):
        dense = partial(nnx.Linear, kernel_init=nnx.initializers.normal(0.1), rngs=rngs)
        self.input = dense(NUM_SYMBOLS, hidden)
        self.recurrent = dense(hidden, hidden, use_bias=False)
        self.output = dense(hidden, NUM_CLASSES)

    def __call__(self, symbols):
        """Logits ``[batch, classes]`` after the last of ``symbols [batch, length]``."""
        inputs = self.input(jax.nn.one_hot(symbols, NUM_SYMBOLS)).swapaxes(0, 1)

        def cell(hidden, given):
            return jnp.tanh(given + self.recurrent(hidden)), None

        hidden, _ = jax.lax.scan(cell, jnp.zeros_like(inputs[0]), inputs)
        return self.output(hidden)


def sample(key: jax.Array, number: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Sequences of distractors in which A (0) or B (1) occurs early and once more in the middle.

    Returns:
      Symbols, int32 ``[number, length]``, and the class: which of the two came first and second.
    """
    keys = jax.random.split(key, 4)
    symbols = jax.random.randint(keys[0], (number, length), 2, NUM_SYMBOLS)
    first, second = jax.random.randint(keys[1], (2, number), 0, 2)
    early = jax.random.randint(keys[2], (number,), length // 10, 2 * length // 10)
    middle = jax.random.randint(keys[3], (number,), length // 2, 6 * length // 10)
    row = jnp.arange(number)
    symbols = symbols.at[row, early].set(first).at[row, middle].set(second)
    return symbols, first + 2 * second


def make_methods(learning_rate: float) -> dict[str, optax.GradientTransformation]:
    """Plain SGD behind every rule of the library at its defaults, and rivals; all guarded.

    Another rule is one more line. The guard skips nothing here; it measures the norms.
    """
    sgd = optax.sgd(learning_rate)
    clips = {
        "none": optax.identity(),
        "clip_by_norm": og.clip_by_norm(1.0),
        "normalize_and_scale": og.normalize_and_scale(1.0),
        "clip_by_zscore": og.clip_by_zscore(2.5),
        "clip_by_zscore_capped": og.clip_by_zscore(2.5, max_norm=1.0),
        "clip_by_median": og.clip_by_median(3.0),
        "normalize_and_scale_auto": og.normalize_and_scale("auto"),
        "clip_by_percentile": og.clip_by_percentile(),
        "clip_by_ema": og.clip_by_ema(),
        "clip_by_rms": og.clip_by_rms(),
        "clip_by_param_norm": og.clip_by_param_norm(),
        "clip_by_max_ema": og.clip_by_max_ema(),
        "normalize_by_ema_norm": og.normalize_by_ema_norm(),
        "optax.zero_nans+clip": optax.chain(optax.zero_nans(), optax.clip_by_global_norm(1.0)),
    }
    methods = {name: optax.chain(clip, sgd) for name, clip in clips.items()}
    methods |= {
        "clip_by_relative_change": optax.chain(sgd, og.clip_by_relative_change()),
        "clip_by_update_ratio": og.clip_by_update_ratio(sgd),
        "optax.apply_if_finite": optax.apply_if_finite(sgd, 5),
        "lr/10": optax.sgd(learning_rate / 10),
        "adam": optax.adam(2e-3),
    }
    return {name: og.guard(method) for name, method in methods.items()}


class Setting(NamedTuple):
    length: int
    updates: int
    seeds: int
    block: int  # updates between two points of the curves


class Result(NamedTuple):
    """Of one method, arrays over seeds in front."""

    final_error: np.ndarray  # percent of NUM_TEST sequences, float32 [seeds]
    skipped: np.ndarray  # steps that the guard skipped, int32 [seeds]
    error: np.ndarray  # percent of NUM_CURVE sequences, float32 [seeds, points]
    grad_norm: np.ndarray  # largest of each block of updates, float32 [seeds, points]


def train_block(graphdef, optimizer, setting: Setting, key, carry, first_update):
    """``setting.block`` updates of one seed, each on a fresh batch, and what came of them."""

    def loss_fn(params, symbols, labels):
        logits = nnx.merge(graphdef, params)(symbols)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def train_step(carry, update):
        params, opt_state = carry
        batch = sample(jax.random.fold_in(key, update), BATCH_SIZE, setting.length)
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        carry = (optax.apply_updates(params, updates), opt_state)
        return carry, og.metrics(opt_state)["guard/grad_norm"]

    steps = first_update + jnp.arange(setting.block)
    carry, norms = jax.lax.scan(train_step, carry, steps)
    test_key = jax.random.fold_in(jax.random.fold_in(key, steps[-1]), 1)
    return carry, norms.max(), measure_error(graphdef, setting, NUM_CURVE, test_key, carry[0])


def measure_error(graphdef, setting: Setting, number: int, key, params):
    """Percent of ``number`` fresh sequences that are classified wrongly."""
    symbols, labels = sample(key, number, setting.length)
    logits = nnx.merge(graphdef, params)(symbols)
    return 100 * jnp.mean(logits.argmax(axis=-1) != labels)


def run(optimizer, setting: Setting, advance) -> Result:
    """All seeds of one method; calls ``advance`` after each block."""

    @jax.jit
    @jax.vmap
    def start(seed):
        model_key, data_key, test_key = jax.random.split(jax.random.key(seed), 3)
        params = nnx.state(TanhRNN(rngs=nnx.Rngs(model_key)), nnx.Param)
        return data_key, test_key, (params, optimizer.init(params))

    @jax.jit
    @jax.vmap
    def finish(key, carry):
        params, opt_state = carry
        error = measure_error(graphdef, setting, NUM_TEST, key, params)
        return error, og.metrics(opt_state)["guard/skipped_total"]

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: TanhRNN(rngs=nnx.Rngs(0))))
    block = partial(train_block, graphdef, optimizer, setting)
    block = jax.jit(jax.vmap(block, (0, 0, None)), donate_argnums=1)
    data_keys, test_keys, carry = start(jnp.arange(setting.seeds))
    points = []
    for first_update in range(0, setting.updates, setting.block):
        carry, *point = block(data_keys, carry, first_update)
        points.append(jax.device_get(point))
        advance()
    grad_norm, error = np.moveaxis(np.array(points), 0, -1)
    return Result(*jax.device_get(finish(test_keys, carry)), error, grad_norm)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a success rate (Wilson 1927); as it should, it is wide at 0 and n."""
    z = 1.959964
    rate, shrink = successes / trials, 1 + z**2 / trials
    middle = (rate + z**2 / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def success(result: Result) -> tuple[int, int]:
    """How many seeds have solved the problem, and how many there are."""
    return int(np.sum(result.final_error < SOLVED)), len(result.final_error)


def make_table(results: dict[str, Result], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in ("solved", "95 % interval", "median error", "worst error", "skipped"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, result in results.items():
        solved, seeds = success(result)
        low, high = wilson_interval(solved, seeds)
        table.add_row(
            name,
            f"{solved}/{seeds}",
            f"{100 * low:.0f}-{100 * high:.0f} %",
            f"{np.median(result.final_error):.2f} %",
            f"{result.final_error.max():.2f} %",
            f"{result.skipped.sum()}",
        )
    return table


def to_cells(all_results: dict[int, dict[str, Result]], learning_rate: float) -> list[dict]:
    """What ``--json`` writes for ``python -m benchmarks.summary``: rates of success in per cent."""
    cells = []
    for length, results in all_results.items():
        for name, result in results.items():
            solved, seeds = success(result)
            low, high = wilson_interval(solved, seeds)
            cells.append(
                {
                    "rule": name,
                    "case": f"L={length}, lr={learning_rate:g}",
                    "value": 100 * solved / seeds,
                    "low": 100 * low,
                    "high": 100 * high,
                    "solved": solved,
                    "seeds": seeds,
                    "median_error": float(np.median(result.final_error)),
                    "worst_error": float(result.final_error.max()),
                }
            )
    return cells


def save_json(path: Path, args: argparse.Namespace, cells: list[dict]) -> None:
    versions = {"jax": jax.__version__, "optax": optax.__version__, "optax_guard": og.__version__}
    options = {"lr": args.lr, "updates": args.updates, "seeds": args.seeds}
    record = {
        "benchmark": "rnn_temporal_order",
        "versions": versions,
        "device": jax.devices()[0].device_kind,
        "arguments": options,
        "cells": cells,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


COLORS = (
    _demo.VERMILION,
    _demo.BLUE,
    _demo.PURPLE,
    _demo.ORANGE,
    _demo.GREEN,
    _demo.SKY,
    _demo.GREY,
)


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a dash for each method, the same in every figure."""
    dashes = ("-", (0, (5, 1.5, 1, 1.5)), (0, (1, 1.5)))
    styles = {
        name: {"color": COLORS[i % len(COLORS)], "linestyle": dashes[i // len(COLORS)]}
        for i, name in enumerate(make_methods(0.1))
    }
    styles["clip_by_zscore_capped"]["linestyle"] = (0, (4, 2))  # its curve lies on clip_by_norm's
    return {name: styles[name] for name in names}


def plot(results: dict[str, Result], setting: Setting, path: Path) -> None:
    """How many seeds have the problem solved, and gradient norms."""
    lines = line_styles(list(results))
    num_legend_lines = -(-len(results) // 3)
    with _demo.figure_at(path, 8, 3.8 + 0.21 * max(0, num_legend_lines - 2)) as figure:
        left, right = figure.subplots(1, 2)
        updates = np.arange(setting.block, setting.updates + 1, setting.block)
        for name, result in results.items():
            left.plot(updates, np.sum(result.error < SOLVED, axis=0), label=name, **lines[name])
            right.plot(updates, np.median(result.grad_norm, axis=0), **lines[name])
        left.set(xlabel="update", ylim=(-0.3, setting.seeds + 0.3))
        left.set_title(f"Seeds below {SOLVED:.0f} % error, of {setting.seeds}")
        right.set(xlabel="update", yscale="log")
        right.set_title(f"Largest gradient norm in {setting.block} updates, median")
        figure.legend(loc="outside upper center", ncols=3)


def plot_lengths(all_results: dict[int, dict[str, Result]], path: Path) -> None:
    """Rates of success over the lengths, with their intervals."""
    lengths = list(all_results)
    names = list(all_results[lengths[0]])
    with _demo.figure_at(path, 7, 4.2) as figure:
        axis = figure.subplots()
        for shift, (name, style) in enumerate(line_styles(names).items()):
            counts = [success(all_results[length][name]) for length in lengths]
            rates = np.array([solved / seeds for solved, seeds in counts])
            bounds = np.array([wilson_interval(*count) for count in counts]).T
            places = np.array(lengths) + (shift - len(names) / 2) * 5 / max(
                16, len(names)
            )  # bars side by side
            spans = np.abs(bounds - rates)
            axis.errorbar(places, rates, spans, label=name, capsize=2, marker="o", **style)
        axis.set(xlabel="length of the sequences", ylim=(-0.03, 1.03))
        axis.set_title(f"Rate of seeds below {SOLVED:.0f} % error, 95 % intervals")
        figure.legend(loc="outside right upper", fontsize=8)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(make_methods(0.1))
    add = parser.add_argument
    add("--quick", action="store_true", help="2 seeds, 600 updates, length 10, two methods")
    add("--methods", nargs="+", choices=[*names, "all"], help="default: the first five")
    add("--seeds", type=int, help="default 16")
    add("--lengths", nargs="+", type=int, help="symbols in a sequence, at least 10; default 30")
    add("--updates", type=int, help="a multiple of 100; default 6000")
    add("--lr", type=float, default=0.1, help="learning rate of SGD; default 0.1")
    figure = Path(__file__).parent / "figures" / "rnn_temporal_order.png"
    add("--out", type=Path, default=figure, help="PNG file to write")
    add("--json", type=Path, help="file for the rates of success")
    args = parser.parse_args(argv)
    args.methods = args.methods or (names[: 2 if args.quick else 5])
    args.methods = names if "all" in args.methods else args.methods
    args.seeds = args.seeds or (2 if args.quick else 16)
    args.lengths = args.lengths or [10 if args.quick else 30]
    args.updates = args.updates or (600 if args.quick else 6000)
    if min(args.lengths) < 10 or args.updates % 100:
        parser.error("--lengths must be at least 10 and --updates a multiple of 100")
    return args


def main(argv: Sequence[str] | None = None) -> dict[int, dict[str, Result]]:
    """Results of every method, for each length."""
    args = parse(argv)
    methods = make_methods(args.lr)
    results: dict[int, dict[str, Result]] = {length: {} for length in args.lengths}
    console = Console()
    with Progress(console=console) as progress:
        for length in args.lengths:
            setting = Setting(length, args.updates, args.seeds, block=100)
            for name in args.methods:
                label = f"{name}, length {length}"
                task = progress.add_task(label, total=setting.updates // setting.block)
                advance = partial(progress.advance, task)
                results[length][name] = run(methods[name], setting, advance)
                if args.json:  # after each method, so that a run cut short leaves something
                    save_json(args.json, args, to_cells(results, args.lr))
    if len(results) == 1:
        plot(results[length], setting, args.out)
    else:
        plot_lengths(results, args.out)
    for length, of_length in results.items():
        title = f"Temporal order, length {length}, lr {args.lr:g}: solved is < {SOLVED:.0f} % wrong"
        console.print(make_table(of_length, title))
    console.print(f"Figure: {args.out}", highlight=False, soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
