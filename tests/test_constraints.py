"""Constraints and penalties on parameters against NumPy, by hand, and by property."""

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
from hypothesis import strategies as st
from jax import lax

import optax_guard as og

DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)
LOW, HIGH, MAX_NORM, STRENGTH = -0.5, 0.75, 1.5, 0.02


def normal_tree(seed: int, size: float = 1.0, dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"b": (3,), "w": (4, 3)}
    return {k: jnp.asarray(size * rng.normal(size=shape), dtype) for k, shape in shapes.items()}


def moved(tx: Any, params: Any, updates: Any) -> Any:
    """Parameters after one step."""
    return optax.apply_updates(params, tx.update(updates, tx.init(params), params)[0])


def train(tx: Any, params: Any, gradients: Any) -> Any:
    """Parameters after every step, stacked, and the last state."""

    def body(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @jax.jit
    def scan(params, gradients):
        return lax.scan(body, (params, tx.init(params)), gradients)

    (_, state), trajectory = scan(params, gradients)
    return trajectory, state


def column_norms(leaf: np.ndarray) -> np.ndarray:
    """As ``scope="unit"``: a vector is one group, a column of a matrix is one."""
    axis = 0 if leaf.ndim == 2 else None
    return np.sqrt(np.sum(np.square(leaf), axis=axis, keepdims=True))


# References in float64


def box(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.clip(leaf, LOW, HIGH) for name, leaf in params.items()}


def balls(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: leaf * np.minimum(1, MAX_NORM / np.maximum(column_norms(leaf), 1e-300))
        for name, leaf in params.items()
    }


def ball(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in params.values()))
    return {name: leaf * min(1, MAX_NORM / norm) for name, leaf in params.items()}


