"""Smaller steps after skipped ones, the return to a snapshot, and a run that both bring back."""

from __future__ import annotations

import functools
from typing import Any

import assertions
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax
from sklearn.datasets import load_digits

import optax_guard as og

PARAMS = {"b": jnp.zeros(2), "w": jnp.ones((3, 2))}
MOMENTUM = optax.sgd(0.1, momentum=0.9)


def gradients(seed: int, like: Any = PARAMS) -> Any:
    """Ordinary ones; with a NaN where ``seed`` is negative."""
    rng = np.random.default_rng(abs(seed))
    tree = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), like)
    if seed >= 0:
        return tree
    return jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), tree)


BAD = -1


def walk(tx: Any, seeds: Any, params: Any = PARAMS) -> tuple[list[Any], list[Any]]:
    """Parameters and states before the first and after each step."""

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    all_params, states = [params], [tx.init(params)]
    for seed in seeds:
        new_params, state = step(all_params[-1], states[-1], gradients(seed, params))
        all_params.append(new_params)
        states.append(state)
    return all_params, states


def optimizer_state(state: Any) -> Any:
    """What is inside of all wrappers."""
    while type(state).__module__.startswith("optax_guard"):
        state = state.inner_state
    return state


# backoff


def shrunk(is_skipped: Any, factor: float, recovery_steps: int) -> list[float]:
    """Reference: the factor on each update, and that on the next one."""
    left, factors = 0, [1.0]
    for skipped in is_skipped:
        left = min(left + recovery_steps, 20 * recovery_steps) if skipped else max(left - 1, 0)
        factors.append(factor ** (left / recovery_steps))
    return factors


@pytest.mark.parametrize(("factor", "recovery_steps"), [(0.5, 3), (0.1, 1), (1.0, 4)])
def test_updates_shrink_after_a_skip_and_grow_back(factor, recovery_steps):
    tx = og.backoff(og.guard(optax.sgd(1.0)), factor=factor, recovery_steps=recovery_steps)
    flags = [0, 1, 0, 0, 0, 0, 1, 1, 0, 1, *12 * [0]]
    factors = shrunk(flags, factor, recovery_steps)
    state, step = tx.init(jnp.zeros(1)), jax.jit(tx.update)
    for index, skipped in enumerate(flags):
        updates, state = step(jnp.array([np.nan if skipped else 3.0]), state)
        expected = 0.0 if skipped else -3.0 * factors[index]
        np.testing.assert_allclose(updates[0], expected, rtol=1e-6)
        np.testing.assert_allclose(state.factor, factors[index + 1], rtol=1e-6)
    assert float(state.factor) == 1.0
    assert int(state.steps_left) == 0


@hypothesis.given(
    st.lists(st.booleans(), min_size=60, max_size=60), st.floats(0.05, 1.0), st.integers(1, 7)
)
@hypothesis.settings(max_examples=15)
def test_factor_follows_the_reference_for_all_sequences(flags, factor, recovery_steps):
    actual = _factors(recovery_steps)(jnp.asarray(flags), factor)
    expected = shrunk(flags, float(np.float32(factor)), recovery_steps)[1:]
    # Powers up to the 20th of a float32.
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-37)
    assert np.all((np.asarray(actual) >= 0) & (np.asarray(actual) <= 1))


@functools.cache
def _factors(recovery_steps: int) -> Any:
    @jax.jit
    def run(flags, factor):
        tx = og.backoff(og.guard(optax.sgd(1.0)), factor=factor, recovery_steps=recovery_steps)

        def body(state, skipped):
            _, state = tx.update(jnp.where(skipped, jnp.nan, jnp.ones(1)), state)
            return state, state.factor

        return lax.scan(body, tx.init(jnp.zeros(1)), flags)[1]

    return run


def test_hundreds_of_skips_are_come_back_from_in_20_recovery_times():
    flags = np.arange(1000 + 20 * 5) < 1000
    factors = np.asarray(_factors(5)(jnp.asarray(flags), 0.5))
    assert factors[999] == 0.5**20
    assert factors[-2] < 1
    assert factors[-1] == 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_backoff_passes_full_steps_bit_for_bit_and_scales_in_float32(dtype):
    params = {"w": jnp.array([1.0, -0.0, 1e-3], dtype)}
    plain, tx = og.guard(MOMENTUM), og.backoff(og.guard(MOMENTUM), factor=0.3)
    expected, _ = plain.update(params, plain.init(params))
    updates, state = tx.update(params, tx.init(params))
    assertions.assert_same_bits(updates, expected)
    spoiled = {"w": params["w"].at[0].set(jnp.nan)}
    _, state = tx.update(spoiled, tx.init(params))
    updates, _ = tx.update(params, state)
    wide = np.complex64 if dtype == jnp.complex64 else np.float32
    scaled = np.asarray(expected["w"], wide) * np.float32(0.3)
    np.testing.assert_allclose(
        np.asarray(updates["w"], wide), scaled, rtol=float(jnp.finfo(dtype).eps)
    )


