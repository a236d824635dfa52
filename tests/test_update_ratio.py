"""``clip_by_update_ratio`` against a NumPy float64 reference, and what it promises."""

from __future__ import annotations

import functools

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og

LEARNING_RATE = 0.1


def params(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    values = {
        "bias": rng.normal(size=4),
        "first": rng.normal(size=(3, 4)),
        "second": 0.1 * rng.normal(size=(4, 2)),
        "zero": np.zeros((2, 2)),
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def gradients(step: int, length: float = 1.0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1000 + step)
    values = {name: rng.normal(size=leaf.shape) for name, leaf in params().items()}
    total = np.sqrt(sum(np.sum(value**2) for value in values.values()))
    return {
        name: jnp.asarray(value * length / total, jnp.float32) for name, value in values.items()
    }


LENGTHS = np.exp(np.random.default_rng(5).normal(size=160))
LENGTHS[[0, 7, 30, 80, 130]] *= 1000  # the last two are gross outliers


def norm(tree, names=("first", "second")):
    """Of the weights that count, relative to their own norms where these are given."""
    return {name: np.linalg.norm(np.asarray(tree[name], np.float64)) for name in names}


def reference(
    weights, stream, *, max_ratio=0.05, median_ratio=3.0, max_norm=0.2, warmup=10, every=8
):
    """Parameters after plain SGD, all in float64, written from the formula of the docstring."""
    theta = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    initial = norm(theta)
    scale, first, limits = dict(initial), [], []
    for step, gradient in enumerate(stream):
        gradient = {name: np.asarray(value, np.float64) for name, value in gradient.items()}
        n = np.sqrt(sum(np.sum(value**2) for value in gradient.values()))
        if step % every == 0 or (step & (step - 1)) == 0:
            scale = {name: max(initial[name], value) for name, value in norm(theta).items()}
        if len(first) < warmup:
            first.append(n)
        q = np.sqrt(sum((value / scale[name]) ** 2 for name, value in norm(gradient).items()))
        r = max_ratio / (LEARNING_RATE * q)
        usual = np.median(first)
        if len(limits) >= 50:
            usual = min(usual, np.median(limits[-100:]))
        m = max(median_ratio * usual / n, 0.15 * r * min(1, 0.15 * r) ** 0.1)
        if len(limits) >= 50:
            m *= min(1, 60 * m)
        factor = min(1, m, r * min(1, r) ** 0.1)
        factor = min(factor, max_norm / n) if step < 3 else factor
        limits.append(factor * n)
        theta = {k: v - LEARNING_RATE * factor * gradient[k] for k, v in theta.items()}
    return theta


def train(tx, weights, stream):
    state = tx.init(weights)
    step = jax.jit(tx.update)
    for gradient in stream:
        updates, state = step(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state


def sgd(learning_rate=LEARNING_RATE):
    return optax.sgd(learning_rate)


def test_follows_its_formula():
    stream = [gradients(step, length) for step, length in enumerate(LENGTHS)]
    tx = og.clip_by_update_ratio(sgd(), max_norm=0.2, warmup_steps=10, measure_every=8)
    actual, state = train(tx, params(), stream)
    expected = jax.tree.map(np.float32, reference(params(), stream))
    assertions.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert 0 < int(state.clipped_total) < len(stream)  # the trace meets both cases


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e6, 1e30])
def test_no_step_of_sgd_changes_the_weights_by_more_than_max_ratio(length):
    tx = og.clip_by_update_ratio(sgd(), max_ratio=0.02)
    weights = params()
    updates, _ = tx.update(gradients(0, length), tx.init(weights), weights)
    change = {k: v / norm(weights)[k] for k, v in norm(updates).items()}
    assert np.sqrt(sum(np.square(list(change.values())))) <= 0.02 * (1 + 1e-5)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in updates.values())


def test_small_gradients_pass_bit_for_bit():
    stream = [gradients(step, 1e-3) for step in range(3)]
    actual, _ = train(og.clip_by_update_ratio(sgd()), params(), stream)
    expected, _ = train(sgd(), params(), stream)
    assertions.assert_same_bits(actual, expected)


def test_units_of_the_loss_do_not_matter():
    stream = [gradients(step, length) for step, length in enumerate(LENGTHS)]
    larger = jax.tree.map(lambda leaf: 64 * leaf, stream)
    clip = functools.partial(og.clip_by_update_ratio, max_norm=np.inf)
    expected, _ = train(clip(sgd()), params(), stream)
    actual, _ = train(clip(sgd(LEARNING_RATE / 64)), params(), larger)
    assertions.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        sgd(),
        optax.sgd(LEARNING_RATE, momentum=0.9),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(LEARNING_RATE, momentum=0.9)),
    ],
    ids=["sgd", "momentum", "momentum-decay"],
)
def test_response_of_sgd_is_its_learning_rate(optimizer):
    _, state = train(
        og.clip_by_update_ratio(optimizer), params(), [gradients(step) for step in range(9)]
    )
    np.testing.assert_allclose(state.response, LEARNING_RATE, rtol=1e-3)


