"""Dynamic loss scaling: the scale itself, what reaches the optimizer, and real float16 training."""

from __future__ import annotations

import itertools
from typing import Any

import assertions
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import strategies as st
from jax import lax
from sklearn.datasets import load_digits

import optax_guard as og

PARAMS = {"b": jnp.ones(2), "w": jnp.array([[1.0, -2.0], [0.5, 4.0]])}


def healthy(seed: int, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), PARAMS)


def overflowed(gradients: Any, value: float = np.inf) -> Any:
    return gradients | {"w": gradients["w"].at[1, 0].set(value)}


def scaled(gradients: Any, state: Any) -> Any:
    """What ``jax.grad`` of a scaled loss gives."""
    return jax.tree.map(lambda leaf: og.scale_loss(leaf, state).astype(leaf.dtype), gradients)


# The scale


def walk(tx: Any, is_finite: Any) -> Any:
    """States after steps that overflow where ``is_finite`` is false, stacked."""

    @jax.jit
    def scan(is_finite):
        def body(state, finite):
            gradient = jnp.where(finite, jnp.ones(1), jnp.inf)
            _, state = tx.update(gradient, state)
            return state, state._replace(inner_state=())

        return lax.scan(body, tx.init(jnp.ones(1)), is_finite)[1]

    return scan(jnp.asarray(is_finite))


@pytest.mark.parametrize(
    "options",
    [
        {"initial_scale": 2.0**15, "growth_interval": 7},
        {"initial_scale": 8.0, "growth_interval": 2, "max_scale": 64.0, "min_scale": 2.0},
        {"initial_scale": 100.0, "growth_interval": 3, "factor": 1.5, "min_scale": 0.01},
        {"initial_scale": 1.0, "growth_interval": 1, "max_scale": 5.0},
    ],
)
def test_scale_and_counts_follow_a_plain_loop(options):
    is_finite = np.random.default_rng(0).random(400) > 0.15
    is_finite[200:260] = False
    states = walk(og.dynamic_loss_scale(optax.sgd(0.1), **options), is_finite)
    scale, good, total, in_a_row = options["initial_scale"], 0, 0, 0
    low, high = options.get("min_scale", 1.0), options.get("max_scale", 2.0**24)
    factor = options.get("factor", 2.0)
    expected = []
    for finite in is_finite:
        if not finite:
            scale, good, total, in_a_row = max(scale / factor, low), 0, total + 1, in_a_row + 1
        else:
            good, in_a_row = good + 1, 0
            if good == options["growth_interval"]:
                scale, good = min(scale * factor, high), 0
        expected.append((scale, good, total, in_a_row))
    scales, goods, totals, in_a_rows = np.array(expected).T
    # Powers of two are exact; 400 products of 1.5 in float32 are not.
    np.testing.assert_allclose(states.loss_scale, scales, rtol=0 if factor == 2 else 3e-5)
    np.testing.assert_array_equal(states.good_steps, goods)
    np.testing.assert_array_equal(states.overflows_total, totals)
    np.testing.assert_array_equal(states.overflows_in_a_row, in_a_rows)
    np.testing.assert_array_equal(states.last_step_overflowed, ~is_finite)


def test_scale_stays_in_its_bounds_in_any_long_run():
    is_finite = np.arange(100_400) >= 400
    states = walk(og.dynamic_loss_scale(optax.sgd(0.1)), is_finite)
    scales = np.asarray(states.loss_scale)
    assert scales.min() == scales[399] == 1.0
    assert scales.max() == scales[-1] == 2.0**24
    assert np.all(np.diff(scales[:400]) <= 0)
    assert np.all(np.diff(scales[400:]) >= 0)
    # 24 times doubled, every 2000 steps.
    assert scales[400 + 24 * 2000 - 2] == 2.0**23
    assert scales[400 + 24 * 2000 - 1] == 2.0**24
    assert int(states.overflows_total[-1]) == 400


# What an overflow does, and what not


