"""Every optimizer of Optax, in every context, under every fault: does a skip leave no trace?

    python tests/fault_matrix.py [--quick] [--peer]

A cell is one optimizer in one context under one fault. It passes if the run with faulty steps ends,
bit for bit, with the parameters and the optimizer state with which the same compiled function
ends that saw only the healthy steps. ``--quick`` takes every optimizer alone and a few optimizers
in every context; ``--peer`` adds the same cells for ``optax.apply_if_finite`` with the same patience
(100 bad steps). About 2 minutes with ``--quick`` and 10 without on two cores, twice that with
``--peer``. Expected: every cell of the guard passes.

Optimizers are found by looking into ``optax`` and ``optax.contrib``, so a new one is tried as soon
as it is installed. Everything else is data at the top of this file.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import inspect
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import lax

import optax_guard as og

LEARNING_RATE = 0.05
PATIENCE = 100
NUM_HEALTHY = 8
PARAMS = {
    "b": jnp.array([0.5, -1.5, 2.0]),
    "w": jnp.linspace(-2.0, 2.0, 12, dtype=jnp.float32).reshape(4, 3),
}


# Optimizers

# Arguments other than the learning rate: those that have no default, and sizes that fit PARAMS.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adafactor": {"min_dim_size_to_factor": 2, "momentum": 0.9},
    "dpsgd": {"l2_norm_clip": 1.0, "noise_multiplier": 0.1, "seed": 0, "momentum": 0.9},
    "galore": {"rank": 2, "update_proj_gap": 3},
    "lbfgs": {"memory_size": 3},
    "noisy_sgd": {"key": 0},
    "schedule_free": {"base_optimizer": optax.sgd(LEARNING_RATE, momentum=0.9)},
    "sgd": {"momentum": 0.9},
    "sophia": {"update_interval": 3},
}
# What an optimizer wants from ``update`` besides gradients and parameters.
EXTRA_ARGS: dict[str, tuple[str, ...]] = {
    "lbfgs": ("value", "grad", "value_fn"),
    "momo": ("value",),
    "momo_adam": ("value",),
    "polyak_sgd": ("value",),
    "sophia": ("obj_fn",),
}
PER_EXAMPLE = ("dpsgd",)  # takes gradients with a leading batch axis


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One of Optax's, ready to be called with a learning rate.

    Attributes:
      name: of the function in ``optax`` or ``optax.contrib``.
      make: ``learning_rate -> transformation``; a schedule is a learning rate, too.
      extra_args: names of the extra arguments that ``update`` gets.
      is_per_example: whether gradients have a leading batch axis.
    """

    name: str
    make: Callable[[Any], Any]
    extra_args: tuple[str, ...]
    is_per_example: bool


def _rate_argument(function: Any) -> str | None:
    names = inspect.signature(function).parameters
    return next((name for name in names if name.endswith("learning_rate")), None)


def discover() -> dict[str, Optimizer]:
    """The optimizers of Optax: public functions of a learning rate that make a transformation."""
    found = {}
    for module in (optax, optax.contrib):
        for name, function in sorted(vars(module).items()):
            is_candidate = inspect.isfunction(function) and not name.startswith(("_", "scale_by_"))
            rate = _rate_argument(function) if is_candidate else None
            if rate is None:
                continue
            arguments = dict(ARGUMENTS.get(name, {}))
            if "key" in arguments:
                arguments["key"] = jax.random.key(arguments["key"])
            make = functools.partial(_make, function, rate, arguments)
            if isinstance(make(LEARNING_RATE), optax.GradientTransformation):
                found[name] = Optimizer(
                    name, make, EXTRA_ARGS.get(name, ()), is_per_example=name in PER_EXAMPLE
                )
    return found


def _make(function: Any, rate: str, arguments: dict[str, Any], learning_rate: Any) -> Any:
    return function(**{rate: learning_rate}, **arguments)


# Contexts

Protect = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Context:
    """How an optimizer is embedded.

    Attributes:
      name: for the tables.
      build: ``(protect, optimizer) -> transformation``, protected somewhere.
      extra_args: names of extra arguments that the context itself needs.
      has_lookahead: whether the parameters are ``optax.LookaheadParams``.
    """

    name: str
    build: Callable[[Protect, Optimizer], Any]
    extra_args: tuple[str, ...] = ()
    has_lookahead: bool = False


def _around(embed: Callable[[Any], Any]) -> Callable[[Protect, Optimizer], Any]:
    return lambda protect, optimizer: protect(embed(optimizer.make(LEARNING_RATE)))


def _injected(protect: Protect, optimizer: Optimizer) -> Any:
    factory = lambda learning_rate: optimizer.make(learning_rate)  # noqa: E731
    schedule = optax.linear_schedule(LEARNING_RATE, 0.01, NUM_HEALTHY)
    return protect(optax.inject_hyperparams(factory)(learning_rate=schedule))


