"""Everything that happened in a run, on disk and in a picture: og.History on a run full of faults.

    python examples/history_digits.py                                    # 10 seconds of CPU time
    python -m optax_guard examples/outputs/history_digits.jsonl          # the same picture again

A 64-128-64-10 network learns 8x8 digits by SGD with momentum inside `og.stabilize`, while four
things go wrong: a NaN pixel in every 60th batch, eight NaN batches in a row from step 150, random
labels at 1000 times the loss from step 250 to 254, and an overflow in the gradient of one layer
from step 330 to 332. Expected: 98.9 % of the test digits right, 18 steps skipped. The picture shows
where each fault was seen: the random labels as a spike of the norm, next to nothing of which is
left after the clip, the overflow in hidden2/kernel alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import _demo
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from mlp_digits import MLP
from rich.console import Console
from rich.progress import track

import optax_guard as og

BATCH_SIZE, NUM_STEPS, NUM_STEPS_QUICK = 64, 440, 340
HERE = Path(__file__).parent


def is_nan_batch(step: int) -> bool:
    return step % 60 == 59 or 150 <= step < 158


def has_random_labels(step: int) -> bool:
    return 250 <= step < 255


def is_overflow(step: int) -> bool:
    return 330 <= step < 333


class Results(NamedTuple):
    """What :func:`main` returns."""

    accuracy: float  # percent
    history: og.History
    explanation: str
    figure: Path


@nnx.jit
def train_step(model, optimizer, images, labels, loss_scale, overflow):
    def loss_fn(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return loss_scale * losses.mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    grads["hidden2"]["kernel"][...] += overflow  # 0 or Inf
    optimizer.update(model, grads, value=loss)
    return loss


def train(data: _demo.Dataset, num_steps: int, path: Path, console: Console) -> Results:
    model = MLP(data.train_images.shape[1], rngs=nnx.Rngs(0))
    tx = og.stabilize(optax.sgd(0.05, momentum=0.9))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    params = nnx.state(model, nnx.Param)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a file that is there would be continued
    with og.History(path, params=params) as history:
        for step in track(range(num_steps), "Training", console=console):
            rows = rng.choice(len(data.train_labels), BATCH_SIZE, replace=False)
            images, labels = data.train_images[rows], data.train_labels[rows]
            if is_nan_batch(step):
                images[0, 0] = np.nan
            if has_random_labels(step):
                labels = rng.integers(0, 10, BATCH_SIZE, np.int32)
            loss_scale = jnp.float32(1000 if has_random_labels(step) else 1)
            overflow = jnp.float32(jnp.inf if is_overflow(step) else 0)
            loss = train_step(model, optimizer, images, labels, loss_scale, overflow)
            history.append(step, optimizer, loss=loss)
            if step % 100 == 99:
                og.check(optimizer, params)  # raises after too many bad steps in a row
    accuracy = 100 * np.mean(model(data.test_images).argmax(axis=-1) == data.test_labels)
    return Results(float(accuracy), history, og.explain(optimizer, params), path)


def main(argv: Sequence[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{NUM_STEPS_QUICK} steps instead of {NUM_STEPS}")
    add("--record", type=Path, default=HERE / "outputs" / "history_digits.jsonl")
    add("--out", type=Path, default=HERE / "figures" / "history_digits.png")
    args = parser.parse_args(argv)
    console = Console()
    num_steps = NUM_STEPS_QUICK if args.quick else NUM_STEPS
    results = train(_demo.load_digits(), num_steps, args.record, console)
    results = results._replace(figure=results.history.plot(args.out))
    show = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    show(results.history.summary())
    show(results.explanation)
    show(f"Test accuracy: {results.accuracy:.1f} %. Record: {args.record}, figure: {args.out}")
    return results


if __name__ == "__main__":
    main()
