"""Conditions to skip: the table of events, a NumPy reference, and the branches by hand."""

from __future__ import annotations

import functools
from typing import Any

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import optax_guard as og

CONDITION = 8
OFS = ("grad_norm", "value")
BAD = {"NaN": np.nan, "+Inf": np.inf, "-Inf": -np.inf}

of_both = pytest.mark.parametrize("of", OFS)


@functools.cache
def _feeder(of: str, options: tuple[tuple[str, Any], ...]) -> Any:
    tx = og.guard(optax.sgd(1.0), skip_if=og.spike(of=of, **dict(options)))

    def step(state, x):
        norm, value = (x, 1.0) if of == "grad_norm" else (1.0, x)
        gradients = jnp.array([0.6, -0.8], jnp.float32) * norm
        _, state = tx.update(gradients, state, value=value)
        return state, state.skip_reason

    return tx, jax.jit(lambda xs: lax.scan(step, tx.init(jnp.zeros(2)), xs))


def feed(xs: Any, of: str = "grad_norm", **options: Any) -> tuple[np.ndarray, og.states.GuardState]:
    """Skip reason of every step of a run with these norms (or losses), and the last state."""
    options = {"sigma": 6.0, "window": 16} | options
    _, run = _feeder(of, tuple(options.items()))
    state, reasons = run(jnp.asarray(xs, jnp.float32))
    return np.asarray(reasons), state


def steady(count: int, level: float = 1.0, seed: int = 0) -> np.ndarray:
    """Positive values that scatter by a tenth around a level."""
    return level * (1 + 0.1 * np.clip(np.random.default_rng(seed).normal(size=count), -2, 2))


def skipped(reasons: np.ndarray) -> list[int]:
    return np.flatnonzero(reasons).tolist()


def spike_state(state: og.states.GuardState) -> og.states.SpikeState:
    (inner,) = state.condition_states.values()
    assert isinstance(inner, og.states.SpikeState)
    return inner


# The table of events: window 16, sigma 6


@of_both
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 3, 40])
def test_nonfinite_is_skipped_at_any_time_and_no_good_step_is_lost(of, bad, at):
    healthy = steady(80)
    reasons, state = feed(np.insert(healthy, at, BAD[bad]), of)
    assert skipped(reasons) == [at]
    assert reasons[at] == (1 if of == "grad_norm" else 2)
    _, expected = feed(healthy, of)
    assertions.assert_same_bits(state.condition_states, expected.condition_states)


@of_both
def test_long_burst_of_nonfinites_blinds_nothing(of):
    xs = np.concatenate([steady(40), np.full(100, np.nan), [50.0], steady(40, seed=1)])
    reasons, _ = feed(xs, of)
    assert skipped(reasons) == list(range(40, 141))
    assert reasons[140] == CONDITION


@of_both
@pytest.mark.parametrize("gap", [0, 1, 4, 15])
def test_spike_soon_after_a_spike_twice_as_large_is_caught(of, gap):
    xs = np.concatenate([steady(40), [100.0], steady(gap, seed=1), [50.0], steady(40, seed=2)])
    reasons, _ = feed(xs, of)
    assert skipped(reasons) == [40, 41 + gap]
    assert set(reasons) == {0, CONDITION}


@of_both
@pytest.mark.parametrize("rebaseline_after", [5, 50])
@pytest.mark.parametrize("factor", [20.0, 1e6])
def test_lasting_change_of_level_is_accepted(of, rebaseline_after, factor):
    xs = np.concatenate([steady(40), steady(200, level=factor, seed=1)])
    reasons, _ = feed(xs, of, rebaseline_after=rebaseline_after)
    num_skipped = len(skipped(reasons))
    # Fewer than allowed where the winsorised values have lifted the limit to the new level.
    assert num_skipped == 5 if rebaseline_after == 5 else 5 < num_skipped < 50
    assert skipped(reasons) == list(range(40, 40 + num_skipped))


