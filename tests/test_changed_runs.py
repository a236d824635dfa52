"""Runs that go on with another transformation: what ``adopt`` carries, what it names, and what
``update`` says of a state that it did not make.
"""

from __future__ import annotations

import functools
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og

PARAMS = {"b": jnp.ones(2), "w": jnp.ones((3, 2))}
GRADS = jax.tree.map(lambda leaf: 0.1 * leaf, PARAMS)
LABELS = {"b": "y", "w": "x"}


def groups(first="x", second="y", wrap=lambda tx: tx):
    labels = {"b": second, "w": first}
    momentum = wrap(optax.sgd(0.1, momentum=0.9))
    return optax.partition({first: wrap(optax.adam(0.1)), second: momentum}, labels)


ADAM = optax.adam(0.1)
TRANSFORMATIONS = {
    "adam": ADAM,
    "adam, schedule": optax.adam(optax.constant_schedule(0.1)),
    "injected": optax.inject_hyperparams(optax.adam)(0.1),
    "sgd": optax.sgd(0.1),
    "groups": groups(),
    "windows": optax.MultiSteps(ADAM, 2),
    "guard": og.guard(ADAM),
    "guard, schedule": og.guard(optax.adam(optax.constant_schedule(0.1))),
    "guard, sgd": og.guard(optax.sgd(0.1)),
    "guard, lion": og.guard(optax.lion(0.1)),
    "guard, amsgrad": og.guard(optax.amsgrad(0.1)),
    "guard, injected": og.guard(optax.inject_hyperparams(optax.adam)(0.1)),
    "guard, norm": og.guard(optax.chain(og.clip_by_norm(1.0), ADAM)),
    "guard, zscore": og.guard(optax.chain(og.clip_by_zscore(), ADAM)),
    "guard, norm of Optax": og.guard(optax.chain(optax.clip_by_global_norm(1.0), ADAM)),
    "guard, decay": og.guard(optax.chain(optax.add_decayed_weights(0.1), ADAM)),
    "guard, named": og.guard(optax.named_chain(("clip", og.clip_by_norm(1.0)), ("adam", ADAM))),
    "guard, spike": og.guard(ADAM, skip_if=og.spike()),
    "guard, short spike": og.guard(ADAM, skip_if=og.spike(window=8)),
    "guard, two conditions": og.guard(ADAM, skip_if=(og.norm_above(9.0), og.spike())),
    "guard, groups": og.guard(groups()),
    "guard, renamed groups": og.guard(groups("p", "q")),
    "guard, names swapped": og.guard(groups("y", "x")),
    "guard, groups swapped": og.guard(
        optax.partition({"x": ADAM, "y": optax.sgd(0.1, momentum=0.9)}, {"b": "x", "w": "y"})
    ),
    "guard, windows": og.guard(optax.MultiSteps(ADAM, 2)),
    "stabilize": og.stabilize(ADAM),
    "short update ratio": og.guard(og.clip_by_update_ratio(ADAM, warmup_steps=7)),
    "rollback": og.rollback(og.guard(ADAM)),
    "backoff": og.backoff(og.guard(ADAM)),
    "backoff, sgd": og.backoff(og.guard(optax.sgd(0.1))),
    "loss scale": og.dynamic_loss_scale(og.guard(ADAM)),
    "loss scale, bare": og.dynamic_loss_scale(ADAM),
    "windows, guard": optax.MultiSteps(og.guard(ADAM), 2),
    "windows, skip": optax.MultiSteps(og.guard(ADAM), 2, should_skip_update_fn=og.skip_microbatch),
    "windows, skip of Optax": optax.MultiSteps(
        og.guard(ADAM), 2, should_skip_update_fn=optax.skip_not_finite
    ),
    "groups, guards": groups(wrap=og.guard),
    "norm": og.clip_by_norm(1.0),
    "zscore": og.clip_by_zscore(),
    "zscore by leaf": og.clip_by_zscore(scope="leaf"),
    "percentile": og.clip_by_percentile(window=8),
    "short median": og.clip_by_median(warmup_steps=3),
    "median": og.clip_by_median(warmup_steps=4),
    "max_ema": og.clip_by_max_ema(),
    "zero_nonfinite": og.zero_nonfinite(),
    "l1": og.add_l1(0.1),
}
OURS = [
    name
    for name in TRANSFORMATIONS
    if not name.startswith(("adam", "injected", "sgd", "groups", "windows"))
]


