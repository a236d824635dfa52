"""Reading states: numbers under jit, words on the host, through every container in use."""

from __future__ import annotations

import types
from typing import Any

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import optax_guard as og

PARAMS = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}, "scale": jnp.ones(())}
GRADIENTS = jax.tree.map(lambda leaf: 0.5 * leaf, PARAMS)
SGD = optax.sgd(0.1)


def with_nan(gradients: Any = GRADIENTS) -> Any:
    dense = gradients["dense"]
    return gradients | {"dense": dense | {"kernel": dense["kernel"].at[1, 1].set(jnp.nan)}}


def after(tx: Any, *steps: Any, params: Any = PARAMS, **extra_args: Any) -> Any:
    """State after these gradients."""
    update = jax.jit(tx.update)
    state = tx.init(params)
    for gradients in steps:
        _, state = update(gradients, state, params, **extra_args)
    return state


# Metrics


GUARD_KEYS = {
    "guard_step",
    "skipped_total",
    "skipped_in_a_row",
    "last_step_skipped",
    "skip_reason",
    "gave_up",
    "grad_norm",
    "last_fault_step",
    "last_fault_reason",
    "last_fault_condition",
    "skip_condition",
}
CLIP = og.clip_by_norm(1.0)
CLIP_FIELDS = ("steps", "clipped_total", "last_scale", "recent_clip_rate", "recent_scale")
CLIP_KEYS = {f"clip_by_norm/{field}" for field in CLIP_FIELDS}


def test_metrics_are_the_scalars_of_all_states():
    state = after(og.stabilize(SGD, clip=CLIP), GRADIENTS, with_nan())
    metrics = og.metrics(state)
    assert set(metrics) == {f"guard/{key}" for key in GUARD_KEYS | CLIP_KEYS}
    expected = {
        "guard_step": 2,
        "skipped_total": 1,
        "skip_reason": 1,
        "last_step_skipped": True,
        "clip_by_norm/steps": 1,
        "last_fault_step": 2,
    }
    for key, value in expected.items():
        array = metrics[f"guard/{key}"]
        assert array.shape == ()
        assert array.dtype == (jnp.bool_ if value is True else jnp.int32)
        assert array == value
    assert metrics["guard/grad_norm"].dtype == jnp.float32


def test_metrics_have_the_same_keys_and_values_under_jit_and_at_every_step():
    tx = og.stabilize(optax.adam(0.1), skip_if=og.spike(window=4))
    states = [tx.init(PARAMS), after(tx, GRADIENTS), after(tx, GRADIENTS, with_nan())]
    jitted = jax.jit(og.metrics)
    for state in states:
        metrics = og.metrics(state)
        assert list(jitted(state)) == sorted(og.metrics(states[0]))
        assertions.assert_same_bits(dict(sorted(metrics.items())), jitted(state))


def test_metrics_of_nested_states_of_a_kind_have_keys_of_their_own():
    inner = og.guard(optax.chain(og.clip_by_norm(1.0), og.clip_by_norm(0.5, scope="leaf"), SGD))
    metrics = og.metrics(after(og.guard(optax.chain(inner)), GRADIENTS))
    expected = {f"guard/{key}" for key in GUARD_KEYS | CLIP_KEYS}
    expected |= {f"guard/2/{key}" for key in GUARD_KEYS}
    expected |= {f"guard/clip_by_norm/2/{field}" for field in CLIP_FIELDS}
    assert set(metrics) == expected
    # ||g|| = 0.5 * 3; the outer guard comes first, and so does the first clip.
    np.testing.assert_allclose(metrics["guard/clip_by_norm/last_scale"], 1 / 1.5, rtol=1e-6)
    assert metrics["guard/clip_by_norm/2/last_scale"] != metrics["guard/clip_by_norm/last_scale"]


def test_metrics_take_a_prefix():
    assert set(og.metrics(after(og.clip_by_norm(1.0)), prefix="train/opt/")) == {
        f"train/opt/{key}" for key in CLIP_KEYS
    }


def test_metrics_of_a_foreign_state_are_an_error_that_says_what_to_write():
    with pytest.raises(ValueError, match=r"No state of optax_guard.*og\.guard\(\.\.\.\)"):
        og.metrics(optax.adam(0.1).init(PARAMS))


