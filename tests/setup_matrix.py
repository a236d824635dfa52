"""Every public transformation in every setup that people have: right, or refused in words.

    python tests/setup_matrix.py [--quick]

A cell is one transformation of ``registry.py`` in one setup. It is right if its updates, and what
``og.metrics`` reads of its state, are those of a plain run: the whole arrays on one device, the
trained parameters alone, the mean of the micro-batches. It is refused if it raises, and then the
words are those of ``refusal``. ``--quick`` takes the cells of the default test suite. About five
minutes on one core. Expected: no cell is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import assertions
import conftest  # noqa: F401  virtual devices, before the first array
import jax
import jax.numpy as jnp
import numpy as np
import optax
import registry
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import Row

import optax_guard as og

# float32 sums of a few dozen terms in another order, through eight steps of statistics.
TOLERANCE = 1e-4
NUM_STEPS, SPIKE, BAD = 6, 3, 4  # the last two: which step is 30 times as long, and which is NaN
ROWS = [row for row in registry.ROWS if not row.is_variant]
BY_UNIT = ("clip_by_param_norm", "clip_params_by_norm")
LOSS = 1.5


def is_by_unit(row: Row) -> bool:
    return row.name in BY_UNIT or row.name.endswith(("-unit", "-callable"))


def tree(seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    named = shapes or {"bias": (4,), "down": (4, 2), "up": (2, 4)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in named.items()}


PARAMS = tree(0)


def gradients() -> dict[str, jax.Array]:
    """Stacked over steps. The NaN is on the last device of each layout."""
    steps = [tree(1 + step) for step in range(NUM_STEPS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves).at[SPIKE].multiply(30), *steps)
    return stacked | {"down": stacked["down"].at[BAD, 3, 1].set(jnp.nan)}


GRADIENTS = gradients()


def run(tx: Any, params: Any, stacked: Any, **extra_args: Any) -> tuple[Any, Any]:
    """Updates of all steps, stacked, and the metrics after the last."""

    def body(state, updates):
        updates, state = tx.update(updates, state, params, **extra_args)
        return state, updates

    state, updates = lax.scan(body, tx.init(params), stacked)
    return updates, og.metrics(state)


def compiled(function: Callable[..., Any]) -> Any:
    """Compiled in a hurry: half the time, and these arrays are small."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=options)


@functools.cache
def plain_run(name: str) -> tuple[Any, Any]:
    """On one device, with all arrays whole."""
    return compiled(functools.partial(run, _row(name).make()))(PARAMS, GRADIENTS)


def _row(name: str) -> Row:
    return next(row for row in registry.ROWS if row.name == name)


# Setups: each gives what a row makes there, and what it should make.

Outcome = tuple[Any, Any]
Layout = Mapping[str, P]
ROWS_SPLIT: Layout = {"bias": P(), "down": P("model"), "up": P("model")}
COLUMNS_SPLIT: Layout = {"bias": P("model"), "down": P(None, "model"), "up": P(None, "model")}
BOTH_SPLIT: Layout = {"bias": P(), "down": P("data", "model"), "up": P(None, ("data", "model"))}


def _mesh(**sizes: int) -> Any:
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def _in_shard_map(row: Row, layout: Layout, axis_name: Any, mesh: Any, **options: Any) -> Outcome:
    after_steps = {name: P(None, *spec) for name, spec in layout.items()}
    make = row.make if axis_name is None else functools.partial(row.make, axis_name=axis_name)
    mapped = jax.shard_map(
        lambda params, stacked: run(make(), params, stacked),
        mesh=mesh,
        in_specs=(dict(layout), after_steps),
        out_specs=(after_steps, P()),
        **options,
    )
    return compiled(mapped)(PARAMS, GRADIENTS), plain_run(row.name)


def _except_bias(path: str, leaf: Any) -> str | None:
    return None if path == "bias" else "model"


def rows_split(row: Row) -> Outcome:
    """Kernels split along their inputs, biases on every device."""
    return _in_shard_map(row, ROWS_SPLIT, "model", _mesh(model=2))


def rows_split_without_types(row: Row) -> Outcome:
    """The same where types do not tell."""
    return _in_shard_map(row, ROWS_SPLIT, _except_bias, _mesh(model=2), check_vma=False)


def columns_split(row: Row) -> Outcome:
    """Kernels split along their outputs, so that units are dealt out to the devices."""

    def but_for_units(path, leaf):
        return "model" if leaf.ndim == 1 else None

    axis_name = but_for_units if is_by_unit(row) else "model"
    return _in_shard_map(row, COLUMNS_SPLIT, axis_name, _mesh(model=2))


