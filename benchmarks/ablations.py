"""What is each part of the default clip for? Every part left out, on small versions of the tasks.

    python -m benchmarks.ablations              # 10 minutes of CPU time
    python -m benchmarks.ablations --quick

All variants of `clip_by_update_ratio` run side by side, in one program for each task, with the
tasks A to K of the evaluation at small sizes: fewer seeds and steps than in their own scripts, so
that rows are to be compared with each other and not with other tables. The tasks about two ways to
write the same training (`benchmarks/equivalences.py`) do not depend on the parts.
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
from flax import nnx

import optax_guard as og
from benchmarks import (
    _decoder,
    _report,
    _trials,
    fine_tuning,
    healthy,
    language_model,
    lasting_rise,
    odd_models,
)
from benchmarks._rules import Rule, _demo, mlp_digits
from optax_guard.wrappers._update_ratio import Parts
from optax_guard.wrappers.clip_by_update_ratio import clip_with_parts

import clinic  # isort: skip
import rnn_temporal_order as order  # isort: skip

NONE = 1e9  # of a limit: so large that it never acts


class Variant(NamedTuple):
    """Arguments and parts of the rule; numbers, or arrays with an axis for the variants."""

    max_ratio: Any = 0.05
    median_ratio: Any = 3.0
    max_norm: Any = 1.0
    parts: Parts = Parts()

    def protect(self, optimizer: optax.GradientTransformation) -> Any:
        return og.guard(clip_with_parts(optimizer, **(self._asdict())))


VARIANTS = {
    "the rule": Variant(),
    "without any limit": Variant(NONE, NONE, NONE),
    "without the limit on the change": Variant(NONE, parts=Parts(harmless=0.0075 / NONE)),
    "without the limit by usual norms": Variant(median_ratio=NONE),
    "without the limit on first norms": Variant(max_norm=NONE),
    "without what is harmless": Variant(parts=Parts(harmless=0.0)),
    "without the fall beyond 60 limits": Variant(parts=Parts(gross=NONE)),
    "without distrust": Variant(parts=Parts(distrust=0.0)),
    "with a limit on Adam's change": Variant(parts=Parts(bounded=0.0)),
}
QUICK_VARIANTS = ("the rule", "without any limit", "without what is harmless")


class Sizes(NamedTuple):
    seeds: np.ndarray
    is_quick: bool

    def steps(self, number: int) -> int:
        return 20 if self.is_quick else number


def _temporal_order(rule: Rule, sizes: Sizes, seed: jax.Array) -> jax.Array:
    """Per cent of sequences of 20 that are wrong after 3000 updates at learning rate 0.1."""
    setting = order.Setting(20, sizes.steps(3000), 1, sizes.steps(3000))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: order.TanhRNN(rngs=nnx.Rngs(0))))
    tx = rule(optax.sgd(0.1))
    model_key, data_key = jax.random.split(jax.random.key(seed))
    params = nnx.state(order.TanhRNN(rngs=nnx.Rngs(model_key)), nnx.Param)
    carry = (params, tx.init(params))
    return order.train_block(graphdef, tx, setting, data_key, carry, 0)[2]


def _clinic(case: clinic.Case, rule: Rule, sizes: Sizes, seed: jax.Array) -> jax.Array:
    """Accuracy of a deep network after 300 steps."""
    data = jax.tree.map(jnp.asarray, _demo.load_digits())
    layers = (data.train_images.shape[1], *clinic.HIDDEN[case.network], 10)
    key = jax.random.key(seed)
    params = clinic.make_params(key, case, layers)
    shape = (sizes.steps(300), clinic.BATCH_SIZE)
    rows = jax.random.randint(jax.random.fold_in(key, 1), shape, 0, len(data.train_labels))
    tx = clinic.unstacked(rule(optax.sgd(0.1)))
    return clinic.train(tx, data, clinic.make_kind(case), params, rows)[0]


def _faults(rule: Rule, sizes: Sizes, seed: jax.Array) -> jax.Array:
    """Accuracy with random labels at 1000 times the loss every 20 steps, from step 0 on."""
    data = jax.tree.map(jnp.asarray, _demo.load_digits())
    start = mlp_digits.make_start(seed, data, 1 if sizes.is_quick else 10)
    tx = rule(optax.sgd(0.05, momentum=0.9))
    which = list(mlp_digits.FAULTS).index("random labels, loss ×1000")
    return mlp_digits.train(tx, data, start, jnp.asarray(which), jnp.asarray(0)).final_accuracy


def _healthy(rule: Rule, sizes: Sizes, seed: jax.Array) -> jax.Array:
    data = jax.tree.map(jnp.asarray, _demo.load_digits())
    return healthy.train(rule(optax.sgd(0.1)), 64, 1 if sizes.is_quick else 20, data, seed)


def _language(name: str, rate: float, loss_scale: float, rule: Rule, sizes: Sizes, seed: Any):
    """Validation loss of a decoder of one layer, after 200 steps."""
    num_steps = sizes.steps(200)
    kind = language_model.OPTIMIZERS[name]
    tx = rule(kind.make(language_model.schedule(rate, num_steps, kind.decays)))
    burst = _decoder.Burst(loss_scale, num_steps // 2, 30)
    sized = _decoder.Sizes(num_layers=1, width=32, context=24, batch_size=8)
    text = _decoder.load_text(sized)
    return _decoder.train(tx, text, num_steps, seed, burst=burst, sizes=sized).loss


def _rise(case: str, rule: Rule, sizes: Sizes, seed: jax.Array) -> jax.Array:
    task = lasting_rise.CASES[case]()
    return lasting_rise.last_loss(task, rule, sizes.steps(task.num_steps), seed)[0]


def _tuning(rule: Rule, sizes: Sizes, seed: jax.Array) -> jax.Array:
    tuning = fine_tuning.CASES["rank 4, adam"]()
    num_steps = sizes.steps(fine_tuning.NUM_STEPS)
    return fine_tuning.last_losses(tuning, rule, num_steps, jnp.float32(1e6), seed[None])[0]


def _odd(case: str, rule: Rule, sizes: Sizes, seed: jax.Array) -> jax.Array:
    task = odd_models.CASES[case]()
    return odd_models.last_loss(task, rule, sizes.steps(task.num_steps), seed)


CASES: dict[str, Callable[[Rule, Sizes, jax.Array], jax.Array]] = {
    "A error %": _temporal_order,
    "B relu, He %": partial(_clinic, clinic.MILD),
    "B PReLU, He %": partial(_clinic, clinic.Case(clinic.DEEP, "PReLU", "He")),
    "C %": _faults,
    "D digits %": _healthy,
    "E adamw .01": partial(_language, "adamw", 0.01, 0.0),
    "E adamw .1": partial(_language, "adamw", 0.1, 0.0),
    "E momentum .1": partial(_language, "momentum", 0.1, 0.0),
    "F ×1000": partial(_language, "adamw", 0.01, 1000.0),
    "G second loss": partial(_rise, "second loss"),
    "G saddle": partial(_rise, "saddle"),
    "G curriculum": partial(_rise, "curriculum"),
    "H rank 4, ×1e6": _tuning,
    "K line": partial(_odd, "line, sgd 0.1"),
}
QUICK_CASES = ("G saddle", "K line")


def stacked(variants: Sequence[Variant]) -> Variant:
    return jax.tree.map(lambda *numbers: jnp.asarray(numbers, jnp.float32), *variants)


def outcomes(case: str, sizes: Sizes, variants: Variant) -> jax.Array:
    """``[variants, seeds]``."""

    def one(variant, seed):
        return CASES[case](variant.protect, sizes, seed)

    over_seeds = jax.vmap(one, (None, 0))
    return jax.vmap(over_seeds, (0, None))(variants, jnp.asarray(sizes.seeds))


class Outcomes:
    """Those of all variants, as soon as one of them is asked for."""

    def __init__(self, case: str, sizes: Sizes, names: Sequence[str]):
        self._case, self._sizes, self._names = case, sizes, list(names)
        self._values: Any = None

    def __call__(self, name: str) -> np.ndarray:
        if self._values is None:
            variants = stacked([VARIANTS[each] for each in self._names])
            run = partial(outcomes, self._case, self._sizes)
            self._values = np.asarray(jax.jit(run)(variants))
        return self._values[self._names.index(name)]


def to_markdown(cells: Sequence[dict[str, Any]]) -> str:
    """A row for each variant, a column for each task."""
    found = {(cell["rule"], cell["case"]): cell for cell in cells}

    def write(row, case):
        value = found[row["rule"], case]["value"]
        return "dead" if value is None else f"{value:.3g}"

    columns: dict[str, Any] = {"": lambda row: row["rule"]}
    columns |= {case: partial(write, case=case) for case in dict.fromkeys(c["case"] for c in cells)}
    rows = [{"rule": name} for name in dict.fromkeys(cell["rule"] for cell in cells)]
    return _report.markdown_table(rows, columns)


def make_trials(arguments: argparse.Namespace) -> list[_trials.Trial]:
    sizes = Sizes(_trials.seeds_of(arguments), arguments.quick)
    names = arguments.rules or list(QUICK_VARIANTS if arguments.quick else VARIANTS)
    cases = arguments.cases or list(QUICK_CASES if arguments.quick else CASES)
    trials = []
    for case in cases:
        all_of_them = Outcomes(case, sizes, names)
        trials += [_trials.Trial(case, name, partial(all_of_them, name)) for name in names]
    return trials


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _trials.parse(_trials.parser("ablations", __doc__, list(CASES), seeds=4), argv)
    cells = _trials.run_trials("ablations", arguments, make_trials(arguments))
    print(to_markdown(cells))
    return cells


if __name__ == "__main__":
    main()