def test_the_overflow_of_a_loss_scale_is_neither_skip_nor_recovery():
    tx = og.backoff(og.dynamic_loss_scale(og.guard(MOMENTUM), initial_scale=4.0))
    _, states = walk(tx, [1, BAD])
    assert float(states[-1].factor) == 1.0
    _, states = walk(tx, [1, BAD, BAD, BAD])  # at the smallest scale it is the guard's
    assert float(states[-1].factor) == 0.5
    # A guard that is not asked again keeps the verdict of that skip; it counts once.
    tx = og.backoff(optax.MultiSteps(og.guard(optax.sgd(0.1)), 4).gradient_transformation())
    _, states = walk(tx, [1, 1, 1, BAD, 1, 1])
    assert float(states[4].factor) == float(states[6].factor) == 0.5


# rollback


def test_rollback_returns_to_the_snapshot_with_the_state_that_belongs_to_it():
    tx = og.rollback(og.backoff(og.guard(MOMENTUM)), every=3, after_skips=2)
    params, states = walk(tx, [1, 2, 3, 4, 5, BAD, BAD])
    # Three healthy steps, and a fourth that has accepted a gradient of where they led.
    assertions.assert_close(params[7], params[3], rtol=1e-6, atol=1e-7)
    assertions.assert_same_bits(optimizer_state(states[7]), optimizer_state(states[3]))
    assertions.assert_same_bits(params[6], params[5])
    guard = states[7].inner_state.inner_state
    assert (int(guard.guard_step), int(guard.skipped_total)) == (7, 2)
    np.testing.assert_allclose(states[7].inner_state.factor, 0.25)
    assert int(states[7].rollbacks_total) == 1
    assert bool(states[7].last_step_rolled_back)
    assert int(states[7].bad_in_a_row) == 0
    assert not bool(states[6].last_step_rolled_back)


def test_run_with_returns_follows_a_float64_reference():
    every, after_skips, seeds = 4, 2, [1, 2, 3, 4, 5, 6, BAD, 7, BAD, BAD, 8, 9, 10, 11, 12, 13, 14]
    seeds += [BAD, BAD, BAD, BAD, 15, 16]
    tx = og.rollback(og.guard(MOMENTUM), every=every, after_skips=after_skips)
    actual, states = walk(tx, seeds)
    p = {name: np.asarray(leaf, np.float64) for name, leaf in PARAMS.items()}
    m = {name: np.zeros_like(leaf) for name, leaf in p.items()}
    saved, since, bad, healthy_in_a_row = (p, m), 0, 0, 0
    for index, seed in enumerate(seeds):
        if seed == BAD:
            bad, healthy_in_a_row = bad + 1, 0
            if bad == after_skips:
                (p, m), bad, since = saved, 0, 0
        else:
            if since >= every and healthy_in_a_row >= after_skips:
                saved, since = (p, m), 0
            g = {name: np.asarray(leaf, np.float64) for name, leaf in gradients(seed).items()}
            m = {name: 0.9 * m[name] + g[name] for name in p}
            p = {name: p[name] - 0.1 * m[name] for name in p}
            since, bad, healthy_in_a_row = since + 1, 0, healthy_in_a_row + 1
        for name in p:
            # 24 steps of three roundings of numbers of about 1.
            np.testing.assert_allclose(actual[index + 1][name], p[name], atol=1e-5, rtol=0)
    assert int(states[-1].rollbacks_total) == 3


@hypothesis.given(st.lists(st.booleans(), min_size=30, max_size=30))
@hypothesis.settings(max_examples=10)
def test_every_return_lands_where_a_healthy_step_was_taken(flags):
    run = _rollback_run()
    path, returned = map(np.asarray, run(jnp.asarray(flags)))
    in_a_row = 0
    for index, skipped in enumerate(flags):
        in_a_row = in_a_row + 1 if skipped else 0
        assert returned[index] == (in_a_row == 3)
        in_a_row = 0 if returned[index] else in_a_row
        before = np.concatenate([[10.0], path[:index]])
        if returned[index]:
            assert np.min(np.abs(before - path[index])) <= 1e-5
        elif skipped and not (index and returned[index - 1]):
            assert path[index] == before[-1]