def two_axes(row: Row) -> Outcome:
    """Each array split over mesh axes of its own."""

    def but_for_units(path, leaf):
        return {"bias": None, "down": "data", "up": None}[path]

    axis_name = but_for_units if is_by_unit(row) else ("data", "model")
    return _in_shard_map(row, BOTH_SPLIT, axis_name, _mesh(data=2, model=2))


def unnamed_axis(row: Row) -> Outcome:
    """Split, and nobody said so."""
    return _in_shard_map(row, ROWS_SPLIT, None, _mesh(model=2))


def in_pmap(row: Row) -> Outcome:
    """As ``rows_split``, by ``pmap``."""
    axes = {"bias": None, "down": 0, "up": 0}
    later = {"bias": None, "down": 1, "up": 1}
    split = lambda leaf, axis: (  # noqa: E731
        leaf if axis is None else jnp.stack(jnp.split(leaf, 2, axis), axis)
    )
    mapped = jax.pmap(
        functools.partial(run, row.make(axis_name=_except_bias)),
        axis_name="model",
        in_axes=(axes, later),
        devices=jax.devices()[:2],
    )
    none = lambda leaf: leaf is None  # noqa: E731
    params, stacked = (
        jax.tree.map(lambda axis, leaf: split(leaf, axis), tree_of_axes, whole, is_leaf=none)
        for tree_of_axes, whole in ((axes, PARAMS), (later, GRADIENTS))
    )
    updates, metrics = mapped(params, stacked)
    joined = {
        name: leaf[0] if later[name] is None else jnp.concatenate(list(leaf), 1)
        for name, leaf in updates.items()
    }
    return (joined, jax.tree.map(lambda leaf: leaf[1], metrics)), plain_run(row.name)


def _on_explicit_mesh(row: Row, layout: Layout, *, is_set: bool) -> Outcome:
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def place(leaf, spec):
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    params = {name: place(leaf, layout[name]) for name, leaf in PARAMS.items()}
    stacked = {name: place(leaf, P(None, *layout[name])) for name, leaf in GRADIENTS.items()}
    function = compiled(functools.partial(run, row.make()))
    if not is_set:
        return function(params, stacked), plain_run(row.name)
    with jax.set_mesh(mesh):
        return function(params, stacked), plain_run(row.name)


def explicit_columns(row: Row) -> Outcome:
    """A mesh of explicit axes that nobody has set."""
    return _on_explicit_mesh(row, COLUMNS_SPLIT, is_set=False)


def explicit_both(row: Row) -> Outcome:
    """A mesh of explicit axes, set, and arrays split along all dimensions."""
    return _on_explicit_mesh(row, BOTH_SPLIT, is_set=True)


TRAINED = {"up": PARAMS["up"], "down": PARAMS["down"]}
IS_TRAINED = {"bias": False, "down": True, "up": True}


def _trained(whole: Any) -> Any:
    return {name: whole[name] for name in TRAINED}


def _alone(row: Row, make: Callable[..., Any]) -> Any:
    """What the trained parameters do without the others."""
    return compiled(functools.partial(run, make()))(_trained(PARAMS), _trained(GRADIENTS))


def _compare_trained(row: Row, actual: Any, expected: Any) -> Outcome:
    (updates, metrics), (alone, metrics_alone) = actual, expected
    assert updates["bias"] is None or not np.any(np.asarray(updates["bias"]))
    shared = set(metrics_alone) & set(metrics)
    assert shared
    keep = lambda found: {key: found[key] for key in shared}  # noqa: E731
    return (_trained(updates), keep(metrics)), (alone, keep(metrics_alone))


def _sgd() -> optax.GradientTransformation:
    return optax.sgd(0.1)


def frozen_group(row: Row) -> Outcome:
    """``optax.partition`` with ``set_to_zero``, and NaN in the gradient of what is frozen."""
    labels = {name: "train" if is_trained else "freeze" for name, is_trained in IS_TRAINED.items()}

    def partition(tx):
        return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)

    wrap = row.wrap
    if row.name == "clip_by_update_ratio":  # which gradients are used is for a guard to find out
        wrap = lambda tx: og.guard(og.clip_by_update_ratio(tx, warmup_steps=3))  # noqa: E731
    tx = partition(row.make()) if wrap is None else wrap(partition(_sgd()))
    stacked = GRADIENTS | {"bias": GRADIENTS["bias"].at[1].set(jnp.nan)}
    actual = compiled(functools.partial(run, tx))(PARAMS, stacked)
    alone = _alone(row, row.make if wrap is None else lambda: wrap(_sgd()))
    if wrap is None:
        metrics = {key.replace("/train/", "/"): value for key, value in actual[1].items()}
        actual = (actual[0], metrics)
    return _compare_trained(row, actual, alone)


