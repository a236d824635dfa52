"""Public functions called in the ways that people call them wrongly: each error says what to write.

What is legal and futile is a warning when the state is made, and never again.
"""

from __future__ import annotations

import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import optax_guard as og

PARAMS = {"b": jnp.ones(2), "w": jnp.ones((3, 2))}
GRADS = jax.tree.map(lambda leaf: 0.1 * leaf, PARAMS)
LOSS = jnp.float32(1.0)
ADAM = optax.adam(0.1)
GUARD = og.guard(ADAM)
STATE = GUARD.init(PARAMS)
CLIP = og.clip_by_norm(1.0)


def refused(call, message):
    """Raises ``TypeError`` or ``ValueError`` with this text in it."""
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


# init

NOT_PARAMETERS = {
    "its own state": (STATE, "got a GuardState, an optimizer state"),
    "the state of a chain": (ADAM.init(PARAMS), "got a tuple, an optimizer state"),
    "the transformation": (ADAM, "the transformation. Call init(params)."),
    "a Linen module": (linen.Dense(2), 'got a Dense. With Flax Linen pass variables["params"]'),
    "a function": (jnp.sin, "with Equinox eqx.filter(model, eqx.is_inexact_array)"),
    "text": ("params", "got a str."),
    "a train state": (
        TrainState.create(apply_fn=None, params=PARAMS, tx=ADAM),
        "got a TrainState, which holds an optimizer state; pass its params",
    ),
}


@pytest.mark.parametrize("tx", [GUARD, CLIP], ids=["guard", "clip_by_norm"])
@pytest.mark.parametrize("what", NOT_PARAMETERS)
def test_init_takes_parameters_only(tx, what):
    params, message = NOT_PARAMETERS[what]
    refused(lambda: tx.init(params), message)


def test_a_leaf_that_is_no_array_is_named_where_the_optimizer_cannot_take_it():
    model = {"dense": PARAMS, "activation": jnp.tanh}
    refused(lambda: GUARD.init(model), "'activation' is of type")
    CLIP.init(model)  # it does not look at it


def test_parameters_may_be_python_numbers():
    state = GUARD.init([1.0, 2.0])
    updates, state = GUARD.update([0.5, 0.5], state, [1.0, 2.0])
    assert float(updates[0]) == pytest.approx(-0.1, rel=1e-4)
    assert int(state.skipped_total) == 0


# update