PROJECTIONS = {
    "box": (lambda: og.clip_params(LOW, HIGH), box),
    "units": (lambda: og.clip_params_by_norm(MAX_NORM), balls),
    "global": (lambda: og.clip_params_by_norm(MAX_NORM, scope="global"), ball),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projected_sgd_follows_its_reference(name):
    make, project = PROJECTIONS[name]
    steps = [normal_tree(seed + 1) for seed in range(60)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    # Starts outside of the set.
    actual, state = train(optax.chain(optax.sgd(0.2), make()), normal_tree(0, 3.0), stacked)

    params = {k: np.asarray(leaf, np.float64) for k, leaf in normal_tree(0, 3.0).items()}
    num_held = 0
    for step, gradient in enumerate(steps):
        free = {k: params[k] - 0.2 * np.asarray(gradient[k], np.float64) for k in params}
        params = project(free)
        num_held += any(np.any(params[k] != free[k]) for k in params)
        for k in params:
            # 60 steps of float32, projections do not enlarge errors.
            np.testing.assert_allclose(actual[k][step], params[k], rtol=1e-5, atol=1e-5)
    assert 10 < num_held <= 60
    assert int(state[1].steps) == 60
    assert int(state[1].clipped_total) == num_held


def test_l1_follows_its_reference():
    schedule = optax.linear_schedule(0.1, 0.0, 40)
    steps = [normal_tree(seed + 1, 0.1) for seed in range(60)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    actual, state = train(optax.chain(og.add_l1(schedule), optax.sgd(0.3)), normal_tree(0), stacked)
    params = {k: np.asarray(leaf, np.float64) for k, leaf in normal_tree(0).items()}
    for step, gradient in enumerate(steps):
        strength = 0.1 * max(0.0, 1 - step / 40)
        for k in params:
            full = np.asarray(gradient[k], np.float64) + strength * np.sign(params[k])
            params[k] = params[k] - 0.3 * full
            # Where the float32 run and this one are on different sides of zero, the two differ by
            # the length of a step; the seeds avoid that.
            np.testing.assert_allclose(actual[k][step], params[k], rtol=1e-5, atol=1e-5)
    assert int(state[0].steps) == 60


# By hand


def test_clip_params_holds_back_only_what_would_leave():
    params = jnp.array([0.5, 0.5, 0.5, 3.0, -3.0, 3.0, -0.0])
    updates = jnp.array([0.1, 1.0, -2.0, 0.0, 0.0, 1.0, -0.0])
    tx = og.clip_params(-1.0, 1.0)
    new, state = tx.update(updates, tx.init(params), params)
    assertions.assert_same_bits(new, jnp.array([0.1, 0.5, -1.5, -2.0, 2.0, -2.0, -0.0]))
    assert (int(state.steps), int(state.clipped_total)) == (1, 1)
    inside = jnp.zeros(7)
    new, state = tx.update(updates * 1e-3, state, inside)
    assertions.assert_same_bits(new, updates * 1e-3)
    assert (int(state.steps), int(state.clipped_total)) == (2, 1)


def test_clip_params_may_be_open_to_one_side_or_fix_a_value():
    params, updates = jnp.array([1.0, -1.0, 5.0]), jnp.array([-3.0, 3e30, 1.0])
    for (low, high), expected in {
        (0.0, np.inf): [0.0, 3e30, 6.0],
        (-np.inf, 2.0): [-2.0, 2.0, 2.0],
        (-np.inf, np.inf): [-2.0, 3e30, 6.0],
        (2.0, 2.0): [2.0, 2.0, 2.0],
    }.items():
        result = moved(og.clip_params(low, high), params, updates)
        assertions.assert_same_bits(result, jnp.array(expected))


def test_clip_params_holds_back_real_and_imaginary_parts():
    params, updates = jnp.array([1 + 1j, 0j]), jnp.array([3 - 4j, 0.5 + 0.25j])
    result = moved(og.clip_params(-1.0, 2.0), params, updates)
    assertions.assert_same_bits(result, jnp.array([2 - 1j, 0.5 + 0.25j]))


def test_clip_params_by_norm_shortens_every_group_that_is_too_long():
    params = {"b": jnp.array([3.0, 0.0]), "w": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
    updates = {"b": jnp.array([0.0, 4.0]), "w": jnp.array([[1.0, 0.5], [4.0, 0.0]])}
    results = {
        scope: moved(og.clip_params_by_norm(2.5, scope=scope), params, updates)
        for scope in ("unit", "leaf", "global")
    }
    w, b = np.array([[3, 0.5], [4, 1]]), np.array([3, 4])
    factors = {"unit": ([0.5, 1], 0.5), "leaf": (2.5 / np.sqrt(26.25), 0.5)}
    factors["global"] = (2.5 / np.sqrt(51.25),) * 2
    for scope, (for_w, for_b) in factors.items():
        np.testing.assert_allclose(results[scope]["w"], w * for_w, rtol=3e-7)  # 2 roundings
        np.testing.assert_allclose(results[scope]["b"], b * for_b, rtol=3e-7)


def test_clip_params_by_norm_passes_short_groups_bit_for_bit():
    params, updates = normal_tree(0, 0.1), normal_tree(1, 0.1)
    tx = og.clip_params_by_norm(10.0)
    new, state = tx.update(updates, tx.init(params), params)
    assertions.assert_same_bits(new, updates)
    assert (int(state.steps), int(state.clipped_total)) == (1, 0)


def test_clip_params_by_norm_zero_and_infinity():
    params, updates = normal_tree(0), normal_tree(1)
    assertions.assert_same_bits(
        moved(og.clip_params_by_norm(0.0), params, updates),
        jax.tree.map(jnp.zeros_like, params),
    )
    new = moved(og.clip_params_by_norm(np.inf), params, updates)
    assertions.assert_same_bits(new, optax.apply_updates(params, updates))


def test_sums_past_the_range_of_float32_are_brought_in():
    params, updates = jnp.array([3e38, 1.0]), jnp.array([3e38, 0.0])
    for tx, expected in (
        (og.clip_params(-2.0, 3e38), [3e38, 1.0]),
        # The norm of the second element vanishes beside the first.
        (og.clip_params_by_norm(3e38), [3e38, 3e38 / np.float32(3.4028235e38)]),
    ):
        np.testing.assert_allclose(moved(tx, params, updates), expected, rtol=1e-6)


def test_l1_pulls_every_weight_but_zero_by_the_same_amount():
    params = jnp.array([5.0, -0.1, 0.0, -0.0, 1e-30])
    updates = jnp.array([0.0, 0.5, -0.0, 0.25, 0.0])
    tx = og.add_l1(0.01)
    new, state = tx.update(updates, tx.init(params), params)
    assertions.assert_same_bits(new, jnp.array([0.01, 0.49, -0.0, 0.25, 0.01]))
    assert int(state.steps) == 1


def test_l1_is_the_gradient_of_the_penalty():
    params = normal_tree(0)
    penalty = lambda p: STRENGTH * sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(p))  # noqa: E731
    tx = og.add_l1(STRENGTH)
    new, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assertions.assert_same_bits(new, jax.grad(penalty)(params))


def test_l1_pulls_complex_weights_towards_zero():
    params = jnp.array([3 + 4j, 0j])
    tx = og.add_l1(10.0)
    new, _ = tx.update(jnp.zeros(2, jnp.complex64), tx.init(params), params)
    np.testing.assert_allclose(new, [6 + 8j, 0], rtol=1e-6)
    assert new.dtype == jnp.complex64


@pytest.mark.parametrize("mask", [{"b": False, "w": True}, lambda p: {"b": False, "w": True}])
def test_l1_leaves_masked_weights_alone(mask):
    params, updates = normal_tree(0), normal_tree(1)
    tx = og.add_l1(0.5, mask)
    new, state = tx.update(updates, tx.init(params), params)
    assertions.assert_same_bits(new["b"], updates["b"])
    # One rounding.
    np.testing.assert_allclose(new["w"], updates["w"] + 0.5 * np.sign(params["w"]), rtol=1e-6)
    assert og.metrics(state) == {"guard/add_l1/steps": 1}


def test_l1_finds_the_inputs_that_matter_and_l2_does_not():
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(200, 20)), jnp.float32)
    truth = jnp.zeros(20).at[:3].set(jnp.array([2.0, -1.0, 0.5]))
    targets = inputs @ truth + jnp.asarray(0.5 * rng.normal(size=200), jnp.float32)
    loss = lambda w: jnp.mean((inputs @ w - targets) ** 2) / 2  # noqa: E731

    @jax.jit
    def fit(penalty):
        tx = optax.chain(optax.inject_hyperparams(og.add_l1)(penalty), optax.sgd(0.01))
        both = optax.chain(optax.add_decayed_weights(0.1 - penalty), tx)

        def body(carry, _):
            weights, state = carry
            updates, state = both.update(jax.grad(loss)(weights), state, weights)
            return (optax.apply_updates(weights, updates), state), None

        return lax.scan(body, (jnp.zeros(20), both.init(jnp.zeros(20))), length=2000)[0][0]

    with_l1, with_l2 = np.abs(fit(0.1)), np.abs(fit(0.0))
    step = 0.01 * 0.1  # what the pull moves a weight in one step
    assert np.sum(with_l1 > 2 * step) == 3
    assert np.all(with_l1[:3] > 0.3)
    assert np.sum(with_l2 > 2 * step) > 15


# Any dtype, any optimizer


def excess(new: Any, low: float, high: float) -> float:
    """How far the parameters lie outside of the bounds, as rounded to their dtype."""
    bounds = jnp.asarray([low, high], jnp.float32).astype(new.dtype).astype(jnp.float32)
    wide = new.astype(jnp.float32)
    return float(jnp.max(jnp.maximum(bounds[0] - wide, wide - bounds[1])))


OPTIMIZERS = {
    "adam": optax.adam(0.3),
    "lion": optax.lion(0.3),
    "momentum": optax.sgd(0.5, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(0.3),
    "adafactor": optax.adafactor(0.3, min_dim_size_to_factor=2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "adam")) for name in OPTIMIZERS]
)
def test_parameters_stay_inside_behind_any_optimizer(name, dtype):
    params = normal_tree(0, 3.0, dtype)
    steps = [normal_tree(seed + 1, 2.0, dtype) for seed in range(30)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    in_box, state = train(optax.chain(OPTIMIZERS[name], og.clip_params(LOW, HIGH)), params, stacked)
    assert int(state[1].clipped_total) > 10
    in_balls, state = train(
        optax.chain(OPTIMIZERS[name], og.clip_params_by_norm(MAX_NORM)), params, stacked
    )
    assert int(state[1].clipped_total) > 10
    for leaf in jax.tree.leaves(in_box):
        assert leaf.dtype == dtype
        assert excess(leaf, LOW, HIGH) <= 0
    for leaf in jax.tree.leaves(in_balls):
        assert leaf.dtype == dtype
        norms = jax.vmap(lambda x: jnp.linalg.norm(x, axis=0))(leaf.astype(jnp.float32))
        # The factor and one rounding of the addition.
        assert jnp.max(norms) <= MAX_NORM * (1 + 2 * float(jnp.finfo(dtype).eps))


NUMBERS = st.floats(-1000, 1000, width=16)
PAIRS = st.sampled_from(list(itertools.product(DTYPES, DTYPES)))
GROUPS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=4, max_size=4)


