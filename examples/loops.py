"""The same guarded training in four kinds of loop: plain Optax, Flax NNX, Flax Linen, Equinox.

    python examples/loops.py    # 15 seconds of CPU time

Each function below is a whole training loop to copy from. What the guard needs is little: the
optimizer inside of `og.stabilize`, and `value=loss` on the way to its `update`, so that a NaN loss
is seen even if the gradients are finite. A 64-128-10 network learns 8x8 digits; the 15th batch
holds a NaN pixel. Expected, in per cent of the test digits (the initial parameters differ):

                     test %    skipped
    plain Optax        99.2          1
    Flax NNX           98.3          1
    Flax Linen         98.3          1
    Equinox            97.2          1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import _demo
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from flax.training.train_state import TrainState
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_guard as og

BATCH_SIZE, NUM_STEPS, NUM_STEPS_QUICK, BAD_STEP = 64, 220, 66, 14


class Result(NamedTuple):
    """What a loop leaves behind; ``state`` is whatever holds the optimizer state."""

    predict: Callable[[jax.Array], jax.Array]  # images -> logits
    params: Any
    state: Any


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_optimizer() -> optax.GradientTransformationExtraArgs:
    return og.stabilize(optax.sgd(0.05, momentum=0.9))


def plain_optax(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> Result:
    keys = jax.random.split(jax.random.key(0))
    params = {
        "hidden": jax.random.normal(keys[0], (64, 128)) / 8,
        "hidden_bias": jnp.zeros(128),
        "output": jax.random.normal(keys[1], (128, 10)) / 128**0.5,
        "output_bias": jnp.zeros(10),
    }
    tx = make_optimizer()
    opt_state = tx.init(params)

    def predict(params, images):
        hidden = jax.nn.relu(images @ params["hidden"] + params["hidden_bias"])
        return hidden @ params["output"] + params["output_bias"]

    @jax.jit
    def train_step(params, opt_state, images, labels):
        loss, grads = jax.value_and_grad(lambda p: loss_of(predict(p, images), labels))(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state

    for step, (images, labels) in enumerate(batches):
        params, opt_state = train_step(params, opt_state, images, labels)
        if step % 50 == 0:
            og.check(opt_state, params)  # raises after too many bad steps in a row
    return Result(lambda images: predict(params, images), params, opt_state)


def flax_nnx(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> Result:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 10, rngs=rngs))
    optimizer = nnx.Optimizer(model, make_optimizer(), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, images, labels):
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m(images), labels))(model)
        optimizer.update(model, grads, value=loss)  # extra arguments go on to the guard

    for step, (images, labels) in enumerate(batches):
        train_step(model, optimizer, images, labels)
        if step % 50 == 0:
            og.check(optimizer, nnx.state(model, nnx.Param))
    return Result(model, nnx.state(model, nnx.Param), optimizer)


def flax_linen(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> Result:
    net = linen.Sequential([linen.Dense(128), linen.relu, linen.Dense(10)])
    params = net.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=make_optimizer())

    @jax.jit
    def train_step(state, images, labels):
        def loss_fn(params):
            return loss_of(state.apply_fn({"params": params}, images), labels)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        # `state.apply_gradients(grads=grads)` would do, but it cannot take the loss along.
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    for step, (images, labels) in enumerate(batches):
        state = train_step(state, images, labels)
        if step % 50 == 0:
            og.check(state, state.params)
    return Result(lambda images: net.apply({"params": state.params}, images), state.params, state)


def equinox(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> Result:
    model = eqx.nn.MLP(64, 10, width_size=128, depth=1, key=jax.random.key(0))
    tx = make_optimizer()
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(model, opt_state, images, labels):
        loss, grads = eqx.filter_value_and_grad(lambda m: loss_of(jax.vmap(m)(images), labels))(
            model
        )
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return eqx.apply_updates(model, updates), opt_state

    for step, (images, labels) in enumerate(batches):
        model, opt_state = train_step(model, opt_state, images, labels)
        if step % 50 == 0:
            og.check(opt_state, eqx.filter(model, eqx.is_inexact_array))
    return Result(jax.vmap(model), eqx.filter(model, eqx.is_inexact_array), opt_state)


LOOPS = {
    "plain Optax": plain_optax,
    "Flax NNX": flax_nnx,
    "Flax Linen": flax_linen,
    "Equinox": equinox,
}


def make_batches(data: _demo.Dataset, num_steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for step in range(num_steps):
        rows = rng.choice(len(data.train_labels), BATCH_SIZE, replace=False)
        images = data.train_images[rows]
        if step == BAD_STEP:
            images[0, 0] = np.nan
        yield images, data.train_labels[rows]


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, Result]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help=f"{NUM_STEPS_QUICK} steps instead of {NUM_STEPS}"
    )
    num_steps = NUM_STEPS_QUICK if parser.parse_args(argv).quick else NUM_STEPS
    data, console = _demo.load_digits(), Console()
    table = Table(title=f"A NaN pixel in step {BAD_STEP + 1}", box=box.SIMPLE_HEAD)
    for name in ("", "test %", "skipped", "leaves that went bad"):
        table.add_column(name)
    results = {}
    for name, loop in track(LOOPS.items(), "Training", console=console):
        result = loop(make_batches(data, num_steps))
        is_right = result.predict(data.test_images).argmax(axis=-1) == data.test_labels
        accuracy = 100 * float(np.mean(is_right))
        results[name] = (accuracy, result)
        skipped = int(og.metrics(result.state)["guard/skipped_total"])
        bad = og.explain(result.state, result.params).splitlines()[1].strip()
        table.add_row(name, f"{accuracy:.1f}", str(skipped), bad.removeprefix("non-finite: "))
    console.print(table)
    return results


if __name__ == "__main__":
    main()
