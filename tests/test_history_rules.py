"""Rules that remember: against plain NumPy in float64, in every kind of trouble, in company.

All rules run over a trace of 300 norms in one compiled scan. Shorter traces are filled up with NaN,
which changes no state; that it does not is a test of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import assertions
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from histories import history_of
from hypothesis import strategies as st
from jax import lax

import optax_guard as og

NUM_STEPS = 300
# float32 statistics over hundreds of steps; the contract's bound for norms.
RTOL = 1e-5

RULES: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "percentile": functools.partial(og.clip_by_percentile, 50.0, window=40),
    "percentile-low": functools.partial(og.clip_by_percentile, 12.5, window=100),
    "median": og.clip_by_median,
    "median-short": functools.partial(og.clip_by_median, 1.5, warmup_steps=8, observe_steps=0),
    "zscore": og.clip_by_zscore,
    "zscore-paper": functools.partial(og.clip_by_zscore, rebaseline_after=None, min_std_ratio=0.0),
    "ema": functools.partial(
        og.clip_by_ema, warmup_steps=30, warmup_max_norm=1.5, rebaseline_after=25
    ),
    "ema-paper": functools.partial(og.clip_by_ema, 1.2, decay=0.9, rebaseline_after=None),
    "max_ema": functools.partial(og.clip_by_max_ema, 0.99),
    "auto": functools.partial(og.normalize_and_scale, "auto", decay=0.95),
    "ema_norm": og.normalize_by_ema_norm,
}
NORMALIZERS = ("auto", "ema_norm")


# Traces


def as_gradients(norms: Any) -> np.ndarray:
    """``[steps, 2]``: each row has the norm given; what is not finite sits in the first element."""
    norms = np.asarray(norms, np.float64)
    rows = np.stack([0.6 * norms, 0.8 * np.where(np.isfinite(norms), norms, 1)], axis=-1)
    return rows.astype(np.float32)


@jax.jit
def _scan(gradients: jax.Array) -> Any:
    transformations = {name: rule() for name, rule in RULES.items()}

    def body(states, gradient):
        results = {name: tx.update(gradient, states[name]) for name, tx in transformations.items()}
        updates = {name: result[0] for name, result in results.items()}
        states = {name: result[1] for name, result in results.items()}
        return states, (updates, states)

    first = {name: tx.init(gradients[0]) for name, tx in transformations.items()}
    return lax.scan(body, first, gradients)[1]


def run(norms: Iterable[float]) -> dict[str, tuple[np.ndarray, Any]]:
    """For each rule the factor of every step and the stacked states.

    A factor is that of the second element, NaN where the gradient was not finite and 1 where it
    was zero.
    """
    norms = np.asarray(list(norms), np.float64)
    filled = np.concatenate([norms, np.full(NUM_STEPS - len(norms), np.nan)])
    gradients = as_gradients(filled)
    updates, states = jax.device_get(_scan(gradients))
    results = {}
    for name, update in updates.items():
        original = gradients[:, 1].astype(np.float64)
        factors = np.where(original == 0, 1, update[:, 1] / np.where(original == 0, 1, original))
        factors = np.where(np.isfinite(filled), factors, np.nan)[: len(norms)]
        results[name] = factors, jax.tree.map(lambda leaf: leaf[: len(norms)], states[name])
    return results


def healthy_norms(seed: int, num_steps: int = NUM_STEPS) -> np.ndarray:
    norms = np.exp(0.2 * np.random.default_rng(seed).normal(size=num_steps))
    return norms.astype(np.float32).astype(np.float64)


def eventful_norms(seed: int) -> np.ndarray:
    """Everything that happens in a run, one thing after another."""
    norms = healthy_norms(seed)
    norms[[7, 90, 91]] = np.nan, np.inf, np.nan
    norms[[10, 95, 96]] = 0
    norms[[60, 64]] *= 100, 50
    norms[110:170] *= 10
    norms[170:230] *= 0.1
    norms[230:260] = norms[230]
    return norms.astype(np.float32).astype(np.float64)


# References: the rules in the words of their papers, one norm at a time. Each gives the factor of
# every step, and the statistic that the state should hold after it.


def live(norms: np.ndarray) -> Iterable[tuple[int, float]]:
    return [(i, n) for i, n in enumerate(norms) if np.isfinite(n) and n > 0]


def idle_factors(norms: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(norms), 1.0, np.nan)


def fill_in(norms: np.ndarray, values: dict[int, float]) -> np.ndarray:
    """The last value known at every step; zero before the first."""
    result, last = [], 0.0
    for step in range(len(norms)):
        last = values.get(step, last)
        result.append(last)
    return np.array(result)


def reference_percentile(norms: np.ndarray, percentile: float, window: int) -> np.ndarray:
    factors, seen = idle_factors(norms), []
    for step, norm in live(norms):
        seen.append(norm)
        factors[step] = min(1, np.percentile(seen[-window:], percentile) / norm)
    return factors


def reference_median(
    norms: np.ndarray, ratio: float = 3.0, warmup_steps: int = 100, observe_steps: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    factors, seen, medians = idle_factors(norms), [], {}
    num_finite = np.cumsum(np.isfinite(norms)) - 1  # before each finite step
    for step, norm in live(norms):
        seen.append(norm)
        medians[step] = np.median(seen[:warmup_steps])
        factors[step] = min(1, ratio * medians[step] / norm)
        if num_finite[step] < observe_steps:
            factors[step] = 0
    return factors, fill_in(norms, medians)


def reference_zclip(
    norms: np.ndarray, decay: float = 0.97, z_threshold: float = 2.5, warmup_steps: int = 25
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of the paper, with its reciprocal adjustment."""
    factors, warmup, means = idle_factors(norms), [], {}
    mean = variance = 0.0
    for step, norm in live(norms):
        if len(warmup) < warmup_steps:
            warmup.append(norm)
            mean, variance = np.mean(warmup), np.var(warmup)
        else:
            std = math.sqrt(variance)
            z = (norm - mean) / (std + 1e-6 * mean)
            clipped = mean + std * z_threshold / (z / z_threshold) if z > z_threshold else norm
            factors[step] = clipped / norm
            mean = decay * mean + (1 - decay) * clipped
            variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
        means[step] = mean
    return factors, fill_in(norms, means)