def parameters_and_updates(pairs: Any, dtypes: Any) -> tuple[jax.Array, jax.Array]:
    params, updates = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
    return jnp.asarray(params, dtypes[0]), jnp.asarray(updates, dtypes[1])


@jax.jit
def boxed(params, updates, low, high):
    return moved(og.clip_params(low, high), params, updates)


@hypothesis.given(pairs=GROUPS, dtypes=PAIRS, low=st.floats(-10, 0.0), width=st.floats(0.0, 20))
def test_every_parameter_ends_inside_the_interval(pairs, dtypes, low, width):
    params, updates = parameters_and_updates(pairs, dtypes)
    low, high = np.float32(low), np.float32(low + width)
    new = boxed(params, updates, low, high)
    assert (new.shape, new.dtype) == (params.shape, params.dtype)
    # How coarse updates of that length are; where no update leads inside, the nearest is taken.
    spacing = float(jnp.finfo(dtypes[1]).eps * jnp.max(jnp.abs(params - new).astype(jnp.float32)))
    # What subnormal numbers of float16 are apart, and the smallest of float32.
    spacing += float(jnp.finfo(dtypes[1]).smallest_subnormal) + 1e-37
    if high - low > spacing:
        assert excess(new, low, high) <= 1e-37
    else:
        rounding = float(jnp.finfo(dtypes[0]).eps) * max(abs(float(low)), abs(float(high)))
        assert excess(new, low, high) <= spacing + rounding


