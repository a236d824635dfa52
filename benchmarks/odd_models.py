"""Small and odd models, and optimizers that search: as without the library, or a warning.

    python -m benchmarks.odd_models            # 2 minutes on two cores
    python -m benchmarks.odd_models --quick

Models whose parameters are numbers and vectors: a line through points far from zero, a mean-field
posterior, the marginal likelihood of a Gaussian process. And optimizers that read a step size off
the length of the gradient, or search along it, on a quadratic and on Rosenbrock's function: a clip
in front would falsify what they read, so that `og.stabilize` only guards them, and warns. Reported
is the loss at the end, mean of the seeds (lower is better).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _trials
from benchmarks._rules import Rule


class Task(NamedTuple):
    """``loss(params, key)``; the last one reported is that of a fixed key."""

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, jax.Array], jax.Array]
    optimizer: Callable[[], optax.GradientTransformation]
    num_steps: int


def _line(optimizer: Callable[[], Any]) -> Task:
    x = jnp.linspace(-1, 1, 200)
    y = 30 * x + 50

    def loss(params, key):
        del key
        return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)

    return Task(lambda _: {"slope": jnp.zeros(()), "offset": jnp.zeros(())}, loss, optimizer, 600)


def _posterior(optimizer: Callable[[], Any]) -> Task:
    """Mean-field normal posterior of a linear regression, by reparametrised samples."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(100, 5)), jnp.float32)
    targets = inputs @ jnp.array([4.0, -3.0, 0.0, 20.0, 1.0]) + 0.5 * rng.normal(size=100)

    def loss(params, key):
        mean, log_std = params["mean"], params["log_std"]
        noise = jax.random.normal(key, (32, 5))
        weights = mean + jnp.exp(log_std) * noise
        errors = weights @ inputs.T - targets
        fit = 0.5 * jnp.sum(errors**2, axis=1).mean() / 0.25
        prior = 0.5 * jnp.sum((mean / 10) ** 2 + jnp.exp(2 * log_std) / 100) - jnp.sum(log_std)
        return fit + prior

    def init(key):
        return {"mean": jax.random.normal(key, (5,)), "log_std": jnp.zeros(5)}

    return Task(init, loss, optimizer, 1500)


def _process() -> Task:
    """Negative log marginal likelihood of a Gaussian process, of three logarithms."""
    x = jnp.linspace(0, 1, 40)
    y = 5 * jnp.sin(12 * x) + 0.3 * np.random.default_rng(0).normal(size=40)

    def loss(params, key):
        del key
        length, scale, noise = (jnp.exp(params[name]) for name in ("length", "scale", "noise"))
        kernel = scale**2 * jnp.exp(-0.5 * ((x[:, None] - x) / length) ** 2)
        factor = jnp.linalg.cholesky(kernel + (noise**2 + 1e-4) * jnp.eye(40))
        white = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
        return 0.5 * white @ white + jnp.log(jnp.diag(factor)).sum()

    def init(key):
        return {
            "length": 0.1 * jax.random.normal(key),
            "scale": jnp.zeros(()),
            "noise": jnp.zeros(()),
        }

    return Task(init, loss, lambda: optax.adam(0.05), 300)


def _rosenbrock(optimizer: Callable[[], Any], num_steps: int = 300) -> Task:
    def loss(params, key):
        del key
        x = params["x"]
        return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    return Task(lambda key: {"x": jax.random.normal(key, (4,))}, loss, optimizer, num_steps)


def _quadratic(optimizer: Callable[[], Any]) -> Task:
    target = jnp.array([1.0, -1.0, 1.0])

    def loss(params, key):
        del key
        return jnp.sum((params["x"] - target) ** 2)

    def init(key):
        return {"x": jnp.array([-1.0, 10.0, 1.0]) + jax.random.normal(key, (3,))}

    return Task(init, loss, optimizer, 300)


SEARCHING: dict[str, Callable[[], optax.GradientTransformation]] = {
    "polyak": optax.polyak_sgd,
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
    "momo": lambda: optax.contrib.momo(learning_rate=0.1),
    "cocob": optax.contrib.cocob,
    "lbfgs": optax.lbfgs,
}
CASES: dict[str, Callable[[], Task]] = {
    "line, sgd 0.1": partial(_line, lambda: optax.sgd(0.1)),
    "line, sgd 0.3": partial(_line, lambda: optax.sgd(0.3)),
    "line, adam 0.5": partial(_line, lambda: optax.adam(0.5)),
    "posterior, sgd": partial(_posterior, lambda: optax.sgd(3e-4)),
    "posterior, adam": partial(_posterior, lambda: optax.adam(0.05)),
    "process, adam": _process,
    **{f"quadratic, {name}": partial(_quadratic, make) for name, make in SEARCHING.items()},
    "rosenbrock, lbfgs": partial(_rosenbrock, optax.lbfgs),
    "rosenbrock, adam": partial(_rosenbrock, lambda: optax.adam(0.02), 1000),
}
QUICK_CASES = ("line, sgd 0.1", "quadratic, polyak")


def last_loss(task: Task, rule: Rule, num_steps: int, seed: jax.Array) -> jax.Array:
    """Loss at the end."""
    optimizer = optax.with_extra_args_support(rule(task.optimizer()))
    init_key, key = jax.random.split(jax.random.key(seed))
    params = task.init(init_key)

    def step(carry, index):
        params, state = carry
        value_fn = partial(task.loss, key=jax.random.fold_in(key, index))
        value, grads = jax.value_and_grad(value_fn)(params)
        told = {"value": value, "grad": grads, "value_fn": value_fn}
        updates, state = optimizer.update(grads, state, params, **told)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, optimizer.init(params))
    (params, _), _ = jax.lax.scan(step, carry, jnp.arange(num_steps))
    return task.loss(params, jax.random.key(0))


def last_losses(task: Task, rule: Rule, num_steps: int, seeds: np.ndarray) -> jax.Array:
    """The same for all seeds, ``[seeds]``."""
    run = partial(last_loss, task, rule, num_steps)
    return jax.jit(lambda seeds: jax.lax.map(run, seeds))(jnp.asarray(seeds))


def only_guards(rule: Rule, task: Task) -> bool:
    """Whether a rule says that it will not clip this optimizer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rule(task.optimizer())
    return any("does not clip" in str(each.message) for each in caught)


def make_trials(arguments: argparse.Namespace) -> list[_trials.Trial]:
    def run(case, rule):
        task = CASES[case]()
        num_steps = 20 if arguments.quick else task.num_steps
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="stabilize only guards")
            return last_losses(task, _trials.RIVALS[rule], num_steps, _trials.seeds_of(arguments))

    cases = arguments.cases or list(QUICK_CASES if arguments.quick else CASES)
    rules = arguments.rules or list(_trials.QUICK if arguments.quick else _trials.RIVALS)
    return [_trials.Trial(c, r, partial(run, c, r)) for c in cases for r in rules]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _trials.parse(_trials.parser("odd_models", __doc__, list(CASES), seeds=3), argv)
    cells = _trials.run_trials("odd_models", arguments, make_trials(arguments))
    print(_trials.to_markdown(cells))
    return cells


if __name__ == "__main__":
    main()
