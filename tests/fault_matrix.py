"""Every optimizer of Optax, in every context, under every fault: does a skip leave no trace?

    python tests/fault_matrix.py [--quick] [--peer] [--json FILE]

A cell is one optimizer in one context under one fault. It passes if the run with faulty steps ends,
bit for bit, with the parameters and the optimizer state with which the same compiled function
ends that saw only the healthy steps. ``--quick`` takes every optimizer alone and a few of them in
every context; ``--peer`` adds the same cells for ``optax.apply_if_finite`` with the same patience
of 100 bad steps. A quarter of an hour on one core. ``--json`` keeps the counts for
``python -m benchmarks.summary``. Expected: every cell of the guard passes.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import functools
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from optimizers import CONTEXTS, FEW, UNSUPPORTED, Context, Optimizer, Protection, discover

import optax_guard as og

PATIENCE = 100
NUM_HEALTHY = 8
PARAMS = {
    "b": jnp.array([0.5, -1.5, 2.0]),
    "w": jnp.linspace(-2.0, 2.0, 12, dtype=jnp.float32).reshape(4, 3),
}


# Faults

VALUES = {"NaN": np.nan, "+Inf": np.inf, "-Inf": -np.inf}
PLACES = ("element", "leaf", "all", "loss")
SCHEDULES: dict[str, list[bool]] = {
    "step 0": [True] + [False] * NUM_HEALTHY,
    "1 step": [False] * 3 + [True] + [False] * (NUM_HEALTHY - 3),
    "5 in a row": [False] * 3 + [True] * 5 + [False] * (NUM_HEALTHY - 3),
    "20 in a row": [False] * 3 + [True] * 20 + [False] * (NUM_HEALTHY - 3),
    "1000 in a row": [False] * 3 + [True] * 1000 + [False] * (NUM_HEALTHY - 3),
    "alternating": [True, False] * NUM_HEALTHY,
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong in a run: ``value`` at ``place`` of the gradients, in these steps."""

    value: str
    place: str
    schedule: str


def faults(optimizer: Optimizer, context: Context) -> list[Fault]:
    """All combinations that make sense; a bad loss only where somebody reads the loss."""
    reads_loss = "value" in optimizer.extra_args + context.extra_args and not context.hides_loss
    places = [place for place in PLACES if place != "loss" or reads_loss]
    return [Fault(*parts) for parts in itertools.product(VALUES, places, SCHEDULES)]


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


GUARD = Protection(
    "optax_guard.guard",
    lambda tx, check_update: og.guard(
        tx, max_consecutive_skips=PATIENCE, check_update=check_update
    ),
    og.skip_microbatch,
)
# It has nothing like check_update; those cells are tried without.
PEER = Protection(
    "optax.apply_if_finite",
    lambda tx, check_update: optax.apply_if_finite(tx, PATIENCE),
    optax.skip_not_finite,
)
NOTHING = Protection("no protection", lambda tx, check_update: tx, None)


def _loss(params: Any, noise: jax.Array) -> jax.Array:
    """A bowl that is tilted differently in each step."""
    parts = [jnp.sum((leaf - 0.3) ** 2 + noise * jnp.sin(leaf)) for leaf in jax.tree.leaves(params)]
    return 0.5 * sum(parts)


class Run:
    """One optimizer in one context under one protection, compiled once for all faults."""

    def __init__(self, protect: Protection, optimizer: Optimizer, context: Context):
        self.tx = context.build(protect, optimizer)
        self.optimizer = optimizer
        self.context = context
        self.params = PARAMS
        if context.has_lookahead:
            self.params = optax.LookaheadParams.init_synced(PARAMS)
        self.state = self.tx.init(self.params)
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
        row, is_faulty = 0, np.zeros(NUM_HEALTHY, np.bool_)
        if fault is not None:
            row = 1 + list(itertools.product(VALUES, PLACES)).index((fault.value, fault.place))
            is_faulty = np.array(SCHEDULES[fault.schedule])
        noises, kinds = np.zeros(self.longest, np.float32), np.zeros(self.longest, np.int32)
        noises[: len(is_faulty)][is_faulty] = 0.1
        noises[: len(is_faulty)][~is_faulty] = np.random.default_rng(0).normal(size=NUM_HEALTHY)
        kinds[: len(is_faulty)][is_faulty] = row
        return self._compiled(self.params, self.state, noises, kinds, len(is_faulty))


def _without_counters(state: Any) -> Any:
    """A state without what its protection counts for itself."""
    counting = (og.states.GuardState, optax.ApplyIfFiniteState, optax.MultiStepsState)

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