def test_metrics_move_nothing_to_the_host():
    state = after(og.stabilize(SGD, clip=CLIP), GRADIENTS)
    assert all(isinstance(value, jax.Array) for value in og.metrics(state).values())
    assert "callback" not in str(jax.make_jaxpr(og.metrics)(state))


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, jax.tree.map(lambda leaf: True, PARAMS)),
    "inject": lambda tx: optax.inject_hyperparams(lambda lr: optax.chain(tx, optax.scale(lr)))(0.1),
    "partition": lambda tx: optax.partition({"a": tx}, "a"),
    "flatten": optax.flatten,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_guards_are_found_inside_the_wrappers_of_optax(wrapper):
    state = after(WRAPPERS[wrapper](og.guard(SGD)), GRADIENTS)
    metrics, place = og.metrics(state), "guard/a/" if wrapper == "partition" else "guard/"
    assert metrics[f"{place}guard_step"] == 1
    np.testing.assert_allclose(metrics[f"{place}grad_norm"], 1.5, rtol=1e-6)
    assert bool(og.step_ok(state))
    og.check(state)
    nothing = "No step was skipped in 1 steps."
    if wrapper == "multi_steps":
        nothing = "The guard skipped none of the 1 windows of MultiSteps that reached it."
    assert og.explain(state) == nothing


def test_a_bare_scalar_as_inner_state_is_no_metric():
    counter = optax.GradientTransformation(
        lambda params: jnp.zeros((), jnp.int32),
        lambda updates, state, params=None: (updates, state),
    )
    assert set(og.metrics(og.guard(counter).init(PARAMS))) == {f"guard/{key}" for key in GUARD_KEYS}


# step_ok and select


def test_step_ok_tells_whether_the_last_step_was_accepted():
    tx = og.guard(SGD)
    step_ok = jax.jit(og.step_ok)
    for steps, expected in [((), True), ((GRADIENTS,), True), ((with_nan(),), False)]:
        ok = step_ok(after(tx, *steps))
        assert ok.shape == ()
        assert ok.dtype == jnp.bool_
        assert bool(ok) == expected
    assert bool(step_ok(after(tx, with_nan(), GRADIENTS)))


def test_step_ok_asks_every_guard():
    strict = og.guard(SGD, skip_if=og.norm_above(0.1))
    assert not bool(og.step_ok(after(og.guard(optax.chain(strict)), GRADIENTS)))
    assert not bool(og.step_ok((after(strict, GRADIENTS), after(og.guard(SGD), GRADIENTS))))


@pytest.mark.parametrize("ok", [True, False])
def test_select_keeps_one_tree_bit_for_bit(ok):
    def tree(sign):
        return {
            "mean": jnp.array([jnp.nan, -0.0, sign]),
            "count": jnp.int32(3 + sign),
            "flags": (jnp.array([True, sign > 0]), None),
            "low": jnp.array([sign, jnp.inf], jnp.bfloat16),
        }

    new, old = tree(1), tree(-1)
    result = jax.jit(og.select)(jnp.array(ok), new, old)
    assertions.assert_same_bits(result, new if ok else old)


def test_select_refuses_trees_of_different_structure():
    with pytest.raises(ValueError):
        og.select(jnp.array(True), {"a": jnp.ones(1)}, {"b": jnp.ones(1)})


# explain


def test_explain_names_step_reason_and_leaves():
    state = after(og.guard(SGD), GRADIENTS, with_nan(), GRADIENTS)
    assert og.explain(state, PARAMS).splitlines() == [
        "Step 1 was skipped: gradients were not finite (reason 1).",
        "  non-finite: dense/kernel (norm nan)",
        "  still finite: dense/bias (norm 0.707), scale (norm 0.5)",
        "  Skipped so far: 1 of 3 steps, 0 in a row.",
    ]


def test_explain_without_parameters_numbers_the_leaves():
    text = og.explain(after(og.guard(SGD), with_nan()))
    assert "  non-finite: leaf 1 (norm nan)" in text.splitlines()


def test_explain_says_that_nothing_happened():
    state = after(og.guard(SGD), GRADIENTS, GRADIENTS)
    assert og.explain(state, PARAMS) == "No step was skipped in 2 steps."


def test_explain_names_a_bad_loss():
    state = after(og.guard(SGD), GRADIENTS, value=jnp.nan)
    assert og.explain(state, PARAMS).startswith(
        "Step 0 was skipped: the loss value was not finite (reason 2).\n  still finite: dense/bias"
    )