def reference_ema(
    norms: np.ndarray,
    ratio: float = 1.05,
    decay: float = 0.98,
    warmup_steps: int = 100,
    warmup_max_norm: float = 1.0,
    rebaseline_after: int | None = 100,
) -> tuple[np.ndarray, np.ndarray]:
    factors, means, streak = idle_factors(norms), {}, []
    mean = math.inf
    for count, (step, norm) in enumerate(live(norms)):
        if count < warmup_steps:
            clipped = norm * min(warmup_max_norm / norm, 1)
            mean = min(mean, clipped)
        else:
            clipped = min(norm, ratio * mean)
            mean = decay * mean + (1 - decay) * clipped
            streak = [*streak, norm] if norm > 2 * clipped else []
            if len(streak) == rebaseline_after:
                mean, streak = np.mean(streak), []
        factors[step] = clipped / norm
        means[step] = mean
    return factors, fill_in(norms, means)


def reference_max_ema(norms: np.ndarray, decay: float) -> tuple[np.ndarray, np.ndarray]:
    factors, means, mean = idle_factors(norms), {}, 0.0
    for count, (step, norm) in enumerate(live(norms), start=1):
        largest = 0.8 * norm
        mean = decay * mean + (1 - decay) * largest
        means[step] = mean / (1 - decay**count)
        factors[step] = means[step] / largest if largest > means[step] else 1
    return factors, fill_in(norms, means)


def reference_auto(norms: np.ndarray, decay: float) -> tuple[np.ndarray, np.ndarray]:
    factors, seen, alphas, alpha = idle_factors(norms), [], {}, 0.0
    for step, norm in live(norms):
        seen.append(norm)
        median = np.median(seen[:100])
        if len(seen) <= 100:
            alpha = median
            factors[step] = min(1, alpha / norm)
        else:
            alpha = decay * alpha + (1 - decay) * min(norm, 2 * median)
            factors[step] = alpha / norm
        alphas[step] = alpha
    return factors, fill_in(norms, alphas)


