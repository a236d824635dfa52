"""Bad batches in the middle of training: what an optimizer makes of them, guarded and not.

A 64-128-64-10 network learns 8x8 digits with SGD and momentum, and every 20th batch is corrupted:
a NaN pixel, eight NaN batches in a row, one sample multiplied by a million, or random labels with
the loss multiplied by a thousand. Each row of the result is one way to protect the optimizer.

    python examples/mlp_digits.py
    python examples/mlp_digits.py --data DIR    # MNIST, Fashion-MNIST: a folder of IDX files

EXPECTED
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _demo import (
    BLUE,
    ORANGE,
    GREEN,
    VERMILION,
    Dataset,
    figure_style,
    load_digits,
    load_idx_folder,
    new_figure,
    save_figure,
)
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_guard as og

BATCH_SIZE = 64
FAULT_PERIOD = 20
DEFAULT_FIGURE = Path(__file__).parent / "figures" / "mlp_digits.png"


class MLP(nnx.Module):
    """Pixels, 128, 64, 10, with Flax's default initialisation."""

    def __init__(self, num_pixels: int, *, rngs: nnx.Rngs):
        self.hidden1 = nnx.Linear(num_pixels, 128, rngs=rngs)
        self.hidden2 = nnx.Linear(128, 64, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.output(nnx.relu(self.hidden2(nnx.relu(self.hidden1(images)))))


class Batch(NamedTuple):
    images: jax.Array
    labels: jax.Array
    loss_scale: jax.Array


class Fault(NamedTuple):
    """What happens to ``length`` batches in a row, every ``FAULT_PERIOD`` steps."""

    length: int
    corrupt: Callable[[Batch, jax.Array], Batch]  # (batch, random labels) -> batch


def _nan_pixel(batch: Batch, _) -> Batch:
    return batch._replace(images=batch.images.at[0, batch.images.shape[1] // 2].set(jnp.nan))


def _huge_sample(batch: Batch, _) -> Batch:
    return batch._replace(images=batch.images.at[0].multiply(1e6))


def _random_labels(batch: Batch, labels: jax.Array) -> Batch:
    return batch._replace(labels=labels, loss_scale=1000 * batch.loss_scale)


FAULTS = {
    "none": Fault(0, lambda batch, _: batch),
    "NaN pixel": Fault(1, _nan_pixel),
    "8 NaN batches": Fault(8, _nan_pixel),
    "sample ×1e6": Fault(1, _huge_sample),
    "random labels, loss ×1000": Fault(1, _random_labels),
}


def make_optimizers() -> dict[str, optax.GradientTransformation]:
    """The rows of the table: one optimizer, protected in different ways."""
    sgd = optax.sgd(0.05, momentum=0.9)
    return {
        "no protection": sgd,
        "optax.apply_if_finite(5)": optax.apply_if_finite(sgd, 5),
        "optax.zero_nans + clip_by_global_norm(1)": optax.chain(
            optax.zero_nans(), optax.clip_by_global_norm(1.0), sgd
        ),
        "og.stabilize: guard + clip_by_norm(1)": og.stabilize(sgd),
        "guard + clip_by_zscore()": og.stabilize(sgd, clip=og.clip_by_zscore()),
        "guard + clip_by_zscore(max_norm=1)": og.stabilize(
            sgd, clip=og.clip_by_zscore(max_norm=1.0)
        ),
        "guard + normalize_and_scale(1)": og.stabilize(sgd, clip=og.normalize_and_scale(1.0)),
    }


class Start(NamedTuple):
    """All that a seed decides: initial parameters, order of samples, labels for the label fault."""

    params: Any
    order: jax.Array  # int32 [steps, BATCH_SIZE]
    random_labels: jax.Array  # int32 [steps, BATCH_SIZE]


def start(seed: jax.Array, data: Dataset, epochs: int) -> Start:
    key = jax.random.key(seed)
    model = MLP(data.train_images.shape[1], rngs=nnx.Rngs(key))
    num_batches = len(data.train_labels) // BATCH_SIZE
    order = [
        jax.random.permutation(jax.random.fold_in(key, epoch), len(data.train_labels))
        for epoch in range(epochs)
    ]
    order = jnp.stack(order)[:, : num_batches * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    labels = jax.random.randint(jax.random.fold_in(key, epochs), order.shape, 0, 10)
    return Start(nnx.state(model, nnx.Param), order, labels)


class Run(NamedTuple):
    params: Any
    opt_state: Any
    loss: jax.Array  # float32 [steps]
    grad_norm: jax.Array  # float32 [steps]
    accuracy: jax.Array  # float32 [steps], NaN where it was not measured
    final_accuracy: jax.Array


def train(
    optimizer: optax.GradientTransformation,
    data: Dataset,
    begin: Start,
    fault: jax.Array,
    first_fault: jax.Array,
) -> Run:
    """One training run as a pure function; ``fault`` is a position in ``FAULTS``."""
    optimizer = optax.with_extra_args_support(optimizer)  # so that all of them accept value=
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: MLP(data.train_images.shape[1], rngs=nnx.Rngs(0))))
    num_steps = len(begin.order)
    measure_every = math.ceil(num_steps / 55)
    lengths = jnp.array([fault.length for fault in FAULTS.values()])
    corruptions = [fault.corrupt for fault in FAULTS.values()]

    def accuracy_of(params):
        logits = nnx.merge(graphdef, params)(data.test_images)
        return jnp.mean(logits.argmax(axis=-1) == data.test_labels)

    def step(carry, inputs):
        params, opt_state = carry
        step, rows, random_labels = inputs
        batch = Batch(data.train_images[rows], data.train_labels[rows], jnp.ones(()))
        since = step - first_fault
        is_faulty = (since >= 0) & (since % FAULT_PERIOD < lengths[fault])
        corrupted = jax.lax.switch(fault, corruptions, batch, random_labels)
        batch = og.select(is_faulty, corrupted, batch)

        def loss_fn(params):
            logits = nnx.merge(graphdef, params)(batch.images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return batch.loss_scale * losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        accuracy = jax.lax.cond(
            step % measure_every == 0, accuracy_of, lambda _: jnp.float32(jnp.nan), params
        )
        return (params, opt_state), (loss, optax.global_norm(grads), accuracy)

    carry = (begin.params, optimizer.init(begin.params))
    inputs = (jnp.arange(num_steps), begin.order, begin.random_labels)
    (params, opt_state), curves = jax.lax.scan(step, carry, inputs)
    return Run(params, opt_state, *curves, accuracy_of(params))


class Results(NamedTuple):
    """What :func:`main` returns; the first axis of an array is the fault, the second the seed."""

    accuracy: dict[str, np.ndarray]  # percent, float64 [faults, seeds]
    is_finite: dict[str, np.ndarray]  # of the parameters at the end, bool [faults, seeds]
    explanation: str
    figure: Path


def run_all(data: Dataset, *, seeds: int, epochs: int, first_fault: int) -> dict[str, Run]:
    """Every optimizer with every fault and seed; those two are vmapped into one call."""
    begin = jax.jit(jax.vmap(start, (0, None, None)), static_argnums=2)(
        jnp.arange(seeds), data, epochs
    )
    runs = {}
    for name, optimizer in track(make_optimizers().items(), "Training", console=Console()):
        over_seeds = jax.vmap(partial(train, optimizer), (None, 0, None, None))
        over_faults = jax.jit(jax.vmap(over_seeds, (None, None, 0, None)))
        result = over_faults(data, begin, jnp.arange(len(FAULTS)), first_fault)
        runs[name] = jax.device_get(result)
    return runs


def all_finite(params: Any) -> np.ndarray:
    """Which runs ended with finite parameters."""
    leaves = [np.isfinite(leaf).all(axis=tuple(range(2, leaf.ndim))) for leaf in jax.tree.leaves(params)]
    return np.all(leaves, axis=0)


def make_table(results: Results) -> Table:
    seeds = next(iter(results.accuracy.values())).shape[1]
    table = Table(title=f"Test accuracy %, median of {seeds} seeds (worst seed)")
    table.add_column("protection")
    for fault in FAULTS:
        table.add_column(fault, justify="right")
    for name, accuracy in results.accuracy.items():
        cells = []
        for values, is_finite in zip(accuracy, results.is_finite[name], strict=True):
            if np.mean(is_finite) < 0.5:
                cells.append("[bold red]dead[/]")
                continue
            color = "" if np.median(values) > 90 else "[red]"
            cells.append(f"{color}{np.median(values):.1f} ({values.min():.0f})")
        table.add_row(name, *cells)
    return table


SHOWN_FAULTS = ("8 NaN batches", "random labels, loss ×1000")
SHOWN_RUNS = {
    "no protection": dict(color=VERMILION, zorder=3),
    "optax.apply_if_finite(5)": dict(color=ORANGE, zorder=2),
    "optax.zero_nans + clip_by_global_norm(1)": dict(color=GREEN, linestyle="--", zorder=5),
    "og.stabilize: guard + clip_by_norm(1)": dict(color=BLUE, zorder=4),
}


def plot(runs: dict[str, Run], first_fault: int, path: Path) -> Path:
    """Test accuracy above, gradient norm below, for two of the faults."""
    with figure_style():
        figure = new_figure(8, 5)
        axes = figure.subplots(2, len(SHOWN_FAULTS), sharex=True, sharey="row")
        for column, name in enumerate(SHOWN_FAULTS):
            fault = list(FAULTS).index(name)
            for run_name, line_style in SHOWN_RUNS.items():
                run = runs[run_name]
                steps = np.arange(run.loss.shape[-1])
                accuracy = np.median(run.accuracy[fault], axis=0)
                measured = np.isfinite(accuracy)
                axes[0, column].plot(steps[measured], 100 * accuracy[measured], label=run_name, **line_style)
                norms = np.median(run.grad_norm[fault], axis=0)
                axes[1, column].plot(steps, np.where(np.isfinite(norms), norms, np.nan), **line_style)
            for axis in axes[:, column]:
                for s in range(first_fault, len(steps), FAULT_PERIOD):
                    axis.axvspan(s - 0.5, s + FAULTS[name].length - 0.5, color="#DDDDDD", zorder=0, linewidth=0)
            axes[0, column].set_title(f"{name}, every {FAULT_PERIOD} steps")
            axes[1, column].set_yscale("log")
            axes[1, column].set_xlabel("step")
        axes[0, 0].set_ylabel("test accuracy %")
        axes[1, 0].set_ylabel("gradient norm")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2)
        return save_figure(figure, path)


def main(argv=None):
    data = jax.tree.map(jnp.asarray, load_digits())
    runs = run_all(data, seeds=5, epochs=10, first_fault=20)
    import pickle; pickle.dump(runs, open('/tmp/runs.pkl','wb'))
    r = Results({k: 100*v.final_accuracy for k,v in runs.items()}, {k: all_finite(v.params) for k,v in runs.items()}, "", None)
    Console().print(make_table(r))
    plot(runs, 20, DEFAULT_FIGURE)

if __name__ == "__main__":
    main()