CALLS = {
    "state and params swapped": (
        lambda: GUARD.update(GRADS, PARAMS, STATE),
        "guard was given its state third, where the parameters belong",
    ),
    "state first": (lambda: GUARD.update(STATE, GRADS, PARAMS), "its state first and the gradient"),
    "no state": (lambda: GUARD.update(GRADS, PARAMS), "was given a dict where its own GuardState"),
    "what update returned": (
        lambda: GUARD.update(GRADS, GUARD.update(GRADS, STATE, PARAMS), PARAMS),
        "was given a tuple that has it at [1] where its own GuardState belongs",
    ),
    "fields of a state": (
        lambda: GUARD.update(GRADS, STATE._asdict(), PARAMS),
        "a dict of its fields, as a checkpoint is restored without a target, where its own",
    ),
    "the transformation for its state": (
        lambda: GUARD.update(GRADS, GUARD, PARAMS),
        "was given a GradientTransformationExtraArgs, a transformation where its own",
    ),
    "the state for params": (
        lambda: GUARD.update(GRADS, STATE, STATE),
        "guard was given as params a GuardState, an optimizer state",
    ),
    "a module for params": (
        lambda: GUARD.update(GRADS, STATE, linen.Dense(2)),
        "guard was given as params a Dense",
    ),
    "the loss for params": (
        lambda: GUARD.update(GRADS, STATE, LOSS),
        "The loss goes by name: update(grads, state, params, value=loss)",
    ),
    "the loss fourth": (
        lambda: GUARD.update(GRADS, STATE, PARAMS, LOSS),
        "and all else by name; got 1 more. Call update(grads, state, params, value=loss)",
    ),
    "no gradients": (
        lambda: GUARD.update(None, STATE, PARAMS),
        "guard was given None where the gradients belong",
    ),
    "loss and gradients": (
        lambda: GUARD.update((LOSS, GRADS), STATE, PARAMS),
        "loss, grads = jax.value_and_grad(loss_fn)(params)",
    ),
    "loss and gradients to a clip": (
        lambda: CLIP.update((LOSS, GRADS), CLIP.init(PARAMS), PARAMS),
        "clip_by_norm was given (loss, gradients) where the gradients belong",
    ),
    "gradients of another model": (
        lambda: GUARD.update({"w": GRADS["w"]}, STATE, PARAMS),
        "This state of guard was made for 2 norms, these gradients have 1 (w). Call init()",
    ),
    "gradients of other shapes": (
        lambda: GUARD.update({**GRADS, "w": jnp.ones((2, 2))}, STATE, PARAMS),
        "'w' of the shape (2, 2) has the shape (3, 2) in params",
    ),
    "an axis that is bound nowhere": (
        lambda: (
            og.guard(ADAM, axis_name="data").init(PARAMS)
            and og.guard(ADAM, axis_name="data").update(GRADS, STATE, PARAMS)
        ),
        "axis_name='data' is for update() inside of jax.shard_map or jax.pmap",
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_update_says_what_was_given_where(what):
    call, message = CALLS[what]
    with pytest.raises((TypeError, ValueError, NameError), match=re.escape(message)):
        call()


def test_params_of_one_number_belong_to_gradients_of_one_number():
    tx = og.guard(optax.sgd(1.0))
    state = tx.init(jnp.float32(3.0))
    assert float(tx.update(jnp.float32(0.5), state, jnp.float32(3.0))[0]) == -0.5
    pair = (jnp.float32(1.0), GRADS)  # a pair of parameters, and no loss
    assert float(tx.update(pair, tx.init(pair), pair)[0][0]) == -1.0


# Arguments of factories

FACTORIES = {
    "several": (lambda: og.guard([CLIP, ADAM]), "Write optax.chain(...) around several."),
    "parameters": (lambda: og.guard(PARAMS), "got arrays in a dict. Parameters go to init(params)"),
    "a limit for a clip": (
        lambda: og.stabilize(ADAM, clip=1.0),
        "Write clip=og.clip_by_norm(1.0).",
    ),
    "condition as text": (lambda: og.guard(ADAM, skip_if="spike"), "Write og.spike(...)."),
    "condition not called": (
        lambda: og.guard(ADAM, skip_if=(og.norm_above(3.0), og.spike)),
        "Call it first: og.spike(...).",
    ),
    "condition as a number": (lambda: og.guard(ADAM, skip_if=10.0), "Write og.norm_above(10.0)."),
    "no condition": (lambda: og.guard(ADAM, skip_if=None), "Leave it out for no condition."),
    "condition as a function": (
        lambda: og.guard(ADAM, skip_if=lambda norm: norm > 1),
        "For a rule of your own write og.Condition(name, init, judge).",
    ),
    "condition of MultiSteps": (
        lambda: og.guard(ADAM, skip_if=og.skip_microbatch),
        "That one is for optax.MultiSteps(..., should_skip_update_fn=...).",
    ),
    "a clip for a condition": (
        lambda: og.guard(ADAM, skip_if=CLIP),
        "A transformation goes inside: og.guard(optax.chain(clip, optimizer)).",
    ),
    "condition without init": (
        lambda: og.guard(ADAM, skip_if=og.Condition("mine", 3, max)),
        "init of an og.Condition must be a callable () -> state, got 3",
    ),
    "name of a condition": (
        lambda: og.guard(ADAM, skip_if=og.Condition(tuple, max, max)),
        "name of an og.Condition must be text",
    ),
    "rule without limit": (
        lambda: og.limit_norms(og.Rule(3), name="mine"),
        "rule.limit must be a callable (norms, history, context) -> (limits, history)",
    ),
    "schedule of two": (
        lambda: og.clip_by_norm(lambda step, rate: 1.0),
        "The schedule max_norm must take the step count and nothing else",
    ),
    "mask": (lambda: og.add_l1(0.1, mask=3), "mask must be a pytree of bools"),
    "size as a schedule": (
        lambda: og.clip_by_percentile(window=optax.constant_schedule(8)),
        "It is fixed when the transformation is built.",
    ),
    "path of a history": (lambda: og.History(PARAMS), "og.History(path, params=params)"),
}


@pytest.mark.parametrize("what", FACTORIES)
def test_factories_say_what_to_write(what):
    refused(*FACTORIES[what])


def test_an_error_shows_no_pages_of_numbers():
    with pytest.raises(TypeError) as caught:
        og.guard([CLIP] * 50)
    assert len(str(caught.value)) < 400


SCHEDULES = {
    "text": (lambda step: "one", "returned 'one' of type str"),
    "a vector": (lambda step: jnp.ones(2), "returned an array of shape (2,)"),
    "a factory": (optax.constant_schedule, "Call the factory of the schedule first."),
}


@pytest.mark.parametrize("what", SCHEDULES)
def test_what_a_schedule_returns_is_looked_at_when_it_is_traced(what):
    schedule, message = SCHEDULES[what]
    tx = og.clip_by_norm(schedule)
    refused(lambda: jax.eval_shape(tx.update, GRADS, tx.init(PARAMS)), message)


@pytest.mark.parametrize(
    ("judge", "what"),
    [
        (lambda norm, value, state: norm > 1, "Without a state, return skip, state."),
        (lambda norm, value, state: (norm, state), "skip a bool scalar; got float32()"),
        (lambda norm, value, state: (norm > jnp.ones(2), state), "got bool(2,)"),
    ],
    ids=["no pair", "a number", "a vector"],
)
def test_what_a_condition_says_is_looked_at_when_it_is_traced(judge, what):
    tx = og.guard(optax.sgd(0.1), skip_if=og.Condition("mine", tuple, judge))
    refused(lambda: jax.eval_shape(tx.update, GRADS, tx.init(PARAMS)), what)


def test_what_a_rule_returns_is_looked_at_when_it_is_traced():
    tx = og.limit_norms(og.Rule(lambda norms, history, context: norms), name="mine")
    message = "limit of an og.Rule must return (limits, new history)"
    refused(lambda: jax.eval_shape(tx.update, GRADS, tx.init(PARAMS)), message)


# Legal and futile


def warned(call):
    """The texts of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


ZERO = {
    "clip_by_norm": lambda value: og.clip_by_norm(value),
    "clip_by_rms": lambda value: og.clip_by_rms(value),
    "clip_by_median": lambda value: og.clip_by_median(value),
    "clip_by_ema": lambda value: og.clip_by_ema(value),
    "clip_by_param_norm": lambda value: og.clip_by_param_norm(value),
    "clip_by_zscore": lambda value: og.clip_by_zscore(max_norm=value),
    "norm_above": lambda value: og.norm_above(value),
}


@pytest.mark.parametrize("name", ZERO)
def test_a_threshold_of_zero_is_not_taken_for_none_in_silence(name):
    (text,) = warned(lambda: ZERO[name](0))
    assert "=0 " in text and "leave it out" in text
    assert not warned(lambda: ZERO[name](1.0))
    assert not warned(lambda: ZERO[name](jnp.zeros(())))  # built anew at every step, maybe


FUTILE = {
    "guard of a clip": (optax.chain(og.guard(CLIP), ADAM), "This guard holds clips only"),
    "guard of a clip of Optax": (
        optax.chain(og.guard(optax.clip_by_global_norm(1.0)), ADAM),
        "This guard holds clips only",
    ),
    "clip behind the optimizer": (
        og.guard(optax.chain(ADAM, CLIP)),
        "clip_by_norm stands behind the learning rate",
    ),
    "clip behind a schedule": (
        og.guard(optax.chain(optax.adam(optax.constant_schedule(0.1)), og.clip_by_zscore())),
        "clip_by_zscore stands behind the learning rate",
    ),
    "clip behind the optimizer, stabilized": (
        og.stabilize(optax.chain(optax.sgd(0.1), og.clip_by_ema())),
        "clip_by_ema stands behind the learning rate",
    ),
    "guard in guard": (og.guard(og.guard(ADAM)), "A guard around a guard"),
    "stabilize in guard": (og.guard(og.stabilize(ADAM)), "A guard around a guard"),
    "guard in stabilize": (og.stabilize(og.guard(ADAM)), "A guard around a guard"),
    "apply_if_finite in guard": (og.guard(optax.apply_if_finite(ADAM, 5)), "Leave it out."),
    "zero_nans in guard": (og.guard(optax.chain(optax.zero_nans(), ADAM)), "optax.zero_nans as"),
    "zero_nonfinite in guard": (og.guard(optax.chain(og.zero_nonfinite(), ADAM)), "zero_nonfinite"),
    "no such stack": (og.guard(ADAM, stacked=lambda path, leaf: False), "stacked returned False"),
}


@pytest.mark.parametrize("what", FUTILE)
def test_what_is_futile_is_said_once_when_the_state_is_made(what):
    tx, message = FUTILE[what]
    texts = warned(lambda: tx.init(PARAMS))
    assert len(texts) == 1 and message in texts[0]
    state = jax.eval_shape(lambda: STATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = jax.eval_shape(tx.init, PARAMS)
    assert not warned(lambda: jax.eval_shape(tx.update, GRADS, state, PARAMS))


LEGAL = {
    "clip in front": og.guard(optax.chain(CLIP, ADAM)),
    "clip of updates in front of the rate": og.guard(
        optax.chain(optax.scale_by_adam(), CLIP, optax.scale_by_learning_rate(0.1))
    ),
    "a bound on steps": og.guard(optax.chain(ADAM, og.clip_by_relative_change())),
    "scaled down in front": og.guard(optax.chain(optax.scale(0.5), CLIP, ADAM)),
    "constraints behind": og.guard(optax.chain(ADAM, og.clip_params(-1.0, 1.0))),
    "plain sgd": og.guard(optax.sgd(0.1)),
    "to measure only": og.guard(optax.identity()),
    "guards of groups": optax.partition(
        {"a": og.guard(ADAM), "b": og.guard(optax.sgd(0.1))}, {"b": "a", "w": "b"}
    ),
    "guard of groups with guards": og.guard(
        optax.partition({"a": og.guard(ADAM), "b": optax.sgd(0.1)}, {"b": "a", "w": "b"})
    ),
    "a stack in one of two groups": optax.partition(
        {name: og.guard(ADAM, stacked=lambda path, leaf: leaf.ndim > 1) for name in "ab"},
        {"b": "a", "w": "b"},
    ),
}


@pytest.mark.parametrize("what", LEGAL)
def test_what_is_of_use_is_not_warned_of(what):
    assert not warned(lambda: jax.eval_shape(LEGAL[what].init, PARAMS))


# Readers

READERS = {
    "check": og.check,
    "metrics": og.metrics,
    "step_ok": og.step_ok,
    "explain": lambda state: og.explain(state, PARAMS),
    "diagnose": lambda state: og.diagnose(state, PARAMS),
    "layer_norms": lambda state: og.layer_norms(state, PARAMS),
    "unwrap": og.unwrap,
    "History.append": lambda state: og.History().append(0, state),
    "adopt": lambda state: og.adopt(STATE, state),
}


@pytest.mark.parametrize("name", READERS)
def test_a_transformation_is_not_its_state(name):
    refused(lambda: READERS[name](GUARD), "transformation" if name != "adopt" else "old_state must")


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("unwrap", "diagnose")])
def test_parameters_are_no_state(name):
    message = "found no place" if name == "adopt" else "in the given dict. Wrap the optimizer in"
    refused(lambda: READERS[name](PARAMS), message)


OTHER_READERS = {
    "verdict last": (
        lambda: og.select(PARAMS, GRADS, jnp.array(True)),
        "ok must be a bool array, but is a dict. Call og.select(ok, new, old)",
    ),
    "state for a verdict": (
        lambda: og.select(STATE, PARAMS, GRADS),
        "which og.step_ok gives for it, but is a GuardState",
    ),
    "loss for a verdict": (lambda: og.select(LOSS, PARAMS, GRADS), "is an array of float32"),
    "no old state": (lambda: og.adopt(STATE, None), "old_state must be an optimizer state"),
    "loss and aux": (
        lambda: og.scale_loss((1.0, {}), og.dynamic_loss_scale(ADAM).init(PARAMS)),
        "return og.scale_loss(loss, opt_state), aux",
    ),
    "prefix": (lambda: og.metrics(STATE, prefix=3), "prefix must be text"),
    "state first": (
        lambda: og.History().append(STATE, 3),
        "The state comes second: history.append(step, opt_state, loss=loss).",
    ),
}


@pytest.mark.parametrize("what", OTHER_READERS)
def test_readers_say_what_to_write(what):
    refused(*OTHER_READERS[what])


def test_the_verdict_may_be_an_integer_or_a_python_bool():
    for ok in (True, jnp.int32(1), jnp.array(True)):
        assert og.select(ok, 2.0, 1.0) == 2.0


def test_nnx_modules_are_told_from_their_parameters():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    state = GUARD.init(nnx.state(model, nnx.Param))
    assert state.leaf_norms.shape == (2,)


# Floats of 8 bits, which JAX promotes to nothing by itself


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=["e4m3", "e5m2"])
def test_gradients_of_8_bits_are_measured_in_float32_and_stay_of_8_bits(dtype):
    tx = og.guard(optax.chain(og.clip_by_norm(0.5), optax.sgd(1.0)))
    gradients = {"w": jnp.full((4, 4), 2.0, dtype)}
    updates, state = jax.jit(tx.update)(gradients, tx.init(gradients), gradients)
    assert updates["w"].dtype == dtype
    assert state.grad_norm == 8.0
    assert jnp.all(updates["w"].astype(jnp.float32) == -0.125)