def try_cells(protect: Protection, optimizer: Optimizer, context: Context) -> list[Cell]:
    """All faults for one optimizer in one context."""
    tried = faults(optimizer, context)
    try:
        run = Run(protect, optimizer, context)
        params, state = run(None)
    except (TypeError, ValueError) as error:
        problems = [f"{type(error).__name__} without any fault"] * len(tried)
    else:
        expected = kept_bits(params, state)
        has_moved = expected != kept_bits(run.params, run.state)
        is_finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params))
        if has_moved and is_finite:
            problems = [
                "" if kept_bits(*run(fault)) == expected else "not where the healthy run ends"
                for fault in tried
            ]
        else:
            problems = ["the healthy run goes wrong"] * len(tried)
    return [
        Cell(optimizer.name, context.name, fault, problem)
        for fault, problem in zip(tried, problems, strict=True)
    ]


def combinations(*, is_quick: bool) -> list[tuple[Optimizer, Context]]:
    """What to try; quick: every optimizer alone, a few of them in every context."""
    pairs = itertools.product(discover().values(), CONTEXTS.values())
    return [
        (optimizer, context)
        for optimizer, context in pairs
        if (optimizer.name, context.name) not in UNSUPPORTED
        and (not is_quick or context.name == "plain" or optimizer.name in FEW)
    ]


# The table


def _row(name: str, cells: list[Cell]) -> str:
    passed = sum(not cell.problem for cell in cells)
    mark = "" if passed == len(cells) else f"   {len(cells) - passed} fail"
    return f"  {name:22} {len(cells):7} {passed:7}{mark}"


def table(title: str, cells: list[Cell]) -> str:
    """Cells tried and passed, by context, schedule, value and place."""
    groupings = {
        "context": lambda cell: cell.context,
        "schedule": lambda cell: cell.fault.schedule,
        "value": lambda cell: cell.fault.value,
        "place": lambda cell: cell.fault.place,
    }
    lines = [title, f"  {'':22} {'tried':>7} {'passed':>7}"]
    for name, key in groupings.items():
        lines.append(f" by {name}")
        groups = dict.fromkeys(map(key, cells))
        lines += [_row(group, [cell for cell in cells if key(cell) == group]) for group in groups]
    lines.append(_row("all", cells))
    whole = {(cell.optimizer, cell.context): cell.problem for cell in cells}
    raised = [f"{name} in {place}" for (name, place), p in whole.items() if "without" in p]
    if raised:
        lines.append(f" raises without any fault: {', '.join(raised)}")
    return "\n".join(lines)


def counts(protection: str, cells: list[Cell]) -> list[dict[str, Any]]:
    """Cells tried and passed, one row a context."""
    tried = collections.Counter(cell.context for cell in cells)
    passed = collections.Counter(cell.context for cell in cells if not cell.problem)
    optimizers = {
        context: len({cell.optimizer for cell in cells if cell.context == context})
        for context in tried
    }
    return [
        {
            "protection": protection,
            "context": context,
            "optimizers": optimizers[context],
            "tried": tried[context],
            "passed": passed[context],
        }
        for context in tried
    ]


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """The counts, with the versions that they hold for."""
    versions = {"jax": jax.__version__, "optax": optax.__version__, "optax_guard": og.__version__}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    record = {"benchmark": "fault_matrix", "date": date, "versions": versions, "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; the exit status is the number of cells that the guard fails, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few optimizers in the contexts")
    parser.add_argument("--peer", action="store_true", help="also try optax.apply_if_finite")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep the counts")
    options = parser.parse_args(argv)
    pairs = combinations(is_quick=options.quick)
    failed, rows = False, []
    for protect in (GUARD, PEER) if options.peer else (GUARD,):
        start, cells = time.perf_counter(), []
        for number, (optimizer, context) in enumerate(pairs, 1):
            note = f"{protect.name} {number}/{len(pairs)}: {optimizer.name}, {context.name}"
            print(f"\r{note:70}", end="", file=sys.stderr, flush=True)
            cells += try_cells(protect, optimizer, context)
        print("\r", end="", file=sys.stderr)
        print(table(f"{protect.name} ({time.perf_counter() - start:.0f} s)", cells))
        failed |= protect is GUARD and any(cell.problem for cell in cells)
        rows += counts(protect.name, cells)
    if options.json:
        save(options.json, rows)
    print(f"Not tried, because Optax alone fails there: {len(UNSUPPORTED)} combinations.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