def test_overflow_changes_nothing_but_the_scale():
    tx = og.dynamic_loss_scale(og.guard(optax.chain(og.clip_by_zscore(), optax.adam(0.1))))
    step = jax.jit(tx.update)
    _, state = step(scaled(healthy(0), tx.init(PARAMS)), tx.init(PARAMS), PARAMS)
    for value in (np.inf, -np.inf, np.nan):
        updates, new_state = step(overflowed(healthy(1), value), state, PARAMS)
        assertions.assert_same_bits(updates, jax.tree.map(lambda x: -jnp.zeros_like(x), PARAMS))
        assertions.assert_same_bits(new_state.inner_state, state.inner_state)
        assert assertions.signature(new_state) == assertions.signature(state)
        assert float(new_state.loss_scale) == 2.0**14


def clipped_guard(**options: Any) -> Any:
    clip = og.clip_by_zscore(warmup_steps=3)
    return og.guard(optax.chain(clip, optax.adamw(0.1)), **options)


COMPANY = {
    "guard": lambda: og.dynamic_loss_scale(clipped_guard(), growth_interval=4),
    "check_update": lambda: og.dynamic_loss_scale(clipped_guard(check_update=True)),
    "backoff": lambda: og.backoff(og.dynamic_loss_scale(clipped_guard())),
    "rollback": lambda: og.dynamic_loss_scale(
        og.rollback(og.backoff(clipped_guard()), every=2, after_skips=2)
    ),
    "multisteps": lambda: og.dynamic_loss_scale(optax.MultiSteps(clipped_guard(), 2)),
    "chain": lambda: optax.chain(
        og.dynamic_loss_scale(optax.adam(0.1)), og.add_l1(0.01), og.clip_params(-2.0, 1.5)
    ),
}


SLOW = ("check_update", "backoff", "multisteps")


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in COMPANY]
)
def test_run_with_overflows_ends_bitwise_where_the_run_without_ends(name):
    """Of the same compiled function; unscaling by powers of two loses no bit."""
    tx = COMPANY[name]()

    @jax.jit
    def run(stacked, is_bad):
        def body(carry, inputs):
            gradients, bad = inputs
            params, state = carry
            gradients = scaled(gradients, state)
            gradients["w"] = jnp.where(bad, jnp.inf, gradients["w"])
            updates, new_state = tx.update(gradients, state, params)
            # What is chained behind the scale still acts on a step that has overflowed.
            new_params = optax.apply_updates(params, updates)
            ok = og.step_ok(new_state)
            return (og.select(ok, new_params, params), new_state), ok

        return lax.scan(body, (PARAMS, tx.init(PARAMS)), (stacked, is_bad))

    is_bad = np.isin(np.arange(30), [0, 1, 4, 9, 10, 11, 25])
    steps = [healthy(seed) for seed in range(30)]
    only_good = [gradients for gradients, bad in zip(steps, is_bad, strict=True) if not bad]
    padding = [steps[0]] * is_bad.sum()
    stack = lambda steps: jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)  # noqa: E731
    # The other run overflows at the end only, so that both have 30 steps.
    (params, state), oks = run(stack(steps), is_bad)
    (expected, expected_state), _ = run(stack(only_good + padding), np.sort(is_bad))
    np.testing.assert_array_equal(oks, ~is_bad)
    assertions.assert_same_bits(params, expected)
    inside, expected_inside = (inner_states(each) for each in (state, expected_state))
    assertions.assert_same_bits(inside, expected_inside)
    metrics = og.metrics(state)
    assert int(metrics["guard/dynamic_loss_scale/overflows_total"]) == 7
    assert int(metrics.get("guard/skipped_total", 0)) == 0


def inner_states(tree: Any) -> list[Any]:
    """What is inside of every loss scale."""
    is_scale = lambda node: isinstance(node, og.states.DynamicLossScaleState)  # noqa: E731
    nodes = jax.tree.leaves(tree, is_leaf=is_scale)
    return [node.inner_state for node in nodes if is_scale(node)]