@functools.cache
def _rollback_run() -> Any:
    tx = og.rollback(og.guard(optax.sgd(0.1)), every=2, after_skips=3)

    @jax.jit
    def run(flags):
        def body(carry, skipped):
            p, state = carry
            updates, state = tx.update(jnp.where(skipped, jnp.nan, p), state, p)
            p = optax.apply_updates(p, updates)
            return (p, state), (p, state.last_step_rolled_back)

        p = jnp.float32(10.0)
        return lax.scan(body, (p, tx.init(p)), flags)[1]

    return run


def test_no_snapshot_is_taken_while_skips_are_running():
    tx = og.rollback(og.guard(MOMENTUM), every=4, after_skips=3)
    # A bad step among three: never three healthy ones in a row.
    params, states = walk(tx, [1, 2, BAD] * 5)
    assertions.assert_same_bits(states[-1].snapshot_params, params[0])
    params, states = walk(tx, [1, 2, BAD] * 3 + [1, 2, 3, 4])
    assertions.assert_same_bits(states[-1].snapshot_params, params[12])


def test_no_snapshot_is_taken_of_where_an_unjudged_update_has_led():
    tx = og.rollback(og.guard(MOMENTUM), every=2, after_skips=9)
    params, states = walk(tx, [1, 2, BAD, BAD])
    assertions.assert_same_bits(states[-1].snapshot_params, params[0])


@pytest.mark.parametrize("part", ["params", "state"])
def test_no_snapshot_is_taken_of_what_is_not_finite(part):
    tx = og.rollback(og.guard(MOMENTUM), every=1, after_skips=9)
    params, states = walk(tx, [1, 2])
    params, state = params[-1], states[-1]
    if part == "params":
        params = params | {"b": params["b"].at[1].set(jnp.inf)}
    else:
        guard = state.inner_state
        bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), guard.inner_state)
        state = state._replace(inner_state=guard._replace(inner_state=bad))
    _, new_state = jax.jit(tx.update)(gradients(3), state, params)
    assertions.assert_same_bits(new_state.snapshot_params, state.snapshot_params)
    assertions.assert_same_bits(new_state.snapshot_state, state.snapshot_state)


def test_state_that_is_infinite_from_the_beginning_is_no_reason_against_a_snapshot():
    inner = optax.chain(MOMENTUM, optax.contrib.reduce_on_plateau())
    tx = og.rollback(og.guard(inner), every=1, after_skips=9)
    state = tx.init(PARAMS)
    assert any(bool(jnp.any(jnp.isinf(x))) for x in jax.tree.leaves(state.snapshot_state))
    for seed in (1, 2):
        before = state
        _, state = tx.update(gradients(seed), state, PARAMS, value=1.0)
    assert int(state.healthy_since_snapshot) == 1
    new, old = (jax.tree.leaves(each.snapshot_state)[0] for each in (state, before))
    assert jnp.any(new != old)