@jax.jit
def balled(params, updates, max_norm):
    return moved(og.clip_params_by_norm(max_norm), params, updates)


@hypothesis.given(pairs=GROUPS, dtypes=PAIRS, max_norm=st.floats(2.0**-10, 100))
def test_every_group_ends_inside_its_ball(pairs, dtypes, max_norm):
    params, updates = parameters_and_updates(pairs, dtypes)
    new = balled(params, updates, np.float32(max_norm))
    assert (new.shape, new.dtype) == (params.shape, params.dtype)
    norm = np.sqrt(np.sum(np.square(np.asarray(new, np.float64))))
    # One rounding of each addition, in a subnormal parameter of float16 too, and the factor's.
    finfo = jnp.finfo(dtypes[0])
    rounding = float(finfo.eps) * max_norm + 2 * float(finfo.smallest_subnormal)
    assert norm <= max_norm + rounding + 4e-7 * max_norm


@hypothesis.given(pairs=GROUPS, max_norm=st.floats(2.0**-10, 100))
def test_the_ball_keeps_directions(pairs, max_norm):
    params, updates = parameters_and_updates(pairs, (jnp.float32, jnp.float32))
    new = np.asarray(balled(params, updates, np.float32(max_norm)), np.float64)
    free = np.asarray(params, np.float64) + np.asarray(updates, np.float64)
    length = np.sqrt(np.sum(free**2))
    expected = free * min(1.0, max_norm / length) if length else free
    # Differences from parameters of up to 2000 round to 1e-4.
    np.testing.assert_allclose(new, expected, rtol=1e-5, atol=2.0**-12)


def test_inwards_means_into_the_set():
    """A bfloat16 near 39.1 is 39 or 39.25; the nearest one leads from 40.1 to 1.1."""
    params = jnp.array([40.1, -40.1])
    tx = og.clip_params(-1.0, 1.0)
    new, _ = tx.update(jnp.zeros(2, jnp.bfloat16), tx.init(params), params)
    assertions.assert_same_bits(new, jnp.array([-39.25, 39.25], jnp.bfloat16))


# Faults, derivatives, company


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden_and_the_rest_is_held_back(bad):
    params = {"b": jnp.full(2, 5.0), "w": jnp.zeros((2, 2))}
    updates = {"b": jnp.zeros(2), "w": jnp.array([[bad, 9.0], [9.0, 9.0]])}
    for make in (lambda: og.clip_params(-1.0, 1.0), lambda: og.clip_params_by_norm(1.0)):
        tx = make()
        state = tx.init(params)
        new, new_state = tx.update(updates, state, params)
        assertions.assert_same_bits(new["w"][0, 0], updates["w"][0, 0])
        assertions.assert_same_bits(new_state, state)
        result = optax.apply_updates(params, new)
        assert float(jnp.linalg.norm(result["b"])) <= np.sqrt(2) + 1e-6
        assert float(result["w"][1, 1]) <= 1


def test_parameters_that_are_not_finite_are_left_alone():
    params = jnp.array([jnp.nan, jnp.inf, 9.0])
    tx = og.clip_params(-1.0, 1.0)
    new, _ = tx.update(jnp.array([0.5, 0.5, 0.0]), tx.init(params), params)
    assertions.assert_same_bits(new, jnp.array([0.5, 0.5, -8.0]))