def test_explain_joins_reasons():
    state = after(og.guard(SGD), with_nan(), value=jnp.inf)
    assert "gradients were not finite; the loss value was not finite (reason 3)" in og.explain(
        state, PARAMS
    )


def test_explain_names_a_condition():
    state = after(og.guard(SGD, skip_if=og.norm_above(1.0)), GRADIENTS)
    assert og.explain(state).startswith(
        "Step 0 was skipped: a skip_if condition rejected the step: norm_above (reason 8)."
    )


def test_explain_names_a_bad_proposal():
    tx = og.guard(optax.sgd(jnp.inf), check_update=True)
    assert (
        "the optimizer proposed a non-finite update or state from finite inputs (reason 4)"
        in og.explain(after(tx, GRADIENTS), PARAMS)
    )


def test_explain_names_parameters_that_were_bad_before():
    poisoned = PARAMS | {"scale": jnp.array(jnp.inf)}
    tx = og.guard(SGD)
    _, state = tx.update(with_nan(), tx.init(PARAMS), poisoned)
    lines = og.explain(state, poisoned).splitlines()
    assert lines[0] == (
        "Step 0 was skipped: gradients were not finite; parameters or optimizer state were "
        "already non-finite (reason 17)."
    )
    assert lines[3] == (
        "  non-finite before the step: scale. Restore a checkpoint from before that."
    )
    assert lines[-1] == "  The guard has given up: training cannot recover by itself."


def test_explain_gives_the_norm_of_finite_gradients_that_a_condition_rejected():
    huge = jax.tree.map(lambda leaf: leaf * 2e30, GRADIENTS)
    lines = og.explain(after(og.guard(SGD, skip_if=og.norm_above(1.0)), huge), PARAMS).splitlines()
    assert lines[2] == "  norm of all gradients: 3e+30"  # 1e30 * sqrt(9)


def test_explain_tells_of_overflows_under_a_loss_scale():
    tx = og.dynamic_loss_scale(og.backoff(og.guard(SGD)), initial_scale=64.0)
    overflow = "Gradients overflowed in 2 steps, 1 in a row; the loss scale is 16."
    text = og.explain(after(tx, with_nan(), GRADIENTS, with_nan()), PARAMS)
    assert text.splitlines()[-1] == overflow
    assert "overflow" not in og.explain(after(tx, GRADIENTS), PARAMS)
    alone = og.dynamic_loss_scale(SGD, initial_scale=64.0)
    assert og.explain(after(alone, with_nan(), GRADIENTS, with_nan())) == overflow
    assert og.explain(after(alone)) == "No gradient overflowed; the loss scale is 64."


def test_explain_counts_the_returns_to_a_snapshot():
    tx = og.rollback(og.guard(SGD), after_skips=2)
    text = og.explain(after(tx, *[with_nan()] * 4), PARAMS)
    assert text.splitlines()[-1] == "Returns to a snapshot so far: 2."
    assert "snapshot" not in og.explain(after(tx, with_nan()), PARAMS)


def test_explain_of_an_ensemble_is_an_error_with_a_remedy():
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), after(og.guard(SGD), with_nan()))
    with pytest.raises(
        ValueError, match=r"og\.explain reads the state of one model.*Pick a member"
    ):
        og.explain(states, PARAMS)


@pytest.mark.parametrize("function", [og.explain, og.check])
def test_inside_jit_the_error_names_the_remedy(function):
    state = after(og.guard(SGD))
    with pytest.raises(
        TypeError, match=r"runs on the host.*og\.metrics and og\.step_ok work inside"
    ):
        jax.jit(function)(state, PARAMS)


def test_explain_lists_no_more_than_eight_leaves():
    params = {f"layer{index:02}": jnp.ones(1) for index in range(11)}
    state = after(og.guard(SGD), jax.tree.map(lambda x: x * jnp.inf, params), params=params)
    line = og.explain(state, params).splitlines()[1]
    assert line.startswith("  non-finite: layer00 (norm inf), layer01")
    assert line.endswith("layer07 (norm inf) and 3 more")


def test_explain_describes_every_guard():
    text = og.explain(after(og.guard(optax.chain(og.guard(SGD))), with_nan()), PARAMS)
    assert text.count("Step 0 was skipped") == 1
    assert text.count("No step was skipped in 0 steps.") == 1  # the inner one did not move


