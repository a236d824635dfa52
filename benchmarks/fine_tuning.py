"""Fine-tuning: low-rank adapters, one layer unfrozen, all layers at a tenth of the rate.

    python -m benchmarks.fine_tuning            # 3 minutes on two cores
    python -m benchmarks.fine_tuning --quick

A 64-128-64-10 network has learnt 8x8 digits and goes on with the same digits turned by a quarter:
with adapters of rank 4 and 8 whose second factor is zero at first, as it should be (Hu et al.
2021), with the last layer alone, and with all layers at a tenth of the rate. Healthy, with one
batch that holds a NaN, and with one whose gradients are a million times as long, both at a tenth
of the steps. Reported is the loss over the training digits at the end, mean of the seeds.

Reference: Hu et al., LoRA: Low-rank adaptation of large language models, 2021,
https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _trials
from benchmarks._rules import Rule, _demo

SIZES, BATCH_SIZE = (64, 128, 64, 10), 64
NUM_STEPS, NUM_STEPS_QUICK, PRETRAINING = 400, 20, 400
FAULTS = {"healthy": 1.0, "one NaN batch": jnp.nan, "one batch ×1e6": 1e6}


class Tuning(NamedTuple):
    """What is trained: parameters made of a key and the weights, and weights made of both."""

    init: Callable[[jax.Array, list[jax.Array]], Any]
    weights: Callable[[list[jax.Array], Any], list[jax.Array]]
    optimizer: optax.GradientTransformation


def _adapters(rank: int, optimizer: optax.GradientTransformation) -> Tuning:
    def init(key, weights):
        keys = jax.random.split(key, len(weights))
        return [
            {
                "a": jax.random.normal(k, (len(w), rank)) * len(w) ** -0.5,
                "b": jnp.zeros((rank, w.shape[1])),
            }
            for k, w in zip(keys, weights, strict=True)
        ]

    def combine(weights, params):
        return [w + p["a"] @ p["b"] for w, p in zip(weights, params, strict=True)]

    return Tuning(init, combine, optimizer)


def _last_layer(optimizer: optax.GradientTransformation) -> Tuning:
    """All layers are parameters, and all but the last are frozen inside the optimizer."""
    labels = ["frozen"] * (len(SIZES) - 2) + ["tuned"]
    parts = {"frozen": optax.set_to_zero(), "tuned": optimizer}
    return Tuning(lambda _, weights: weights, lambda _, p: p, optax.partition(parts, labels))


CASES: dict[str, Callable[[], Tuning]] = {
    "rank 4, adam": lambda: _adapters(4, optax.adam(1e-2)),
    "rank 8, adam": lambda: _adapters(8, optax.adam(1e-2)),
    "rank 8, sgd": lambda: _adapters(8, optax.sgd(0.3)),
    "last layer, sgd": lambda: _last_layer(optax.sgd(0.1)),
    "all at a tenth, sgd": lambda: Tuning(lambda _, w: w, lambda _, p: p, optax.sgd(0.01, 0.9)),
    "all at a tenth, adam": lambda: Tuning(lambda _, w: w, lambda _, p: p, optax.adam(2e-4)),
}


def loss_of(weights: list[jax.Array], images: jax.Array, labels: jax.Array) -> jax.Array:
    *hidden, last = weights
    for layer in hidden:
        images = jax.nn.relu(images @ layer)
    return optax.softmax_cross_entropy_with_integer_labels(images @ last, labels).mean()


def pretrain(key: jax.Array, images: jax.Array, labels: jax.Array) -> list[jax.Array]:
    keys = jax.random.split(key, len(SIZES))
    shapes = zip(keys, SIZES[:-1], SIZES[1:], strict=False)
    weights = [jax.random.normal(k, (a, b)) * (2 / a) ** 0.5 for k, a, b in shapes]
    optimizer = optax.adam(2e-3)

    def step(carry, key):
        weights, state = carry
        rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(labels))
        grads = jax.grad(loss_of)(weights, images[rows], labels[rows])
        updates, state = optimizer.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    steps = jax.random.split(keys[-1], PRETRAINING)
    return jax.lax.scan(step, (weights, optimizer.init(weights)), steps)[0][0]


def turned(images: np.ndarray) -> np.ndarray:
    return np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(len(images), -1).copy()


def last_losses(
    tuning: Tuning, rule: Rule, num_steps: int, factor: jax.Array, seeds: jax.Array
) -> jax.Array:
    """Loss over all training digits at the end, ``[seeds]``; one batch counts ``factor`` times."""
    data = _demo.load_digits()
    before, after = jnp.asarray(data.train_images), jnp.asarray(turned(data.train_images))
    labels = jnp.asarray(data.train_labels)
    optimizer = optax.with_extra_args_support(rule(tuning.optimizer))

    def run(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        weights = pretrain(keys[0], before, labels)
        params = tuning.init(keys[1], weights)

        def step(carry, index):
            params, state = carry
            rows = jax.random.randint(jax.random.fold_in(keys[2], index), (64,), 0, len(labels))

            def loss_fn(params):
                times = jnp.where(index == num_steps // 10, factor, 1.0)
                return times * loss_of(tuning.weights(weights, params), after[rows], labels[rows])

            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = optimizer.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, optimizer.init(params))
        (params, _), _ = jax.lax.scan(step, carry, jnp.arange(num_steps))
        return loss_of(tuning.weights(weights, params), after, labels)

    return jax.vmap(run)(seeds)


class Runs:
    """The faults of a case under a rule share a compilation."""

    def __init__(self, case: str, rule: str, num_steps: int, seeds: np.ndarray):
        self._function = jax.jit(
            partial(last_losses, CASES[case](), _trials.RIVALS[rule], num_steps)
        )
        self._seeds = seeds

    def __call__(self, fault: str) -> jax.Array:
        return self._function(jnp.float32(FAULTS[fault]), jnp.asarray(self._seeds))


def make_trials(arguments: argparse.Namespace) -> list[_trials.Trial]:
    cases = arguments.cases or list(CASES)[: 1 if arguments.quick else None]
    rules = arguments.rules or list(_trials.QUICK if arguments.quick else _trials.RIVALS)
    num_steps = NUM_STEPS_QUICK if arguments.quick else NUM_STEPS
    trials = []
    for case, rule in itertools.product(cases, rules):
        runs = Runs(case, rule, num_steps, _trials.seeds_of(arguments))
        trials += [
            _trials.Trial(f"{case}, {fault}", rule, partial(runs, fault)) for fault in FAULTS
        ]
    return sorted(trials, key=lambda trial: list(FAULTS).index(trial.case.rpartition(", ")[2]))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _trials.parse(_trials.parser("fine_tuning", __doc__, list(CASES), seeds=4), argv)
    cells = _trials.run_trials("fine_tuning", arguments, make_trials(arguments))
    print(_trials.to_markdown(cells))
    return cells


if __name__ == "__main__":
    main()
