"""Meta-gradients through skipped steps: finite, and equal to those of the healthy steps alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_guard as og

PARAMS = {"s": jnp.float32(0.5), "w": jnp.array([1.0, -2.0, 3.0])}
RATE = 0.1


def gradients(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), PARAMS)


def spoiled(value: float) -> Any:
    return gradients(9) | {"w": jnp.array([1.0, value, 2.0])}


ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
GOOD = [gradients(0), gradients(1)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A guarded optimizer, its gradients in order, and which of them are healthy."""

    name: str
    make: Callable[[Any], Any]
    steps: list[Any]
    healthy: tuple[int, ...]
    values: tuple[float, ...] | None = None

    def only_healthy(self) -> Case:
        values = self.values and tuple(self.values[i] for i in self.healthy)
        steps = [self.steps[i] for i in self.healthy]
        return dataclasses.replace(self, steps=steps, values=values)


def with_bad(bad: Any) -> list[Any]:
    """A fault at the first step, and two in a row."""
    return [bad, GOOD[0], bad, bad, GOOD[1]]


def rate_spike(rate: Any, value: float) -> Any:
    return lambda count: rate * jnp.where(count == 2, value, 1.0)


NAN_STEPS = with_bad(spoiled(np.nan))
CASES = [
    Case("momentum, NaN", lambda r: og.guard(optax.sgd(r, 0.9)), NAN_STEPS, (1, 4)),
    Case("adam, NaN", lambda r: og.guard(optax.adam(r)), NAN_STEPS, (1, 4)),
    Case("adam, Inf", lambda r: og.guard(optax.adam(r)), with_bad(spoiled(np.inf)), (1, 4)),
    Case("stabilize, NaN", lambda r: og.stabilize(optax.adamw(r)), NAN_STEPS, (1, 4)),
    Case(
        "Optax's clip, NaN",
        lambda r: og.guard(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(r, 0.9))),
        NAN_STEPS,
        (1, 4),
    ),
    Case(
        "lamb and noise from a typed key",
        lambda r: og.guard(
            optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.lamb(r))
        ),
        NAN_STEPS,
        (1, 4),
    ),
    Case(
        "loss",
        lambda r: og.guard(optax.contrib.momo(r)),
        [*GOOD, gradients(2)],
        (0, 2),
        values=(3.0, np.nan, 2.0),
    ),
    Case(
        "condition",
        lambda r: og.guard(optax.adam(r), skip_if=(og.norm_above(50.0), og.spike(window=4))),
        [GOOD[0], jax.tree.map(lambda leaf: 1e6 * leaf, GOOD[1]), GOOD[1]],
        (0, 2),
    ),
    Case(
        "moment overflow",
        lambda r: og.guard(optax.adam(r), check_update=True),
        [GOOD[0], jax.tree.map(lambda leaf: 1e25 * leaf, GOOD[1]), GOOD[1]],
        (0, 2),
    ),
    *(
        Case(
            f"schedule gives {value}",
            lambda r, value=value: og.guard(optax.adam(rate_spike(r, value)), check_update=True),
            [*GOOD, gradients(2)],
            (0, 1),
        )
        for value in (np.nan, np.inf)
    ),
]
FIRST = ("momentum, NaN", "stabilize, NaN", "loss", "condition")
each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name not in FIRST))
        for case in CASES
    ],
)


def stacked(steps: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)


def final_loss(case: Case, rate: Any, params: Any, offsets: Any) -> tuple[Any, Any]:
    """What a meta-learner minimises, as a function of rate, first parameters and gradients."""
    tx = case.make(rate)

    def step(carry, inputs):
        params, state = carry
        gradients, value = inputs
        pulled = jax.tree.map(lambda g, o, p: g + o + 0.1 * p, gradients, offsets, params)
        updates, state = tx.update(pulled, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    values = jnp.asarray(case.values or [1.0] * len(case.steps), jnp.float32)
    inputs = stacked(case.steps), values
    (params, state), _ = lax.scan(step, (params, tx.init(params)), inputs)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)), state


MODES = {"reverse": jax.grad, "forward": jax.jacfwd}


