"""``skip_microbatch`` in ``optax.MultiSteps``: the mean of a window without its bad parts."""

from __future__ import annotations

import functools
from typing import Any

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optax_guard as og

PARAMS = {"b": jnp.array([1.0, -2.0]), "w": jnp.ones((2, 3))}
BAD = {"NaN": np.nan, "+Inf": np.inf, "-Inf": -np.inf}


def micro(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), PARAMS)


def spoiled(seed: int, value: float = np.nan) -> Any:
    good = micro(seed)
    return good | {"w": good["w"].at[1, 2].set(value)}


@functools.cache
def _compiled(tx: Any) -> Any:
    return jax.jit(tx.update)


def mean(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: np.mean([np.float64(x) for x in leaves], 0), *trees)


def walk(tx: Any, steps: Any, params: Any = PARAMS, **extra_args: Any) -> tuple[Any, Any]:
    update = _compiled(tx)
    state = tx.init(params)
    for gradients in steps:
        updates, state = update(gradients, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


def multi_steps(inner: Any, k: int = 3, **options: Any) -> Any:
    return optax.MultiSteps(inner, k, should_skip_update_fn=og.skip_microbatch, **options)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_window_is_the_mean_of_its_good_micro_batches(bad, at):
    good = [micro(seed) for seed in range(3)]
    steps = [*good[:at], spoiled(7, BAD[bad]), *good[at:]]
    params, state = walk(multi_steps(optax.sgd(1.0)), steps)
    expected = jax.tree.map(lambda p, g: np.float32(p - g), PARAMS, mean(*good))
    # Three float32 additions.
    assertions.assert_close(params, expected, rtol=1e-6, atol=1e-6)
    assert (state.mini_step, state.gradient_step) == (0, 1)


def test_bad_micro_batch_moves_neither_parameters_nor_the_window():
    tx = multi_steps(optax.adam(0.1))
    _, before = walk(tx, [micro(0), micro(1)])
    updates, after = tx.update(spoiled(2), before, PARAMS)
    assertions.assert_same_bits(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assertions.assert_same_bits(after[:-1], before[:-1])


def test_what_was_seen_of_the_micro_batch_is_kept():
    tx = multi_steps(optax.sgd(1.0))
    _, state = walk(tx, [spoiled(0, np.inf)])
    seen = state.skip_state
    assert isinstance(seen, og.states.SkipMicrobatchState)
    norms = [np.linalg.norm(np.float64(micro(0)["b"])), np.inf]
    assert bool(seen.microbatch_skipped)
    assert np.isinf(seen.microbatch_norm)
    np.testing.assert_allclose(seen.microbatch_leaf_norms, norms, rtol=1e-6)  # a sum of two squares
    assert seen.microbatch_bad_leaves.tolist() == [False, True]
    _, state = walk(tx, [spoiled(0), micro(1)])
    assert not state.skip_state.microbatch_skipped
    whole = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(micro(1))))
    np.testing.assert_allclose(state.skip_state.microbatch_norm, whole, rtol=1e-6)
    metrics = og.metrics(state)
    assert metrics["guard/skip_microbatch/microbatch_norm"] == state.skip_state.microbatch_norm


def test_state_and_trace_are_stable():
    tx = multi_steps(optax.adam(0.1))
    traces = []

    @jax.jit
    def step(gradients, state):
        traces.append(1)
        return tx.update(gradients, state, PARAMS)

    state = tx.init(PARAMS)
    expected = assertions.signature(jax.eval_shape(tx.init, PARAMS).skip_state)
    for gradients in (micro(0), spoiled(1), micro(2), micro(3)):
        _, state = step(gradients, state)
        assert assertions.signature(state.skip_state) == expected
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_verdict_in_every_precision(dtype):
    largest = jnp.asarray(jnp.finfo(dtype).max, dtype)
    tree = {"count": jnp.arange(3), "none": None, "w": jnp.full((4, 4), largest)}
    skip, seen = og.skip_microbatch(tree, 0, None)
    assert not skip
    assert seen.microbatch_leaf_norms.dtype == jnp.float32
    assert seen.microbatch_leaf_norms.shape == (1,)
    skip, _ = og.skip_microbatch(tree | {"w": tree["w"].at[0, 0].set(jnp.nan)}, 0, None)
    assert skip


def test_empty_trees_are_good():
    skip, seen = og.skip_microbatch({"none": None}, 0, None)
    assert not skip
    assert (seen.microbatch_norm, seen.microbatch_leaf_norms.shape) == (0, (0,))