def test_response_to_complex_gradients_is_the_learning_rate_too():
    weights = {"kernel": jnp.full((2, 2), 1 + 2j)}
    tx = og.clip_by_update_ratio(sgd())
    _, state = tx.update({"kernel": jnp.full((2, 2), 0.1 - 0.3j)}, tx.init(weights), weights)
    np.testing.assert_allclose(state.response, LEARNING_RATE, rtol=1e-5)


def test_response_follows_a_schedule_that_begins_at_zero():
    rates = optax.linear_schedule(0.0, 0.1, 32)
    tx = og.clip_by_update_ratio(optax.sgd(rates), measure_every=8)
    state, seen = tx.init(params()), []
    update = jax.jit(tx.update)
    for step in range(33):
        _, state = update(gradients(step), state, params())
        seen.append(float(state.response))
    measured_at = [0, 1, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8, 16]
    np.testing.assert_allclose(seen[:17], rates(np.array(measured_at)), rtol=1e-5)
    np.testing.assert_allclose(seen[-1], 0.1, rtol=1e-5)


@pytest.mark.parametrize("warmup_steps", [3, 100])
def test_max_norm_holds_for_three_steps(warmup_steps):
    tx = og.clip_by_update_ratio(
        optax.trace(0.0), max_ratio=20.0, max_norm=0.5, warmup_steps=warmup_steps
    )
    state, norms = tx.init(params()), []
    for step, length in enumerate([100.0, 1.0, 1.0, 1.0, 100.0]):
        updates, state = tx.update(gradients(step, length), state, params())
        norms.append(float(optax.global_norm(updates)))
    np.testing.assert_allclose(norms, [0.5, 0.5, 0.5, 1.0, 3.0], rtol=1e-5)


def test_what_has_no_weights_to_compare_with_knows_only_the_median():
    weights = {"bias": jnp.ones(3), "kernel": jnp.zeros((3, 2)), "scale": jnp.ones(())}
    tx = og.clip_by_update_ratio(sgd(1.0), max_norm=0.5)
    large = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e6), weights)
    updates, state = tx.update(large, tx.init(weights), weights)
    assertions.assert_same_bits(updates, jax.tree.map(jnp.negative, large))
    larger = jax.tree.map(lambda leaf: 1e3 * leaf, large)
    updates, _ = tx.update(larger, state, weights)  # usual: the mean of 1 and 1000
    np.testing.assert_allclose(updates["bias"], -1e9)


def test_gradients_that_change_next_to_nothing_pass_however_much_norms_have_risen():
    weights = {"kernel": jnp.eye(4)}  # of norm 2
    tx = og.clip_by_update_ratio(sgd(1.0), warmup_steps=2)
    stream = [jax.tree.map(lambda leaf, size=size: size * leaf, weights) for size in 60 * [1e-6]]
    _, state = train(tx, weights, stream)
    for size in (7.4e-3, 0.0077):  # of 0.15 * 0.05
        gradient = {"kernel": size * weights["kernel"]}
        updates, _ = tx.update(gradient, state, weights)
        assert bool(jnp.all(updates["kernel"] == -gradient["kernel"])) == (size < 7.5e-3)


@pytest.mark.parametrize(
    ("optimizer", "is_bounded"),
    [
        (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)), False),
        (optax.adam(0.1), True),
    ],
    ids=["momentum-decay", "adam"],
)
def test_only_optimizers_that_do_not_bound_their_steps_meet_the_limit_on_the_change(
    optimizer, is_bounded
):
    tx = og.clip_by_update_ratio(optimizer, max_norm=np.inf)
    stream = [gradients(step, 10.0) for step in range(9)]
    _, state = train(tx, params(), stream)
    if is_bounded:
        assert float(state.linearity) < 0.01 and int(state.clipped_total) == 0
    else:
        np.testing.assert_allclose(state.linearity, 1, rtol=1e-3)
        assert int(state.clipped_total) == len(stream)


def test_layers_of_a_stack_count_as_arrays():
    def unrolled(step, length):
        rng = np.random.default_rng(step)
        sizes = length * np.array([1.0, 0.1, 10.0])
        return {f"{i}": jnp.asarray(size * rng.normal(size=(4, 5)), jnp.float32)
                for i, size in enumerate(sizes)}  # fmt: skip

    def stack(tree):
        return {"layers": jnp.stack(list(tree.values()))}

    weights, stream = unrolled(0, 1.0), [unrolled(step, 0.3) for step in range(1, 8)]
    clip = functools.partial(og.clip_by_update_ratio, sgd(), measure_every=1)
    expected, state = train(clip(), weights, stream)
    stacked = clip(stacked=lambda path, _: path == "layers")
    actual, stacked_state = train(stacked, stack(weights), list(map(stack, stream)))
    assertions.assert_close(actual, stack(expected), rtol=1e-6, atol=1e-6)
    count = len(stream)
    for field in ("recent_norms", "weight_norms", "response"):
        found, wanted = getattr(stacked_state, field), getattr(state, field)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, err_msg=field)
    assert int(state.clipped_total) == count
    # As one array its layers would share a norm, and the limit would be another.
    other = train(clip(), stack(weights), list(map(stack, stream)))[1]
    assert not np.allclose(other.recent_norms[:count], state.recent_norms[:count], rtol=1e-2)