def test_metrics_and_step_ok_show_an_overflow():
    tx = og.dynamic_loss_scale(optax.adam(0.1))
    assert bool(og.step_ok(tx.init(PARAMS)))
    _, state = jax.jit(tx.update)(overflowed(healthy(0)), tx.init(PARAMS), PARAMS)
    assert not bool(jax.jit(og.step_ok)(state))
    assert jax.tree.map(float, jax.jit(og.metrics)(state)) == {
        "guard/dynamic_loss_scale/loss_scale": 2.0**14,
        "guard/dynamic_loss_scale/good_steps": 0,
        "guard/dynamic_loss_scale/overflows_total": 1,
        "guard/dynamic_loss_scale/overflows_in_a_row": 1,
        "guard/dynamic_loss_scale/last_step_overflowed": 1,
        "guard/dynamic_loss_scale/steps": 1,
        "guard/dynamic_loss_scale/last_skip_step": 0,
    }
    _, state = jax.jit(tx.update)(healthy(0), state, PARAMS)
    assert bool(og.step_ok(state))


def test_step_ok_asks_guards_and_scales():
    tx = og.dynamic_loss_scale(og.guard(optax.sgd(0.1)), initial_scale=4.0)
    step = jax.jit(lambda gradients, state, value: tx.update(gradients, state, value=value))
    healthy_step, bad_loss = (healthy(0), 1.0), (healthy(0), jnp.nan)
    overflow = (overflowed(healthy(0)), 1.0)
    state = tx.init(PARAMS)
    for (gradients, value), ok, skipped, overflows in [
        (healthy_step, True, 0, 0),
        (overflow, False, 0, 1),
        (bad_loss, False, 1, 1),
        (overflow, False, 1, 2),
        (healthy_step, True, 1, 2),
    ]:
        _, state = step(gradients, state, value)
        assert bool(og.step_ok(state)) is ok
        metrics = og.metrics(state)
        assert int(metrics["guard/skipped_total"]) == skipped
        assert int(metrics["guard/dynamic_loss_scale/overflows_total"]) == overflows
    # A skip of the guard is no overflow, and lets the scale be.
    assert float(state.loss_scale) == 1.0


def test_guard_inside_sees_true_gradients_and_its_skips_change_no_scale():
    tx = og.dynamic_loss_scale(
        og.guard(optax.sgd(1.0), skip_if=og.norm_above(3.0)), growth_interval=2
    )
    state = tx.init(jnp.zeros(2))
    for length, skips, scale in [(2.0, 0, 2.0**15), (6.0, 1, 2.0**16), (2.0, 1, 2.0**16)]:
        gradients = og.scale_loss(jnp.array([0.6, 0.8]) * length, state)
        updates, state = tx.update(gradients, state)
        assert float(state.inner_state.grad_norm) == pytest.approx(length, rel=1e-6)
        assert int(state.inner_state.skipped_total) == skips
        assert float(state.loss_scale) == scale
        expected = 0.0 if length > 3 else length
        assert float(jnp.linalg.norm(updates)) == pytest.approx(expected, rel=1e-6)


def test_what_is_not_finite_at_the_smallest_scale_is_left_to_the_guard():
    tx = og.dynamic_loss_scale(
        og.guard(optax.adam(0.1), max_consecutive_skips=3), initial_scale=4.0
    )
    step = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for count in range(5):
        og.check(state, PARAMS)
        _, state = step(overflowed(healthy(0), np.nan), state, PARAMS)
        assert int(state.overflows_in_a_row) == count + 1
        assert int(state.inner_state.skipped_total) == max(0, count - 1)
    assert "non-finite: w (norm nan)" in og.explain(state, PARAMS)
    assert "still finite: b (norm " in og.explain(state, PARAMS)
    with pytest.raises(og.GuardGaveUp):
        og.check(state, PARAMS)
    for leaf in jax.tree.leaves(state.inner_state.inner_state):
        assert jnp.all(jnp.isfinite(leaf))