def reference_ema_norm(
    norms: np.ndarray, b1: float = 0.7, b2: float = 0.9, eps: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    factors, roots = idle_factors(norms), {}
    mean = square = 0.0
    for count, (step, norm) in enumerate(live(norms), start=1):
        mean = b1 * mean + (1 - b1) * norm
        square = b2 * square + (1 - b2) * norm**2
        roots[step] = math.sqrt(square / (1 - b2**count))
        factors[step] = mean / (1 - b1**count) / (roots[step] + eps) / norm
    return factors, fill_in(norms, roots)


REFERENCES: dict[str, tuple[Callable[..., Any], str]] = {
    "median": (reference_median, "median"),
    "median-short": (
        functools.partial(reference_median, ratio=1.5, warmup_steps=8, observe_steps=0),
        "median",
    ),
    "zscore-paper": (reference_zclip, "mean"),
    "ema": (
        functools.partial(reference_ema, warmup_steps=30, warmup_max_norm=1.5, rebaseline_after=25),
        "mean",
    ),
    "ema-paper": (
        functools.partial(reference_ema, ratio=1.2, decay=0.9, rebaseline_after=None),
        "mean",
    ),
    "max_ema": (functools.partial(reference_max_ema, decay=0.99), "value"),
    "auto": (functools.partial(reference_auto, decay=0.95), "alpha"),
    "ema_norm": (reference_ema_norm, "rms"),
}


@functools.cache
def eventful_run() -> dict[str, tuple[np.ndarray, Any]]:
    return run(eventful_norms(0))


@pytest.mark.parametrize("rule", REFERENCES)
def test_rule_follows_its_formula_through_all_events(rule):
    norms = eventful_norms(0)
    factors, states = eventful_run()[rule]
    reference, field = REFERENCES[rule]
    expected, statistic = reference(norms)
    actual = getattr(history_of(states), field)
    assert np.sum(expected[np.isfinite(expected)] < 0.99) > 20  # else the trace tests nothing
    np.testing.assert_allclose(factors, expected, rtol=RTOL)
    np.testing.assert_allclose(actual.reshape(NUM_STEPS), statistic, rtol=RTOL)


@pytest.mark.parametrize(("rule", "percentile", "window"), [
    ("percentile", 50.0, 40), ("percentile-low", 12.5, 100),
])  # fmt: skip
def test_percentile_is_that_of_numpy(rule, percentile, window):
    norms = eventful_norms(0)
    factors, states = eventful_run()[rule]
    expected = reference_percentile(norms, percentile, window)
    np.testing.assert_allclose(factors, expected, rtol=RTOL)
    # The window holds the last norms, as they came in.
    window_at_end = np.sort(history_of(states).norms[-1])
    last = [norm for _, norm in live(norms)][-window:]
    np.testing.assert_allclose(window_at_end, np.sort(last), rtol=1e-6)  # rounding of a norm


def test_counters_count_accepted_and_clipped_steps():
    norms = eventful_norms(0)
    num_finite = np.cumsum(np.isfinite(norms))
    num_live = np.cumsum(np.isfinite(norms) & (norms > 0))
    for rule, (factors, states) in eventful_run().items():
        steps, clipped, scale = states.steps, states.clipped_total, states.last_scale
        np.testing.assert_array_equal(steps, num_finite, err_msg=rule)
        if rule not in NORMALIZERS:
            is_cut = np.nan_to_num(factors, nan=1.0) < 1
            np.testing.assert_array_equal(clipped, np.cumsum(is_cut), err_msg=rule)
            is_finite = np.isfinite(norms)
            np.testing.assert_allclose(scale[is_finite], factors[is_finite], rtol=1e-6)
    found = {rule: history_of(states) for rule, (_, states) in eventful_run().items()}
    for rule, count in [
        ("zscore", found["zscore"].count),
        ("ema", found["ema"].count[:, 0]),
        ("max_ema", found["max_ema"].count[:, 0]),
        ("ema_norm", found["ema_norm"].count[:, 0]),
        ("median", found["median"].count),
    ]:
        most = 100 if rule == "median" else NUM_STEPS
        np.testing.assert_array_equal(count, np.minimum(num_live, most), err_msg=rule)


# The table of events. What holds for every rule comes first.


def histories(states: Any) -> list[np.ndarray]:
    """Last value of every statistic, without what counts steps."""
    return [leaf[-1] for leaf in jax.tree.leaves(states.history)]


def with_inserted(norms: np.ndarray, value: float, places: Iterable[int]) -> np.ndarray:
    return np.insert(norms, list(places), value)


@pytest.mark.parametrize("places", [(3, 4, 5), (140, 141)], ids=["in warm-up", "after"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_steps_leave_no_trace(value, places):
    norms = eventful_norms(1)[:280]
    expected, actual = run(norms), run(with_inserted(norms, value, places))
    for rule in RULES:
        factors, states = actual[rule]
        kept = factors[~np.isin(np.arange(len(factors)), np.array(places) + range(len(places)))]
        np.testing.assert_array_equal(kept, expected[rule][0], err_msg=rule)
        last, last_expected = (
            jax.tree.map(lambda leaf: leaf[-1], each) for each in (states, expected[rule][1])
        )
        assertions.assert_same_bits(last, last_expected)


@pytest.mark.parametrize("places", [(0, 1, 2), (50, 140)], ids=["first", "later"])
def test_zeros_enter_no_statistic(places):
    norms = eventful_norms(2)[:280]
    expected, actual = run(norms), run(with_inserted(norms, 0.0, places))
    for rule in RULES:
        assertions.assert_same_bits(histories(actual[rule][1]), histories(expected[rule][1]))


def test_zeros_only_leave_the_statistics_as_they_were():
    for rule, (factors, states) in run(np.zeros(20)).items():
        assert np.all(factors == 1), rule
        initial = jax.tree.map(np.asarray, RULES[rule]().init(jnp.zeros(2)))
        assertions.assert_same_bits(histories(states), jax.tree.leaves(initial.history))


@pytest.mark.parametrize("norm", [1e-30, 1e-3, 0.7, 1.0])
def test_constant_norms_clip_nothing_bit_for_bit(norm):
    results = run(np.full(NUM_STEPS, norm))
    for rule, (factors, states) in results.items():
        num_observed = 3 if rule == "median" else 0
        assert np.all(factors[:num_observed] == 0), rule
        if rule == "ema_norm":  # the norm given is 1 / (1 + eps / norm)
            np.testing.assert_allclose(factors * norm, 1 / (1 + 1e-6 / norm), rtol=RTOL)
            continue
        assert np.all(factors[num_observed:] == 1), rule
        if rule != "auto":
            assert states.clipped_total[-1] == num_observed


@pytest.mark.parametrize("norm", [1e3, 1e18])
def test_large_constant_norms_clip_nothing_bit_for_bit(norm):
    for rule, (factors, _) in run(np.full(NUM_STEPS, norm)).items():
        if not rule.startswith("ema"):  # clip_by_ema: above warmup_max_norm, clipped by definition
            assert np.all(factors[3:] == 1), rule


STEP = np.arange(NUM_STEPS)
EVENTS = {
    "first step": np.where(STEP == 0, 1000, 1),
    "spike": np.where(STEP == 200, 100, 1),
    "second spike": np.select([STEP == 200, STEP == 204], [100, 50], 1),
    "level up": np.where(STEP < 150, 1, 10),
    "level down": np.where(STEP < 150, 1, 0.1),
}
# Otherwise norms are about 1, at most 1.75. For each rule and event: the largest norm that may come
# out after the first three steps, and how many healthy steps may lose more than half of their norm
# (normalisers: of the norm that they usually give).
TABLE = {
    "percentile": {
        "first step": (1.2, 0),
        "spike": (1.2, 0),
        "second spike": (1.2, 0),
        "level up": (11, 20),  # half of the window
        "level down": (1.2, 0),
    },
    "median": {
        "first step": (1.8, 0),
        "spike": (3.2, 0),
        "second spike": (3.2, 0),
        "level up": (3.2, 150),  # frozen: it follows neither an explosion nor a new level
        "level down": (1.8, 0),
    },
    "zscore": {
        "first step": (1.8, 0),
        "spike": (1.8, 0),
        "second spike": (1.8, 0),
        "level up": (17, 100),  # rebaseline_after
        "level down": (1.8, 0),
    },
    "ema": {  # after the warm-up a few are cut to little more than the smallest norm so far
        "first step": (1.5, 5),
        "spike": (1.5, 5),
        "second spike": (1.5, 5),
        "level up": (12, 25 + 5),  # rebaseline_after
        "level down": (1.5, 5),
    },
    "max_ema": {
        "first step": (1.8, 0),  # blind: its mean maximum is 10 at step 100
        "spike": (2.5, 0),
        "second spike": (3, 0),
        "level up": (10, 60),  # about half of 1 / (1 - decay)
        "level down": (1.8, 0),
    },
    "auto": {
        "first step": (1.2, 0),
        "spike": (1.2, 0),
        "second spike": (1.2, 0),
        "level up": (2.1, 0),  # at most twice the median of the first norms
        "level down": (1.2, 150),  # follows, by design
    },
    "ema_norm": {  # loses steps until its second moment has decayed
        "first step": (1.4, 100),
        "spike": (1.4, 60),
        "second spike": (1.4, 60),
        "level up": (1.4, 5),
        "level down": (1.4, 40),
    },
}


@pytest.mark.parametrize("event", EVENTS)
def test_outcome_of_every_event_is_in_bounds(event):
    usual = healthy_norms(5)
    norms = usual * EVENTS[event]
    results = run(norms)
    is_judged = (STEP > 2) & ((EVENTS[event] == 1) | event.startswith("level"))
    for rule, row in TABLE.items():
        given = results[rule][0] * norms
        wanted = norms
        if rule in NORMALIZERS:
            wanted = np.median(run(usual)[rule][0] * usual)
        most, most_lost = row[event]
        assert np.max(given[3:]) <= most, rule
        assert np.sum((given < wanted / 2) & is_judged) <= most_lost, rule


def test_paper_mode_stays_below_a_new_level_for_ever():
    norms = healthy_norms(5) * EVENTS["level up"]
    for rule in ("zscore-paper", "ema-paper"):
        factors, _ = run(norms)[rule]
        assert np.all(factors[150:170] < 0.5), rule
    assert np.all(run(norms)["zscore-paper"][0][150:] < 0.5)


def test_observed_steps_are_zero_whatever_they_bring():
    norms = healthy_norms(6)
    norms[:3] = 1e6, np.nan, 1.0
    norms[4] = 1e7
    factors, states = run(norms)["median"]
    np.testing.assert_array_equal(factors[[0, 2, 3]], 0)  # the NaN does not count
    assert np.isnan(factors[1])
    median = np.median([1e6, 1.0, norms[3], 1e7])
    np.testing.assert_allclose(factors[4], 3 * median / 1e7, rtol=RTOL)
    np.testing.assert_allclose(states.last_scale[[0, 2, 3]], 0)


# Percentiles


def test_every_percentile_may_be_traced():
    norms = eventful_norms(3)[:80]
    percentiles = np.array([0.0, 1.0, 33.3, 50.0, 66.0, 90.0, 99.9, 100.0])

    def factors(percentile):
        tx = og.clip_by_percentile(percentile, window=30)

        def body(state, gradient):
            updates, state = tx.update(gradient, state)
            return state, updates[1] / gradient[1]

        gradients = as_gradients(norms)
        return lax.scan(body, tx.init(gradients[0]), gradients)[1]

    actual = jax.jit(jax.vmap(factors))(percentiles.astype(np.float32))
    for percentile, row in zip(percentiles, actual, strict=True):
        expected = reference_percentile(norms, float(np.float32(percentile)), 30)
        is_live = np.isfinite(norms) & (norms > 0)
        np.testing.assert_allclose(row[is_live], expected[is_live], rtol=RTOL)


def test_a_spike_beside_the_percentile_stays_out_of_it():
    # 50 % of 11 norms is the sixth, exactly; a fraction of 1e-7 of the next would be 1e5.
    norms = [1.0] * 5 + [1e12] * 5 + [1.0]
    factors, _ = run(norms)["percentile"]
    assert factors[-1] == 1
    tx = og.clip_by_percentile(90.0, window=1000)
    state = tx.init(jnp.zeros(1))
    window = jnp.where(jnp.arange(1000) <= 900, 1.0, 1e12).at[0].set(2.0)
    state = state._replace(history=jnp.append(window, 1900.0))
    updates, _ = tx.update(jnp.array([100.0]), state)  # replaces a norm of 1
    # Position 899.1 of 898 ones, a 2, a 100 and 99 spikes: between the 2 and the 100.
    expected = np.percentile(np.array([1.0] * 898 + [2.0, 100.0] + [1e12] * 99 + [1.0] * 1), 90)
    np.testing.assert_allclose(updates[0], expected, rtol=1e-4)


def test_window_forgets_the_oldest_norm_first():
    tx = og.clip_by_percentile(100.0, window=3)
    state = tx.init(jnp.zeros(1))
    results = []
    for norm in [9.0, 1.0, 2.0, 3.0, 8.0]:
        updates, state = tx.update(jnp.array([norm]), state)
        results.append(float(updates[0]))
    assert results == [9, 1, 2, 3, 8]
    tx = og.clip_by_percentile(0.0, window=3)
    state = tx.init(jnp.zeros(1))
    results = []
    for norm in [1.0, 5.0, 2.0, 3.0, 8.0, 9.0, 9.0]:
        updates, state = tx.update(jnp.array([norm]), state)
        results.append(float(updates[0]))
    assert results == [1, 1, 1, 2, 2, 3, 8]


# Groups


SCOPED = {
    "percentile": functools.partial(og.clip_by_percentile, 50.0, window=10),
    "median": functools.partial(og.clip_by_median, 1.1, warmup_steps=10),
    "zscore": functools.partial(og.clip_by_zscore, warmup_steps=10),
    "ema": functools.partial(og.clip_by_ema, warmup_steps=10, rebaseline_after=5),
    "auto": functools.partial(og.normalize_and_scale, "auto"),
    "ema_norm": og.normalize_by_ema_norm,
}


def columns(path: str, leaf: Any) -> int | None:
    return 0 if path == "matrix" else None


def scan_scopes(tree: Any) -> Any:
    """Updates of every rule for a matrix and a vector, under each of the scopes."""
    split = {f"column{i}": tree["matrix"][:, :, i] for i in range(tree["matrix"].shape[2])}
    split["vector"] = tree["vector"]
    whole = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in tree.values()], axis=1)
    cases = {
        "unit": (tree, "unit"),
        "callable": (tree, columns),
        "leaf": (split, "leaf"),
        "global": (tree, "global"),
        "whole": (whole, "leaf"),
    }
    inputs = {case: gradients for case, (gradients, _) in cases.items()}
    rules = {
        (rule, case): make(scope=scope)
        for rule, make in SCOPED.items()
        for case, (_, scope) in cases.items()
        if case in ("unit", "leaf") or rule in ("percentile", "ema")
    }

    def body(states, gradients):
        results = {key: tx.update(gradients[key[1]], states[key]) for key, tx in rules.items()}
        return {key: state for key, (_, state) in results.items()}, {
            key: updates for key, (updates, _) in results.items()
        }

    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    states = {key: tx.init(first[key[1]]) for key, tx in rules.items()}
    return lax.scan(body, states, inputs)[1]


def test_every_scope_keeps_a_history_for_each_group():
    traces = [np.nan_to_num(eventful_norms(seed)[50:120], posinf=0.0) for seed in range(4)]
    rows = [as_gradients(trace) * size for trace, size in zip(traces, [1, 30, 0.1, 1], strict=True)]
    tree = {
        "matrix": jnp.asarray(np.stack(rows[:3], axis=-1)),
        "vector": jnp.asarray(rows[3]),
    }
    results = jax.device_get(jax.jit(scan_scopes)(tree))

    def check(actual, expected):  # sums in another order: a few roundings
        assertions.assert_close(actual, expected, rtol=RTOL, atol=1e-9)

    for rule in SCOPED:
        leaf = results[rule, "leaf"]
        stacked = np.stack([leaf[f"column{i}"] for i in range(3)], axis=-1)
        check(results[rule, "unit"], {"matrix": stacked, "vector": leaf["vector"]})
        assert np.any(np.abs(stacked) < 0.9 * np.abs(np.stack(rows[:3], axis=-1))), rule
    for rule in ("percentile", "ema"):
        check(results[rule, "callable"], results[rule, "unit"])
        flat = [part.reshape(len(part), -1) for part in results[rule, "global"].values()]
        check(np.concatenate(flat, axis=1), results[rule, "whole"])


# Range


@pytest.mark.parametrize("scope", ["global", "leaf", "unit"])
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e20, 3e38])
def test_clipped_norms_match_float64_at_every_scale(scale, scope):
    rng = np.random.default_rng(0)
    tree = {"b": rng.uniform(0.5, 1, (5,)) * scale, "w": rng.uniform(0.5, 1, (40, 3)) * scale}
    tree = {name: leaf.astype(np.float32) for name, leaf in tree.items()}
    wide = {name: leaf.astype(np.float64) for name, leaf in tree.items()}
    total = math.sqrt(sum(np.sum(leaf**2) for leaf in wide.values()))
    limit = 0.3 * scale
    results = warm_up(tree, np.float32(limit), scope)
    for name, leaf in results.items():
        expected = wide[name] * (limit / total)
        np.testing.assert_allclose(leaf, expected, rtol=RTOL, atol=1e-38)


