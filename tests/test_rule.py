"""Rules of one's own through ``og.limit_norms``, and what every rule counts."""

from __future__ import annotations

import pickle

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import optax_guard as og

RTOL = 1e-5  # the contract's bound for norms; a few dozen steps of float32


def tree(step: int, length: float = 1.0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    shapes = {"b": (3,), "w": (2, 3)}
    return {k: jnp.asarray(length * rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


# For each scope the groups: name and place of their elements.
ALL = np.s_[:]
GROUPS = {
    "global": [[("b", ALL), ("w", ALL)]],
    "leaf": [[("b", ALL)], [("w", ALL)]],
    "unit": [[("b", ALL)], *([("w", np.s_[:, i])] for i in range(3))],
    "rows": [[("b", ALL)], *([("w", np.s_[i, :])] for i in range(2))],
}
LENGTHS = np.exp(np.random.default_rng(5).normal(size=24))
LENGTHS[[5, 17]] = np.nan
LENGTHS[9] = 0


def by_rows(path, leaf):
    return 1 if path == "w" else None


def reference(stream, groups):
    """Clipped gradients in float64, and the last norms and smallest factor after each step."""
    last, results = np.ones(len(groups)), []
    for gradients in stream:
        gradients = {k: np.asarray(v, np.float64) for k, v in gradients.items()}
        smallest = 1.0
        if all(np.isfinite(v).all() for v in gradients.values()):
            for i, group in enumerate(groups):
                n = np.sqrt(sum(np.sum(gradients[k][place] ** 2) for k, place in group))
                if n > 0:
                    limit = 2 * last[i]
                    for k, place in group:
                        gradients[k][place] *= min(1, limit / n)
                    last[i], smallest = min(n, limit), min(smallest, limit / n)
        results.append((gradients, last.copy(), smallest))
    return results


@pytest.mark.parametrize("scope", GROUPS)
def test_a_rule_of_ones_own_follows_its_formula_and_shows_in_the_metrics(scope):
    tx = registry.rule_of_ones_own(scope=by_rows if scope == "rows" else scope)
    guarded = og.guard(optax.chain(tx, optax.sgd(1.0)))
    state, update = tx.init(tree(0)), jax.jit(tx.update)
    stream = [tree(step, length) for step, length in enumerate(LENGTHS)]
    num_cut = 0
    for gradients, (expected, last, smallest) in zip(
        stream, reference(stream, GROUPS[scope]), strict=True
    ):
        updates, state = update(gradients, state)
        assertions.assert_close(updates, jax.tree.map(np.float32, expected), rtol=RTOL)
        num_cut += smallest < 1
        histories = jax.tree.leaves(state.history)  # rows "calls" and "last", then the groups
        found = np.concatenate([np.asarray(each)[1].reshape(-1) for each in histories])
        np.testing.assert_allclose(found, last, rtol=RTOL)
    assert 2 < num_cut == int(state.clipped_total)
    assert int(state.steps) == len(LENGTHS) - 2
    counts = np.concatenate([np.asarray(each)[0].reshape(-1) for each in histories])
    np.testing.assert_array_equal(counts, len(LENGTHS) - 3)  # neither zeros nor NaN

    _, state = guarded.update(tree(1, 100.0), guarded.init(tree(0)))
    found = og.metrics(state)
    names = ("steps", "clipped_total", "last_scale", "recent_clip_rate", "recent_scale")
    for name in names:
        assert np.shape(found[f"guard/rule_of_ones_own/{name}"]) == ()
    assert int(found["guard/rule_of_ones_own/clipped_total"]) == 1


def test_the_state_of_a_rule_of_ones_own_is_named_after_it_and_pickles():
    state = registry.rule_of_ones_own(scope="unit").init(tree(0))
    assert isinstance(state, og.states.RuleState)
    assert type(state).__name__ == "RuleOfOnesOwnState"
    again = pickle.loads(pickle.dumps(state))
    assert type(again) is type(state)
    assertions.assert_same_bits(again, state)


def test_a_rule_is_told_of_steps_sizes_parameters_and_the_whole():
    def limit(norms, history, context):
        told = (context.size, context.param_norms, context.global_norm, context.shares)
        rows = [jnp.broadcast_to(each, norms.shape) for each in (context.step, *told)]
        return jnp.full_like(norms, jnp.inf), jnp.stack([row.astype(norms.dtype) for row in rows])

    rule = og.Rule(
        limit,
        lambda norms: jnp.zeros((5, *norms.shape), norms.dtype),
        needs_params=True,
        needs_global_norm=True,
    )
    tx = og.limit_norms(rule, name="listen", scope="leaf")
    params = {"b": jnp.full(4, 2.0), "w": jnp.full((3, 3), 1.0)}
    gradients = {"b": jnp.array([3.0, 0, 0, 0]), "w": jnp.zeros((3, 3)).at[0, 0].set(4.0)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(gradients, state, params)
    assertions.assert_same_bits(updates, gradients)
    expected = [[1, 1], [4, 9], [4, 3], [5, 5], [0.6, 0.8]]
    np.testing.assert_allclose(state.history, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^listen compares updates with parameters, but update"):
        tx.update(gradients, state)


def test_a_rule_may_set_norms_instead_of_limiting_them():
    rule = og.Rule(lambda norms, history, context: (jnp.full_like(norms, 2.0), history),
                   is_target=True)  # fmt: skip
    tx = og.limit_norms(rule, name="two")
    gradients = {"w": jnp.array([0.03, 0.04])}
    updates, state = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(updates["w"], [1.2, 1.6], rtol=1e-6)
    np.testing.assert_allclose(state.last_scale, 40.0, rtol=1e-6)


def test_a_statistic_that_would_overflow_keeps_its_value():
    rule = og.Rule(
        lambda norms, history, context: (2 * norms, norms**2),
        lambda norms: jnp.zeros(norms.shape, norms.dtype),
    )
    tx = og.limit_norms(rule, name="squares", scope="leaf")
    state = tx.init(tree(0))
    for length in (3.0, 1e30):
        gradients = {"b": jnp.array([length, 0, 0]), "w": jnp.full((2, 3), 0.5)}
        _, state = tx.update(gradients, state)
    np.testing.assert_allclose(state.history, [[9.0, 1.5]], rtol=1e-6)


# What every rule counts


def test_recent_rate_and_scale_by_hand():
    tx = og.clip_by_norm(1.0)
    state, update = tx.init(jnp.zeros(1)), jax.jit(tx.update)

    def feed(norms):
        nonlocal state
        for norm in norms:
            _, state = update(jnp.array([norm], jnp.float32), state)
        return float(state.recent_clip_rate), float(state.recent_scale)

    assert feed([]) == (0.0, 1.0)
    # First a plain mean. A zero is a step that was not cut; NaN is none.
    np.testing.assert_allclose(feed([2.0]), [1.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(feed([0.0, np.nan]), [1 / 2, (0.5 + 1) / 2], rtol=1e-6)
    np.testing.assert_allclose(feed([4.0, np.inf]), [2 / 3, (0.5 + 1 + 0.25) / 3], rtol=1e-6)
    np.testing.assert_allclose(feed(97 * [0.5]), [2 / 100, 98.75 / 100], rtol=1e-5)
    # From the hundredth step on each weighs a hundredth.
    rate, scale = 0.99 * (0.99 * 0.02) + 0.01, 0.99 * (1 - 0.99 * 0.0125) + 0.01 * 0.2
    np.testing.assert_allclose(feed([0.5, 5.0]), [rate, scale], rtol=1e-5)
    assert state.recent_scale.dtype == state.recent_clip_rate.dtype == jnp.float32


@pytest.mark.parametrize(
    "tx", [og.normalize_and_scale(1e30), og.normalize_and_scale(1e30, scope="leaf")]
)
def test_factors_past_float32_are_counted_as_finite_ones(tx):
    gradients = jnp.array([1e-30])
    updates, state = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(updates, [1e30], rtol=RTOL)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
    assert float(state.last_scale) > 8e37


# States whose numbers share two arrays


def test_entries_of_a_state_are_read_and_replaced_by_name():
    state = og.clip_by_zscore().init(jnp.zeros(2))
    changed = state._replace(clipped_total=7, recent_scale=0.25, history=state.history + 1)
    assert int(changed.clipped_total) == 7
    assert float(changed.recent_scale) == 0.25
    assert float(changed.last_scale) == 1.0
    assert assertions.signature(changed) == assertions.signature(state)
    with pytest.raises(ValueError, match=r"^ClipByZscoreState has no 'total'; it has integers, n"):
        state._replace(total=3)


def test_entries_of_an_ensemble_have_its_axis():
    tx = og.clip_by_norm(1.0)
    gradients = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    _, states = jax.vmap(tx.update)(gradients, jax.vmap(tx.init)(gradients))
    np.testing.assert_array_equal(states.clipped_total, [1, 0])
    np.testing.assert_allclose(states.last_scale, [0.2, 1.0], rtol=1e-6)
    states = states._replace(clipped_total=np.array([5, 6]))
    np.testing.assert_array_equal(states.clipped_total, [5, 6])