@functools.cache
def shapes(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jax.eval_shape(TRANSFORMATIONS[name].init, PARAMS)


def signature(state):
    leaves = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    return jax.tree.structure(state), leaves


@pytest.mark.parametrize("name", OURS)
def test_every_state_of_another_transformation_is_called_that(name):
    tx = TRANSFORMATIONS[name]
    others = [
        other for other in TRANSFORMATIONS if signature(shapes(other)) != signature(shapes(name))
    ]
    assert len(others) >= len(TRANSFORMATIONS) - 5
    for other in others:
        message = "This state is of another transformation|was made for other arrays"
        with pytest.raises((TypeError, ValueError), match=message):
            jax.eval_shape(tx.update, GRADS, shapes(other), PARAMS)


def test_the_first_states_that_differ_are_named_also_where_nobody_called_init():
    tx = og.guard(optax.chain(og.clip_by_zscore(), optax.sgd(0.1)))
    state = og.guard(optax.chain(og.clip_by_norm(1.0), optax.sgd(0.1))).init(PARAMS)
    text = "guard holds ClipByNormState where its own has ClipByZscoreState"
    with pytest.raises(ValueError, match=text):
        tx.update(GRADS, state, PARAMS)
    with pytest.raises(ValueError, match=text):
        tx.update(GRADS, state)


def test_a_state_of_other_parameters_is_called_that():
    state = jax.eval_shape(og.guard(ADAM).init, {**PARAMS, "w": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match=r"given one with \(4, 2\) at 'inner_state/0/mu/w'"):
        jax.eval_shape(og.guard(ADAM).update, GRADS, state, PARAMS)


# What is carried


def train(tx):
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(2):
        _, state = step(GRADS, state, PARAMS)
    return state


def as_restored(tree):
    """What Orbax gives without a target."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {name: as_restored(part) for name, part in zip(tree._fields, tree, strict=True)}
    if isinstance(tree, (tuple, list)):
        return [as_restored(part) for part in tree]
    if isinstance(tree, dict):
        return {name: as_restored(part) for name, part in tree.items()}
    return np.asarray(tree)


def moments(state):
    return {str(path): leaf for path, leaf in optax.tree.get_all_with_path(state, "mu")}


CARRIED = [
    ("adam", "guard"),
    ("guard", "adam"),
    ("adam", "stabilize"),
    ("stabilize", "guard, zscore"),
    ("guard, norm of Optax", "guard, norm"),
    ("guard, norm", "guard, named"),
    ("guard, two conditions", "guard, short spike"),
    ("adam", "guard, injected"),
    ("guard", "loss scale"),
    ("backoff", "rollback"),
    ("adam", "windows, skip"),
    ("windows", "guard, windows"),
    ("windows, skip", "windows, guard"),
    ("windows, skip of Optax", "windows, skip"),
    ("groups", "guard, groups"),
    ("guard, groups", "groups, guards"),
    ("guard, groups", "guard, renamed groups"),
    ("guard, groups", "guard, names swapped"),
    ("guard", "guard, schedule"),
    ("guard", "guard, decay"),
]


@pytest.mark.parametrize("form", ["typed", "restored"])
@pytest.mark.parametrize(("before", "after"), CARRIED)
def test_a_run_goes_on_after_the_change(before, after, form):
    tx, old = TRANSFORMATIONS[after], _trained(before)
    state = og.adopt(tx.init(PARAMS), old if form == "typed" else as_restored(old))
    assert signature(state) == signature(shapes(after))
    (new_mu, *_), (old_mu, *_) = moments(state).values(), moments(old).values()
    np.testing.assert_array_equal(new_mu["w"], old_mu["w"])
    assert np.any(np.asarray(new_mu["w"]))
    jax.eval_shape(tx.update, GRADS, state, PARAMS)


@functools.cache
def _trained(name):
    return train(TRANSFORMATIONS[name])


REFUSED = {
    ("adam", "guard, sgd"): "ScaleByAdamState at 0 with count (), mu/b (2,)",
    ("guard", "guard, lion"): "ScaleByAdamState at inner_state/0",
    ("guard", "guard, amsgrad"): "ScaleByAdamState at inner_state/0",
    ("windows", "adam"): "MultiStepsState with mini_step ()",
    ("guard, schedule", "guard"): "ScaleByScheduleState at inner_state/1 with count ()",
    ("guard, groups", "guard, groups swapped"): "TraceState at inner_state/inner_states/y",
}


@pytest.mark.parametrize(("before", "after"), REFUSED)
def test_what_has_no_place_is_named(before, after):
    with pytest.raises(ValueError, match=re.escape(REFUSED[before, after])):
        og.adopt(TRANSFORMATIONS[after].init(PARAMS), _trained(before))


def test_an_array_of_another_shape_is_named():
    new = og.guard(ADAM).init({**PARAMS, "c": jnp.ones(3)})  # a layer added
    with pytest.raises(ValueError, match=re.escape("ScaleByAdamState at inner_state/0")):
        og.adopt(new, _trained("guard"))


class TinyState(NamedTuple):
    """Parameters whose container is named as states are."""

    w: jax.Array


def test_one_transformation_serves_models_of_unlike_containers():
    tx = og.guard(optax.adam(0.1))
    first, second = TinyState(jnp.ones(2)), {"w": jnp.ones(3)}
    state = tx.init(first)
    tx.init(second)  # the last init is not the only one
    updates, state = tx.update(first, state, first)
    assert isinstance(updates, TinyState)
    assert int(state.skipped_total) == 0


def test_a_run_comes_over_from_the_guard_of_optax():
    theirs = optax.apply_if_finite(ADAM, 5)
    _, old = theirs.update(GRADS, theirs.init(PARAMS), PARAMS)
    new = og.guard(ADAM).init(PARAMS)
    with pytest.raises(ValueError, match=re.escape("such as old_state.inner_state.")):
        og.adopt(new, old)
    carried = og.adopt(new, old.inner_state)
    np.testing.assert_array_equal(
        optax.tree.get(carried, "mu")["w"], optax.tree.get(old, "mu")["w"]
    )