@functools.partial(jax.jit, static_argnames="scope")
def warm_up(tree, max_norm, scope):
    tx = og.clip_by_ema(scope=scope, warmup_max_norm=max_norm)
    return tx.update(tree, tx.init(tree))[0]


@pytest.mark.parametrize("scale", [1e-33, 1e-30, 1e-10, 1e10, 1e30, 3e37])
def test_later_steps_are_clipped_at_every_scale(scale):
    # Rules that need no squares of norms. Differences of norms may not be denormal either.
    norms = np.array([1.0, 1.1, 0.9] * 15 + [8.0])
    results = run(norms * scale)
    for rule in ("percentile", "median", "median-short", "max_ema"):
        expected = run(norms)[rule][0]
        assert expected[-1] < 0.5
        np.testing.assert_allclose(results[rule][0], expected, rtol=1e-5, err_msg=rule)


# Properties. What takes the time is to compile, so all rules run at once.

EXPONENTS = st.sampled_from([-30, -3, 2, 20])


@hypothesis.given(seed=st.integers(0, 2**16), exponent=EXPONENTS)
def test_rules_are_homogeneous(seed, exponent):
    norms = eventful_norms(seed)[:200]
    results, expected = run(norms * 2.0**exponent), run(norms)
    for rule in set(RULES) - {"ema", "ema-paper", "ema_norm"}:  # these three hold a norm
        # Powers of two commute with every rounding; the compiler may still contract differently.
        np.testing.assert_allclose(results[rule][0], expected[rule][0], rtol=1e-6, err_msg=rule)