@of_both
def test_accepted_level_starts_the_window_anew(of):
    new = steady(100, level=20.0, seed=1)
    new[60] = 1000.0
    reasons, _ = feed(np.concatenate([steady(40), new]), of, rebaseline_after=3)
    assert skipped(reasons) == [40, 41, 42, 100]
    _, state = feed(np.concatenate([steady(40), new[:4]]), of, rebaseline_after=3)
    assert spike_state(state).num_entered == 1


@of_both
def test_without_rebaseline_only_the_window_adapts(of):
    xs = np.concatenate([steady(200), steady(100, level=1e6, seed=1)])
    for rebaseline_after, num_skipped in ((10, 10), (None, 100)):
        reasons, _ = feed(xs, of, window=128, rebaseline_after=rebaseline_after)
        assert skipped(reasons) == list(range(200, 200 + num_skipped))


@of_both
@pytest.mark.parametrize("level", [0.0, 1e-30, 1e-3, 1.0, 245.0, 1e30])
def test_constant_values_are_never_skipped(of, level):
    xs = np.full(100, level)
    xs[50:] *= 1.0001
    reasons, _ = feed(xs, of)
    assert skipped(reasons) == []


def test_constant_negative_loss_is_never_skipped():
    xs = np.full(100, -3.0)
    xs[50:] = -2.9997
    reasons, _ = feed(xs, "value")
    assert skipped(reasons) == []


@of_both
def test_start_at_a_large_value_is_not_skipped(of):
    xs = np.concatenate([[245.0, 120.0, 30.0, 8.0], steady(200)])
    reasons, _ = feed(xs, of)
    assert skipped(reasons) == []


@of_both
def test_decay_over_many_orders_is_not_skipped(of):
    reasons, _ = feed(245.0 * np.exp(-np.arange(300) / 10), of)
    assert skipped(reasons) == []


@pytest.mark.parametrize("level", [1e-30, 1e-20, 1e20, 1e30])
def test_spike_is_caught_at_any_scale(level):
    xs = steady(60, level=level)
    xs[40] *= 100
    reasons, _ = feed(xs)
    assert skipped(reasons) == [40]


def test_loss_that_jumps_from_negative_is_caught():
    xs = steady(60, level=-5.0)
    xs[40] = 5.0
    reasons, _ = feed(xs, "value")
    assert skipped(reasons) == [40]


# Branches by hand


def test_limit_is_mean_plus_sigma_standard_deviations():
    window = [1.0, 3.0, 1.0, 3.0]  # mean 2, standard deviation 1
    for last, reason in ((4.99, 0), (5.01, CONDITION)):
        reasons, _ = feed([*window, last], sigma=3.0, window=4)
        assert reasons.tolist() == [0, 0, 0, 0, reason]


def test_rejected_value_enters_as_the_limit_that_it_broke():
    _, state = feed([1.0, 3.0, 1.0, 3.0, 100.0], sigma=3.0, window=4)
    inner = spike_state(state)
    assert inner.window.dtype == jnp.float32
    # In place of the oldest one; float32 rounding of a mean and a root of four numbers.
    np.testing.assert_allclose(inner.window, [5.0, 3.0, 1.0, 3.0], rtol=1e-6)
    assert inner.rejected_in_a_row == 1


def test_floor_of_the_standard_deviation_is_relative_to_the_mean():
    for last, reason in ((2.19, 0), (2.21, CONDITION)):
        reasons, _ = feed([2.0, 2.0, last], sigma=5.0, window=2, min_std_ratio=0.02)
        assert reasons.tolist() == [0, 0, reason]


@pytest.mark.parametrize(("min_history", "first"), [(None, 4), (1, 1), (3, 3), (8, 8)])
def test_nothing_is_skipped_before_min_history_values_have_entered(min_history, first):
    for at in range(10):
        xs = np.ones(10)
        xs[at] = 1e4
        reasons, _ = feed(xs, window=8, min_history=min_history)
        assert skipped(reasons) == ([at] if at >= first else [])


def test_window_of_one_compares_with_the_last_value():
    reasons, _ = feed([1.0, 1.05, 1.2, 1.0], window=1, sigma=6.0)
    # Limits: 1.06, 1.05 * 1.06 = 1.113, then the rejected 1.2 stands as 1.113.
    assert reasons.tolist() == [0, 0, CONDITION, 0]


