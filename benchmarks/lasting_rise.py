"""Norms that rise for good reasons, and stay: does a limit learnt before stop the training?

    python -m benchmarks.lasting_rise          # 4 minutes on two cores
    python -m benchmarks.lasting_rise --quick

Six runs in which gradients grow and are right to. Reported is the loss at the end (mean over the
last steps and the seeds; lower is better):

- second loss: a classifier's loss is switched on at a tenth of the steps, beside one that was a
  thousandth of its size (SGD 0.1, momentum 0.9);
- saddle: four linear layers begin near zero, where gradients are tiny, and leave it (SGD);
- unfreezing: the hidden layers of a network begin to learn at a quarter of the steps (SGD 0.1);
- curriculum: two kinds of digits for a quarter of the steps, then all ten (SGD 0.1);
- warm restarts: the learning rate falls to zero and is raised again, four times (SGD, momentum);
- recurrent: a network that sums up its inputs, whose sequences grow from 5 to 40 (SGD, momentum).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from benchmarks import _trials
from benchmarks._rules import RULES, Rule, _demo

LAST = 20  # steps whose losses are averaged
METHODS = {**_trials.RIVALS, "clip_by_median": _trials.guarded(RULES["clip_by_median"])}


class Task(NamedTuple):
    """A loss of parameters, step and key, told how many steps there are."""

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, jax.Array, jax.Array, int], jax.Array]
    optimizer: Callable[[int], optax.GradientTransformation]
    num_steps: int


def _dense(key: jax.Array, sizes: Sequence[int], gain: float = 1.0) -> list[jax.Array]:
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [gain * jax.random.normal(k, (a, b)) * a**-0.5 for k, a, b in pairs]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


_INPUTS = np.random.default_rng(0).normal(size=(256, 32)).astype(np.float32)


def _second_loss() -> Task:
    labels = jnp.argmax(_INPUTS[:, :10], -1)

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "encoder": jax.random.normal(keys[0], (32, 16)) / 6,
            "decoder": jax.random.normal(keys[1], (16, 32)) / 4,
            "head": jax.random.normal(keys[2], (16, 10)) / 4,
        }

    def loss(params, step, key, num_steps):
        del key
        hidden = jnp.tanh(_INPUTS @ params["encoder"])
        is_on = step >= num_steps // 10
        first = 1e-3 * jnp.mean((hidden @ params["decoder"] - _INPUTS) ** 2)
        second = _cross_entropy(hidden @ params["head"], labels)
        return first + jnp.where(is_on, 1.0, 0.0) * second

    return Task(init, loss, lambda _: optax.sgd(0.1, momentum=0.9), 3000)


def _saddle() -> Task:
    inputs = _INPUTS[:, :16]
    target = inputs @ np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]

    def loss(params, step, key, num_steps):
        del step, key, num_steps
        outputs = jnp.asarray(inputs)
        for layer in params:
            outputs = outputs @ layer
        return jnp.mean((outputs - target) ** 2)

    return Task(lambda key: _dense(key, [16] * 5, 0.3), loss, lambda _: optax.sgd(0.5), 3000)


def _digits(optimizer: Callable[[int], Any], *, unfreezes: bool, grows: bool) -> Task:
    data = _demo.load_digits()
    easy = np.flatnonzero(data.train_labels < 2)
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)

    def loss(params, step, key, num_steps):
        is_late = step >= num_steps // 4
        rows = jax.random.randint(key, (64,), 0, len(labels))
        if grows:
            few = jnp.asarray(easy)[rows % len(easy)]
            rows = jnp.where(is_late, rows, few)
        *hidden, last = params
        if unfreezes:
            hidden = [jnp.where(is_late, w, jax.lax.stop_gradient(w)) for w in hidden]
        outputs = images[rows]
        for layer in hidden:
            outputs = jax.nn.relu(outputs @ layer)
        return _cross_entropy(outputs @ last, labels[rows])

    init = partial(_dense, sizes=[64, 128, 64, 10], gain=1.4)
    return Task(init, loss, optimizer, 1200)


def _restarts(num_steps: int) -> optax.GradientTransformation:
    length = max(1, num_steps // 4)
    return optax.sgd(
        lambda count: 0.1 * 0.5 * (1 + jnp.cos(jnp.pi * (count % length) / length)), momentum=0.9
    )


def _recurrent() -> Task:
    width, longest = 32, 40

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "input": 0.5 * jax.random.normal(keys[0], (2, width)),
            "recurrent": 0.9 * jax.random.orthogonal(keys[1], width),
            "output": jax.random.normal(keys[2], (width, 1)) * width**-0.5,
        }

    def loss(params, step, key, num_steps):
        length = 5 + (longest - 5) * jnp.minimum(1.0, 2 * step / num_steps)
        keys = jax.random.split(key)
        values = jax.random.uniform(keys[0], (32, longest))
        marks = jax.random.bernoulli(keys[1], 0.2, (32, longest)).astype(jnp.float32)
        is_used = jnp.arange(longest) < length
        targets = jnp.sum(values * marks * is_used, axis=1, keepdims=True)
        inputs = jnp.stack([values, marks], -1).swapaxes(0, 1)

        def cell(hidden, given):
            x, used = given
            new = jax.nn.relu(x @ params["input"] + hidden @ params["recurrent"])
            return jnp.where(used, new, hidden), None

        hidden, _ = jax.lax.scan(cell, jnp.zeros((32, width)), (inputs, is_used))
        return jnp.mean((hidden @ params["output"] - targets) ** 2)

    return Task(init, loss, lambda _: optax.sgd(0.0003, momentum=0.9), 2000)


CASES: dict[str, Callable[[], Task]] = {
    "second loss": _second_loss,
    "saddle": _saddle,
    "unfreezing": partial(_digits, lambda _: optax.sgd(0.1), unfreezes=True, grows=False),
    "curriculum": partial(_digits, lambda _: optax.sgd(0.1), unfreezes=False, grows=True),
    "warm restarts": partial(_digits, _restarts, unfreezes=False, grows=False),
    "recurrent": _recurrent,
}


def last_loss(task: Task, rule: Rule, num_steps: int, seed: jax.Array) -> tuple[Any, Any]:
    """Loss over the last steps, and the largest share of 100 steps in a row that was cut."""
    optimizer = optax.with_extra_args_support(rule(task.optimizer(num_steps)))
    init_key, key = jax.random.split(jax.random.key(seed))
    params = task.init(init_key)

    def step(carry, index):
        params, state = carry
        loss_fn = partial(task.loss, step=index, key=jax.random.fold_in(key, index))
        loss, grads = jax.value_and_grad(partial(loss_fn, num_steps=num_steps))(params)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), (loss, clip_rate(state))

    carry = (params, optimizer.init(params))
    _, (losses, rates) = jax.lax.scan(step, carry, jnp.arange(num_steps))
    return losses[-LAST:].mean(), rates[100:].max(initial=0)


def last_losses(task: Task, rule: Rule, num_steps: int, seeds: np.ndarray) -> tuple[Any, Any]:
    """The same for all seeds."""
    return jax.jit(jax.vmap(partial(last_loss, task, rule, num_steps)))(jnp.asarray(seeds))


def clip_rate(state: Any) -> jax.Array:
    """Share of about the last 100 steps that were cut, as `og.metrics` has it."""
    try:
        found = og.metrics(state)
    except ValueError:
        return jnp.zeros(())
    rates = [value for key, value in found.items() if key.endswith("recent_clip_rate")]
    return rates[0] if rates else jnp.zeros(())


def make_trials(arguments: argparse.Namespace) -> list[_trials.Trial]:
    def run(case, rule):
        task = CASES[case]()
        num_steps = 60 if arguments.quick else task.num_steps
        return last_losses(task, METHODS[rule], num_steps, _trials.seeds_of(arguments))[0]

    cases = arguments.cases or list(CASES)
    rules = arguments.rules or list(_trials.QUICK if arguments.quick else METHODS)
    return [_trials.Trial(c, r, partial(run, c, r)) for c in cases for r in rules]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _trials.parse(_trials.parser("lasting_rise", __doc__, list(CASES), seeds=4), argv)
    cells = _trials.run_trials("lasting_rise", arguments, make_trials(arguments))
    print(_trials.to_markdown(cells))
    return cells


if __name__ == "__main__":
    main()
