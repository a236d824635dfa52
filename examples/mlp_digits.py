"""Bad batches in the middle of training: what becomes of a run, guarded and not.

    python examples/mlp_digits.py                # about 20 seconds on two CPU cores
    python examples/mlp_digits.py --data DIR     # MNIST or Fashion-MNIST from IDX files: minutes

A 64-128-64-10 network learns 8x8 digits by SGD with momentum. From step 20 on, every 20th batch
goes wrong in one of four ways. "clip 1" limits the global norm of the gradients to 1; "dead" means
that the parameters are NaN. Expected, in per cent of the test digits, median of 5 seeds and worst:

                              no fault  NaN pixel   8 NaN    sample  random labels,
                                                   batches    ×1e6     loss ×1000
    no protection             98.1 (97)   dead       dead    8.3 (8)    7.8 (8)
    optax.apply_if_finite(5)  98.1 (97) 98.3 (96)    dead    8.3 (8)    7.8 (8)
    optax.zero_nans + clip 1  97.8 (97) 98.1 (97) 96.7 (96) 97.8 (97)  98.1 (98)
    og.stabilize              98.1 (97) 98.3 (96) 97.2 (95) 98.1 (97)  98.3 (97)
    og.guard + z-score        97.8 (97) 98.3 (97) 97.2 (97) 97.8 (8)    8.9 (8)
    og.guard + z-score, ≤ 1   97.8 (97) 98.1 (97) 96.9 (96) 97.8 (97)  98.1 (98)
    og.guard + normalize to 1 96.9 (95) 97.5 (96) 97.2 (96) 97.5 (95)  97.5 (96)

To be read with the rivals in mind. Two lines of Optax, `zero_nans` and `clip_by_global_norm(1)`,
survive all this nearly as well as `og.stabilize`; they do not say that anything happened, or where.
`apply_if_finite` accepts the sixth NaN in a row. A guard alone does not stop finite faults: the
z-score rule is still warming up at step 20 and has no limit until that is over. A huge sample
hurts only if the network has it wrong at the time, so that some unprotected seeds escape.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _demo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_guard as og

BATCH_SIZE = 64
FAULT_PERIOD = 20
STABILIZED = "og.stabilize"


class MLP(nnx.Module):
    """Pixels, 128, 64, 10, with Flax's default initialisation."""

    def __init__(self, num_pixels: int, *, rngs: nnx.Rngs):
        self.hidden1 = nnx.Linear(num_pixels, 128, rngs=rngs)
        self.hidden2 = nnx.Linear(128, 64, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.output(nnx.relu(self.hidden2(nnx.relu(self.hidden1(images)))))


def make_optimizers() -> dict[str, optax.GradientTransformation]:
    """The rows of the table: one optimizer, protected in different ways."""
    sgd = optax.sgd(0.05, momentum=0.9)
    zero_nans_and_clip = (optax.zero_nans(), optax.clip_by_global_norm(1.0))
    capped_zscore = og.clip_by_zscore(2.5, max_norm=1.0)
    return {
        "no protection": sgd,
        "optax.apply_if_finite(5)": optax.apply_if_finite(sgd, 5),
        "optax.zero_nans + clip 1": optax.chain(*zero_nans_and_clip, sgd),
        STABILIZED: og.stabilize(sgd),
        "og.guard + z-score": og.guard(optax.chain(og.clip_by_zscore(2.5), sgd)),
        "og.guard + z-score, ≤ 1": og.guard(optax.chain(capped_zscore, sgd)),
        "og.guard + normalize to 1": og.guard(optax.chain(og.normalize_and_scale(1.0), sgd)),
    }


class Batch(NamedTuple):
    images: jax.Array
    labels: jax.Array
    loss_scale: jax.Array


class Fault(NamedTuple):
    """What happens to ``length`` batches in a row, every ``FAULT_PERIOD`` steps."""

    length: int
    corrupt: Callable[[Batch, jax.Array], Batch]  # (batch, random labels) -> batch


def _nan_pixel(batch, _):
    return batch._replace(images=batch.images.at[0, batch.images.shape[1] // 2].set(jnp.nan))


def _huge_sample(batch, _):
    return batch._replace(images=batch.images.at[0].multiply(1e6))


def _random_labels(batch, random_labels):
    return batch._replace(labels=random_labels, loss_scale=1000 * batch.loss_scale)


FAULTS = {
    "no fault": Fault(0, lambda batch, _: batch),
    "NaN pixel": Fault(1, _nan_pixel),
    "8 NaN batches": Fault(8, _nan_pixel),
    "sample ×1e6": Fault(1, _huge_sample),
    "random labels, loss ×1000": Fault(1, _random_labels),
}


def corrupt(batch: Batch, random_labels: jax.Array, fault: jax.Array, since_first: jax.Array):
    """The batch, corrupted if it is its turn; ``fault`` is a position in ``FAULTS``."""
    lengths = jnp.array([fault.length for fault in FAULTS.values()])
    is_due = (since_first >= 0) & (since_first % FAULT_PERIOD < lengths[fault])
    branches = [fault.corrupt for fault in FAULTS.values()]
    return jax.lax.switch(jnp.where(is_due, fault, 0), branches, batch, random_labels)


class Start(NamedTuple):
    """What a seed decides: initial parameters, order of the samples, labels of the last fault."""

    params: Any
    order: jax.Array  # int32 [steps, BATCH_SIZE]
    random_labels: jax.Array  # int32 [steps, BATCH_SIZE]


def make_start(seed: jax.Array, data: _demo.Dataset, epochs: int) -> Start:
    key = jax.random.key(seed)
    model = MLP(data.train_images.shape[1], rngs=nnx.Rngs(key))
    keys = jax.random.split(jax.random.fold_in(key, 1), epochs)
    order = jax.lax.map(lambda key: jax.random.permutation(key, len(data.train_labels)), keys)
    used = len(data.train_labels) // BATCH_SIZE * BATCH_SIZE
    order = order[:, :used].reshape(-1, BATCH_SIZE)
    random_labels = jax.random.randint(jax.random.fold_in(key, 2), order.shape, 0, 10)
    return Start(nnx.state(model, nnx.Param), order, random_labels)


class Run(NamedTuple):
    """One training run; with all faults and seeds, each array has two axes in front."""

    params: Any
    opt_state: Any
    grad_norm: jax.Array  # float32 [steps]
    accuracy: jax.Array  # float32 [steps], percent; NaN where it was not measured
    final_accuracy: jax.Array  # float32, percent
    is_alive: jax.Array  # bool, whether the parameters are finite at the end


def train(
    optimizer: optax.GradientTransformation,
    data: _demo.Dataset,
    start: Start,
    fault: jax.Array,
    first_fault: jax.Array,
) -> Run:
    """One training run as a pure function."""
    optimizer = optax.with_extra_args_support(optimizer)  # so that all of them take value=
    model = nnx.eval_shape(lambda: MLP(data.train_images.shape[1], rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(model)
    num_steps = len(start.order)
    measure_every = math.ceil(num_steps / 55)

    def loss_fn(params, batch):
        logits = nnx.merge(graphdef, params)(batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return batch.loss_scale * losses.mean()

    def accuracy_of(params):
        logits = nnx.merge(graphdef, params)(data.test_images)
        return 100 * jnp.mean(logits.argmax(axis=-1) == data.test_labels)

    def train_step(carry, inputs):
        params, opt_state = carry
        step, rows, random_labels = inputs
        batch = Batch(data.train_images[rows], data.train_labels[rows], jnp.ones(()))
        batch = corrupt(batch, random_labels, fault, step - first_fault)
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        is_measured = step % measure_every == 0
        accuracy = jax.lax.cond(is_measured, accuracy_of, lambda _: jnp.float32(jnp.nan), params)
        return (params, opt_state), (optax.global_norm(grads), accuracy)

    carry = (start.params, optimizer.init(start.params))
    inputs = (jnp.arange(num_steps), start.order, start.random_labels)
    (params, opt_state), (grad_norm, accuracy) = jax.lax.scan(train_step, carry, inputs)
    is_alive = jnp.isfinite(optax.global_norm(params))
    return Run(params, opt_state, grad_norm, accuracy, accuracy_of(params), is_alive)


def train_all(
    data: _demo.Dataset, *, seeds: int, epochs: int, first_fault: int, console: Console
) -> dict[str, Run]:
    """Every optimizer, and for each of them all faults and seeds at once."""
    data = jax.tree.map(jnp.asarray, data)
    make_starts = jax.jit(jax.vmap(make_start, (0, None, None)), static_argnums=2)
    starts = make_starts(jnp.arange(seeds), data, epochs)
    runs = {}
    for name, optimizer in track(make_optimizers().items(), "Training", console=console):
        over_seeds = jax.vmap(partial(train, optimizer), (None, 0, None, None))
        over_faults = jax.jit(jax.vmap(over_seeds, (None, None, 0, None)))
        runs[name] = jax.device_get(over_faults(data, starts, jnp.arange(len(FAULTS)), first_fault))
    return runs


class Results(NamedTuple):
    """What :func:`main` returns; arrays are ``[faults, seeds]``."""

    accuracy: dict[str, np.ndarray]  # percent
    is_alive: dict[str, np.ndarray]  # whether the parameters are finite at the end
    explanation: str
    figure: Path


def explain_last_fault(run: Run) -> str:
    """The last NaN batch of the first seed, as the optimizer state tells it."""
    index = (list(FAULTS).index("NaN pixel"), 0)
    opt_state, params = jax.tree.map(lambda leaf: leaf[index], (run.opt_state, run.params))
    return og.explain(opt_state, params)


def make_table(results: Results) -> Table:
    seeds = results.accuracy[STABILIZED].shape[1]
    title = f"Test accuracy %, median of {seeds} seeds (worst seed)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for name in FAULTS:
        table.add_column(name, justify="right", min_width=9)
    for name, of_faults in results.accuracy.items():
        cells = []
        for accuracy, is_alive in zip(of_faults, results.is_alive[name], strict=True):
            text = f"{np.median(accuracy):.1f} ({accuracy.min():.0f})"
            is_dead = np.mean(is_alive) < 0.5
            is_lost = is_dead or accuracy.min() < 0.5 * of_faults[0].min()
            cells.append(f"[red]{'dead' if is_dead else text}[/]" if is_lost else text)
        table.add_row(name, *cells)
    return table


SHOWN_FAULTS = ("8 NaN batches", "random labels, loss ×1000")
LINES = {
    "no protection": {"color": _demo.VERMILION},
    "optax.apply_if_finite(5)": {"color": _demo.ORANGE, "linestyle": (0, (4, 4))},
    STABILIZED: {"color": _demo.BLUE},
    "optax.zero_nans + clip 1": {"color": _demo.GREEN, "linestyle": (0, (2, 5))},
}


def plot(runs: dict[str, Run], first_fault: int, path: Path) -> None:
    """Test accuracy above, gradient norm below, for two of the faults; medians over seeds."""
    with _demo.figure_at(path, 8, 4.8) as figure:
        axes = figure.subplots(2, len(SHOWN_FAULTS), sharex=True, sharey="row")
        for (above, below), fault in zip(axes.T, SHOWN_FAULTS, strict=True):
            above.set_title(f"{fault}, every {FAULT_PERIOD} steps")
            below.set(xlabel="step", yscale="log")
            for name, style in LINES.items():
                plot_run(above, below, runs[name], fault, style | {"label": name})
            for begin in range(first_fault, runs[STABILIZED].accuracy.shape[-1], FAULT_PERIOD):
                end = begin + FAULTS[fault].length
                for axis in (above, below):
                    axis.axvspan(begin, end, color="#D4D4D4", linewidth=0, label="bad batches")
        axes[0, 0].set(ylabel="test accuracy %", ylim=(0, 102))
        axes[1, 0].set(ylabel="gradient norm")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=3)


def plot_run(above: Axes, below: Axes, run: Run, fault: str, style: dict[str, Any]) -> None:
    index = list(FAULTS).index(fault)
    accuracy = np.median(run.accuracy[index], axis=0)
    measured = np.flatnonzero(np.isfinite(accuracy))
    above.plot(measured, accuracy[measured], **style)
    norm = np.median(run.grad_norm[index], axis=0)
    norm[~np.isfinite(norm)] = np.nan
    below.plot(norm, **style)
    if np.mean(run.is_alive[index]) < 0.5 and np.isfinite(norm).any():
        last = np.flatnonzero(np.isfinite(norm))[-1]
        below.plot(last, norm[last], "x", color=style["color"], markersize=8, markeredgewidth=2)
        if not below.texts:
            place = {"xy": (last, norm[last]), "xytext": (12, 45), "textcoords": "offset points"}
            below.annotate("NaN from here on", **place, arrowprops={"arrowstyle": "-"})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="2 seeds, 4 epochs: a few seconds")
    add("--seeds", type=int, help="default 5")
    add("--epochs", type=int, help="default 10, with --data 1")
    add("--first-fault", type=int, default=20, help="step of the first bad batch, from 0")
    add("--data", type=Path, help="folder with the four IDX files of MNIST or Fashion-MNIST")
    add("--out", type=Path, default=Path(__file__).parent / "figures" / "mlp_digits.png")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (2 if args.quick else 5)
    args.epochs = args.epochs or (1 if args.data else 4 if args.quick else 10)
    return args


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse(argv)
    console = Console()
    data = _demo.load_idx_folder(args.data) if args.data else _demo.load_digits()
    runs = train_all(
        data, seeds=args.seeds, epochs=args.epochs, first_fault=args.first_fault, console=console
    )
    plot(runs, args.first_fault, args.out)
    results = Results(
        accuracy={name: run.final_accuracy for name, run in runs.items()},
        is_alive={name: run.is_alive for name, run in runs.items()},
        explanation=explain_last_fault(runs[STABILIZED]),
        figure=args.out,
    )
    console.print(make_table(results))
    console.print("og.explain, after the run of og.stabilize with NaN pixels:", style="bold")
    console.print(results.explanation, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nFigure: {results.figure}", highlight=False, soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
