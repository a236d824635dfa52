"""What does a rule cost a run that needs none? Differences of test accuracy, on real images.

    python -m benchmarks.healthy                     # digits; 3 minutes of CPU time
    python -m benchmarks.healthy --data mnist=DIR    # and IDX files; 3 minutes more for each
    python -m benchmarks.healthy --quick

A healthy network learns by plain SGD with learning rate 0.1, without any rule and behind every rule
of the library at its defaults, from the same initial weights and on the same batches. Reported is
the mean over the seeds of the paired difference of test accuracy, in points of a per cent, with its
standard error. Digits: 64-128-64-10, batch 64, 40 epochs. IDX folders (MNIST, Fashion-MNIST):
784-128-64-10 on the first 5000 images, batch 32, 4 epochs, tested on all 10,000. "adam" is
Adam(0.002) and "lr/10" SGD(0.01), for comparison. Expected, for 10 seeds on CPU:

                                        digits           mnist         fashion
    none                               98.61 %         92.44 %         80.05 %
    optax.apply_if_finite        +0.00 ± 0.00    +0.00 ± 0.00    +0.00 ± 0.00
    optax.zero_nans+clip         -0.11 ± 0.06    -1.16 ± 0.08    -0.95 ± 0.57
    optax.adaptive_grad_clip     -1.42 ± 0.12    -4.60 ± 0.15    -4.29 ± 0.58
    og.stabilize                 -0.03 ± 0.03    -0.01 ± 0.04    -0.39 ± 0.34
    clip_by_norm                 -0.11 ± 0.06    -1.16 ± 0.08    -0.95 ± 0.57
    clip_by_rms                  +0.00 ± 0.00    +0.00 ± 0.00    +0.00 ± 0.00
    clip_by_param_norm           -1.42 ± 0.12    -4.60 ± 0.15    -4.30 ± 0.58
    clip_by_relative_change      +0.00 ± 0.04    -0.07 ± 0.04    -0.18 ± 0.24
    clip_by_zscore               -0.06 ± 0.04    -0.03 ± 0.04    -0.18 ± 0.32
    clip_by_zscore_capped        -0.11 ± 0.05    -1.16 ± 0.08    -0.99 ± 0.56
    clip_by_percentile           -0.42 ± 0.13    -0.56 ± 0.08    -0.12 ± 0.45
    clip_by_median               -0.06 ± 0.04    -0.02 ± 0.02    -0.06 ± 0.15
    clip_by_ema                  -0.39 ± 0.11    -1.24 ± 0.07    -1.82 ± 0.56
    clip_by_max_ema              -0.06 ± 0.06    -0.01 ± 0.02    -0.01 ± 0.25
    clip_by_update_ratio         -0.03 ± 0.03    -0.01 ± 0.04    -0.39 ± 0.34
    normalize_by_ema_norm        +0.06 ± 0.17    -1.12 ± 0.12    -0.95 ± 0.48
    normalize_and_scale          -0.14 ± 0.20    -1.17 ± 0.08    -0.93 ± 0.55
    normalize_and_scale_auto     -0.14 ± 0.13    -0.22 ± 0.09    -0.37 ± 0.47
    normalize_and_scale_0.1      -4.11 ± 0.21    -9.37 ± 0.20    -9.31 ± 0.56
    normalize_and_scale_0.01    -52.58 ± 2.19   -60.91 ± 1.30   -37.63 ± 1.81
    adam                         +0.47 ± 0.12    +0.54 ± 0.22    +1.62 ± 0.62
    lr/10                        -4.25 ± 0.21    -5.13 ± 0.15    -3.86 ± 0.64

A negative number is what the rule takes from a run that was fine. Healthy gradients on MNIST are
longer than 1, so that a limit of 1 slows training down; one point on digits is 3.6 of 360 images.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _harness, _report, alpha
from benchmarks._rules import PEERS, RULES, _demo

LEARNING_RATE = 0.1
HIDDEN, NUM_CLASSES = (128, 64), 10
SGD = optax.sgd(LEARNING_RATE)
METHODS = {
    **{name: rule(SGD) for name, rule in {**PEERS, **RULES}.items()},
    "adam": optax.adam(2e-3),
    "lr/10": optax.sgd(LEARNING_RATE / 10),
}
QUICK = ("none", "normalize_and_scale_0.01")


class Task(NamedTuple):
    """Data, and how long to train on them."""

    data: _demo.Dataset
    batch_size: int
    epochs: int


def train(
    method: optax.GradientTransformation,
    batch_size: int,
    epochs: int,
    data: _demo.Dataset,
    seed: jax.Array,
) -> jax.Array:
    """Test accuracy in per cent at the end."""
    images, labels = data.train_images, data.train_labels
    init_key, order_key = jax.random.split(jax.random.key(seed))
    params = alpha.init(init_key, 1.0, (images.shape[1], *HIDDEN, NUM_CLASSES))

    def loss(params, rows):
        logits = alpha.predict(params, images[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry, rows):
        params, state = carry
        updates, state = method.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, len(labels))
        rows = order[: len(labels) // batch_size * batch_size].reshape(-1, batch_size)
        return jax.lax.scan(step, carry, rows)

    carry = (params, method.init(params))
    (params, _), _ = jax.lax.scan(epoch, carry, jax.random.split(order_key, epochs))
    logits = alpha.predict(params, data.test_images)
    return 100 * jnp.mean(jnp.argmax(logits, -1) == data.test_labels)


def make_cell(name: str, case: str, accuracy: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Mean and standard error of the paired difference; both arrays are ``[seeds]``."""
    difference = accuracy - reference
    return {
        "rule": name,
        "case": case,
        "value": float(difference.mean()),
        "se": float(difference.std(ddof=1) / len(difference) ** 0.5),
        "accuracy": float(accuracy.mean()),
        "worst": float(accuracy.min()),
        "seeds": len(accuracy),
    }


