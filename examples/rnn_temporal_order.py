"""Exploding gradients in a recurrent network: the temporal order problem.

    python examples/rnn_temporal_order.py        # 5 minutes of CPU time
    python examples/rnn_temporal_order.py --methods none clip_by_norm --seeds 4

A and B occur in a sequence of 30 symbols, once early and once in the middle; which came when must
be told at the end. One layer of 50 tanh units, plain SGD with learning rate 0.1, 6000 updates on
fresh batches of 20. A seed has solved it when under 1 % of 10,000 fresh sequences are wrong.
Expected of 16 seeds, and the range of three runs whose arithmetic differed in the last bit only
(versions, fusion); near an explosion that is enough to change the fate of a seed:

                             solved    range   median error %   worst error %
    none                       0/16        0            75.23           77.66
    clip_by_norm              16/16    15-16             0.00            0.00
    normalize_and_scale        7/16      1-7             3.34           75.63
    clip_by_zscore             5/16      5-8            47.62           75.12
    clip_by_zscore_capped     16/16    15-16             0.00            0.02

All methods are guarded, and no step is skipped: these gradients explode without overflowing, which
takes a clip, not a guard. Normalised steps find the solution and walk out of it again, since their
length never shrinks. The z-score rule learns its limit from norms that have exploded already; it
needs the cap. Clipping is no cure-all: with `--length 20 --lr 0.01`, 13 of 16 seeds succeed with
it and without.

Reference: Pascanu, Mikolov & Bengio, On the difficulty of training recurrent neural networks,
2013, https://arxiv.org/abs/1211.5063, section 4.1.1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
    """Plain SGD behind different clips, all of them guarded."""
    clips = {
        "none": optax.identity(),
        "clip_by_norm": og.clip_by_norm(1.0),
        "normalize_and_scale": og.normalize_and_scale(1.0),
        "clip_by_zscore": og.clip_by_zscore(2.5),
        "clip_by_zscore_capped": og.clip_by_zscore(2.5, max_norm=1.0),
        "clip_by_median": og.clip_by_median(3.0),
        "normalize_and_scale_auto": og.normalize_and_scale("auto"),
    }
    sgd = optax.sgd(learning_rate)
    return {name: og.guard(optax.chain(clip, sgd)) for name, clip in clips.items()}


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


def make_table(results: dict[str, Result]) -> Table:
    table = Table(title=f"Temporal order: solved is < {SOLVED:.0f} % wrong", box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for name in ("solved", "median error %", "worst error %", "skipped"):
        table.add_column(name, justify="right")
    for name, result in results.items():
        error = result.final_error
        table.add_row(
            name,
            f"{np.sum(error < SOLVED)}/{len(error)}",
            f"{np.median(error):.2f}",
            f"{error.max():.2f}",
            f"{result.skipped.sum()}",
        )
    return table


LINES = {
    "none": {"color": _demo.VERMILION},
    "clip_by_norm": {"color": _demo.BLUE},
    "normalize_and_scale": {"color": _demo.PURPLE},
    "clip_by_zscore": {"color": _demo.ORANGE},
    "clip_by_zscore_capped": {"color": _demo.GREEN, "linestyle": (0, (4, 2))},
    "clip_by_median": {"color": _demo.SKY},
    "normalize_and_scale_auto": {"color": _demo.GREY},
}


def plot(results: dict[str, Result], setting: Setting, path: Path) -> None:
    """How many seeds have the problem solved, and gradient norms."""
    with _demo.figure_at(path, 8, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        updates = np.arange(setting.block, setting.updates + 1, setting.block)
        for name, result in results.items():
            left.plot(updates, np.sum(result.error < SOLVED, axis=0), label=name, **LINES[name])
            right.plot(updates, np.median(result.grad_norm, axis=0), **LINES[name])
        left.set(xlabel="update", ylim=(-0.3, setting.seeds + 0.3))
        left.set_title(f"Seeds below {SOLVED:.0f} % error, of {setting.seeds}")
        right.set(xlabel="update", yscale="log")
        right.set_title(f"Largest gradient norm in {setting.block} updates, median")
        figure.legend(loc="outside upper center", ncols=3)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(make_methods(0.1))
    add = parser.add_argument
    add("--quick", action="store_true", help="2 seeds, 600 updates, length 10, two methods")
    add("--methods", nargs="+", choices=names, help="default: the first five")
    add("--seeds", type=int, help="default 16")
    add("--length", type=int, help="symbols in a sequence, at least 10; default 30")
    add("--updates", type=int, help="a multiple of 100; default 6000")
    add("--lr", type=float, default=0.1, help="learning rate of SGD; default 0.1")
    figure = Path(__file__).parent / "figures" / "rnn_temporal_order.png"
    add("--out", type=Path, default=figure, help="PNG file to write")
    args = parser.parse_args(argv)
    args.methods = args.methods or (names[: 2 if args.quick else 5])
    args.seeds = args.seeds or (2 if args.quick else 16)
    args.length = args.length or (10 if args.quick else 30)
    args.updates = args.updates or (600 if args.quick else 6000)
    if args.length < 10 or args.updates % 100:
        parser.error("--length must be at least 10 and --updates a multiple of 100")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    args = parse(argv)
    setting = Setting(args.length, args.updates, args.seeds, block=100)
    methods = make_methods(args.lr)
    results = {}
    console = Console()
    with Progress(console=console) as progress:
        for name in args.methods:
            task = progress.add_task(name, total=setting.updates // setting.block)
            results[name] = run(methods[name], setting, partial(progress.advance, task))
    plot(results, setting, args.out)
    console.print(make_table(results))
    console.print(f"Figure: {args.out}", highlight=False, soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