def test_explain_lists_the_finite_leaves_next_to_the_faulty_ones():
    params = {f"layer{index:02}": jnp.ones(1) for index in range(40)}
    gradients = params | {"layer20": jnp.full(1, jnp.nan)}
    lines = og.explain(after(og.guard(SGD), gradients, params=params), params).splitlines()
    assert lines[1] == "  non-finite: layer20 (norm nan)"
    near = [f"layer{index} (norm 1)" for index in (16, 17, 18, 19, 21, 22, 23, 24)]
    assert lines[2] == f"  still finite: {', '.join(near)} and 31 more"


def test_explain_says_when_no_leaf_is_finite_any_more():
    state = after(og.guard(SGD), jax.tree.map(lambda leaf: leaf * jnp.nan, GRADIENTS))
    assert og.explain(state, PARAMS).splitlines()[2] == (
        "  No leaf is still finite: it came with the batch, the loss or the weights."
    )


MASK = {"dense": {"bias": False, "kernel": True}, "scale": True}
LABELS = {"dense": {"bias": "a", "kernel": "b"}, "scale": "a"}


def test_explain_names_leaves_behind_a_mask_where_moments_tell_them():
    state = after(optax.masked(og.guard(optax.adam(0.1)), MASK), with_nan())
    lines = og.explain(state, PARAMS).splitlines()
    assert lines[1:3] == [
        "  non-finite: dense/kernel (norm nan)",
        "  still finite: scale (norm 0.5)",
    ]


def test_explain_numbers_leaves_behind_a_mask_where_nothing_tells_them():
    state = after(optax.masked(og.guard(SGD), MASK), with_nan())
    text = og.explain(state, PARAMS)
    assert "  non-finite: leaf 0 (norm nan)\n  still finite: leaf 1 (norm 0.5)\n" in text
    assert "inside optax.masked or optax.partition and watches 2 of the leaves" in text
    assert "watches 2" not in og.explain(state)


def test_explain_and_check_name_the_leaves_of_each_partition():
    momentum = optax.sgd(0.1, momentum=0.9)
    strict = og.guard(momentum, max_consecutive_skips=1)
    state = after(optax.partition({"a": og.guard(momentum), "b": strict}, LABELS), with_nan())
    lines = og.explain(state, PARAMS).splitlines()
    assert lines[0] == "Guard a: No step was skipped in 1 steps."
    assert lines[1].startswith("Guard b: Step 0 was skipped: gradients were not finite")
    assert lines[2] == "  non-finite: dense/kernel (norm nan)"
    with pytest.raises(og.GuardGaveUp) as caught:
        og.check(state, PARAMS)
    assert caught.value.leaves == ("dense/kernel",)


def test_explain_calls_a_single_array_params():
    state = after(og.guard(SGD), jnp.array([jnp.nan]), params=jnp.ones(1))
    assert "non-finite: params (norm nan)" in og.explain(state, jnp.ones(1))


def test_explain_names_the_fast_parameters_of_lookahead():
    params = optax.LookaheadParams.init_synced(PARAMS)
    tx = og.guard(optax.lookahead(SGD, 2, 0.5))
    state = after(tx, with_nan(), params=params)
    assert "  non-finite: dense/kernel (norm nan)" in og.explain(state, params).splitlines()


def test_dictionary_keys_called_value_keep_their_name():
    params = {"attention": {"value": jnp.ones(2)}}
    state = after(og.guard(SGD), jax.tree.map(lambda x: x * jnp.nan, params), params=params)
    assert "non-finite: attention/value (norm nan)" in og.explain(state, params)


# check


def test_check_is_silent_until_the_guard_gives_up():
    tx = og.guard(SGD, max_consecutive_skips=2)
    og.check(after(tx), PARAMS)
    og.check(after(tx, GRADIENTS, with_nan()), PARAMS)
    og.check(after(tx, with_nan(), GRADIENTS, with_nan()), PARAMS)


def test_check_raises_with_step_reason_and_leaves():
    tx = og.guard(SGD, max_consecutive_skips=2)
    state = after(tx, GRADIENTS, with_nan(), with_nan())
    with pytest.raises(og.GuardGaveUp) as caught:
        og.check(state, PARAMS)
    assert isinstance(caught.value, RuntimeError)
    assert (caught.value.step, caught.value.reason) == (2, 1)
    assert caught.value.leaves == ("dense/kernel",)
    message = str(caught.value)
    assert message.startswith("The guard gave up. Step 2 was skipped: gradients were not finite")
    assert "dense/kernel (norm nan)" in message
    assert "Skipped so far: 2 of 3 steps, 2 in a row." in message