def test_arrays_that_grow_may_change_more():
    weights = {"kernel": jnp.full((2, 2), 0.1)}
    tx = og.clip_by_update_ratio(sgd(), measure_every=1)
    _, state = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(weights), weights)
    grown = {"kernel": jnp.full((2, 2), 10.0)}
    _, state = tx.update({"kernel": jnp.ones((2, 2))}, state, grown)
    np.testing.assert_allclose(state.weight_norms, [20.0], rtol=1e-6)
    shrunk = {"kernel": jnp.full((2, 2), 1e-3)}
    _, state = tx.update({"kernel": jnp.ones((2, 2))}, state, shrunk)
    np.testing.assert_allclose(state.weight_norms, [0.2], rtol=1e-6)


def test_works_without_params_for_an_optimizer_that_needs_none():
    stream = [gradients(step, 10.0) for step in range(4)]
    tx = og.clip_by_update_ratio(sgd(), measure_every=1000)
    state = without = tx.init(params())
    update = jax.jit(tx.update)
    for gradient in stream:
        expected, state = update(gradient, state, params())
        actual, without = update(gradient, without)
        assertions.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "optimizer",
    [optax.lookahead(sgd(), 3, 0.5), optax.contrib.muon(0.02), optax.lion(1e-3)],
    ids=["lookahead", "muon", "lion"],
)
def test_wraps_optimizers_of_every_kind(optimizer):
    weights = params()
    if optimizer.init.__qualname__.startswith("lookahead"):
        weights = optax.LookaheadParams.init_synced(weights)
    tx = og.guard(og.clip_by_update_ratio(optimizer))
    state = tx.init(weights)
    step = jax.jit(tx.update)
    for index in range(6):
        bad = jnp.nan if index == 2 else 1.0
        gradient = jax.tree.map(lambda leaf: leaf * bad, gradients(index))  # noqa: B023
        updates, state = step(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(weights))
    assert float(state.inner_state.response) > 0
    assert int(state.skipped_total) == 1


def test_accumulates_inside_multi_steps():
    tx = optax.MultiSteps(og.clip_by_update_ratio(sgd()), 2).gradient_transformation()
    actual, _ = train(tx, params(), [gradients(0), gradients(0), gradients(1), gradients(1)])
    expected, _ = train(og.clip_by_update_ratio(sgd()), params(), [gradients(0), gradients(1)])
    assertions.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_all_evaluations_of_the_optimizer_but_one_sit_in_a_branch():
    calls = []

    def update(updates, state, params=None):
        calls.append(None)
        return updates, state

    tx = og.clip_by_update_ratio(optax.GradientTransformation(lambda _: (), update))
    jaxpr = jax.make_jaxpr(tx.update)(gradients(0), tx.init(params()), params())
    assert len(calls) == 4  # one for the step, three in the branch
    assert any(equation.primitive.name == "cond" for equation in jaxpr.eqns)


def test_multi_steps_inside_is_refused():
    tx = og.stabilize(optax.MultiSteps(sgd(), 2))
    with pytest.raises(ValueError, match=r"Write optax.MultiSteps\(og.stabilize\(optimizer\), k\)"):
        tx.init(params())


@pytest.mark.parametrize(
    ("optimizer", "culprit"),
    [
        (optax.polyak_sgd(), "(scale_by_)?polyak"),
        (optax.contrib.mechanize(sgd()), "mechanize"),
        (optax.chain(optax.trace(0.9), optax.lbfgs()), "scale_by_(lbfgs|zoom_linesearch)"),
    ],
    ids=["polyak", "mechanize", "lbfgs"],
)
def test_optimizers_that_need_the_length_are_only_guarded_and_it_warns(optimizer, culprit):
    with pytest.warns(UserWarning, match=f"does not clip: {culprit} reads a step size") as caught:
        tx = og.stabilize(optimizer, max_consecutive_skips=3)
    assert caught[0].filename == __file__
    state = tx.init(params())
    assert not any(key.startswith("guard/clip_by_update_ratio") for key in og.metrics(state))
    # With a clip of one's own it is as one says, without a word.
    clipped = og.stabilize(optimizer, clip=og.clip_by_norm(1.0)).init(params())
    assert "guard/clip_by_norm/steps" in og.metrics(clipped)
    if culprit == "(scale_by_)?polyak":
        actual, _ = tx.update(gradients(0, 1e3), state, params(), value=0.5)
        plain = optimizer.init(params())
        expected, _ = optimizer.update(gradients(0, 1e3), plain, params(), value=0.5)
        assertions.assert_close(actual, expected, rtol=1e-6, atol=0)
