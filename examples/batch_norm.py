"""BatchNorm in Flax NNX: a guard cannot hold back statistics that live outside the optimizer.

    python examples/batch_norm.py    # 15 seconds of CPU time

A small convolutional network with BatchNorm learns 8x8 digits; one batch in the middle holds a NaN
pixel. The guard skips that step, so that parameters and momentum stay as they were. The forward
pass has written NaN into the running statistics all the same, and no later batch can drive it out:
every evaluation from then on is worthless, although training itself looks healthy (it normalises
by the statistics of the batch). `og.step_ok` and `og.select` put the old statistics back.

Expected, in per cent, on the last batches and on the test digits:

                               training     test
    no bad batch                  100.0     98.1
    no protection                   0.0      0.0    parameters and statistics are NaN
    og.stabilize                  100.0      0.0    the statistics are NaN
    og.stabilize, og.select       100.0     98.1

A NaN output counts as wrong.

Mind that `nnx.state(model, nnx.BatchStat)` shares the live variables: what is to be put back must
be copied before the forward pass.
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

BATCH_SIZE, NUM_STEPS, NUM_STEPS_QUICK = 64, 220, 66
BAD_STEP, MEASURE_EVERY = 33, 11
WITH_SELECT = "og.stabilize, og.select"


class ConvNet(nnx.Module):
    """Two convolutions of stride 2, each with BatchNorm and ReLU, then logits."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.output = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, images, *, is_training: bool):  # float32 [batch, 64]
        by_batch = {"use_running_average": not is_training}
        hidden = images.reshape(-1, 8, 8, 1)
        hidden = nnx.relu(self.norm1(self.conv1(hidden), **by_batch))
        hidden = nnx.relu(self.norm2(self.conv2(hidden), **by_batch))
        return self.output(hidden.reshape(len(images), -1))


@partial(nnx.jit, static_argnames="keep_statistics")
def train_step(model, optimizer, images, labels, *, keep_statistics: bool):
    """Changes model and optimizer; returns how many of the batch were right, in per cent."""
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))  # the forward pass writes

    def loss_fn(model):
        logits = model(images, is_training=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, value=loss)  # a bad step changes no parameter
    if keep_statistics:
        after = nnx.state(model, nnx.BatchStat)
        nnx.update(model, og.select(og.step_ok(optimizer), after, before))
    return percent_right(logits, labels)


@nnx.jit
def evaluate(model, images, labels):
    return percent_right(model(images, is_training=False), labels)


def percent_right(logits, labels):
    is_finite = jnp.isfinite(logits).all(axis=-1)  # the argmax of NaNs is class 0
    return 100 * jnp.mean(is_finite & (logits.argmax(axis=-1) == labels))


class Run(NamedTuple):
    """One training run; accuracies in per cent."""

    model: ConvNet
    optimizer: nnx.Optimizer
    in_training: np.ndarray  # float32 [steps], normalised by the statistics of the batch
    measured: np.ndarray  # int [measurements], after how many steps
    on_test: np.ndarray  # float32 [measurements], normalised by the running statistics

    @property
    def num_nonfinite(self) -> dict[str, int]:
        """How many parameters, and how many running statistics, are NaN or Inf."""
        return {
            kind.__name__: sum(
                int(jnp.sum(~jnp.isfinite(leaf)))
                for leaf in jax.tree.leaves(nnx.state(self.model, kind))
            )
            for kind in (nnx.Param, nnx.BatchStat)
        }


class Row(NamedTuple):
    """A row of the table."""

    tx: optax.GradientTransformation
    bad_step: int | None = BAD_STEP
    keep_statistics: bool = False


def make_rows() -> dict[str, Row]:
    sgd = optax.with_extra_args_support(optax.sgd(0.05, momentum=0.9))  # to take value=
    return {
        "no bad batch": Row(sgd, bad_step=None),
        "no protection": Row(sgd),
        "og.stabilize": Row(og.stabilize(sgd)),
        WITH_SELECT: Row(og.stabilize(sgd), keep_statistics=True),
    }