def test_check_goes_on_raising_after_a_healthy_step():
    tx = og.guard(SGD, max_consecutive_skips=1)
    with pytest.raises(og.GuardGaveUp) as caught:
        og.check(after(tx, with_nan(), GRADIENTS, GRADIENTS))
    assert caught.value.step == 0
    assert caught.value.leaves == ("leaf 1",)


def test_check_finds_the_guard_that_gave_up():
    healthy, broken = og.guard(SGD), og.guard(SGD, max_consecutive_skips=1)
    states = (after(healthy, GRADIENTS), after(broken, with_nan()))
    with pytest.raises(og.GuardGaveUp, match="dense/kernel"):
        og.check(states, PARAMS)


def test_check_finds_the_member_of_an_ensemble_that_gave_up():
    tx = og.guard(SGD, max_consecutive_skips=1)
    members = [after(tx, GRADIENTS), after(tx, GRADIENTS, with_nan()), after(tx, with_nan())]

    def stacked(*states):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    og.check(stacked(members[0], members[0]), PARAMS)
    with pytest.raises(
        og.GuardGaveUp, match=r"Member 1 of the ensemble \(2 of 3 gave up\): Step 1"
    ):
        og.check(stacked(*members), PARAMS)


def test_check_raises_even_if_the_parameters_do_not_fit():
    state = after(og.guard(SGD, max_consecutive_skips=1), with_nan())
    with pytest.raises(og.GuardGaveUp, match=r"leaf 1 \(norm nan\)"):
        og.check(state, {"other": jnp.ones(1)})