def _inside_multi_steps(protect: Protect, optimizer: Optimizer) -> Any:
    is_ours = protect is guard
    skip = og.skip_microbatch if is_ours else optax.skip_not_finite
    inner = protect(optimizer.make(LEARNING_RATE))
    return optax.MultiSteps(inner, 2, should_skip_update_fn=skip)


def _partitioned(tx: Any) -> Any:
    other = optax.sgd(LEARNING_RATE, momentum=0.5)
    return optax.partition({"tried": tx, "other": other}, {"b": "other", "w": "tried"})


def _raw_key_noise() -> Any:
    """Like ``optax.add_noise``, but its key is an old-style array of two uint32."""

    def update(updates, key, params=None):
        key, subkey = jax.random.split(key)
        noise = 0.1 * jax.random.normal(subkey, ())
        return jax.tree.map(lambda leaf: leaf + noise, updates), key

    return optax.GradientTransformation(lambda params: jax.random.PRNGKey(1), update)


def _sam(tx: Any, **options: Any) -> Any:
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.01))
    return optax.contrib.sam(tx, adversary, **options)


CONTEXTS = {
    context.name: context
    for context in (
        Context("plain", _around(lambda tx: tx)),
        Context("inject_hyperparams", _injected),
        Context("masked", _around(lambda tx: optax.masked(tx, {"b": False, "w": True}))),
        Context("partition", _around(_partitioned)),
        Context(
            "noise (typed key)",
            _around(lambda tx: optax.chain(optax.add_noise(0.1, 0.55, jax.random.key(1)), tx)),
        ),
        Context("noise (raw key)", _around(lambda tx: optax.chain(_raw_key_noise(), tx))),
        Context("around MultiSteps", _around(lambda tx: optax.MultiSteps(tx, 2))),
        Context("inside MultiSteps", _inside_multi_steps),
        Context(
            "reduce_on_plateau",
            _around(lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau(patience=2))),
            extra_args=("value",),
        ),
        Context(
            "lookahead", _around(lambda tx: optax.lookahead(tx, 3, 0.5)), has_lookahead=True
        ),
        Context(
            "schedule_free", _around(lambda tx: optax.contrib.schedule_free(tx, LEARNING_RATE))
        ),
        Context("mechanize", _around(lambda tx: optax.contrib.mechanize(tx))),
        Context("SAM", _around(_sam)),
        Context(
            "SAM (opaque)",
            _around(lambda tx: _sam(tx, opaque_mode=True)),
            extra_args=("grad_fn",),
        ),
    )
}
# Those of the quick matrix: with and without a count, parameters or extra arguments in the state.
FEW = ("adamw", "sgd", "momo")


# Faults