def test_guard_sees_what_the_optimizer_breaks_behind_a_constraint():
    for constraint in (og.clip_params(-1.0, 1.0), og.clip_params_by_norm(1.0), og.add_l1(0.1)):
        broken = optax.chain(optax.sgd(lambda step: jnp.inf), constraint)
        tx = og.guard(broken, check_update=True)
        params = jnp.array([0.5, 0.5])
        new, state = tx.update(jnp.ones(2), tx.init(params), params)
        assertions.assert_same_bits(new, jnp.array([-0.0, -0.0]))
        assert int(state.skip_reason) == 4


def test_derivatives_are_those_of_the_projection():
    """Inside the set that of the identity, outside that of the bound."""
    params, updates = jnp.array([0.5, 0.5, 9.0]), jnp.array([0.1, 3.0, 0.5])
    box = lambda p, u: moved(og.clip_params(-1.0, 1.0), p, u)  # noqa: E731
    for argument in (0, 1):
        jacobian = jax.jacobian(box, argument)(params, updates)
        np.testing.assert_array_equal(jacobian, np.diag([1.0, 0.0, 0.0]))
    bound = lambda high: moved(og.clip_params(-1.0, high), params, updates)  # noqa: E731
    np.testing.assert_array_equal(jax.jacobian(bound)(1.0), [0.0, 1.0, 1.0])

    free = jnp.array([3.0, 4.0])
    ball = lambda u: moved(og.clip_params_by_norm(2.0), free - u, u)  # noqa: E731
    project = lambda q: 2.0 * q / jnp.linalg.norm(q)  # noqa: E731
    actual = jax.jacobian(lambda u: moved(og.clip_params_by_norm(2.0), free, u))(jnp.zeros(2))
    np.testing.assert_allclose(actual, jax.jacobian(project)(free), rtol=1e-5, atol=1e-6)
    # p + u does not change here, nor where it is projected to.
    np.testing.assert_allclose(jax.jacobian(ball)(jnp.ones(2)), np.zeros((2, 2)), atol=1e-6)


def everything() -> optax.GradientTransformationExtraArgs:
    return og.guard(
        optax.chain(
            og.clip_by_norm(5.0),
            og.add_l1(STRENGTH, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
            optax.adam(0.2),
            og.clip_params(LOW, HIGH),
            optax.masked(og.clip_params_by_norm(MAX_NORM / 2), {"b": False, "w": True}),
        )
    )


def test_chain_of_all_works_under_scan_inside_multisteps_and_inject_hyperparams():
    params = normal_tree(0)
    steps = [normal_tree(seed + 1) for seed in range(12)]
    steps[5] = jax.tree.map(lambda leaf: leaf * jnp.nan, steps[5])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    variants = {
        "plain": everything(),
        "multi": optax.MultiSteps(
            everything(), 2, should_skip_update_fn=og.skip_microbatch
        ).gradient_transformation(),
        "injected": og.guard(
            optax.chain(
                optax.inject_hyperparams(og.clip_params_by_norm)(max_norm=0.5),
                optax.inject_hyperparams(og.clip_params)(min_value=-0.4, max_value=0.5),
            )
        ),
    }
    for name, tx in variants.items():
        trajectory, state = train(tx, params, stacked)
        last = jax.tree.map(lambda leaf: leaf[-1], trajectory)
        assert excess(last["w"], LOW, HIGH) <= 0, name
        assert np.all(column_norms(np.asarray(last["w"])) <= MAX_NORM / 2 * (1 + 1e-6)), name
        metrics = og.metrics(state)
        names = {"clip_params", "clip_params_by_norm"}
        assert {f"guard/{each}/clipped_total" for each in names} <= set(metrics)
        if name != "multi":
            assert int(metrics["guard/skipped_total"]) == 1
            assert int(metrics["guard/clip_params/steps"]) == 11


def test_nnx_optimizer_holds_parameters_inside():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(og.add_l1(0.1), optax.sgd(1.0), og.clip_params(-0.1, 0.2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        gradients = nnx.grad(lambda model: jnp.sum(model(x)))(model)
        optimizer.update(model, gradients)
        return og.metrics(optimizer)

    metrics = step(model, optimizer, jnp.ones((4, 3)))
    assert excess(model.kernel[...], -0.1, 0.2) <= 0
    assert int(metrics["guard/clip_params/clipped_total"]) == 1
    assert int(metrics["guard/add_l1/steps"]) == 1


@pytest.mark.parametrize("name", ["clip_params", "clip_params_by_norm", "add_l1"])
def test_without_parameters_there_is_an_error(name):
    tx = getattr(og, name)(*((0.0, 1.0) if name == "clip_params" else (1.0,)))
    with pytest.raises(
        ValueError, match=rf"^{name} .* update\(\) was called without params\. Call"
    ):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
