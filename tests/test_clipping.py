"""Clipping and normalising rules against plain NumPy in float64, by hand, and by property."""

from __future__ import annotations

import math
from typing import Any

import assertions
import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from histories import history_of
from hypothesis import strategies as st
from jax import lax

import optax_guard as og

# float32 statistics over hundreds of steps; the contract's bound for norms.
NORM_RTOL = 1e-5


# Sequences of gradients


def norm_sequence(seed: int, *, num_steps: int = 400, last_level: float = 1.0) -> np.ndarray:
    """Norms with spikes, zeros and non-finite ones; the second half on another level."""
    rng = np.random.default_rng(seed)
    norms = np.exp(0.2 * rng.normal(size=num_steps))
    norms[rng.integers(0, num_steps, 12)] *= 50
    norms[num_steps // 2 :] *= last_level
    norms[rng.integers(0, num_steps, 8)] = 0
    norms[[0, 3, 20, 21, 40]] = 0, np.nan, np.inf, np.nan, np.inf
    return norms.astype(np.float32).astype(np.float64)


def two_element_gradients(norms: np.ndarray, dtype: Any = jnp.float32) -> jax.Array:
    """``[steps, 2]``, each row with the norm given; a non-finite one in the first element."""
    rows = np.stack([0.6 * norms, 0.8 * np.where(np.isfinite(norms), norms, 1)], axis=-1)
    return jnp.asarray(rows, dtype)


def run(tx: Any, gradients: Any) -> tuple[Any, Any]:
    """Updates of all steps, stacked, and all states, stacked."""

    @jax.jit
    def scan(gradients):
        def body(state, gradient):
            updates, state = tx.update(gradient, state)
            return state, (updates, state)

        first = jax.tree.map(lambda leaf: leaf[0], gradients)
        return lax.scan(body, tx.init(first), gradients)[1]

    return scan(gradients)


def factors_of(updates: Any, gradients: Any) -> np.ndarray:
    """By how much every row was scaled; NaN where it was not finite, 1 where it was zero."""
    updates, gradients = np.asarray(updates, np.float64), np.asarray(gradients, np.float64)
    last, original = updates[..., -1], gradients[..., -1]
    factors = np.where(original == 0, 1, last / np.where(original == 0, 1, original))
    return np.where(np.all(np.isfinite(gradients), axis=-1), factors, np.nan)


# Constant and scheduled limits


def schedule(step: Any) -> Any:
    return 0.5 + 0.01 * step


def reference_factors(norms: np.ndarray, limit_at: Any, *, normalize: bool = False) -> np.ndarray:
    """Factor of each step; the schedule counts finite steps only."""
    factors, count = [], 0
    for norm in norms:
        if not np.isfinite(norm):
            factors.append(np.nan)
            continue
        ratio = limit_at(count) / norm if norm > 0 else 1.0
        factors.append(ratio if normalize else min(1.0, ratio))
        count += 1
    return np.array(factors)


@pytest.mark.parametrize("threshold", [1.2, schedule], ids=["constant", "schedule"])
def test_clip_by_norm_follows_its_formula(threshold):
    norms = norm_sequence(0)
    gradients = two_element_gradients(norms)
    updates, states = run(og.clip_by_norm(threshold), gradients)
    limit_at = threshold if callable(threshold) else lambda step: threshold
    expected = reference_factors(norms, limit_at)
    assert updates.shape == gradients.shape
    assert updates.dtype == jnp.float32
    np.testing.assert_allclose(factors_of(updates, gradients), expected, rtol=NORM_RTOL)
    is_finite = np.isfinite(norms)
    np.testing.assert_array_equal(states.steps, np.cumsum(is_finite))
    np.testing.assert_array_equal(states.clipped_total, np.cumsum(expected < 1))
    np.testing.assert_allclose(
        np.asarray(states.last_scale)[is_finite], expected[is_finite], rtol=NORM_RTOL
    )


@pytest.mark.parametrize("threshold", [0.8, schedule], ids=["constant", "schedule"])
def test_clip_by_rms_follows_its_formula(threshold):
    norms = norm_sequence(1)
    gradients = two_element_gradients(norms)
    updates, states = run(og.clip_by_rms(threshold), gradients)
    limit_at = threshold if callable(threshold) else lambda step: threshold
    expected = reference_factors(norms, lambda step: limit_at(step) * math.sqrt(2))
    assert updates.shape == gradients.shape
    assert updates.dtype == jnp.float32
    np.testing.assert_allclose(factors_of(updates, gradients), expected, rtol=NORM_RTOL)
    np.testing.assert_array_equal(states.steps, np.cumsum(np.isfinite(norms)))
    np.testing.assert_array_equal(states.clipped_total, np.cumsum(expected < 1))


@pytest.mark.parametrize("alpha", [0.7, schedule], ids=["constant", "schedule"])
def test_normalize_and_scale_follows_its_formula(alpha):
    norms = norm_sequence(2)
    gradients = two_element_gradients(norms)
    updates, states = run(og.normalize_and_scale(alpha), gradients)
    alpha_at = alpha if callable(alpha) else lambda step: alpha
    expected = reference_factors(norms, alpha_at, normalize=True)
    assert updates.shape == gradients.shape
    assert updates.dtype == jnp.float32
    np.testing.assert_allclose(factors_of(updates, gradients), expected, rtol=NORM_RTOL)
    np.testing.assert_array_equal(states.steps, np.cumsum(np.isfinite(norms)))


# By hand


def one_step(tx: Any, gradients: Any) -> Any:
    return tx.update(gradients, tx.init(gradients))[0]


GRADIENTS = {"b": jnp.array([0.0, 12.0]), "w": jnp.array([[3.0, 0.0], [4.0, 0.5]])}


@pytest.mark.parametrize(
    ("scope", "b", "w"),
    [
        # ||b|| = 12, columns of w: 5 and 0.5, ||w|| = sqrt(25.25), all: sqrt(169.25)
        ("global", 12 / math.sqrt(169.25), np.array([[3, 0], [4, 0.5]]) / math.sqrt(169.25)),
        ("leaf", 1.0, np.array([[3, 0], [4, 0.5]]) / math.sqrt(25.25)),
        ("unit", 1.0, [[0.6, 0], [0.8, 0.5]]),
        (lambda path, leaf: None if path == "b" else -1, 1.0, [[1, 0], [8 / 65**0.5, 1 / 65**0.5]]),
    ],
    ids=["global", "leaf", "unit", "callable"],
)
def test_clip_by_norm_by_hand(scope, b, w):
    result = one_step(og.clip_by_norm(1.0, scope=scope), GRADIENTS)
    expected = {"b": np.array([0, b], np.float32), "w": np.asarray(w, np.float32)}
    assertions.assert_close(result, expected, rtol=1e-6)  # a few roundings


def test_clip_by_rms_by_hand():
    # b: rms 12/sqrt(2), to 2; w: rms sqrt(25.25)/2 = 2.51, to 2; its columns 5/sqrt(2) and 0.35
    by_leaf = one_step(og.clip_by_rms(2.0), GRADIENTS)
    expected_b = np.array([0, 2 * math.sqrt(2)], np.float32)
    w = np.asarray(GRADIENTS["w"])
    expected = {"b": expected_b, "w": (w * 4 / math.sqrt(25.25)).astype(np.float32)}
    assertions.assert_close(by_leaf, expected, rtol=1e-6)  # a few roundings
    by_unit = one_step(og.clip_by_rms(2.0, scope="unit"), GRADIENTS)
    expected = {"b": expected_b, "w": (w * [2 * math.sqrt(2) / 5, 1]).astype(np.float32)}
    assertions.assert_close(by_unit, expected, rtol=1e-6)
    by_global = one_step(og.clip_by_rms(2.0, scope="global"), GRADIENTS)
    factor = 2 * math.sqrt(6) / math.sqrt(169.25)
    expected = {"b": np.array([0, 12 * factor], np.float32), "w": (w * factor).astype(np.float32)}
    assertions.assert_close(by_global, expected, rtol=1e-6)


def test_normalize_and_scale_by_hand():
    result = one_step(og.normalize_and_scale(2.0, scope="unit"), GRADIENTS)
    expected = {
        "b": np.array([0, 2], np.float32),
        "w": np.array([[1.2, 0], [1.6, 2]], np.float32),
    }
    assertions.assert_close(result, expected, rtol=1e-6)  # a few roundings


def test_normalize_and_scale_with_alpha_zero_gives_zero():
    result = one_step(og.normalize_and_scale(0.0), GRADIENTS)
    assertions.assert_close(result, jax.tree.map(jnp.zeros_like, GRADIENTS), rtol=0)


@pytest.mark.parametrize(
    "threshold",
    [1, 1.0, np.float32(1), np.array(1.0), jnp.array(1.0), jnp.array(1), jnp.bfloat16(1), True + 0],
    ids=repr,
)
def test_thresholds_may_be_numbers_of_every_kind(threshold):
    expected = one_step(og.clip_by_norm(1.0), GRADIENTS)
    assertions.assert_same_bits(one_step(og.clip_by_norm(threshold), GRADIENTS), expected)


# Z-score


def reference_zscore(
    norms: np.ndarray,
    z_threshold: float = 2.5,
    decay: float = 0.97,
    warmup_steps: int = 25,
    target: str = "reciprocal",
    max_norm: float = math.inf,
    min_std_ratio: float = 0.01,
    rebaseline_after: int | None = 100,
    eps: float = 1e-6,
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Limits of a sequence of norms, and (mean, variance) after each, from the formulas."""
    warmup: list[float] = []
    streak: list[float] = []
    mean = variance = 0.0
    limits, statistics = [], []
    for norm in norms:
        limit = max_norm
        if np.isfinite(norm) and norm > 0:
            if len(warmup) < warmup_steps:
                warmup.append(norm)
                mean, variance = float(np.mean(warmup)), float(np.var(warmup))
            else:
                std = math.sqrt(variance)
                z = (norm - mean) / (max(std, min_std_ratio * mean) + eps * mean)
                if z > z_threshold:
                    spike_limit = {
                        "reciprocal": mean + z_threshold**2 * std / z,
                        "mean": mean,
                        "threshold": mean + z_threshold * std,
                    }[target]
                    limit = min(limit, spike_limit)
                result = min(norm, limit)
                streak = [*streak, norm] if norm > 2 * result else []
                if rebaseline_after is not None and len(streak) == rebaseline_after:
                    mean, variance, streak = float(np.mean(streak)), float(np.var(streak)), []
                else:
                    mean = decay * mean + (1 - decay) * result
                    variance = decay * variance + (1 - decay) * (result - mean) ** 2
        limits.append(limit)
        statistics.append((mean, variance))
    return np.array(limits), statistics


ZSCORE_CASES = {
    "defaults": {},
    "mean": {"target": "mean", "warmup_steps": 10, "rebaseline_after": 20},
    "threshold": {"target": "threshold", "z_threshold": 2.0, "max_norm": 6.0, "decay": 0.9},
    "paper": {"min_std_ratio": 0.0, "rebaseline_after": None, "eps": 1e-6},
}


def check_zscore(case: str, norms: np.ndarray, dtype: Any, rtol: float, variance_rtol: float):
    gradients = two_element_gradients(norms, dtype)
    updates, states = run(og.clip_by_zscore(**ZSCORE_CASES[case]), gradients)
    limits, statistics = reference_zscore(norms, **ZSCORE_CASES[case])
    is_live = np.isfinite(norms) & (norms > 0)
    expected = np.where(np.isfinite(norms), 1.0, np.nan)
    expected[is_live] = np.minimum(1, limits[is_live] / norms[is_live])
    assert updates.shape == gradients.shape
    assert updates.dtype == dtype
    assert np.sum(expected < 1) > 8
    np.testing.assert_allclose(factors_of(updates, gradients), expected, rtol=rtol)
    history = history_of(states)
    assert history.mean.dtype == history.variance.dtype == dtype
    assert history.mean.shape == (len(norms),)
    mean, variance = np.array(statistics).T
    np.testing.assert_allclose(history.mean, mean, rtol=rtol)
    np.testing.assert_allclose(history.variance, variance, rtol=variance_rtol, atol=1e-9)
    np.testing.assert_array_equal(history.count, np.cumsum(is_live))
    np.testing.assert_array_equal(states.steps, np.cumsum(np.isfinite(norms)))


@pytest.mark.parametrize("case", ["defaults", "mean", "threshold"])
def test_clip_by_zscore_follows_its_formula(case):
    # A variance is a difference of numbers a few times larger: about ten times their rounding.
    check_zscore(case, norm_sequence(4), jnp.float32, NORM_RTOL, 1e-4)


@pytest.mark.parametrize("case", ZSCORE_CASES)
def test_clip_by_zscore_follows_its_formula_through_a_change_of_level(case, x64):
    # There the recursion amplifies rounding a thousandfold: 1e-4 in float32, nothing in float64.
    check_zscore(case, norm_sequence(4, last_level=8.0), jnp.float64, 1e-9, 1e-9)


def test_clip_by_zscore_keeps_a_history_for_every_group():
    sequences = {name: norm_sequence(seed, num_steps=150) for seed, name in enumerate("abc")}
    # The global verdict on a non-finite step is shared, so here all sequences are finite.
    sequences = {name: np.nan_to_num(norms, posinf=0.0) for name, norms in sequences.items()}
    columns = np.stack([sequences["b"], sequences["c"]], axis=-1)[:, None, :]
    gradients = {
        "a": two_element_gradients(sequences["a"]),
        "w": jnp.asarray(columns * np.array([[0.6], [0.8]]), jnp.float32),
    }
    updates, states = run(og.clip_by_zscore(scope="unit"), gradients)
    assert history_of(states, leaf=1).mean.shape == (150, 1, 2)
    actual = {
        "a": factors_of(updates["a"], gradients["a"]),
        "b": factors_of(updates["w"][..., 0], gradients["w"][..., 0]),
        "c": factors_of(updates["w"][..., 1], gradients["w"][..., 1]),
    }
    for name, norms in sequences.items():
        limits, _ = reference_zscore(norms)
        expected = np.minimum(1, limits / np.where(norms > 0, norms, 1))
        expected[norms == 0] = 1
        assert np.sum(expected < 1) >= 1
        np.testing.assert_allclose(actual[name], expected, rtol=NORM_RTOL, err_msg=name)


def feed(tx: Any, norms: list[float]) -> tuple[list[float], Any]:
    """Gradients of one element through ``tx``: what comes out, and the last state."""
    step = jax.jit(tx.update)
    state = tx.init(jnp.zeros(1))
    results = []
    for norm in norms:
        updates, state = step(jnp.array([norm], jnp.float32), state)
        results.append(float(updates[0]))
    return results, state


@pytest.mark.parametrize(("target", "limit"), [("reciprocal", 2.5), ("mean", 2), ("threshold", 4)])
def test_clip_by_zscore_by_hand(target, limit):
    # Warm-up 1, 3: mean 2, variance 1. Then 10 has z = 8; reciprocal: 2 + 2**2 * 1 / 8 = 2.5.
    tx = og.clip_by_zscore(2.0, target=target, warmup_steps=2, eps=0.0)
    results, state = feed(tx, [1.0, 3.0, 10.0])
    # float32 rounding of a handful of operations
    np.testing.assert_allclose(results, [1, 3, limit], rtol=1e-6)
    mean = 0.97 * 2 + 0.03 * limit
    variance = 0.97 + 0.03 * (limit - mean) ** 2
    history = history_of(state)
    np.testing.assert_allclose(history.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(history.variance, variance, rtol=1e-6)
    assert int(history.count) == 3
    assert int(state.clipped_total) == 1
    np.testing.assert_allclose(state.last_scale, limit / 10, rtol=1e-6)


def test_clip_by_zscore_lets_norms_up_to_the_threshold_pass():
    tx = og.clip_by_zscore(2.0, warmup_steps=2, eps=0.0)
    results, _ = feed(tx, [1.0, 3.0, 4.0])  # z = 2 is not above 2
    assert results == [1.0, 3.0, 4.0]


def test_clip_by_zscore_uses_the_floor_of_the_spread():
    # Warm-up 2, 2: variance 0. Floor 0.25 * 2 = 0.5: 2.9 has z = 1.8, 4 has z = 3.8 or so.
    tx = og.clip_by_zscore(2.0, warmup_steps=2, eps=0.0, min_std_ratio=0.25, decay=0.0)
    results, _ = feed(tx, [2.0, 2.0, 2.9])
    np.testing.assert_allclose(results[2], 2.9, rtol=1e-7)
    results, _ = feed(tx, [2.0, 2.0, 4.0])
    assert results[2] == 2.0  # 2 + 4 * 0 / z


def test_clip_by_zscore_applies_max_norm_in_the_warm_up_too():
    tx = og.clip_by_zscore(2.0, warmup_steps=2, max_norm=2.0)
    results, state = feed(tx, [8.0, 1.0, 8.0])
    np.testing.assert_allclose(results, [2, 1, 2], rtol=1e-6)  # rounding
    # The warm-up statistics are those of the incoming norms 8 and 1.
    np.testing.assert_allclose(history_of(state).mean, 0.97 * 4.5 + 0.03 * 2, rtol=1e-6)


def test_clip_by_zscore_accepts_a_lasting_change_of_level():
    tx = og.clip_by_zscore(2.0, warmup_steps=3, rebaseline_after=4)
    results, state = feed(tx, [1.0, 1.1, 0.9, 10.0, 12.0, 10.0, 12.0, 11.0])
    assert all(result < 6 for result in results[3:7])
    assert results[7] == 11.0
    history = history_of(state)
    assert int(history.streak_count) == 0
    # The statistics restarted from 10, 12, 10, 12, then saw 11.
    np.testing.assert_allclose(history.mean, 11, rtol=1e-6)
    np.testing.assert_allclose(history.variance, 0.97, rtol=1e-6)


def test_clip_by_zscore_needs_an_unbroken_run_for_a_change_of_level():
    tx = og.clip_by_zscore(2.0, warmup_steps=3, rebaseline_after=4)
    results, state = feed(tx, [1.0, 1.1, 0.9] + 3 * [10.0] + [1.0] + 3 * [10.0])
    assert all(result < 5 for result in results)
    assert int(history_of(state).streak_count) == 3


def test_clip_by_zscore_never_gives_in_without_rebaselining():
    tx = og.clip_by_zscore(2.0, warmup_steps=3, rebaseline_after=None)
    results, _ = feed(tx, [1.0, 1.1, 0.9] + 30 * [10.0])
    assert max(results) < 5


@pytest.mark.parametrize("norm", [1e-30, 0.1, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("strict", [False, True])
def test_constant_norms_clip_nothing_bit_for_bit(norm, strict):
    arguments = {"min_std_ratio": 0.0, "eps": 0.0} if strict else {}
    tx = og.clip_by_zscore(warmup_steps=5, **arguments)
    gradients = jnp.full((60, 1), norm, jnp.float32)
    updates, states = run(tx, gradients)
    assertions.assert_same_bits(updates, gradients)
    assert int(states.clipped_total[-1]) == 0


@pytest.mark.parametrize("place", [1, 10], ids=["in warm-up", "after warm-up"])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_zero_and_nonfinite_norms_enter_no_statistic(place, bad):
    norms = [1.0, 1.2, 0.8, 1.0, 1.1] * 3
    tx = og.clip_by_zscore(warmup_steps=4)
    _, expected = feed(tx, norms)
    results, state = feed(tx, [*norms[:place], bad, *norms[place:]])
    assertions.assert_same_bits(state.history, expected.history)
    np.testing.assert_array_equal(results[place], bad)


# Properties, of all rules without history at once, since what takes the time is to compile

# Nothing that scaling by 2**20 would bring near the end of the range of float32.
MAGNITUDES = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(2.0**-100, 2.0**100, width=32),
    st.floats(-(2.0**100), -(2.0**-100), width=32),
)
TREES = st.fixed_dictionaries(
    {
        "b": hnp.arrays(np.float32, (3,), elements=MAGNITUDES),
        "w": hnp.arrays(np.float32, (2, 3), elements=MAGNITUDES),
    }
)
LIMITS = st.floats(2.0**-60, 2.0**60, width=32)
RULES = {
    "norm-global": lambda limit: og.clip_by_norm(limit),
    "norm-leaf": lambda limit: og.clip_by_norm(limit, scope="leaf"),
    "norm-unit": lambda limit: og.clip_by_norm(limit, scope="unit"),
    "rms-leaf": lambda limit: og.clip_by_rms(limit, scope="leaf"),
    "normalize": lambda limit: og.normalize_and_scale(limit),
}


@jax.jit
def applied(tree, limit):
    transformations = {name: rule(limit) for name, rule in RULES.items()}
    return {name: tx.update(tree, tx.init(tree))[0] for name, tx in transformations.items()}


def norms_of_groups(tree: dict[str, Any], rule: str) -> np.ndarray:
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}
    if rule in ("norm-global", "normalize"):
        return np.array([math.sqrt(sum(np.sum(leaf**2) for leaf in wide.values()))])
    if rule == "norm-unit":
        return np.append(np.linalg.norm(wide["w"], axis=0), np.linalg.norm(wide["b"]))
    sizes = np.array([3, 6]) if rule == "rms-leaf" else 1
    return np.array([np.linalg.norm(wide[name]) for name in "bw"]) / np.sqrt(sizes)


@hypothesis.given(tree=TREES, limit=LIMITS)
def test_norms_are_bounded_and_directions_kept(tree, limit):
    for rule, result in applied(tree, limit).items():
        before, after = norms_of_groups(tree, rule), norms_of_groups(result, rule)
        limits = np.where(before > 0, limit, 0)
        expected = limits if rule == "normalize" else np.minimum(before, limit)
        # Elements below 2**-126 flush to zero, at most 9 of them in a norm.
        np.testing.assert_allclose(after, expected, rtol=NORM_RTOL, atol=3 * 2.0**-126)
        for name, leaf in tree.items():
            assert result[name].shape == leaf.shape
            assert result[name].dtype == leaf.dtype
            assert np.all((np.sign(result[name]) == np.sign(leaf)) | (result[name] == 0))


@hypothesis.given(tree=TREES, limit=LIMITS, exponent=st.integers(-20, 20))
def test_clipping_is_homogeneous(tree, limit, exponent):
    factor = np.float32(2.0**exponent)
    scaled = {name: leaf * factor for name, leaf in tree.items()}
    results, expected = applied(scaled, limit * factor), applied(tree, limit)
    for rule in RULES:
        for name in tree:
            # Another branch may compute the norm: a few roundings. Denormals flush to zero.
            np.testing.assert_allclose(
                results[rule][name],
                expected[rule][name] * factor,
                rtol=1e-6,
                atol=max(factor, 1) * 2.0**-125,
                err_msg=rule,
            )


@hypothesis.given(tree=TREES, limit=LIMITS)
def test_order_of_leaves_does_not_matter(tree, limit):
    renamed = {"x": tree["w"], "y": tree["b"]}  # the matrix comes first now
    results, expected = applied(renamed, limit), applied(tree, limit)
    for rule in RULES:
        # Two sums of the same numbers: a few roundings.
        np.testing.assert_allclose(results[rule]["x"], expected[rule]["w"], rtol=1e-6)
        np.testing.assert_allclose(results[rule]["y"], expected[rule]["b"], rtol=1e-6)


@hypothesis.given(seed=st.integers(0, 2**16), scale=st.sampled_from([2.0**-30, 1.0, 2.0**30]))
def test_zscore_is_homogeneous(seed, scale):
    norms = norm_sequence(seed, num_steps=80)
    results = zscored(two_element_gradients(norms) * np.float32(scale))
    expected = zscored(two_element_gradients(norms)) * np.float32(scale)
    # Powers of two commute with every rounding; the compiler may still contract differently.
    np.testing.assert_allclose(results, expected, rtol=1e-6)


@jax.jit
def zscored(gradients):
    tx = og.clip_by_zscore(warmup_steps=5, rebaseline_after=10)

    def body(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, updates

    return lax.scan(body, tx.init(gradients[0]), gradients)[1]


# Composition


def test_rms_after_adam_bounds_the_step():
    tx = optax.chain(optax.scale_by_adam(), og.clip_by_rms(0.5), optax.scale(-0.1))
    updates = one_step(tx, GRADIENTS)
    for leaf in updates.values():
        # Adam's first step is +-1 up to eps; zeros stay.
        assert math.sqrt(float(jnp.mean(leaf**2))) <= 0.05 * (1 + 1e-6)