def test_nonfinite_between_two_rejections_keeps_the_count_of_rejections():
    shifted = np.where(np.arange(60) % 2 == 0, np.nan, 20.0)
    reasons, _ = feed(np.concatenate([np.ones(20), shifted]), rebaseline_after=3)
    judged = reasons[20:][1::2]
    assert judged.tolist() == [CONDITION] * 3 + [0] * 27


def test_loss_in_low_precision_is_watched_in_float32():
    tx = og.guard(optax.sgd(1.0), skip_if=og.spike(of="value", window=4))
    state = tx.init(jnp.zeros(1))
    for value in (1.0, 1.0, 1.0, 1.0, 9.0):
        _, state = tx.update(jnp.ones(1), state, value=jnp.float16(value))
    assert state.skip_reason == CONDITION
    assert spike_state(state).window.dtype == jnp.float32


def test_count_stays_within_twice_the_window_and_the_window_goes_round():
    _, state = feed(np.arange(1, 104) * 1e-3 + 1.0, window=4)
    inner = spike_state(state)
    assert 4 <= inner.num_entered < 8
    # The values of the last four of 103 steps, wherever the window has arrived.
    np.testing.assert_allclose(np.sort(inner.window), [1.1, 1.101, 1.102, 1.103], rtol=1e-6)


# A reference


def reference(xs: Any, *, sigma: float, window: int, rebaseline_after: int) -> list[bool]:
    """The rule in float64, with a list for the window."""
    kept: list[float] = []
    rejected, verdicts = 0, []
    for x in xs:
        if not np.isfinite(x):
            verdicts.append(True)
            continue
        limit = np.inf
        if len(kept) >= window // 2:
            recent = np.asarray(kept[-window:])
            limit = recent.mean() + sigma * max(recent.std(), 1e-2 * abs(recent.mean()))
        if x <= limit:
            rejected = 0
            kept.append(x)
        elif rejected >= rebaseline_after:
            rejected, kept = 0, [x]
        else:
            rejected += 1
            kept.append(limit)
            verdicts.append(True)
            continue
        verdicts.append(False)
    return verdicts


@of_both
def test_verdicts_are_those_of_a_float64_reference(of):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        xs = np.exp(0.3 * rng.normal(size=600)) * np.repeat([1.0, 30.0, 0.1], 200)
        xs[rng.random(600) < 0.05] *= 100
        xs[rng.random(600) < 0.05] = np.nan
        reasons, _ = feed(xs.astype(np.float32), of, window=32, rebaseline_after=10)
        expected = reference(xs, sigma=6.0, window=32, rebaseline_after=10)
        assert (reasons > 0).tolist() == expected
        assert 20 < sum(expected) < 200


@given(
    seed=st.integers(0, 2**31),
    spikes=st.lists(st.integers(20, 70), max_size=3, unique=True),
    nans=st.lists(st.integers(0, 80), max_size=20),
)
def test_only_spikes_and_nonfinites_are_skipped(seed, spikes, nans):
    xs = steady(80, seed=seed)
    xs[spikes] *= 1000
    is_nan = np.zeros(80, bool)
    is_nan[[place for place in nans if place < 80 and place not in spikes]] = True
    # NaN pushes a spike back into the warm-up of 8 values only if all before it are NaN.
    xs[is_nan] = np.nan
    reasons, state = feed(xs)
    late = [place for place in spikes if np.sum(~is_nan[:place]) >= 8]
    assert skipped(reasons) == sorted([*np.flatnonzero(is_nan), *late])
    assert np.all(np.isfinite(spike_state(state).window))


# norm_above, and several conditions