def missing_gradients(row: Row) -> Outcome:
    """``None`` where there is a parameter, as Equinox gives it."""
    wrap = row.wrap
    make = row.make if wrap is None else lambda: wrap(_sgd())
    stacked = GRADIENTS | {"bias": None}
    actual = compiled(functools.partial(run, make()))(PARAMS, stacked)
    return _compare_trained(row, actual, _alone(row, make))


def quantised_base(row: Row) -> Outcome:
    """int8 weights beside the trained ones."""
    wrap = row.wrap
    masked = lambda: optax.masked(_sgd(), IS_TRAINED)  # noqa: E731
    tx = row.make() if wrap is None else wrap(masked())
    base = jnp.ones((3,), jnp.int8)
    stacked = GRADIENTS | {"bias": jnp.zeros((NUM_STEPS, 3), jnp.int8)}
    actual = compiled(functools.partial(run, tx))(PARAMS | {"bias": base}, stacked)
    return _compare_trained(
        row, actual, _alone(row, row.make if wrap is None else lambda: wrap(_sgd()))
    )


def mask_of_minus_infinity(row: Row) -> Outcome:
    """A parameter that is -inf by design, without a gradient worth the name."""
    wrap = row.wrap
    make = row.make if wrap is None else lambda: wrap(_sgd())
    params = PARAMS | {"bias": jnp.array([0.0, -jnp.inf])}
    stacked = GRADIENTS | {"bias": jnp.zeros((NUM_STEPS, 2))}
    updates, metrics = compiled(functools.partial(run, make()))(params, stacked)
    updates = updates | {"bias": jnp.zeros(2)}  # add_l1 pulls at what is left of it
    return _compare_trained(row, (updates, metrics), _alone(row, make))


def in_multi_steps(row: Row) -> Outcome:
    """Every micro-batch twice, in ``MultiSteps`` that leaves out the bad ones."""
    tx = optax.MultiSteps(row.make(), 2, should_skip_update_fn=og.skip_microbatch)
    twice = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), GRADIENTS)
    updates, metrics = compiled(functools.partial(run, tx))(PARAMS, twice)
    good = jax.tree.map(lambda leaf: jnp.delete(leaf, BAD, axis=0), GRADIENTS)
    expected, expected_metrics = compiled(functools.partial(run, row.make()))(PARAMS, good)
    updates = jax.tree.map(lambda leaf: jnp.delete(leaf[1::2], BAD, axis=0), updates)
    keep = lambda found: {key: found[key] for key in expected_metrics}  # noqa: E731
    return (updates, keep(metrics)), (expected, expected_metrics)


def around_multi_steps(row: Row) -> Outcome:
    """A wrapper around ``MultiSteps``; it leaves out the bad micro-batches by itself."""
    if row.wrap is None or row.name == "guard-conditions":  # whose spikes are half a window
        return in_multi_steps(row)
    tx = row.wrap(optax.MultiSteps(_sgd(), 2))
    twice = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), GRADIENTS)
    updates, _ = compiled(functools.partial(run, tx))(PARAMS, twice)
    at = np.delete(np.arange(NUM_STEPS), BAD)
    mean = jax.tree.map(lambda leaf: -0.1 * leaf[at], GRADIENTS)
    if row.name in ("backoff", "rollback", "dynamic_loss_scale"):  # which react to a bad one
        at = at[:BAD]
        mean = jax.tree.map(lambda leaf: leaf[:BAD], mean)
    return (jax.tree.map(lambda leaf: leaf[1::2][at], updates), ()), (mean, ())


LOSSES = {
    "python float": LOSS,
    "numpy scalar": np.float32(LOSS),
    "numpy array": np.array(LOSS),
    "bfloat16": jnp.bfloat16(LOSS),
    "int": 1,
    "bool": True,
}


def losses_of_any_real_type(row: Row) -> Outcome:
    """All change nothing. Traced only, but for one of them."""
    first = jax.tree.map(lambda leaf: leaf[0], GRADIENTS)

    def step(value):
        tx = row.make()
        return tx.update(first, tx.init(PARAMS), PARAMS, value=value)

    shapes = {name: jax.eval_shape(lambda v=value: step(v)) for name, value in LOSSES.items()}
    plain = jax.eval_shape(lambda: step(jnp.float32(LOSS)))
    for name, found in shapes.items():
        assert jax.tree.leaves(found) == jax.tree.leaves(plain), name
    return (), ()