def test_a_loss_that_is_not_finite_keeps_the_scale_and_is_left_to_the_guard():
    tx = og.dynamic_loss_scale(og.guard(optax.adam(0.1)))
    state = tx.init(PARAMS)
    _, state = tx.update(overflowed(healthy(0), np.nan), state, PARAMS, value=jnp.nan)
    assert float(state.loss_scale) == 2.0**15
    assert (int(state.overflows_total), int(state.inner_state.skipped_total)) == (0, 1)
    _, state = tx.update(overflowed(healthy(0)), state, PARAMS, value=1.0)
    assert float(state.loss_scale) == 2.0**14
    assert (int(state.overflows_total), int(state.inner_state.skipped_total)) == (1, 1)


def test_without_a_guard_a_bad_step_is_skipped_at_the_smallest_scale_too():
    for inner in (optax.adam(0.1), optax.chain(optax.trace(0.9), og.guard(optax.sgd(0.1)))):
        tx = og.dynamic_loss_scale(inner, initial_scale=1.0)
        state = tx.init(PARAMS)
        updates, new_state = tx.update(overflowed(healthy(0)), state, PARAMS)
        assertions.assert_same_bits(updates, jax.tree.map(lambda x: -jnp.zeros_like(x), PARAMS))
        assertions.assert_same_bits(new_state.inner_state, state.inner_state)


@pytest.mark.parametrize(
    "make",
    [
        lambda tx: og.guard(tx),
        lambda tx: og.stabilize(tx),
        lambda tx: og.guard(optax.chain(optax.identity(), optax.masked(tx, True))),
        lambda tx: og.guard(optax.MultiSteps(tx, 2).gradient_transformation()),
    ],
    ids=["guard", "stabilize", "chain", "multisteps"],
)
def test_guard_around_a_loss_scale_is_an_error_that_says_what_to_write(make):
    tx = make(og.dynamic_loss_scale(optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"^dynamic_loss_scale inside of a guard") as caught:
        tx.init(PARAMS)
    assert "Write og.dynamic_loss_scale(og.guard(optimizer))" in str(caught.value)


# What reaches the optimizer


def recorder(seen: list[Any]) -> Any:
    def init(params):
        seen.append(params)
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None, *, value=None, **extra_args):
        seen.append((updates, params, value, extra_args))
        return updates, jax.tree.map(jnp.add, state, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def test_float16_reaches_the_optimizer_as_float32_and_comes_back():
    dtypes = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.int8)
    params = {np.dtype(dtype).name: jnp.ones(2, dtype) for dtype in dtypes}
    seen: list[Any] = []
    tx = og.dynamic_loss_scale(recorder(seen), initial_scale=1024.0)
    state = tx.init(params)
    gradients = jax.tree.map(lambda leaf: leaf * 3, params)
    updates, new_state = tx.update(gradients, state, params, value=jnp.float16(7), note="a word")
    assert assertions.signature(updates) == assertions.signature(gradients)
    assert assertions.signature(new_state) == assertions.signature(state)
    inner_dtypes = {"float16": "float32", "bfloat16": "bfloat16", "float32": "float32"}
    inside, inner_params, value, extra_args = seen[-1]
    for tree in (seen[0], inside, inner_params, new_state.inner_state):
        names = {name: str(leaf.dtype) for name, leaf in tree.items()}
        assert names == inner_dtypes | {"int8": "int8"}
    assert (value.dtype, value.shape) == (jnp.float16, ())
    assert extra_args == {"note": "a word"}
    assertions.assert_same_bits(updates["int8"], gradients["int8"])
    np.testing.assert_array_equal(new_state.inner_state["float16"], jnp.full(2, 3 / 1024))
    assertions.assert_same_bits(updates["bfloat16"], jnp.full(2, 3 / 1024, jnp.bfloat16))


def test_unscaled_float16_gradients_lose_nothing():
    """Gradients of 1e-6, whose squares float16 does not know, give Adam full steps."""
    params = jnp.ones(3, jnp.float16)
    gradients = jnp.array([1e-6, -2e-6, 4e-6])
    tx = og.dynamic_loss_scale(optax.adam(0.25, eps=1e-12), initial_scale=2.0**20)
    state = tx.init(params)
    updates, state = tx.update((gradients * 2**20).astype(jnp.float16), state, params)
    assertions.assert_same_bits(updates, jnp.array([-0.25, 0.25, -0.25], jnp.float16))
    # What the gradients lost when they were written down in float16: 11 bits are left.
    np.testing.assert_allclose(state.inner_state[0].nu, 1e-3 * gradients**2, rtol=2.0**-10)

    plain = optax.adam(0.25, eps=1e-12)
    _, plain_state = plain.update(gradients.astype(jnp.float16), plain.init(params), params)
    np.testing.assert_array_equal(plain_state[0].nu, 0)


