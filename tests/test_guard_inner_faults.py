"""What the optimizer itself breaks, from finite gradients: with ``check_update`` and without."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og

PROPOSAL = 4


@dataclasses.dataclass(frozen=True)
class Fault:
    """An optimizer, and finite gradients that break it.

    Attributes:
      name: pytest id.
      make: builds the optimizer.
      healthy: gradients of the steps before and after.
      breaking: those of the step that breaks it.
      breaks_update: whether the update becomes non-finite.
      breaks_state: whether the state does.
    """

    name: str
    make: Callable[[], Any]
    healthy: Any
    breaking: Any
    breaks_update: bool = True
    breaks_state: bool = False


def tree(value: float, dtype: Any = jnp.float32) -> dict[str, Any]:
    return {"a": jnp.full((3,), value, dtype), "b": jnp.full((2, 2), -value, dtype)}


def in_leaf_b(value: float) -> dict[str, Any]:
    healthy = tree(1.0)
    return healthy | {"b": healthy["b"].at[0, 1].set(value)}


FAULTS = [
    # eps = 1e-8 is 0 in float16, and so is the square of 1e-4: 0 / 0.
    Fault(
        "float16 Adam's eps underflows",
        lambda: optax.adam(0.1, b1=0.0, b2=0.0),
        tree(1.0, jnp.float16),
        tree(1e-4, jnp.float16),
    ),
    Fault(
        "learning rate times gradient overflows", lambda: optax.sgd(1e5), tree(1.0), in_leaf_b(1e35)
    ),
    Fault(
        "second moment overflows",
        lambda: optax.adam(0.1),
        tree(1.0),
        in_leaf_b(1e25),
        breaks_update=False,
        breaks_state=True,
    ),
    # 0.9 * 100 + 65504 rounds to more than float16 holds.
    Fault(
        "float16 momentum overflows",
        lambda: optax.sgd(1e-3, momentum=0.9),
        tree(100.0, jnp.float16),
        tree(65504.0, jnp.float16),
        breaks_state=True,
    ),
    Fault(
        "ratio of zeros",
        lambda: optax.chain(optax.contrib.normalize(), optax.sgd(0.1)),
        tree(1.0),
        tree(0.0),
    ),
]

each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)


def params_of(fault: Fault) -> Any:
    return jax.tree.map(jnp.ones_like, fault.healthy)


@functools.cache
def stepper(tx: Any) -> Any:
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def walk(tx: Any, steps: Any, params: Any) -> list[tuple[Any, Any]]:
    """Parameters and state at the start and after every step."""
    trail = [(params, tx.init(params))]
    for gradients in steps:
        trail.append(stepper(tx)(*trail[-1], gradients))
    return trail


def is_finite(tree: Any) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)


@each_fault
def test_bare_optimizer_breaks(fault):
    params = params_of(fault)
    trail = walk(fault.make(), [fault.healthy, fault.breaking], params)
    assert is_finite(fault.breaking)
    assert is_finite(trail[1])
    after, state = trail[2]
    assert (is_finite(after), is_finite(state)) == (not fault.breaks_update, not fault.breaks_state)


@each_fault
def test_checked_update_prevents_it(fault):
    tx = og.guard(fault.make(), check_update=True)
    params = params_of(fault)
    trail = walk(tx, [fault.healthy, fault.breaking, fault.healthy], params)
    before, after, end = trail[1], trail[2], trail[3]
    assert before[1].skip_reason == 0
    assert after[1].skip_reason == PROPOSAL
    assert not after[1].gave_up
    assertions.assert_same_bits(after[0], before[0])
    assertions.assert_same_bits(after[1].inner_state, before[1].inner_state)
    assert end[1].skip_reason == 0
    healthy = walk(tx, [fault.healthy, fault.healthy], params)[-1]
    assertions.assert_same_bits(end[0], healthy[0])
    assertions.assert_same_bits(end[1].inner_state, healthy[1].inner_state)


def test_leaves_of_a_bad_update_are_named():
    tx = og.guard(optax.sgd(1e5), check_update=True, max_consecutive_skips=1)
    _, state = walk(tx, [in_leaf_b(1e35)], tree(1.0))[-1]
    assert state.last_fault_leaves.tolist() == [False, True]
    assert "non-finite: b" in og.explain(state, tree(1.0))
    with pytest.raises(og.GuardGaveUp, match="optimizer proposed") as caught:
        og.check(state, tree(1.0))
    assert caught.value.reason == PROPOSAL


# Schedules


def rate_at(step: int, value: float) -> Any:
    return lambda count: jnp.where(count == step, value, 0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_schedule_that_fails_once_stops_the_run_and_says_so(value):
    # The count of an accepted step is what moves the schedule on, so it fails for ever.
    tx = og.guard(optax.adam(rate_at(1, value)), check_update=True, max_consecutive_skips=3)
    trail = walk(tx, [tree(1.0)] * 5, tree(1.0))
    assert [int(state.skip_reason) for _, state in trail[1:]] == [0, 4, 4, 4, 4]
    assert [bool(state.gave_up) for _, state in trail[1:]] == [False, False, False, True, True]
    for params, state in trail[2:]:
        assertions.assert_same_bits(params, trail[1][0])
        assertions.assert_same_bits(state.inner_state, trail[1][1].inner_state)


# With the check off, poison is found at the next bad gradient


@pytest.mark.parametrize("breaks", ["params", "state"])
def test_without_the_check_the_optimizer_is_blamed_one_step_later(breaks):
    # The schedule poisons the parameters; a spike of 1e38 twice makes the momentum infinite, which
    # poisons them as well.
    rate = rate_at(1, np.nan) if breaks == "params" else 1e-3
    tx = og.guard(optax.sgd(rate, momentum=0.9))
    params = tree(1.0)
    state = tx.init(params)
    reasons, latched = [], []
    for number in range(5):
        gradients = jax.tree.map(lambda leaf: 2 * leaf, params)
        if breaks == "state" and number in (0, 1):
            gradients = tree(3e38)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        reasons.append(int(state.skip_reason))
        latched.append(bool(state.gave_up))
    assert reasons == [0, 0, 17, 17, 17]
    assert latched == [False, False, True, True, True]
    assert "already non-finite" in og.explain(state, params)


def test_with_the_check_poisoned_parameters_are_not_called_the_optimizers_fault_alone():
    tx = og.guard(optax.adamw(0.1), check_update=True)
    params = tree(1.0) | {"a": jnp.array([1.0, jnp.nan, 1.0])}
    _, state = tx.update(tree(1.0), tx.init(tree(1.0)), params)
    assert state.skip_reason == PROPOSAL + 16
    assert state.gave_up


# States that start with +inf

STARTS_INFINITE = {
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "lbfgs": lambda: optax.lbfgs(memory_size=2),
}


def quadratic(params: Any) -> Any:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def run_with_loss(tx: Any, params: Any, *, bad_step: int, num_steps: int = 4) -> tuple[Any, Any]:
    @jax.jit
    def step(params, state, factor):
        value, gradients = jax.value_and_grad(quadratic)(params)
        gradients = jax.tree.map(lambda leaf: leaf * factor, gradients)
        updates, state = tx.update(
            gradients, state, params, value=value, grad=gradients, value_fn=quadratic
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for number in range(num_steps):
        params, state = step(params, state, jnp.nan if number == bad_step else 1.0)
    return params, state


@pytest.mark.parametrize(
    ("name", "check_update", "bad_step"),
    [
        ("reduce_on_plateau", False, 0),
        ("reduce_on_plateau", True, 1),
        ("lbfgs", False, 1),
        ("lbfgs", True, 0),
    ],
)
def test_infinities_of_init_are_no_fault(name, check_update, bad_step):
    params = {"scalar": jnp.float32(2.0), "w": jnp.array([1.0, -1.0])}
    tx = og.guard(STARTS_INFINITE[name](), check_update=check_update)
    assert not is_finite(tx.init(params).inner_state)
    after, state = run_with_loss(tx, params, bad_step=bad_step)
    assert (state.skipped_total, state.last_fault_reason, bool(state.gave_up)) == (1, 1, False)
    assert is_finite(after)
    assert any(bool(jnp.any(leaf != params[name])) for name, leaf in after.items())


def test_infinity_of_init_excuses_nothing_else():
    # The best loss is a scalar, and so is a parameter with its moments.
    params = {"scalar": jnp.float32(2.0), "w": jnp.array([1.0, -1.0])}
    gradients = jax.tree.map(jnp.ones_like, params)
    inner = STARTS_INFINITE["reduce_on_plateau"]()
    tx = og.guard(inner)
    state = tx.init(params)
    poisoned = params | {"scalar": jnp.float32(jnp.nan)}
    bad = gradients | {"w": jnp.array([jnp.nan, 1.0])}
    _, after = tx.update(bad, state, poisoned, value=1.0)
    assert (after.skip_reason, bool(after.gave_up)) == (1 + 16, True)

    tx = og.guard(inner, check_update=True)
    spike = gradients | {"scalar": jnp.float32(1e25)}  # its second moment overflows
    _, after = tx.update(spike, tx.init(params), params, value=1.0)
    assert after.skip_reason == PROPOSAL


def test_flag_of_init_is_kept_per_leaf_of_state_and_parameters():
    params = {"w": jnp.array([0.0, -jnp.inf])}
    state = og.guard(STARTS_INFINITE["reduce_on_plateau"]()).init(params)
    leaves = jax.tree.leaves((state.inner_state, params))
    leaves = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    expected = [not bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves]
    assert state.initially_nonfinite.tolist() == expected
    assert sum(expected) == 2


# What stands in the state besides floats


def test_state_may_hold_keys_flags_and_literals():
    # DoG clears a flag of its state with the literal False; add_noise keeps a typed key.
    inner = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.contrib.dog(1.0))
    params = tree(1.0)
    for check_update in (False, True):
        tx = og.guard(inner, check_update=check_update)
        bad = tree(np.nan)
        _, state = walk(tx, [tree(1.0), bad, tree(2.0)], params)[-1]
        _, expected = walk(tx, [tree(1.0), tree(2.0)], params)[-1]
        noise, dog = state.inner_state
        expected_noise, expected_dog = expected.inner_state
        assertions.assert_same_bits(
            jax.random.key_data(noise.rng_key), jax.random.key_data(expected_noise.rng_key)
        )
        assert dog[1].is_init_step.dtype == jnp.bool_
        assertions.assert_same_bits(dog, expected_dog)


def test_per_example_gradients_have_other_shapes_than_the_state():
    params = tree(1.0)
    batch = lambda value: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree(value))  # noqa: E731
    for check_update in (False, True):
        tx = og.guard(
            optax.contrib.dpsgd(0.1, 1.0, 0.1, 0, momentum=0.9), check_update=check_update
        )
        trail = walk(tx, [batch(1.0), batch(np.nan)], params)
        assertions.assert_same_bits(trail[2][0], trail[1][0])
        assert trail[2][1].skip_reason == 1
        assert trail[1][0]["a"].shape == (3,)
