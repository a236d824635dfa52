"""A small language model: does a rule stand in the way, at any learning rate and by any optimizer?

    python -m benchmarks.language_model                      # AdamW: 8 minutes on two cores
    python -m benchmarks.language_model --optimizers all     # each of the seven 2 to 4 minutes more
    python -m benchmarks.language_model --quick

A decoder of 3 layers and width 64 learns, in 400 steps of 16 x 48 characters, to continue what
scikit-learn says of its data sets. The learning rate rises over a tenth of the steps and falls to
zero by a cosine. Reported is the validation loss in nats per character, mean of the seeds, at each
learning rate, without a fault (Wortsman et al. 2023 call the mean loss over rates the
*learning-rate sensitivity*); and, by AdamW at 0.01, with three batches of random characters every
60 steps from step 200 on, at once or 1000 times the loss. With optimizers other than AdamW only
no clip, a norm of 1 and the default are compared.

"soap" is an Adam with a short memory of squares in the eigenbasis of the gradients: the shorter
the gradients, the longer its steps can become, which a limit that feeds on its own response must
not answer by cutting more.

Found: the default is within 0.02 nats of the better of no clip and a norm of 1 with AdamW and
Adafactor at every rate, and with schedule-free but for the highest. With Lion, SOAP, Muon and
momentum it is as good as no clip, to 0.01, or better, and a norm of 1 is up to 0.08 better still:
it evens out what each batch adds to the momentum. Bursts at 1000 times the loss cost the default
0.006 nats, bursts at once the loss 0.05, and 0.002 with `skip_if=og.spike()`.

Reference: Wortsman et al., Small-scale proxies for large-scale Transformer training instabilities,
2023, https://arxiv.org/abs/2309.14322.
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

from benchmarks import _decoder, _trials
from benchmarks._rules import Rule

NUM_STEPS, NUM_STEPS_QUICK = 400, 12
FAULT_RATE = 0.01
BURSTS = {"bursts ×1": 1.0, "bursts ×1000": 1000.0}
FEW = ("none", "og.stabilize", "optax.clip_by_global_norm")


class _Rotated(NamedTuple):
    mean: Any
    square: Any
    covariance: Any
    basis: Any
    count: jax.Array


def scale_by_rotated_adam(
    b1: float = 0.9, b2: float = 0.6, refresh_every: int = 10
) -> optax.GradientTransformation:
    """Adam in the eigenbasis of the smaller side of each matrix (after SOAP), short of memory."""

    def to_basis(basis, leaf):
        if leaf.ndim != 2:
            return leaf
        return basis.T @ leaf if leaf.shape[0] <= leaf.shape[1] else leaf @ basis

    def from_basis(basis, leaf):
        if leaf.ndim != 2:
            return leaf
        return basis @ leaf if leaf.shape[0] <= leaf.shape[1] else leaf @ basis.T

    def outer(leaf):
        if leaf.ndim != 2:
            return jnp.zeros(())
        return leaf @ leaf.T if leaf.shape[0] <= leaf.shape[1] else leaf.T @ leaf

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        square = jax.tree.map(lambda leaf: jnp.zeros_like(outer(leaf)), params)
        basis = jax.tree.map(lambda leaf: jnp.eye(len(leaf)) if leaf.ndim else leaf, square)
        return _Rotated(zeros, zeros, square, basis, jnp.zeros((), jnp.int32))

    def refreshed(basis, covariance):
        return jnp.linalg.qr(covariance @ basis)[0] if basis.ndim else basis

    def update(updates, state, params=None):
        del params
        decay = partial(jax.tree.map, lambda old, new: b1 * old + (1 - b1) * new)
        covariance = decay(state.covariance, jax.tree.map(outer, updates))
        basis = jax.lax.cond(
            state.count % refresh_every == 0,
            lambda basis: jax.tree.map(refreshed, basis, covariance),
            lambda basis: basis,
            state.basis,
        )
        rotated = jax.tree.map(to_basis, basis, updates)
        mean = decay(state.mean, updates)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, rotated)
        count = state.count + 1
        correct = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        steps = jax.tree.map(
            lambda m, v: correct * m / (jnp.sqrt(v) + 1e-8),
            jax.tree.map(to_basis, basis, mean),
            square,
        )
        steps = jax.tree.map(from_basis, basis, steps)
        return steps, _Rotated(mean, square, covariance, basis, count)

    return optax.GradientTransformation(init, update)


def soap(rate: Any) -> optax.GradientTransformation:
    return optax.chain(scale_by_rotated_adam(), optax.scale_by_learning_rate(rate))


class Optimizer(NamedTuple):
    make: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]
    decays: bool = True  # the learning rate, after its rise


OPTIMIZERS = {
    "adamw": Optimizer(partial(optax.adamw, b2=0.95), (0.01, 0.03, 0.06, 0.1, 0.3)),
    "lion": Optimizer(optax.lion, (0.001, 0.003, 0.01)),
    "muon": Optimizer(optax.contrib.muon, (0.01, 0.03, 0.1)),
    "adafactor": Optimizer(optax.adafactor, (0.03, 0.1, 0.3)),
    "soap": Optimizer(soap, (0.003, 0.01, 0.03)),
    "schedule_free": Optimizer(optax.contrib.schedule_free_adamw, (0.01, 0.03, 0.1), decays=False),
    "momentum": Optimizer(partial(optax.sgd, momentum=0.9), (0.03, 0.1, 0.3)),
}


def schedule(rate: Any, num_steps: int, decays: bool) -> Callable[[Any], jax.Array]:
    """A rise over a tenth of the steps, then a cosine to zero, or a constant."""

    def at(count):
        rise = jnp.minimum(1, (count + 1) / (num_steps / 10))
        fall = 0.5 * (1 + jnp.cos(jnp.pi * count / num_steps)) if decays else 1.0
        return rate * rise * fall

    return at


def losses(
    optimizer: Optimizer,
    rule: Rule,
    text: _decoder.Text,
    num_steps: int,
    first_burst: int,
    runs: jax.Array,
) -> jax.Array:
    """Validation losses of ``runs [runs, 3]``: rate, loss scale of bursts, seed; one by one."""

    def run(given):
        rate, loss_scale, seed = given
        tx = rule(optimizer.make(schedule(rate, num_steps, optimizer.decays)))
        burst = _decoder.Burst(loss_scale, first_burst)
        return _decoder.train(tx, text, num_steps, seed.astype(jnp.int32), burst=burst).loss

    return jax.lax.map(run, runs)


class Sweep:
    """Everything that an optimizer does under a rule shares a compilation."""

    def __init__(self, name: str, rule: str, text: _decoder.Text, arguments: argparse.Namespace):
        first_burst = 4 if arguments.quick else 200
        kind = OPTIMIZERS[name], RULES[rule], text, arguments.steps, first_burst
        self._losses = jax.jit(partial(losses, *kind))
        self._seeds = _trials.seeds_of(arguments)

    def __call__(self, rate: float, loss_scale: float = 0.0) -> np.ndarray:
        runs = [(rate, loss_scale, seed) for seed in self._seeds]
        return np.asarray(self._losses(jnp.asarray(runs, jnp.float32)))


RULES = {**_trials.RIVALS, **_trials.WITH_SPIKE}


def make_trials(arguments: argparse.Namespace) -> list[_trials.Trial]:
    text = _decoder.load_text()
    trials = []
    for name in arguments.optimizers:
        rules = arguments.rules or list(RULES if name == "adamw" else FEW)
        for rule in rules:
            sweep = Sweep(name, rule, text, arguments)
            for rate in arguments.rates or OPTIMIZERS[name].rates:
                trials.append(_trials.Trial(f"{name}, {rate:g}", rule, partial(sweep, rate)))
            if name != "adamw":
                continue
            for case, loss_scale in BURSTS.items():
                run = partial(sweep, FAULT_RATE, loss_scale)
                trials.append(_trials.Trial(f"{name}, {FAULT_RATE:g}, {case}", rule, run))
    kinds = arguments.cases or ("healthy", "bursts")
    return [
        trial for trial in trials if ("bursts" if "burst" in trial.case else "healthy") in kinds
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = _trials.parser("language_model", __doc__, ("healthy", "bursts"), seeds=2)
    made.add_argument("--optimizers", nargs="+", choices=[*OPTIMIZERS, "all"], default=["adamw"])
    made.add_argument("--rates", nargs="+", type=float, help="default: those of each optimizer")
    made.add_argument("--steps", type=int, help=f"default {NUM_STEPS}")
    arguments = _trials.parse(made, argv)
    if "all" in arguments.optimizers:
        arguments.optimizers = list(OPTIMIZERS)
    if arguments.quick:
        arguments.rules = arguments.rules or list(_trials.QUICK)
        arguments.rates = arguments.rates or [0.01, 0.1]
    arguments.steps = arguments.steps or (NUM_STEPS_QUICK if arguments.quick else NUM_STEPS)
    return arguments


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = parse(argv)
    cells = _trials.run_trials("language_model", arguments, make_trials(arguments))
    print(_trials.to_markdown(cells, 4))
    return cells


if __name__ == "__main__":
    main()