def test_loss_passed_as_value_is_untouched():
    tx = og.dynamic_loss_scale(og.guard(optax.sgd(0.1), skip_if=og.spike(of="value", window=2)))
    state = tx.init(PARAMS)
    for loss in (0.5, 0.25):
        _, state = tx.update(healthy(0), state, PARAMS, value=jnp.float32(loss))
    history = jax.tree.leaves(state.inner_state.condition_states)
    assert any(leaf.shape == (2,) and set(np.asarray(leaf)) == {0.5, 0.25} for leaf in history)


@hypothesis.given(seed=st.integers(0, 2**16), power=st.integers(-8, 24))
def test_unscaling_by_a_power_of_two_keeps_every_bit(seed, power):
    gradients = healthy(seed)
    state = SCALED.init(PARAMS)._replace(loss_scale=jnp.float32(2.0**power))
    updates, new_state = scaled_step(scaled(gradients, state), state)
    assertions.assert_same_bits(updates, gradients)
    assert not bool(new_state.last_step_overflowed)


SCALED = og.dynamic_loss_scale(optax.identity(), min_scale=2.0**-10)
scaled_step = jax.jit(SCALED.update)


@hypothesis.given(is_finite=st.lists(st.booleans(), min_size=40, max_size=40))
def test_scale_is_a_power_of_two_inside_its_bounds(is_finite):
    states = bounded_walk(np.array(is_finite))
    powers = np.log2(np.asarray(states.loss_scale))
    np.testing.assert_array_equal(powers, np.round(powers))
    assert np.all((powers >= -1) & (powers <= 4))
    assert np.all(np.abs(np.diff(powers)) <= 1)


BOUNDED = og.dynamic_loss_scale(
    optax.sgd(0.1), initial_scale=2.0, growth_interval=2, min_scale=0.5, max_scale=16.0
)


@jax.jit
def bounded_walk(is_finite):
    def body(state, finite):
        _, state = BOUNDED.update(jnp.where(finite, jnp.ones(1), jnp.nan), state)
        return state, state

    return lax.scan(body, BOUNDED.init(jnp.ones(1)), is_finite)[1]


# scale_loss


class Boxed(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones(3))


def test_scale_is_found_at_any_depth():
    tx = og.dynamic_loss_scale(optax.sgd(0.1), initial_scale=8.0)
    state = tx.init(PARAMS)
    deep = {
        "itself": state,
        "chain": optax.chain(optax.identity(), optax.chain(tx)).init(PARAMS),
        "masked": optax.masked(tx, {"b": True, "w": False}).init(PARAMS),
        "multisteps": optax.MultiSteps(tx, 2).init(PARAMS),
        "partition": optax.partition({0: tx}, 0).init(PARAMS),
        "injected": optax.inject_hyperparams(
            lambda scale: og.dynamic_loss_scale(optax.sgd(0.1), initial_scale=scale)
        )(8.0).init(PARAMS),
        "linen": TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=tx),
        "nnx": nnx.Optimizer(Boxed(), tx, wrt=nnx.Param),
        "nnx state": nnx.Optimizer(Boxed(), tx, wrt=nnx.Param).opt_state,
        "anything": ([1, {"state": state}], None),
    }
    for name, opt_state in deep.items():
        loss = og.scale_loss(jnp.float32(0.5), opt_state)
        assert (loss.shape, loss.dtype, float(loss)) == ((), jnp.float32, 4.0), name
        assert type(loss) is type(jnp.ones(())), name