@pytest.mark.parametrize("mode", ["reverse", pytest.param("forward", marks=pytest.mark.slow)])
@each_case
def test_derivatives_are_those_of_the_healthy_steps(case, mode):
    def derivative(case):
        function = MODES[mode](functools.partial(final_loss, case), (0, 1, 2), has_aux=True)
        return jax.jit(function)(RATE, PARAMS, ZEROS)

    actual, state = derivative(case)
    expected, healthy_state = derivative(case.only_healthy())
    assert state.skipped_total == len(case.steps) - len(case.healthy)
    assert healthy_state.skipped_total == 0
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(one))
        # Two programs, and derivatives of Adam's first step of size 10.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert np.abs(actual[0]) > 1e-3


@pytest.mark.parametrize(
    "hessian",
    [
        jax.hessian,
        pytest.param(lambda f: jax.jacrev(jax.jacrev(f)), marks=pytest.mark.slow),
        pytest.param(lambda f: jax.jacfwd(jax.jacfwd(f)), marks=pytest.mark.slow),
    ],
    ids=["forward over reverse", "reverse over reverse", "forward over forward"],
)
def test_second_derivatives_are_those_of_the_healthy_steps(hessian):
    case = Case("", lambda r: og.guard(optax.adam(r, eps_root=1e-8)), NAN_STEPS, (1, 4))
    second = lambda case: hessian(lambda rate: final_loss(case, rate, PARAMS, ZEROS)[0])(RATE)  # noqa: E731
    actual, expected = jax.jit(lambda: (second(case), second(case.only_healthy())))()
    assert np.isfinite(actual)
    assert np.abs(expected) > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def scanned_loss(rate: Any, steps: Any) -> Any:
    tx = og.guard(optax.adam(rate))

    def step(carry, gradients):
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = lax.scan(step, (PARAMS, tx.init(PARAMS)), steps)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def test_gradient_through_scan_is_that_of_the_healthy_steps_and_zero_at_the_bad_ones():
    differentiate = jax.jit(jax.grad(scanned_loss, (0, 1)))
    rate, steps = differentiate(RATE, stacked(NAN_STEPS))
    healthy_rate, healthy_steps = differentiate(RATE, stacked(GOOD))
    np.testing.assert_allclose(rate, healthy_rate, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(steps), jax.tree.leaves(healthy_steps), strict=True):
        np.testing.assert_array_equal(one[np.array([0, 2, 3])], 0)
        np.testing.assert_allclose(one[np.array([1, 4])], other, rtol=1e-4, atol=1e-5)


def test_vmapped_gradient_is_right_for_healthy_and_faulty_members():
    healthy = [GOOD[0], gradients(5), gradients(6), gradients(7), GOOD[1]]
    members = stacked([stacked(NAN_STEPS), stacked(healthy)])
    together = jax.jit(jax.vmap(jax.grad(scanned_loss), in_axes=(None, 0)))(RATE, members)
    single = jax.jit(jax.grad(scanned_loss))
    expected = [single(RATE, stacked(GOOD)), single(RATE, stacked(healthy))]
    assert together.shape == (2,)
    np.testing.assert_allclose(together, expected, rtol=1e-5)


def test_recorded_norm_has_a_finite_derivative_at_a_bad_step():
    tx = og.guard(optax.sgd(RATE))

    def norm(scale):
        bad = jax.tree.map(lambda leaf: leaf * scale, spoiled(np.nan))
        _, state = tx.update(bad, tx.init(PARAMS), PARAMS)
        return jnp.where(state.last_step_skipped, 0.0, state.grad_norm)

    def healthy_norm(scale):
        good = jax.tree.map(lambda leaf: leaf * scale, GOOD[0])
        return tx.update(good, tx.init(PARAMS), PARAMS)[1].grad_norm

    value, slope = jax.jit(jax.value_and_grad(healthy_norm))(1.0)
    assert slope > 0.5
    np.testing.assert_allclose(slope, value, rtol=1e-6)
    assert np.isfinite(jax.jit(jax.jacfwd(norm))(1.0))