def train(data: _demo.Dataset, row: Row, num_steps: int, bar: Progress) -> Run:
    model = ConvNet(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, row.tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    in_training, measured, on_test = [], [], []
    for step in range(num_steps):
        rows = rng.choice(len(data.train_labels), BATCH_SIZE, replace=False)
        images, labels = data.train_images[rows], data.train_labels[rows]
        if step == row.bad_step:
            images[0, 0] = np.nan
        right = train_step(model, optimizer, images, labels, keep_statistics=row.keep_statistics)
        in_training.append(right)
        if (step + 1) % MEASURE_EVERY == 0:
            measured.append(step + 1)
            on_test.append(evaluate(model, data.test_images, data.test_labels))
        bar.advance(bar.task_ids[0])
    in_training, on_test = jax.device_get((in_training, on_test))
    return Run(model, optimizer, np.array(in_training), np.array(measured), np.array(on_test))


def train_all(data: _demo.Dataset, num_steps: int, console: Console) -> dict[str, Run]:
    rows, runs = make_rows(), {}
    with Progress(console=console) as bar:
        bar.add_task("", total=len(rows) * num_steps)
        for name, row in rows.items():
            bar.update(bar.task_ids[0], description=name.ljust(max(map(len, rows))))
            runs[name] = train(data, row, num_steps, bar)
    return runs


def make_table(runs: dict[str, Run]) -> Table:
    table = Table(title=f"Accuracy, one NaN pixel in step {BAD_STEP + 1}", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in ("training %", "test %", "parameters", "statistics"):
        table.add_column(name, justify="right")
    for name, run in runs.items():
        accuracies = (run.in_training[-MEASURE_EVERY:].mean(), run.on_test[-1])
        cells = [f"{a:.1f}" if a > 20 else f"[red]{a:.1f}[/]" for a in accuracies]
        cells += ["[red]NaN[/]" if number else "finite" for number in run.num_nonfinite.values()]
        table.add_row(name, *cells)
    return table


LINES = {
    "no protection": {"color": _demo.VERMILION},
    WITH_SELECT: {"color": _demo.BLUE},
    "og.stabilize": {"color": _demo.ORANGE, "linestyle": (0, (4, 4))},  # on top of both
}


def plot(runs: dict[str, Run], path: Path) -> None:
    """Accuracy in training and in evaluation over the steps."""
    with _demo.figure_at(path, 8, 3.2) as figure:
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        for name, style in LINES.items():
            run = runs[name]
            blocks = np.median(run.in_training.reshape(-1, MEASURE_EVERY), axis=1)
            left.plot(run.measured, blocks, label=name, **style)
            right.plot(run.measured, run.on_test, **style)
        left.set(title="training batches", ylabel="accuracy %", ylim=(-2, 102))
        right.set(title="test digits (running statistics)")
        for axis in (left, right):
            axis.set_xlabel("step")
            label = {"label": "NaN pixel"} if axis is left else {}
            axis.axvline(BAD_STEP, color="#D4D4D4", linewidth=3, zorder=0, **label)
        figure.legend(loc="outside upper center", ncols=4)


class Results(NamedTuple):
    """What :func:`main` returns."""

    runs: dict[str, Run]
    explanation: str
    figure: Path


def main(argv: Sequence[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{NUM_STEPS_QUICK} steps instead of {NUM_STEPS}")
    add("--out", type=Path, default=Path(__file__).parent / "figures" / "batch_norm.png")
    args = parser.parse_args(argv)
    console = Console()
    runs = train_all(_demo.load_digits(), NUM_STEPS_QUICK if args.quick else NUM_STEPS, console)
    plot(runs, args.out)
    kept = runs[WITH_SELECT]
    og.check(kept.optimizer, nnx.state(kept.model, nnx.Param))  # raises if a guard gave up
    explanation = og.explain(kept.optimizer, nnx.state(kept.model, nnx.Param))
    console.print(make_table(runs))
    console.print(explanation, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nFigure: {args.out}", highlight=False, soft_wrap=True)
    return Results(runs, explanation, args.out)


if __name__ == "__main__":
    main()