def test_scaled_loss_is_at_least_float32_and_keeps_its_shape(x64):
    state = og.dynamic_loss_scale(optax.sgd(0.1)).init(PARAMS)
    for dtype, expected in [
        (jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ]:
        loss = jax.jit(og.scale_loss)(jnp.full((2, 1), 4, dtype), state)
        assertions.assert_same_bits(loss, jnp.full((2, 1), 2**17, expected))
    assert og.scale_loss(4.0, state).dtype in (jnp.float32, jnp.float64)


def test_gradient_of_a_scaled_loss_is_scaled():
    state = og.dynamic_loss_scale(optax.sgd(0.1)).init(PARAMS)
    gradient = jax.grad(lambda x: og.scale_loss(jnp.float16(3) * x, state))(jnp.float16(1))
    assert (gradient.dtype, float(gradient)) == (jnp.float16, np.inf)  # 3 * 2**15
    gradient = jax.grad(lambda x: og.scale_loss(x, state))(jnp.float16(1))
    assert float(gradient) == 2**15


@pytest.mark.parametrize(
    ("tx", "count"),
    [
        (optax.adam(0.1), 0),
        (og.dynamic_loss_scale(og.dynamic_loss_scale(optax.sgd(0.1))), 2),
    ],
)
def test_scale_loss_wants_exactly_one_scale(tx, count):
    with pytest.raises(ValueError, match=f"with one loss scale; {count} were found in the given"):
        og.scale_loss(1.0, tx.init(PARAMS))


# Company


def test_overflow_of_one_microbatch_leaves_the_others_alone():
    def mean_of_two():
        return optax.MultiSteps(og.guard(optax.sgd(1.0)), 2).gradient_transformation()

    tx = og.dynamic_loss_scale(mean_of_two(), initial_scale=4.0)
    step = jax.jit(tx.update)
    state = tx.init(jnp.zeros(1, jnp.float16))
    total = jnp.zeros(1)
    for gradient in [1.0, jnp.inf, 3.0, jnp.nan, 5.0, 7.0]:
        gradients = og.scale_loss(jnp.full(1, gradient), state).astype(jnp.float16)
        updates, state = step(gradients, state, jnp.zeros(1, jnp.float16))
        total += updates
        assert updates.dtype == jnp.float16
    assertions.assert_same_bits(total, jnp.array([-8.0]))  # means of (1, 3) and of (5, 7)
    assert int(state.overflows_total) == 2
    assert og.metrics(state)["guard/guard_step"] == 2


def test_chain_of_scale_guard_clip_constraint_and_penalty_trains_under_scan():
    tx = og.dynamic_loss_scale(
        og.guard(
            optax.chain(
                og.add_l1(1e-3), og.clip_by_norm(1.0), optax.sgd(0.1), og.clip_params(-1.5, 1.5)
            )
        ),
        growth_interval=5,
    )
    target = jnp.array([1.0, -3.0, 0.0], jnp.float16)

    @jax.jit
    def train(params):
        def body(carry, step):
            params, state = carry
            # In float16 from step 20 to 22 this loss overflows at every scale above 1.
            factor = jnp.where((step >= 20) & (step < 23), 30000, 1).astype(jnp.float16)
            loss = lambda p: og.scale_loss(jnp.sum((p - target) ** 2) * factor, state)  # noqa: E731
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), og.step_ok(state)

        return lax.scan(body, (params, tx.init(params)), jnp.arange(120))

    (params, state), oks = train(jnp.full(3, 0.5, jnp.float16))
    assert params.dtype == jnp.float16
    # Steps of 0.1 with spacings of 1e-3 of float16, and the penalty of 5e-4.
    np.testing.assert_allclose(params, [1.0, -1.5, 0.0], atol=6e-3)
    assert not np.any(oks[20:23])
    assert int(og.metrics(state)["guard/clip_params/clipped_total"]) > 50