MAGNITUDES = st.one_of(
    st.just(0.0),
    st.just(math.nan),
    st.just(math.inf),
    st.floats(2.0**-40, 2.0**40),
)


@hypothesis.given(norms=st.lists(MAGNITUDES, min_size=1, max_size=NUM_STEPS))
def test_clips_never_lengthen_and_states_stay_finite(norms):
    for rule, (factors, states) in run(norms).items():
        kept = factors[np.isfinite(norms)]
        assert np.all(np.isfinite(kept)), rule
        assert np.all(kept >= 0), rule
        if rule not in NORMALIZERS:
            assert np.all(kept <= 1), rule
        np.testing.assert_array_equal(np.isnan(factors), ~np.isfinite(norms), err_msg=rule)
        for leaf in jax.tree.leaves(states):
            assert np.all(np.isfinite(leaf)), rule


@hypothesis.given(seed=st.integers(0, 2**16))
def test_limits_hold(seed):
    norms = eventful_norms(seed)
    results = run(norms)
    is_live = np.isfinite(norms) & (norms > 0)
    given = {rule: (factors * norms)[is_live] for rule, (factors, _) in results.items()}
    first = norms[is_live][:100]
    assert np.all(given["median"][100:] <= 3 * np.median(first) * (1 + 1e-6))
    assert np.all(given["auto"][100:] <= 2 * np.median(first) * (1 + 1e-6))
    # During the warm-up a running minimum of what came out; later at most ratio times the mean.
    mean = history_of(results["ema"][1]).mean[is_live, 0]
    np.testing.assert_allclose(mean[:30], np.minimum.accumulate(given["ema"][:30]), rtol=1e-6)
    assert np.all(given["ema"][30:] <= 1.05 * mean[29:-1] * (1 + 1e-6))


