"""How long should a normalised step be? Fixed lengths beside ``alpha="auto"``, on real digits.

    python -m benchmarks.alpha            # half a minute on 2 cores
    python -m benchmarks.alpha --quick

A 64-128-64-10 network learns 8x8 digits by plain SGD (learning rate 0.1, batch 64, 1000 steps, 8
seeds) in three conditions: healthy; with the loss, and so the gradients, multiplied by 64; and from
weights three times as large as He's. Test accuracy in per cent, median and (worst). Expected:
``"auto"`` costs nothing where plain SGD works, and helps no more than plain SGD does where the
steps were too long from the start; the best fixed length lies between 1 and 3 in all three.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import optax_guard as og
from benchmarks import _harness, _report

SIZES = (64, 128, 64, 10)
NUM_TEST, BATCH_SIZE, LEARNING_RATE = 360, 64, 0.1
CONDITIONS = {  # scale of the initial weights, factor of the loss
    "healthy": (1.0, 1.0),
    "loss x 64": (1.0, 64.0),
    "weights x 3": (3.0, 1.0),
}
Rule = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def before(clip: optax.GradientTransformation) -> Rule:
    return lambda optimizer: optax.chain(clip, optimizer)


RULES: dict[str, Rule] = {
    "none": before(optax.identity()),
    "clip_by_norm(1)": before(og.clip_by_norm(1.0)),
    "clip_by_update_ratio": og.clip_by_update_ratio,
    **{f"alpha={a}": before(og.normalize_and_scale(a)) for a in (0.01, 0.1, 0.3, 1.0, 3.0)},
    'alpha="auto"': before(og.normalize_and_scale("auto")),
}


def load() -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Images and labels to train on and to test with."""
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
    return (images[NUM_TEST:], labels[NUM_TEST:]), (images[:NUM_TEST], labels[:NUM_TEST])


def init(
    key: jax.Array, scale: float, sizes: Sequence[int] = SIZES
) -> list[tuple[jax.Array, jax.Array]]:
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = itertools.pairwise(sizes)
    return [
        (scale * he(k, shape), jnp.zeros(shape[1])) for k, shape in zip(keys, shapes, strict=True)
    ]


def predict(params: Any, images: jax.Array) -> jax.Array:
    for weights, bias in params[:-1]:
        images = jax.nn.relu(images @ weights + bias)
    weights, bias = params[-1]
    return images @ weights + bias


def train(rule: Rule, condition: str, num_steps: int, data: Any, seed: jax.Array) -> jax.Array:
    """Test accuracy in per cent."""
    weight_scale, loss_factor = CONDITIONS[condition]
    (images, labels), (test_images, test_labels) = data
    tx = rule(optax.sgd(LEARNING_RATE))
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    params = init(init_key, weight_scale)

    def loss(params, rows):
        logits = predict(params, images[rows])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        return loss_factor * losses.mean()

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(labels))
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(batch_key, num_steps)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    return 100 * jnp.mean(jnp.argmax(predict(params, test_images), -1) == test_labels)


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    def cell(row, condition):
        return f"{row[condition]:.1f} ({row[condition + ', worst']:.1f})"

    columns = {name: functools.partial(cell, condition=name) for name in CONDITIONS}
    return _report.markdown_table(rows, {"rule": lambda row: row["rule"], **columns})


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 seeds, 50 steps, three rules")
    _harness.add_output_arguments(parser, "alpha", plot=False)
    arguments = parser.parse_args(argv)
    seeds = jnp.arange(2 if arguments.quick else 8)
    num_steps = 50 if arguments.quick else 1000
    names = ("none", "alpha=1.0", 'alpha="auto"') if arguments.quick else tuple(RULES)
    data, rows = load(), []
    with _harness.progress("alpha", len(names) * len(CONDITIONS)) as advance:
        for name in names:
            row: dict[str, Any] = {"rule": name}
            for condition in CONDITIONS:
                run = functools.partial(train, RULES[name], condition, num_steps, data)
                accuracy = np.asarray(jax.jit(jax.vmap(run))(seeds))
                row[condition] = float(np.median(accuracy))
                row[f"{condition}, worst"] = float(accuracy.min())
                advance(f"{name}, {condition}")
            rows.append(row)
    print(to_markdown(rows))
    _harness.save_json(arguments.json, "alpha", arguments, rows)
    return rows


if __name__ == "__main__":
    main()