def test_nnx_optimizer_of_a_float16_model_learns():
    model = nnx.Linear(3, 1, dtype=jnp.float16, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, og.dynamic_loss_scale(og.guard(optax.adam(0.05))), wrt=nnx.Param
    )
    inputs = jax.random.normal(jax.random.key(0), (64, 3), jnp.float16)
    targets = inputs @ jnp.array([[1.0], [-1.0], [0.5]], jnp.float16)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return og.scale_loss(jnp.mean((model(inputs) - targets) ** 2), optimizer)

        loss, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return og.metrics(optimizer), og.step_ok(optimizer)

    for _ in range(150):
        metrics, ok = step(model, optimizer)
    assert bool(ok)
    assert model.kernel[...].dtype == jnp.float16
    np.testing.assert_allclose(model.kernel[...].ravel(), [1.0, -1.0, 0.5], atol=0.02)
    assert float(metrics["guard/dynamic_loss_scale/loss_scale"]) >= 2.0**10


# Real data


def split_digits() -> tuple[Any, ...]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


def init_network(dtype: Any) -> Any:
    rng = np.random.default_rng(1)
    sizes = [64, 128, 64, 10]
    return [
        {
            "kernel": jnp.asarray(rng.normal(size=(m, n)) * np.sqrt(2 / m), dtype),
            "bias": jnp.zeros(n, dtype),
        }
        for m, n in itertools.pairwise(sizes)
    ]


def rounded(tree: Any) -> Any:
    """To float16 in fact, cotangents too: XLA:CPU leaves out roundings that it finds in between."""

    def to_float16(leaf):
        if leaf.dtype != jnp.float16:
            return leaf
        return lax.reduce_precision(leaf, exponent_bits=5, mantissa_bits=10)

    return jax.tree.map(to_float16, tree)


def logits_of(params: Any, images: Any) -> jax.Array:
    for layer in params[:-1]:
        images = jax.nn.relu(rounded(images @ layer["kernel"] + layer["bias"]))
    return rounded(images @ params[-1]["kernel"] + params[-1]["bias"])


LOSS_WEIGHT = 1e-7  # so small that float16 has no gradient left of the loss as it is


def accuracy_on_digits(dtype: Any, *, is_scaled: bool, epochs: int = 12) -> tuple[float, Any]:
    """Test accuracy in per cent, all arithmetic in ``dtype``, and the last state."""
    images, labels, test_images, test_labels = split_digits()
    images, test_images = images.astype(dtype), test_images.astype(dtype)
    largest = 2.0**45 if is_scaled else 1.0
    tx = og.dynamic_loss_scale(
        og.guard(optax.sgd(0.05 / LOSS_WEIGHT, momentum=0.9)),
        initial_scale=largest,
        max_scale=largest,
        growth_interval=50,
    )
    rng = np.random.default_rng(2)
    rows = np.concatenate([rng.permutation(1437)[: 22 * 64] for _ in range(epochs)])

    @jax.jit
    def train(params, rows):
        def body(carry, rows):
            params, state = carry

            def loss_fn(params):
                logits = logits_of(params, jnp.asarray(images)[rows]).astype(jnp.float32)
                losses = optax.softmax_cross_entropy_with_integer_labels(
                    logits, jnp.asarray(labels)[rows]
                )
                return og.scale_loss(LOSS_WEIGHT * jnp.mean(losses), state)

            gradients = rounded(jax.grad(loss_fn)(params))
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(body, (params, tx.init(params)), rows)[0]

    params, state = train(init_network(dtype), rows.reshape(-1, 64))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    predictions = np.asarray(jax.jit(logits_of)(params, test_images)).argmax(axis=-1)
    return 100 * float(np.mean(predictions == test_labels)), state


def test_float16_network_learns_digits_as_well_as_float32_if_the_loss_is_scaled():
    in_float32, _ = accuracy_on_digits(jnp.float32, is_scaled=False)
    in_float16, state = accuracy_on_digits(jnp.float16, is_scaled=True)
    without, _ = accuracy_on_digits(jnp.float16, is_scaled=False)
    assert in_float32 > 97
    assert in_float16 > in_float32 - 1
    assert without < 20
    # The scale starts too large on purpose, and grows into another overflow now and then.
    assert 5 <= int(state.overflows_total) < 40
    assert int(state.inner_state.skipped_total) == 0
    assert 2.0**24 < float(state.loss_scale) < 2.0**45