# In company


GRADIENTS = [
    {"b": jnp.asarray(row[::-1]), "w": jnp.asarray(row)}
    for row in as_gradients([1.0, 1.2, 0.9, 30.0, 1.1, 0.8])
]
PARAMS = {"b": jnp.array([3.0, 4.0]), "w": jnp.array([-2.0, 0.5])}
COMPANY = {
    "percentile": functools.partial(og.clip_by_percentile, 50.0, window=3),
    "median": functools.partial(og.clip_by_median, 0.9, observe_steps=1),
    "zscore": functools.partial(og.clip_by_zscore, warmup_steps=2),
    "ema": functools.partial(og.clip_by_ema, warmup_steps=2),
    "param_norm": functools.partial(og.clip_by_param_norm, 0.1),
    "max_ema": functools.partial(og.clip_by_max_ema, 0.9),
    "relative_change": og.clip_by_relative_change,
    "auto": functools.partial(og.normalize_and_scale, "auto"),
    "ema_norm": og.normalize_by_ema_norm,
}


# The others share all of their code but the rule itself with one of these.
@pytest.mark.parametrize(
    "rule",
    [
        "param_norm",
        *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("median", "ema", "max_ema")),
        pytest.param("relative_change", marks=pytest.mark.slow),
    ],
)
def test_rule_works_in_chains_partitions_guards_and_accumulators(rule):
    tx, adam = COMPANY[rule](), optax.scale_by_adam()
    labels = {"b": "free", "w": "clipped"}
    actual = {
        "before adam": optax.chain(tx, adam),
        "after adam": optax.chain(adam, tx),
        "partition": optax.partition({"clipped": tx, "free": optax.identity()}, labels),
        "accumulated": optax.MultiSteps(tx, every_k_schedule=2),
        "guarded": og.guard(optax.chain(tx, optax.trace(0.9))),
    }
    walked = {name: walk(each, GRADIENTS) for name, each in actual.items()}
    alone = walk(tx, GRADIENTS)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    pairs = zip(GRADIENTS[::2], GRADIENTS[1::2], strict=True)
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in pairs]
    only_w = walk(tx, [{"w": gradients["w"]} for gradients in GRADIENTS], {"w": PARAMS["w"]})
    expected = {
        "before adam": walk(adam, alone),
        "after adam": walk(tx, walk(adam, GRADIENTS)),
        "partition": [g | w for g, w in zip(GRADIENTS, only_w, strict=True)],
        "accumulated": [update for mean in walk(tx, means) for update in (zeros, mean)],
        "guarded": walk(optax.trace(0.9), alone),
    }
    for name in actual:
        # Compiled together or apart: a few roundings.
        assertions.assert_close(walked[name], expected[name], rtol=1e-5, atol=1e-7)


def walk(tx: Any, steps: list[Any], params: Any = PARAMS) -> list[Any]:
    """Updates of a few steps."""
    step = jax.jit(tx.update)
    state, results = tx.init(params), []
    for gradients in steps:
        updates, state = step(gradients, state, params)
        results.append(updates)
    return results


# Relative to the parameters


@pytest.mark.parametrize(
    "shape", [(), (7,), (1, 7), (5, 7), (3, 5, 7), (3, 3, 5, 7), (2, 3, 3, 5, 7)]
)
def test_clip_by_param_norm_equals_adaptive_grad_clip(shape):
    rng = np.random.default_rng(len(shape))
    params = jnp.asarray(rng.normal(size=shape), jnp.float32)
    if shape:
        params = params.at[..., 0].set(0)
    sizes = 10.0 ** np.resize([1.0, -5.0, -2.0, 0.0], shape[-1:])
    gradients = jnp.asarray(rng.normal(size=shape) * sizes, jnp.float32)
    tx, peer = og.clip_by_param_norm(0.05), optax.adaptive_grad_clip(0.05)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    expected, _ = jax.jit(peer.update)(gradients, peer.init(params), params)
    assert jnp.any(updates != gradients)
    # Both are within a few roundings of the formula.
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_clip_by_param_norm_is_right_in_low_precision(dtype):
    params = {"b": jnp.zeros(3, dtype), "w": jnp.full((40, 3), 300, dtype)}
    gradients = {"b": jnp.ones(3, dtype), "w": jnp.full((40, 3), 300, dtype)}
    tx = og.clip_by_param_norm(0.01)
    updates, _ = tx.update(gradients, tx.init(params), params)
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in gradients.items()}
    # Rounding of the dtype: 2**-11 and 2**-8, relative to the result.
    rtol = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(updates["w"], np.float64), 0.01 * wide["w"], rtol=rtol)
    expected = 0.01 * 1e-3 / math.sqrt(3)
    atol = float(jnp.finfo(dtype).smallest_subnormal)
    np.testing.assert_allclose(np.asarray(updates["b"], np.float64), expected, rtol=rtol, atol=atol)


def unit_axes(path: str, leaf: Any) -> Any:
    """The example in the docstring of ``clip_by_param_norm``."""
    if leaf.ndim < 2:
        return None
    if path.endswith("embedding"):
        return 1
    if path.endswith("conv1d/kernel"):
        return (0, 1)
    if path.endswith("out/kernel"):
        return (0, 1)
    if path.startswith("layers/"):
        return 1
    return tuple(range(leaf.ndim - 1))