class Untouchable:
    """Stands for an array that must not be fetched."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a second value was fetched")

    __bool__ = __int__ = __float__ = __jax_array__ = __array__


def test_check_fetches_one_scalar_when_all_is_well():
    state = after(og.stabilize(optax.adam(0.1)), GRADIENTS)
    others = jax.tree.map(lambda leaf: Untouchable(), state)
    og.check(others._replace(integers=state.integers), PARAMS)
    with pytest.raises((AssertionError, TypeError)):
        og.check(others, PARAMS)


# Containers of models and optimizers


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear1 = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_bias=False, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 2, use_bias=False, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.blocks[0](self.norm(self.linear1(x)))


@pytest.fixture(scope="module")
def trained_nnx() -> Any:
    """Model and optimizer after a healthy step and a faulty one; what was read under jit."""
    model = Network(nnx.Rngs(0))
    tx = og.stabilize(optax.adam(0.1), clip=CLIP, max_consecutive_skips=1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        # A copy: the variables themselves are changed in place by the call of the model.
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
        loss, gradients = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, gradients, value=loss)
        ok = og.step_ok(optimizer)
        nnx.update(model, og.select(ok, nnx.state(model, nnx.BatchStat), before))
        return og.metrics(optimizer), ok

    healthy = step(model, optimizer, jnp.arange(6.0).reshape(2, 3))
    snapshot = jax.tree.map(jnp.copy, nnx.state(model))
    faulty = step(model, optimizer, jnp.full((2, 3), jnp.nan))
    return types.SimpleNamespace(
        model=model, optimizer=optimizer, healthy=healthy, faulty=faulty, snapshot=snapshot
    )


def test_nnx_metrics_are_read_under_jit_and_outside(trained_nnx):
    keys = {f"guard/{key}" for key in GUARD_KEYS | CLIP_KEYS}
    for metrics, ok, step in [(*trained_nnx.healthy, 1), (*trained_nnx.faulty, 2)]:
        assert set(metrics) == keys
        assert metrics["guard/guard_step"] == step
        assert bool(ok) == (step == 1)
    outside = og.metrics(trained_nnx.optimizer)
    assert set(outside) == keys
    assert all(type(value) is type(jnp.ones(())) for value in outside.values())
    assert all(value.shape == () for value in outside.values())
    assert outside["guard/guard_step"] == 2
    assert not bool(og.step_ok(trained_nnx.optimizer))
    assert not bool(og.step_ok(trained_nnx.optimizer.opt_state))


def test_nnx_parameters_and_statistics_survive_a_faulty_step(trained_nnx):
    assertions.assert_same_bits(nnx.state(trained_nnx.model), trained_nnx.snapshot)


NNX_NAMES = ("blocks/0/kernel", "linear1/bias", "linear1/kernel", "norm/scale")


def test_nnx_layers_are_named_as_in_the_model(trained_nnx):
    params = nnx.state(trained_nnx.model, nnx.Param)
    for opt_state in (trained_nnx.optimizer, trained_nnx.optimizer.opt_state):
        with pytest.raises(og.GuardGaveUp) as caught:
            og.check(opt_state, params)
        assert caught.value.leaves == NNX_NAMES
        assert (caught.value.step, caught.value.reason) == (1, 3)
        text = og.explain(opt_state, params)
        assert "non-finite: blocks/0/kernel (norm nan), linear1/bias (norm nan)" in text
        assert "/value" not in text


def test_nnx_model_instead_of_its_parameters_is_an_error_with_a_remedy(trained_nnx):
    with pytest.raises(ValueError, match=r"nnx\.state\(model, nnx\.Param\)\.$"):
        og.explain(trained_nnx.optimizer, trained_nnx.model)


def test_linen_train_state_is_read_as_it_is():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            boxed = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
            return nn.Dense(1)(nn.Dense(2, kernel_init=boxed)(x))

    model = Model()
    x = jnp.ones((2, 3))
    train_state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), x)["params"],
        tx=og.stabilize(optax.adam(0.1), clip=CLIP, max_consecutive_skips=1),
    )

    @jax.jit
    def step(train_state, x):
        loss = lambda params: jnp.mean(model.apply({"params": params}, x) ** 2)  # noqa: E731
        new = train_state.apply_gradients(grads=jax.grad(loss)(train_state.params))
        return new, og.metrics(new), og.step_ok(new)

    train_state, metrics, ok = step(train_state, x)
    assert bool(ok)
    assert metrics["guard/guard_step"] == 1
    og.check(train_state, train_state.params)
    train_state, metrics, ok = step(train_state, x * jnp.inf)
    assert not bool(ok)
    assert metrics["guard/guard_step"] == 2
    with pytest.raises(og.GuardGaveUp) as caught:
        og.check(train_state, train_state.params)
    assert caught.value.leaves == (
        "Dense_0/bias",
        "Dense_0/kernel",
        "Dense_1/bias",
        "Dense_1/kernel",
    )
    assert "Dense_0/kernel (norm nan)" in og.explain(train_state, train_state.params)


def test_equinox_modules_are_named_by_their_fields():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = og.guard(SGD)
    gradients = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    state = after(tx, gradients, params=params)
    text = og.explain(state, params)
    assert "non-finite: layers/0/weight (norm nan), layers/0/bias (norm nan)" in text


def test_equinox_metrics_are_read_from_a_module_that_holds_model_and_state():
    eqx = pytest.importorskip("equinox")
    tx = og.stabilize(optax.adam(0.1), clip=CLIP)

    class Training(eqx.Module):
        model: eqx.nn.MLP
        opt_state: Any

    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    training = Training(model, tx.init(eqx.filter(model, eqx.is_inexact_array)))

    @eqx.filter_jit
    def step(training, x):
        loss = lambda model: jnp.mean(model(x) ** 2)  # noqa: E731
        grads = eqx.filter_grad(loss)(training.model)
        params = eqx.filter(training.model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, training.opt_state, params)
        training = Training(eqx.apply_updates(training.model, updates), opt_state)
        return training, og.metrics(training)

    keys = {f"guard/{key}" for key in GUARD_KEYS | CLIP_KEYS}
    assert set(og.metrics(training)) == keys
    training, metrics = step(training, jnp.ones(2))
    assert set(metrics) == set(og.metrics(training)) == keys
    training, metrics = step(training, jnp.full(2, jnp.nan))
    assert metrics["guard/skipped_total"] == 1 and not bool(og.step_ok(training))


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in registry.ROWS])
def test_metrics_of_every_state_are_scalars_under_keys_that_never_change(row):
    def both(tx):
        def before_and_after(params, gradients):
            state = tx.init(params)
            return og.metrics(state), og.metrics(tx.update(gradients, state, params)[1])

        return jax.eval_shape(before_and_after, registry.tree(), registry.gradients(0))

    before, later = both(optax.chain(row.make(), row.make()))
    assert before and before == later  # keys, shapes and dtypes
    assert all(value.shape == () and not value.weak_type for value in before.values())
    assert len(before) == 2 * len(both(row.make())[0])  # no name twice