def test_every_device_takes_the_same_decision():
    skip_fn = functools.partial(og.skip_microbatch, axis_name="data")
    tx = optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=skip_fn)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P(None, "data"), out_specs=(P(None, "data"), P("data"))
    )
    def run(steps):
        params = jnp.zeros_like(steps[0])

        def step(state, gradients):
            updates, state = tx.update(gradients, state, params)
            return state, updates

        state, updates = jax.lax.scan(step, tx.init(params), steps)
        return updates, state.skip_state.microbatch_norm[None]

    steps = jnp.ones((3, 16)).at[1, 5].set(jnp.nan)  # on one device only
    updates, norms = run(steps)
    # Not to the bit: the sign of the zero that MultiSteps makes is its own.
    np.testing.assert_array_equal(updates, jnp.zeros((3, 16)).at[2].set(-1.0))
    np.testing.assert_allclose(norms, np.full(8, 4.0), rtol=1e-6)


# With the guard


def test_guard_inside_judges_the_mean_and_loses_one_window_at_most():
    inner = og.guard(optax.sgd(1.0), skip_if=og.norm_above(10.0))
    tx = multi_steps(inner, k=2)
    huge = jax.tree.map(lambda leaf: 1e3 * leaf, micro(1))
    params, state = walk(tx, [micro(0), spoiled(5), huge, micro(2), spoiled(6), micro(3)])
    expected = jax.tree.map(lambda p, g: np.float32(p - g), PARAMS, mean(micro(2), micro(3)))
    assertions.assert_close(params, expected, rtol=1e-6, atol=1e-6)
    guard_state = state.inner_opt_state
    assert (guard_state.guard_step, guard_state.skipped_total) == (2, 1)
    assert guard_state.last_fault_reason == 8


def test_guard_outside_leaves_bad_micro_batches_out_by_itself():
    tx = og.guard(optax.MultiSteps(optax.sgd(1.0), 2))
    params, state = walk(tx, [micro(0), spoiled(5), micro(1), spoiled(6)])
    expected = jax.tree.map(lambda p, g: np.float32(p - g), PARAMS, mean(micro(0), micro(1)))
    assertions.assert_close(params, expected, rtol=1e-6, atol=1e-6)
    assert (state.guard_step, state.skipped_total) == (4, 2)
    assert state.inner_state.gradient_step == 1


def test_guard_inside_without_it_keeps_parameters_but_gives_up():
    # What the docstring warns of: 0 * NaN is NaN, so the accumulator never recovers.
    tx = optax.MultiSteps(og.guard(optax.sgd(1.0), max_consecutive_skips=3), 2)
    params, state = walk(tx, [spoiled(0), *map(micro, range(1, 6))])
    assertions.assert_same_bits(params, PARAMS)
    assert state.inner_opt_state.skipped_total == 3
    with pytest.raises(og.GuardGaveUp, match=r"non-finite: w"):
        og.check(state, PARAMS)


def test_bad_loss_costs_its_own_window_at_most():
    # MultiSteps does not show the loss to skip_microbatch; the guard inside sees that of the
    # last micro-batch of the window.
    inner = og.guard(optax.sgd(1.0))
    tx = multi_steps(inner, k=2)
    state, params = tx.init(PARAMS), PARAMS
    for seed, value in enumerate([1.0, np.nan, np.nan, 1.0]):
        updates, state = tx.update(micro(seed), state, params, value=jnp.float32(value))
        params = optax.apply_updates(params, updates)
    expected = jax.tree.map(lambda p, g: np.float32(p - g), PARAMS, mean(micro(2), micro(3)))
    assertions.assert_close(params, expected, rtol=1e-6, atol=1e-6)
    assert state.inner_opt_state.last_fault_reason == 2


def test_extra_args_reach_the_optimizer_inside_a_guarded_multi_steps():
    tx = og.guard(optax.MultiSteps(optax.contrib.momo(1.0), 1))
    _, state = walk(tx, [micro(0)], value=jnp.float32(3.0))
    assert state.inner_state.inner_opt_state.barf == 3.0


def test_sum_that_overflows_is_foreseen_by_a_guard_outside_that_checks_updates():
    huge = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3e38), PARAMS)
    tx = og.guard(optax.MultiSteps(optax.sgd(1e-3), 2, use_grad_mean=False), check_update=True)
    params, state = walk(tx, [huge, huge, micro(0)])
    assert state.skipped_total == 1
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((params, state)))