def test_documented_scope_gives_one_norm_for_each_unit():
    axes = {
        "conv1d/kernel": ((3, 4, 5), (0, 1)),
        "attention/out/kernel": ((2, 4, 5), (0, 1)),
        "attention/query/kernel": ((5, 2, 4), (0, 1)),
        "embedding": ((9, 4), (1,)),
        "head/kernel": ((4, 3), (0,)),
        "layers/mlp/kernel": ((6, 4, 5), (1,)),
        "norm/scale": ((4,), (0,)),
    }
    rng = np.random.default_rng(0)
    # Keys with slashes stand for nested dictionaries, whose paths read the same.
    params = {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in axes.items()}
    gradients = {name: leaf[::-1] * 3 for name, leaf in params.items()}
    tx = og.clip_by_param_norm(0.01, scope=unit_axes)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    for name, (_, over) in axes.items():
        norms, expected = (
            np.sqrt(np.sum(np.square(np.asarray(tree[name]), dtype=np.float64), axis=over))
            for tree in (updates, params)
        )
        np.testing.assert_allclose(norms, 0.01 * expected, rtol=RTOL, err_msg=name)


def test_documented_mask_leaves_the_head_alone():
    def all_but_head(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "head" not in jax.tree_util.keystr(path), params
        )

    params = {"body": {"kernel": jnp.ones((4, 3))}, "head": {"kernel": jnp.ones((3, 2))}}
    gradients = jax.tree.map(lambda leaf: leaf * 5, params)
    tx = optax.masked(og.clip_by_param_norm(0.01), all_but_head)
    updates, _ = tx.update(gradients, tx.init(params), params)
    assertions.assert_same_bits(updates["head"], gradients["head"])
    np.testing.assert_allclose(updates["body"]["kernel"], 0.01, rtol=1e-6)  # rounding


def test_parameters_that_are_nan_clip_nothing():
    params = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2)}
    gradients = {"a": jnp.array([5.0, 6.0]), "b": jnp.array([5.0, 6.0])}
    tx = og.clip_by_param_norm(0.01)
    updates, _ = tx.update(gradients, tx.init(params), params)
    assertions.assert_same_bits(updates["a"], gradients["a"])
    assert float(jnp.linalg.norm(updates["b"])) < 0.02


def reference_relative_change(
    update: Any, param: Any, max_relative: float, max_absolute: float
) -> np.ndarray:
    update, param = np.asarray(update, np.float64), np.asarray(param, np.float64)
    moves = update != 0
    bounds = max_relative * np.abs(param[moves]) + max_absolute
    return update * min(1, np.min(bounds / np.abs(update[moves]), initial=np.inf))


@hypothesis.given(
    seed=st.integers(0, 2**16),
    exponent=st.sampled_from([-37, -20, -3, 0, 3, 20, 37]),
    max_relative=st.sampled_from([0.0, 0.1, 0.5]),
    max_absolute=st.sampled_from([0.0, 1e-2]),
)
def test_relative_change_follows_its_formula(seed, exponent, max_relative, max_absolute):
    rng = np.random.default_rng(seed)
    params = (rng.normal(size=(3, 4)) * 10.0 ** rng.integers(-3, 3, (3, 4))).astype(np.float32)
    updates = (rng.normal(size=(3, 4)) * 10.0**exponent).astype(np.float32)
    updates[rng.random((3, 4)) < 0.3] = 0
    if seed % 3 == 0:
        params[1, 2] = 0
    actual = relatively_clipped(updates, params, max_relative, max_absolute)
    expected = reference_relative_change(updates, params, max_relative, max_absolute)
    # A few roundings; what is below 2**-126 may be flushed to zero.
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2.0**-126)
    if np.array_equal(expected, updates):
        assertions.assert_same_bits(actual, jnp.asarray(updates))


@jax.jit
def relatively_clipped(updates, params, max_relative, max_absolute):
    tx = og.clip_by_relative_change(max_relative, max_absolute=max_absolute)
    return tx.update(updates, tx.init(params), params)[0]


def test_relative_change_by_hand():
    params = {"a": jnp.array([10.0, 0.0]), "b": jnp.array([1.0]), "c": jnp.array([2.0])}
    updates = {"a": jnp.array([0.0, 0.02]), "b": jnp.array([-0.11]), "c": jnp.array([-1.05])}
    tx = og.clip_by_relative_change(0.1, max_absolute=0.01)
    state = tx.init(params)
    clipped, state = tx.update(updates, state, params)
    np.testing.assert_allclose(clipped["a"], [0, 0.01], rtol=1e-6)
    assertions.assert_same_bits(clipped["b"], updates["b"])  # exactly at its bound
    np.testing.assert_allclose(clipped["c"], [-0.21], rtol=1e-6)
    assert int(state.steps) == int(state.clipped_total) == 1
    np.testing.assert_allclose(state.last_scale, 0.2, rtol=1e-6)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, updates), state, params)
    assert int(state.clipped_total) == 1
    assert float(state.last_scale) == 1


def test_relative_change_stops_an_array_whose_zero_parameter_may_not_move():
    updates = relatively_clipped(jnp.array([1.0, 1.0]), jnp.array([0.0, 1.0]), 0.1, 0.0)
    np.testing.assert_array_equal(updates, [0, 0])
    updates = relatively_clipped(jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0]), 0.1, 0.0)
    np.testing.assert_allclose(updates, [0, 0.1], rtol=1e-6)


def test_relative_change_in_float16_and_complex():
    params = jnp.array([1.0, 100.0], jnp.float16)
    tx = og.clip_by_relative_change(0.1, max_absolute=0.0)
    updates, _ = tx.update(jnp.array([6e4, 6e4], jnp.float16), tx.init(params), params)
    np.testing.assert_allclose(np.asarray(updates, float), [0.1, 0.1], rtol=1e-3)  # float16
    params = jnp.array([3 + 4j, 1j])
    updates, _ = tx.update(jnp.array([1j, 0.05 + 0j]), tx.init(params), params)
    np.testing.assert_allclose(updates, [0.5j, 0.025], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-290, 1e-30, 1.0, 1e30, 1e300])