def loss_with_aux(row: Row) -> Outcome:
    """What ``value_and_grad(has_aux=True)`` returns."""
    tx = row.make()
    value = (jnp.float32(LOSS), {"accuracy": jnp.float32(1)})
    jax.eval_shape(lambda: run(tx, PARAMS, GRADIENTS, value=value))
    return (), ()


def loss_of_each_example(row: Row) -> Outcome:
    """A vector."""
    tx = row.make()
    jax.eval_shape(lambda: run(tx, PARAMS, GRADIENTS, value=jnp.ones(4)))
    return (), ()


SETUPS: dict[str, Callable[[Row], Outcome]] = {
    "shard_map, rows": rows_split,
    "shard_map, no types": rows_split_without_types,
    "shard_map, columns": columns_split,
    "shard_map, two axes": two_axes,
    "shard_map, unnamed": unnamed_axis,
    "pmap": in_pmap,
    "explicit mesh": explicit_columns,
    "explicit mesh, set": explicit_both,
    "frozen group": frozen_group,
    "gradients None": missing_gradients,
    "int8 base": quantised_base,
    "mask of -inf": mask_of_minus_infinity,
    "in MultiSteps": in_multi_steps,
    "around MultiSteps": around_multi_steps,
    "loss of any type": losses_of_any_real_type,
    "loss with aux": loss_with_aux,
    "loss of examples": loss_of_each_example,
}

GUARDED = ("guard-adam", "guard-conditions", "guard-check_update", "backoff", "rollback")
NOT_SHARED = ("clip_params", "add_l1", "zero_nonfinite")


def refusal(setup: str, row: Row) -> str | None:
    """The words with which a cell must be refused; None where it must be right."""
    if setup == "shard_map, unnamed" and row.name not in NOT_SHARED:
        return r"'down' differs .*'model'.*axis_name='model'"
    if setup == "around MultiSteps" and row.name == "clip_by_update_ratio":
        return r"MultiSteps\(og.stabilize\(optimizer\), k\)"
    if setup.startswith("loss ") and setup != "loss of any type" and row.name in GUARDED:
        return "value= must be the loss, a real scalar"
    return None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One transformation in one setup."""

    setup: str
    row: Row

    @property
    def id(self) -> str:
        return f"{self.setup}-{self.row.name}"

    def check(self) -> None:
        """Raises unless the cell is right, or refused as it should be."""
        words = refusal(self.setup, self.row)
        if words is None:
            actual, expected = SETUPS[self.setup](self.row)
            assertions.assert_close(actual, expected, rtol=TOLERANCE, atol=1e-6)
            return
        try:
            SETUPS[self.setup](self.row)
        except (TypeError, ValueError) as error:
            assert re.search(words, str(error), re.DOTALL), f"refused in other words: {error}"
        else:
            raise AssertionError("accepted")


IS_CHEAP = ("loss of any type", "loss with aux", "loss of examples", "shard_map, unnamed")


def cells(*, is_quick: bool) -> list[Cell]:
    """All, or each setup for every sixteenth transformation, and what is only traced for all."""
    return [
        Cell(setup, row)
        for number, setup in enumerate(SETUPS)
        for place, row in enumerate(ROWS)
        if not is_quick or setup in IS_CHEAP or (number + place) % 16 == 0
    ]


def main(argv: list[str] | None = None) -> int:
    """Prints the table; the exit status is 1 if a cell is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="every sixteenth transformation")
    options = parser.parse_args(argv)
    marks: dict[tuple[str, str], str] = {}
    problems = []
    for cell in cells(is_quick=options.quick):
        print(f"\r{cell.id:60}", end="", file=sys.stderr, flush=True)
        mark = "." if refusal(cell.setup, cell.row) is None else "r"
        try:
            cell.check()
        except Exception as error:
            mark = "X"
            problems.append(f"{cell.id}: {type(error).__name__}: {str(error)[:400]}")
        marks[cell.setup, cell.row.name] = mark
    print("\r", end="", file=sys.stderr)
    names = list(SETUPS)
    print("  ".join(f"{number} {name}" for number, name in enumerate(names)))
    print(f"{'':24}" + " ".join(f"{number:2}" for number in range(len(names))))
    for row in ROWS:
        found = " ".join(f"{marks.get((name, row.name), ''):>2}" for name in names)
        print(f"{row.name:24}{found}")
    print(". right   r refused in words   X wrong")
    print("\n".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
