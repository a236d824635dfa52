"""Two ways to write one training: layers in a row or stacked, one large batch or several small.

    python -m benchmarks.equivalences           # 3 minutes on two cores
    python -m benchmarks.equivalences --quick

Stacked layers: the decoder of `benchmarks/language_model.py`, its layers as arrays of their own
and as one stack that `lax.scan` goes along, by AdamW(0.01) and by SGD(0.1) with momentum; a rule
is told of the stack where it can be (`stacked=`). Accumulation: a 64-128-64-10 network on digits in
batches of 64, and in four of 16 at a time, within `optax.MultiSteps(rule(optimizer), 4)` or added
up by hand, by SGD(0.1) and Adam(0.002). Reported is the largest difference of a parameter at the
end, relative to the norm of its array, mean of the seeds: rounding, where the two are the same
training. A rule that takes a stack for one array, or a micro-batch for a batch, is seen at once.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from benchmarks import _decoder, _trials
from benchmarks._rules import Rule, _demo

NUM_STEPS, NUM_STEPS_QUICK, NUM_PARTS = 60, 6, 4


def is_stacked(path: str, leaf: Any) -> bool:
    del leaf
    return path.startswith("layers")


STACKED: dict[str, Rule] = {
    **_trials.RIVALS,
    "og.stabilize": partial(og.stabilize, stacked=is_stacked),
    "og.stabilize, not told": og.stabilize,
}


def _schedule(rate: float) -> Callable[[Any], jax.Array]:
    return lambda count: rate * jnp.minimum(1, (count + 1) / 10)


STACKED_OPTIMIZERS = {
    "adamw": optax.adamw(_schedule(0.01), b2=0.95),
    "momentum": optax.sgd(_schedule(0.1), momentum=0.9),
}
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(2e-3)}
CASES = ("stacked", "MultiSteps", "by hand")


def difference(one: Any, other: Any) -> jax.Array:
    """Largest difference of a parameter, relative to the norm of its array."""

    def largest(a, b):
        return jnp.max(jnp.abs(a - b)) / jnp.linalg.norm(a)

    return jnp.stack(jax.tree.leaves(jax.tree.map(largest, one, other))).max()


def stacked_difference(
    rule: str, optimizer: optax.GradientTransformation, num_steps: int, seeds: np.ndarray
) -> jax.Array:
    text = _decoder.load_text()
    in_a_row = og.stabilize if rule.startswith("og.stabilize") else STACKED[rule]

    def run(seed):
        one = _train_decoder(in_a_row(optimizer), text, num_steps, seed, stacked=False)
        other = _train_decoder(STACKED[rule](optimizer), text, num_steps, seed, stacked=True)
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one["layers"])
        return difference({**one, "layers": layers}, other)

    return jax.jit(lambda seeds: jax.lax.map(run, seeds))(jnp.asarray(seeds))


def _train_decoder(optimizer, text, num_steps, seed, *, stacked) -> Any:
    return _decoder.train(optimizer, text, num_steps, seed, stacked=stacked).params


def accumulated_difference(
    rule: Rule, optimizer: optax.GradientTransformation, by_hand: bool, num_steps: int, seeds: Any
) -> jax.Array:
    data = _demo.load_digits()
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    whole = optax.with_extra_args_support(rule(optimizer))
    parts = optax.MultiSteps(rule(optimizer), NUM_PARTS).gradient_transformation()

    def loss(params, rows):
        hidden, middle, last = params
        outputs = jax.nn.relu(jax.nn.relu(images[rows] @ hidden) @ middle) @ last
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels[rows]).mean()

    def start(key):
        shapes = ((64, 128), (128, 64), (64, 10))
        keys = jax.random.split(key, len(shapes))
        return [
            jax.random.normal(k, s) * (2 / s[0]) ** 0.5 for k, s in zip(keys, shapes, strict=True)
        ]

    def at_once(carry, rows):
        params, state = carry
        updates, state = whole.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    def added_up(carry, rows):
        params, state = carry
        several = [jax.grad(loss)(params, part) for part in jnp.split(rows, NUM_PARTS)]
        mean = jax.tree.map(lambda *grads: sum(grads) / NUM_PARTS, *several)
        updates, state = whole.update(mean, state, params)
        return (optax.apply_updates(params, updates), state), None

    def in_parts(carry, rows):
        def micro(carry, part):
            params, state = carry
            updates, state = parts.update(jax.grad(loss)(params, part), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(micro, carry, rows.reshape(NUM_PARTS, -1))

    def run(seed):
        init_key, key = jax.random.split(jax.random.key(seed))
        params = start(init_key)
        rows = jax.random.randint(key, (num_steps, 64), 0, len(labels))
        (one, _), _ = jax.lax.scan(at_once, (params, whole.init(params)), rows)
        step, tx = (added_up, whole) if by_hand else (in_parts, parts)
        (other, _), _ = jax.lax.scan(step, (params, tx.init(params)), rows)
        return difference(one, other)

    return jax.jit(lambda seeds: jax.lax.map(run, seeds))(jnp.asarray(seeds))


def make_trials(arguments: argparse.Namespace) -> list[_trials.Trial]:
    num_steps = NUM_STEPS_QUICK if arguments.quick else NUM_STEPS
    seeds = _trials.seeds_of(arguments)
    trials = []
    for case in arguments.cases or (CASES[1:2] if arguments.quick else CASES):
        is_stack = case == "stacked"
        known = STACKED if is_stack else _trials.RIVALS
        rules = arguments.rules or list(_trials.QUICK if arguments.quick else known)
        optimizers = STACKED_OPTIMIZERS if is_stack else OPTIMIZERS
        for (name, optimizer), rule in itertools.product(optimizers.items(), rules):
            if rule not in known:
                continue
            if is_stack:
                run = partial(stacked_difference, rule, optimizer, num_steps, seeds)
            else:
                args = known[rule], optimizer, case == "by hand", num_steps, seeds
                run = partial(accumulated_difference, *args)
            trials.append(_trials.Trial(f"{case}, {name}", rule, run))
    return trials


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _trials.parse(_trials.parser("equivalences", __doc__, CASES, seeds=2), argv)
    cells = _trials.run_trials("equivalences", arguments, make_trials(arguments))
    print(_trials.to_markdown(cells, 2))
    return cells


if __name__ == "__main__":
    main()