def compare(task: Task, case: str, names: Sequence[str], seeds: int) -> Iterator[dict[str, Any]]:
    """A cell for every method: its accuracy, and what it differs from that without a rule."""
    reference = None
    data = jax.tree.map(jnp.asarray, task.data)
    for name in names:
        run = partial(train, METHODS[name], task.batch_size, task.epochs)
        run = jax.jit(jax.vmap(run, (None, 0)))
        accuracy = np.asarray(run(data, jnp.arange(seeds)), np.float64)
        reference = accuracy if reference is None else reference
        yield make_cell(name, case, accuracy, reference)


def to_markdown(cells: Sequence[dict[str, Any]]) -> str:
    """One row a rule; the row without any has the accuracy itself."""
    found = {(cell["rule"], cell["case"]): cell for cell in cells}
    names = dict.fromkeys(cell["rule"] for cell in cells)

    def write(row, case):
        cell = found[row["rule"], case]
        if row["rule"] == "none":
            return f"{cell['accuracy']:.2f} %"
        return f"{cell['value']:+.2f} ± {cell['se']:.2f}"

    cases = dict.fromkeys(cell["case"] for cell in cells)
    columns = {case: partial(write, case=case) for case in cases}
    rows = [{"rule": name} for name in names]
    return _report.markdown_table(rows, {"rule": lambda row: row["rule"], **columns})


def load_folder(named: str, num_train: int) -> tuple[str, _demo.Dataset]:
    """``NAME=DIR`` or ``DIR``, whose last part is the name then."""
    name, _, folder = named.rpartition("=")
    data = _demo.load_idx_folder(folder)
    kept = data._replace(
        train_images=data.train_images[:num_train], train_labels=data.train_labels[:num_train]
    )
    return name or Path(folder).name, kept


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="2 seeds, 3 epochs, two rules")
    add("--seeds", type=int, help="default 10")
    add("--rules", nargs="+", choices=list(METHODS), metavar="RULE", help="default: all")
    add("--data", nargs="+", default=[], metavar="[NAME=]DIR", help="folders with four IDX files")
    add("--train", type=int, default=5000, help="images to train on, of a folder; default 5000")
    _harness.add_output_arguments(parser, "healthy", plot=False)
    arguments = parser.parse_args(argv)
    arguments.seeds = arguments.seeds or (2 if arguments.quick else 10)
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2, for a standard error")
    return arguments


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = parse(argv)
    tasks = {"digits": Task(_demo.load_digits(), 64, 3 if arguments.quick else 40)}
    for named in arguments.data:
        name, data = load_folder(named, arguments.train)
        tasks[name] = Task(data, 32, 1 if arguments.quick else 4)
    arguments.data = list(tasks)  # where the files lie on this machine is of no interest
    wanted = arguments.rules or (QUICK if arguments.quick else METHODS)
    names = list(dict.fromkeys(itertools.chain(["none"], wanted)))
    cells: list[dict[str, Any]] = []
    with _harness.progress("healthy", len(names) * len(tasks)) as advance:
        for case, task in tasks.items():
            for cell in compare(task, case, names, arguments.seeds):
                cells.append(cell)  # saved one by one: a run cut short leaves something
                _harness.save_json(arguments.json, "healthy", arguments, cells, key="cells")
                advance(f"{cell['rule']}, {case}")
    print(to_markdown(cells))
    return cells


if __name__ == "__main__":
    main()