VALUES = {"NaN": np.nan, "+Inf": np.inf, "-Inf": -np.inf}
PLACES = ("element", "leaf", "all", "loss")
LONG = "1000 in a row"
SCHEDULES: dict[str, list[bool]] = {
    "step 0": [True] + [False] * NUM_HEALTHY,
    "1 step": [False] * 3 + [True] + [False] * (NUM_HEALTHY - 3),
    "5 in a row": [False] * 3 + [True] * 5 + [False] * (NUM_HEALTHY - 3),
    "20 in a row": [False] * 3 + [True] * 20 + [False] * (NUM_HEALTHY - 3),
    LONG: [False] * 3 + [True] * 1000 + [False] * (NUM_HEALTHY - 3),
    "alternating": [True, False] * NUM_HEALTHY,
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong in a run: ``value`` at ``place`` of the gradients, in these steps."""

    value: str
    place: str
    schedule: str


def faults(optimizer: Optimizer, context: Context, *, is_quick: bool) -> list[Fault]:
    """All combinations that make sense; a bad loss only where somebody reads the loss."""
    reads_loss = "value" in optimizer.extra_args + context.extra_args
    places = [place for place in PLACES if place != "loss" or reads_loss]
    every = [Fault(*parts) for parts in itertools.product(VALUES, places, SCHEDULES)]
    long_ones = [fault for fault in every if fault.schedule == LONG]
    left_out = set(long_ones[1:]) if is_quick else set()
    return [fault for fault in every if fault not in left_out]


def _fault_tables(is_per_example: bool) -> tuple[Any, jax.Array]:
    """What is added to gradients and loss; row 0 is nothing, then one row a (value, place)."""
    shape_of = lambda leaf: (2, *leaf.shape) if is_per_example else leaf.shape  # noqa: E731
    nothing = jax.tree.map(lambda leaf: np.zeros(shape_of(leaf), np.float32), PARAMS)
    trees, losses = [nothing], [0.0]
    for value, place in itertools.product(VALUES.values(), PLACES):
        tree = jax.tree.map(np.copy, nothing)
        if place == "element":
            tree["w"].flat[4] = value
        if place in ("leaf", "all"):
            tree["b"][...] = value
        if place == "all":
            tree["w"][...] = value
        trees.append(tree)
        losses.append(value if place == "loss" else 0.0)
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)
    return stacked, jnp.asarray(losses, jnp.float32)


# Runs


def guard(tx: Any) -> Any:
    return og.guard(tx, max_consecutive_skips=PATIENCE)


def apply_if_finite(tx: Any) -> Any:
    return optax.apply_if_finite(tx, PATIENCE)


def unprotected(tx: Any) -> Any:
    return tx


def _loss(params: Any, noise: jax.Array) -> jax.Array:
    """A bowl that is tilted differently in each step."""
    parts = [jnp.sum((leaf - 0.3) ** 2 + noise * jnp.sin(leaf)) for leaf in jax.tree.leaves(params)]
    return 0.5 * sum(parts)


class Run:
    """One optimizer in one context under one protection, compiled once for all faults."""

    def __init__(self, protect: Protect, optimizer: Optimizer, context: Context):
        self.tx = context.build(protect, optimizer)
        self.optimizer = optimizer
        self.context = context
        self.params = PARAMS
        if context.has_lookahead:
            self.params = optax.LookaheadParams.init_synced(PARAMS)
        self.fault_tables = _fault_tables(optimizer.is_per_example)
        self.longest = max(map(len, SCHEDULES.values()))
        self._compiled = jax.jit(self._run)

    def _step(self, params: Any, state: Any, noise: jax.Array, fault: jax.Array) -> Any:
        own = params.fast if self.context.has_lookahead else params
        loss = functools.partial(_loss, noise=noise)
        value, gradients = jax.value_and_grad(loss)(own)
        if self.optimizer.is_per_example:
            gradients = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), gradients)
        bad_gradients, bad_values = self.fault_tables
        gradients = jax.tree.map(lambda leaf, bad: leaf + bad[fault], gradients, bad_gradients)
        every = {
            "value": value + bad_values[fault],
            "grad": gradients,
            "value_fn": loss,
            "obj_fn": loss,
            "grad_fn": lambda params, step: jax.grad(loss)(params),
        }
        wanted = self.optimizer.extra_args + self.context.extra_args
        extra_args = {name: every[name] for name in wanted}
        updates, state = self.tx.update(gradients, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    def _run(self, params: Any, state: Any, noises: Any, kinds: Any, num_steps: Any) -> Any:
        body = lambda i, carry: self._step(*carry, noises[i], kinds[i])  # noqa: E731
        return lax.fori_loop(0, num_steps, body, (params, state))

    def __call__(self, fault: Fault | None) -> tuple[Any, Any]:
        """Parameters and state after all healthy steps, with the faulty ones between them."""
        row, is_faulty = 0, [False] * NUM_HEALTHY
        if fault is not None:
            kinds = list(itertools.product(VALUES, PLACES))
            row = 1 + kinds.index((fault.value, fault.place))
            is_faulty = SCHEDULES[fault.schedule]
        healthy = iter(np.random.default_rng(0).normal(size=NUM_HEALTHY))
        noises, kinds = np.zeros(self.longest, np.float32), np.zeros(self.longest, np.int32)
        for step, is_bad in enumerate(is_faulty):
            noises[step] = 0.1 if is_bad else next(healthy)
            kinds[step] = row if is_bad else 0
        state = self.tx.init(self.params)
        return self._compiled(self.params, state, noises, kinds, len(is_faulty))


def _without_counters(state: Any) -> Any:
    """A state without what its protection counts for itself."""
    counting = (og.GuardState, optax.ApplyIfFiniteState, optax.MultiStepsState)

    def strip(node):
        if isinstance(node, optax.MultiStepsState):
            rest = node._replace(skip_state=())
            return (*rest[:2], _without_counters(rest.inner_opt_state), rest.acc_grads)
        return _without_counters(node.inner_state) if isinstance(node, counting) else node

    return jax.tree.map(strip, state, is_leaf=lambda node: isinstance(node, counting))


def kept_bits(params: Any, state: Any) -> list[bytes]:
    """What a skip must not change."""
    leaves = jax.tree.leaves((params, _without_counters(state)))
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    arrays = [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in leaves]
    return [np.asarray(array).tobytes() for array in arrays]


# Cells


@dataclasses.dataclass(frozen=True)
class Cell:
    """The outcome of one cell; ``problem`` is empty if it passed."""

    optimizer: str
    context: str
    fault: Fault
    problem: str


def try_cells(
    protect: Protect, optimizer: Optimizer, context: Context, *, is_quick: bool
) -> list[Cell]:
    """All faults for one optimizer in one context."""

    def cell(fault, problem):
        return Cell(optimizer.name, context.name, fault, problem)

    tried = faults(optimizer, context, is_quick=is_quick)
    try:
        run = Run(protect, optimizer, context)
        params, state = run(None)
    except (TypeError, ValueError) as error:
        return [cell(fault, f"{type(error).__name__} without any fault") for fault in tried]
    start = kept_bits(run.params, run.tx.init(run.params))
    healthy = kept_bits(params, state)
    finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params))
    if not finite or healthy == start:
        return [cell(fault, "the healthy run goes wrong") for fault in tried]
    results = []
    for fault in tried:
        same = kept_bits(*run(fault)) == healthy
        results.append(cell(fault, "" if same else "differs from the healthy run"))
    return results