def test_norm_above_skips_only_what_exceeds_it():
    tx = og.guard(optax.sgd(1.0), skip_if=og.norm_above(5.0))
    state = tx.init(jnp.zeros(2))
    updates, state = tx.update(jnp.array([3.0, 4.0]), state)
    assertions.assert_same_bits(updates, jnp.array([-3.0, -4.0]))
    assert state.skip_reason == 0
    updates, state = tx.update(jnp.array([3.0, 4.001]), state)
    assertions.assert_same_bits(updates, -jnp.zeros(2))
    assert state.skip_reason == CONDITION
    np.testing.assert_allclose(state.grad_norm, np.hypot(3.0, 4.001), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
def test_norm_above_is_right_over_the_full_range(scale):
    gradients = jnp.array([3.0, 4.0]) * jnp.float32(scale)
    for limit, reason in ((4.999 * scale, CONDITION), (5.001 * scale, 0)):
        tx = og.guard(optax.sgd(1e-30), skip_if=og.norm_above(limit))
        _, state = tx.update(gradients, tx.init(jnp.zeros(2)))
        assert state.skip_reason == reason


def test_norm_above_takes_a_traced_limit():
    @jax.jit
    def reason(limit):
        tx = og.guard(optax.sgd(1.0), skip_if=og.norm_above(limit))
        return tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))[1].skip_reason

    assert [int(reason(limit)) for limit in (0.5, 1.0, jnp.inf)] == [CONDITION, 0, 0]


def test_any_of_several_conditions_skips_the_step():
    conditions = (og.norm_above(10.0), og.spike(window=4), og.spike(of="value", window=4))
    tx = og.guard(optax.sgd(1.0), skip_if=conditions)
    step = jax.jit(tx.update)
    state = tx.init(jnp.zeros(1))
    for _ in range(4):
        _, state = step(jnp.ones(1), state, value=1.0)
    for norm, value, first in ((11.0, 1.0, 0), (11.0, 5.0, 0), (5.0, 1.0, 1), (1.0, 5.0, 2)):
        _, after = step(jnp.array([norm]), state, value=value)
        assert (after.skip_reason, after.skip_condition) == (CONDITION, first)
        assert list(after.condition_states)[first].partition(" ")[2] in og.explain(after)
    _, after = step(jnp.ones(1), state, value=1.0)
    assert (after.skip_reason, after.skip_condition) == (0, -1)


def test_condition_that_did_not_reject_forgets_a_step_that_another_rejected():
    # The loss is ordinary: had the step been accepted, it would have entered the window.
    tx = og.guard(optax.sgd(1.0), skip_if=[og.norm_above(10.0), og.spike(of="value", window=4)])
    state = tx.init(jnp.zeros(1))
    _, state = tx.update(jnp.array([1.0]), state, value=1.0)
    _, after = tx.update(jnp.array([11.0]), state, value=1.1)
    assert after.skip_reason == CONDITION
    assertions.assert_same_bits(after.condition_states, state.condition_states)


def test_step_that_the_optimizer_itself_broke_enters_no_window():
    tx = og.guard(optax.sgd(1e30), check_update=True, skip_if=og.spike(window=4))
    state = tx.init(jnp.zeros(1))
    _, state = tx.update(jnp.array([1.0]), state)
    _, after = tx.update(jnp.array([1e10]), state)
    assert after.skip_reason == 4
    assertions.assert_same_bits(after.condition_states, state.condition_states)


def test_rejections_count_towards_giving_up():
    tx = og.guard(optax.sgd(1.0), skip_if=og.norm_above(1.0), max_consecutive_skips=3)
    state = tx.init(jnp.zeros(1))
    for gave_up in (False, False, True):
        _, state = tx.update(jnp.array([2.0]), state)
        assert bool(state.gave_up) == gave_up
    with pytest.raises(og.GuardGaveUp, match="skip_if condition"):
        og.check(state)


def test_own_condition_sees_finite_numbers_only_and_keeps_its_own_state():
    def judge(grad_norm, value, seen):
        return value > 3.0, seen + grad_norm

    condition = og.Condition("my own", lambda: jnp.zeros(()), judge, needs_value=True)
    tx = og.guard(optax.sgd(1.0), skip_if=condition)
    state = tx.init(jnp.zeros(1))
    for gradient, value, reason in (
        (2.0, 1.0, 0),
        (np.nan, 9.0, 1),
        (2.0, np.inf, 2),
        (3.0, 9.0, CONDITION),
    ):
        _, state = tx.update(jnp.array([gradient]), state, value=value)
        assert state.skip_reason == reason
    assert state.condition_states == {"00 my own": 5.0}
    assert "my own" in og.explain(state)