def test_parameters_that_swallow_the_snapshot_are_back_after_one_more_step():
    tx = og.rollback(og.guard(optax.sgd(0.1)), every=1, after_skips=1)
    params = {"w": jnp.array([1.25, -0.0, 3e-3, 2e5])}
    state = tx.init(params)
    lost = {"w": jnp.array([1e20, -3e38, 3e30, 1e12])}
    step = jax.jit(tx.update)
    updates, state = step({"w": jnp.full(4, jnp.nan)}, state, lost)
    landed = optax.apply_updates(lost, updates)
    # One rounding of the sum of two numbers as large as the lost ones.
    assert jnp.all(jnp.abs(landed["w"] - params["w"]) <= 6e-8 * jnp.abs(lost["w"]))
    assert landed["w"][0] != 1.25
    updates, state = step({"w": jnp.full(4, jnp.nan)}, state, landed)
    np.testing.assert_allclose(optax.apply_updates(landed, updates)["w"], params["w"], rtol=1e-6)
    # What is missing comes on top of a healthy update, too.
    first = step({"w": jnp.full(4, jnp.nan)}, tx.init(params), lost)[1]
    updates, _ = step({"w": jnp.ones(4)}, first, landed)
    expected = params["w"] - 0.1
    np.testing.assert_allclose(optax.apply_updates(landed, updates)["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_differences_of_narrow_parameters_never_overflow(dtype):
    most = float(jnp.finfo(dtype).max)
    params = {"w": jnp.array([most, -most, 1.5], dtype)}
    tx = og.rollback(og.guard(optax.sgd(0.1)), every=1, after_skips=1)
    state, now = tx.init(params), {"w": -params["w"]}
    for _ in range(2):
        updates, state = tx.update({"w": jnp.full(3, jnp.nan, dtype)}, state, now)
        assert updates["w"].dtype == dtype
        assert jnp.all(jnp.isfinite(updates["w"].astype(jnp.float32)))
        now = optax.apply_updates(now, updates)
    assertions.assert_same_bits(now, params)


def test_a_return_to_where_one_is_changes_no_bit_and_a_lost_parameter_stays_visible():
    tx = og.rollback(og.guard(optax.sgd(0.1)), every=1, after_skips=1)
    params = {"w": jnp.array([-0.0, 1e-30, 7.0])}
    for _ in range(2):
        updates, state = tx.update({"w": jnp.full(3, jnp.nan)}, tx.init(params), params)
        assertions.assert_same_bits(optax.apply_updates(params, updates), params)
    lost = {"w": params["w"].at[1].set(jnp.nan)}
    updates, _ = tx.update({"w": jnp.full(3, jnp.nan)}, state, lost)
    after = optax.apply_updates(lost, updates)["w"]
    assert jnp.isnan(after[1]) and after[2] == 7


def test_keys_lookahead_and_complex_parameters_are_taken_back():
    noisy = optax.noisy_sgd(0.1, key=jax.random.key(3))
    params, _ = walk(og.rollback(og.guard(noisy), every=1, after_skips=1), [1, 2, 3, BAD, 3])
    assertions.assert_close(params[4], params[2], rtol=1e-6, atol=1e-7)
    assertions.assert_close(params[5], params[3], rtol=1e-6, atol=1e-7)  # the same noise again

    tx = og.rollback(og.guard(optax.lookahead(optax.sgd(0.1), 2, 0.5)), every=1, after_skips=1)
    path = [optax.LookaheadParams(PARAMS, PARAMS)]
    state = tx.init(path[0])
    for seed in (1, 2, 3, BAD):
        updates, state = jax.jit(tx.update)(gradients(seed), state, path[-1])
        path.append(optax.apply_updates(path[-1], updates))
    assertions.assert_close(path[4], path[2], rtol=1e-6, atol=1e-6)

    tx = og.rollback(og.guard(optax.sgd(0.1)), every=1, after_skips=1)
    start = jnp.array([1 + 2j, 3 - 1j])
    lost = start + (100 - 50j)
    updates, _ = tx.update(jnp.full(2, jnp.nan + 0j), tx.init(start), lost)
    np.testing.assert_allclose(optax.apply_updates(lost, updates), start, rtol=1e-5)


# Where people use them


def full(inner: Any = MOMENTUM) -> Any:
    return og.rollback(og.backoff(og.guard(inner)), every=1, after_skips=1)


def test_buffers_of_parameters_and_state_can_be_donated():
    tx = full()
    expected, expected_states = walk(tx, [1, 2, BAD, 3])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for seed in (1, 2, BAD, 3):
        old = params
        params, state = step(params, state, gradients(seed))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assertions.assert_same_bits((params, state), (expected[-1], expected_states[-1]))


def test_rollback_works_with_nnx_and_linen():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, full(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)

    kernels = [jnp.copy(model.kernel[...])]
    for x in (1.0, 1.0, 1.0, jnp.nan):
        step(model, optimizer, jnp.full((4, 3), x))
        kernels.append(jnp.copy(model.kernel[...]))
    np.testing.assert_allclose(kernels[4], kernels[2], rtol=1e-6)
    metrics = og.metrics(optimizer.opt_state)
    assert int(metrics["guard/rollback/rollbacks_total"]) == 1
    assert float(metrics["guard/backoff/factor"]) == 0.5

    state = TrainState.create(apply_fn=None, params=PARAMS, tx=full())
    seen = [state.params]
    for seed in (1, 2, 3, BAD):
        state = state.apply_gradients(grads=gradients(seed))
        seen.append(state.params)
    assertions.assert_close(seen[4], seen[2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
        lambda tx: optax.masked(tx, {"b": True, "w": True}),
        lambda tx: optax.inject_hyperparams(lambda lr: full(optax.sgd(lr, momentum=0.9)))(0.1),
        lambda tx: og.dynamic_loss_scale(tx, initial_scale=1.0),
        lambda tx: optax.chain(tx, og.clip_params(-50.0, 50.0)),
    ],
    ids=["multi_steps", "masked", "inject", "loss_scale", "clip_params"],
)
def test_rollback_works_inside_other_wrappers(wrap):
    params, states = walk(wrap(full()), [1, 2, 3, BAD])
    assertions.assert_close(params[4], params[2], rtol=1e-6, atol=1e-7)
    assert int(og.metrics(states[-1])["guard/rollback/rollbacks_total"]) == 1


def test_metrics_show_the_run_and_nothing_of_the_snapshot():
    tx = full(optax.chain(og.clip_by_zscore(warmup_steps=1), MOMENTUM))
    _, states = walk(tx, [1, BAD])
    metrics = og.metrics(states[-1])
    assert not any("/2/" in key for key in metrics)
    assert {"guard/backoff/steps_left", "guard/rollback/last_step_rolled_back"} <= set(metrics)
    assert "Step 1 was skipped" in og.explain(states[-1], PARAMS)
    assert not og.step_ok(states[-1])


def test_explanations_name_the_leaves_inside_both():
    _, states = walk(full(), [1, BAD])
    assert "non-finite: b (norm nan), w (norm nan)" in og.explain(states[-1], PARAMS)


def test_sharded_rollback_takes_one_decision_for_all_devices():
    params = registry.tree()
    make = lambda **kw: og.rollback(og.guard(MOMENTUM, **kw), every=1, after_skips=1, **kw)  # noqa: E731
    _, expected = walk(make(), [1, 2, 3], params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec

    def spec(tree):
        return jax.tree.map(lambda x: P("data") if x.shape[:1] == (16,) else P(), tree)

    tx, state = make(axis_name="data"), expected[2]
    # Non-finite on one device only: no device may take a snapshot.
    spoiled = params | {"bias": params["bias"].at[15].set(jnp.inf)}
    step = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=mesh,
            in_specs=(spec(params), spec(state), spec(params)),
            out_specs=(spec(params), spec(state)),
        )
    )
    _, new_state = step(gradients(3, params), state, spoiled)
    assertions.assert_same_bits(new_state.snapshot_params, state.snapshot_params)
    _, new_state = step(gradients(3, params), state, params)
    assertions.assert_same_bits(new_state.snapshot_params, params)


# Derivatives: the contract tests have those through a skip; here through a return.


def test_derivatives_through_a_return_are_finite_and_end_at_the_snapshot():
    tx = og.rollback(og.backoff(og.guard(optax.adam(0.1))), every=1, after_skips=1)

    def last(start, rate):
        def body(carry, faulty):
            p, state = carry
            gradient = jnp.where(faulty, jnp.nan, rate * p)
            updates, state = tx.update(gradient, state, p)
            return (optax.apply_updates(p, updates), state), None

        faults = jnp.array([False, False, True, False])
        return jnp.sum(lax.scan(body, (start, tx.init(start)), faults)[0][0])

    start = jnp.array([1.0, -2.0])
    slopes = jax.jit(jax.grad(last, argnums=(0, 1)))(start, jnp.float32(0.5))
    assert all(bool(jnp.all(jnp.isfinite(slope))) for slope in slopes)
    _, forward = jax.jvp(last, (start, jnp.float32(0.5)), (jnp.ones(2), jnp.float32(1.0)))
    np.testing.assert_allclose(forward, jnp.sum(slopes[0]) + slopes[1], rtol=1e-4)


# Errors


@pytest.mark.parametrize("name", ["backoff", "rollback"])
def test_init_without_a_guard_says_what_to_write(name):
    tx = getattr(og, name)(optax.adam(1e-3))
    text = rf"{name} acts on what a guard decides, .* Write og.{name}\(og.guard\(optimizer\)\)"
    with pytest.raises(ValueError, match=text):
        tx.init(PARAMS)


@pytest.mark.parametrize("name", ["backoff", "rollback"])
def test_inside_of_a_guard_they_would_see_no_skip(name):
    tx = og.guard(getattr(og, name)(og.guard(MOMENTUM)))
    with pytest.raises(ValueError, match=rf"{name} inside of a guard would never see a bad step"):
        tx.init(PARAMS)


def test_backoff_around_rollback_says_what_to_write():
    text = r"Write og.rollback\(og.backoff\(og.guard\(optimizer\)\)\)"
    with pytest.raises(ValueError, match=text):
        og.backoff(og.rollback(og.guard(MOMENTUM))).init(PARAMS)


def test_rollback_needs_params():
    tx = og.rollback(og.guard(MOMENTUM))
    with pytest.raises(ValueError, match=r"without params. Call update\(updates, state, params\)"):
        tx.update(PARAMS, tx.init(PARAMS))


# A learning rate that becomes 100 times too high after step 200: a 64-128-64-10 network learns
# digits with a squared error, the loss of which overflows once the weights run away.

GOOD_RATE, BAD_STEP, NUM_STEPS = 0.005, 200, 1200


def sgd_that_goes_wrong() -> Any:
    rate = lambda step: jnp.where(step < BAD_STEP, GOOD_RATE, 100 * GOOD_RATE)  # noqa: E731
    return optax.sgd(rate, momentum=0.9)


REMEDIES = {
    "well tuned": lambda: optax.sgd(GOOD_RATE, momentum=0.9),
    "nothing": lambda: sgd_that_goes_wrong(),
    "guard": lambda: og.guard(sgd_that_goes_wrong()),
    "backoff(guard)": lambda: og.backoff(og.guard(sgd_that_goes_wrong())),
    "backoff(guard(spike))": lambda: og.backoff(
        og.guard(sgd_that_goes_wrong(), skip_if=og.spike(6.0, window=64))
    ),
    "rollback(guard)": lambda: og.rollback(og.guard(sgd_that_goes_wrong())),
    "rollback(backoff(guard))": lambda: og.rollback(og.backoff(og.guard(sgd_that_goes_wrong()))),
}


@functools.cache
def outcome(remedy: str) -> tuple[float, bool, dict[str, Any]]:
    """Test accuracy in percent, whether all parameters are finite, and the last metrics."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    images, labels = (
        jnp.asarray(data.data[order] / 16, jnp.float32),
        jnp.asarray(data.target[order]),
    )
    rng = np.random.default_rng(0)
    params = [
        (jnp.asarray(rng.normal(size=(m, n)) * np.sqrt(2 / m), jnp.float32), jnp.zeros(n))
        for m, n in ((64, 128), (128, 64), (64, 10))
    ]
    tx = REMEDIES[remedy]()

    def network(params, x):
        for kernel, bias in params[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        return x @ params[-1][0] + params[-1][1]

    def step(carry, rows):
        params, state = carry

        def loss_fn(params):
            errors = network(params, images[rows]) - jax.nn.one_hot(labels[rows], 10)
            return jnp.mean(jnp.sum(errors**2, axis=-1))

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    batches = jnp.asarray(np.random.default_rng(1).integers(0, 1400, (NUM_STEPS, 64)))
    (params, state), _ = jax.jit(lambda: lax.scan(step, (params, tx.init(params)), batches))()
    is_right = network(params, images[1400:]).argmax(axis=-1) == labels[1400:]
    is_finite = all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(params))
    metrics = og.metrics(state) if "guard" in remedy else {}
    metrics = {key.removeprefix("guard/"): np.asarray(v) for key, v in metrics.items()}
    return 100 * float(jnp.mean(is_right)), is_finite, metrics


def test_the_task_is_learnt_at_the_good_rate_and_lost_at_the_bad_one():
    assert outcome("well tuned")[0] > 96
    assert not outcome("nothing")[1]


@pytest.mark.parametrize("remedy", ["guard", "backoff(guard)", "rollback(guard)"])
def test_alone_they_keep_the_run_finite_but_do_not_bring_it_back(remedy):
    accuracy, is_finite, metrics = outcome(remedy)
    assert is_finite
    assert accuracy < 50
    assert metrics["skipped_total"] > 400
    if remedy == "rollback(guard)":
        assert metrics["rollback/rollbacks_total"] > 10  # to where the same rate leads astray again


@pytest.mark.parametrize("remedy", ["backoff(guard(spike))", "rollback(backoff(guard))"])
def test_smaller_steps_in_time_or_after_a_return_bring_it_back(remedy):
    accuracy, is_finite, metrics = outcome(remedy)
    assert is_finite
    assert accuracy >= outcome("well tuned")[0] - 2
    assert 1 <= metrics["skipped_total"] <= 50