def test_relative_change_in_float64(scale, x64):
    rng = np.random.default_rng(0)
    params, updates = rng.normal(size=(2, 3, 4))
    updates *= scale
    actual = relatively_clipped(jnp.asarray(updates), jnp.asarray(params), 0.1, 1e-2)
    expected = reference_relative_change(updates, params, 0.1, 1e-2)
    assert actual.dtype == jnp.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-14)  # a few roundings
    tx = og.clip_by_relative_change()
    mixed = {"narrow": jnp.asarray(params, jnp.float32), "wide": jnp.asarray(updates)}
    like = {"narrow": mixed["narrow"], "wide": jnp.asarray(params)}
    clipped, state = tx.update(mixed, tx.init(like), like)
    np.testing.assert_allclose(clipped["wide"], expected, rtol=1e-14)
    assert clipped["narrow"].dtype == jnp.float32
    assert state.last_scale.dtype == jnp.float32


@pytest.mark.parametrize("size", [3, 40_000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_elementwise_rules_let_one_bad_element_through_in_arrays_of_any_size(size, bad):
    # On CPU a maximum over more than some thousand elements is silent about NaN.
    good = jnp.full(size, 0.5).at[1].set(20.0)
    updates = {"bad": good.at[2].set(bad), "good": good}
    params = {"bad": jnp.ones(size), "good": jnp.ones(size)}
    for tx in (og.clip_by_relative_change(), og.clip_by_max_ema()):
        state = tx.init(params)
        if isinstance(tx, optax.GradientTransformationExtraArgs):
            _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        results, new_state = jax.jit(tx.update)(updates, state, params)
        assertions.assert_same_bits(results["bad"], updates["bad"])
        assert float(results["good"][1]) < 20
        assertions.assert_same_bits(new_state, state)


# Maxima


def test_max_ema_cuts_single_elements():
    tx = og.clip_by_max_ema(0.5)
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    state = tx.init(params)
    first = {"a": jnp.array([[1.0, -2.0], [0.5, 0.0]]), "b": jnp.zeros(2)}
    updates, state = tx.update(first, state)
    assertions.assert_same_bits(updates, first)
    np.testing.assert_array_equal(history_of(state).count, [1, 0])
    second = {"a": jnp.array([[8.0, -7.0], [3.0, -1.0]]), "b": jnp.array([3.0, -1.0])}
    updates, state = tx.update(second, state)
    mean = (0.25 * 2 + 0.5 * 8) / 0.75
    expected = np.array([[8.0 * mean / 8, -7.0 * mean / 8], [3, -1]])
    np.testing.assert_allclose(updates["a"], expected, rtol=1e-6)
    assertions.assert_same_bits(updates["a"][1], second["a"][1])
    assertions.assert_same_bits(updates["b"], second["b"])  # its first step
    np.testing.assert_array_equal(history_of(state).count, [2, 1])
    np.testing.assert_allclose(history_of(state).value, [mean, 3], rtol=1e-6)
    assert int(state.clipped_total) == 1
    np.testing.assert_allclose(state.last_scale, mean / 8, rtol=1e-6)


def test_max_ema_of_complex_numbers_takes_their_modulus():
    tx = og.clip_by_max_ema(0.5)
    _, state = tx.update(jnp.array([3 + 4j]), tx.init(jnp.zeros(1, complex)))
    updates, state = tx.update(jnp.array([30 - 40j]), state)
    mean = (0.25 * 5 + 0.5 * 50) / 0.75
    np.testing.assert_allclose(updates, [(30 - 40j) * mean / 50], rtol=1e-6)
    updates, state = tx.update(jnp.array([3e38 + 3e38j]), state)
    assert jnp.all(jnp.isfinite(updates))
    assert np.all(np.isfinite(history_of(state).value))


def slopes(tx: Any, steps: jax.Array, params: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reverse and forward derivative of the sum of the updates."""

    def total(steps, params):
        def body(state, gradients):
            updates, state = tx.update(gradients, state, params)
            return state, jnp.sum(updates)

        return jnp.sum(lax.scan(body, tx.init(params), steps)[1])

    reverse = jax.grad(total, argnums=(0, 1))(steps, params)
    ones = (jnp.ones_like(steps), jnp.ones_like(params))
    return reverse, jax.jvp(total, (steps, params), ones)[1]


@pytest.mark.parametrize("rule", COMPANY)
def test_derivatives_are_finite_at_every_scale(rule):
    tx = COMPANY[rule]()
    scales = jnp.array([0.0, 1e-36, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e18])
    steps = jnp.array([[0.6, 0.8], [0.1, 0.2], [5.0, -7.0], [0.0, 0.0], [1.0, 1.0]])
    compute = jax.jit(jax.vmap(lambda scale: slopes(tx, steps * scale, jnp.array([3.0, 0.0]))))
    for leaf in jax.tree.leaves(compute(scales)):
        assert jnp.all(jnp.isfinite(leaf))


def test_median_frozen_early_holds_an_explosion_that_begins_at_once():
    def largest(warmup_steps):
        clip = og.clip_by_median(warmup_steps=warmup_steps)
        tx = optax.chain(clip, optax.sgd(0.1, momentum=0.9))

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(40 * x, state)  # up to 38 it is stable
            x = x + updates
            return (x, state), jnp.abs(x)[0]

        x = jnp.ones(1)
        return float(jax.lax.scan(step, (x, tx.init(x)), length=300)[1].max())

    assert largest(100) > 1000
    assert largest(10) < 100
