"""notify: the host is called at a skip and at no other time, wherever the step runs."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optax_guard as og

PARAMS = {"layers": jnp.ones((3, 2)), "out": jnp.ones(8)}
BAD = PARAMS | {"layers": PARAMS["layers"].at[2, 0].set(jnp.nan)}


def listening(**options: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []

    def notify(step, reason, names):
        calls.append((step, reason, names))

    tx = og.guard(optax.sgd(0.1), notify=notify, **options)
    return tx, calls


def test_a_skip_calls_with_the_step_the_reason_and_the_layers():
    tx, calls = listening(stacked=lambda path, _: path == "layers")
    update = jax.jit(tx.update)
    _, state = update(PARAMS, tx.init(PARAMS))
    _, state = update(BAD, state)
    _, state = update(PARAMS, state)
    jax.effects_barrier()
    assert calls == [(1, og.SkipReason.GRADIENT, ("layers[2]",))]
    assert f"Step {calls[0][0]} was skipped" in og.explain(state, PARAMS)


def test_each_skip_in_a_scan_calls_once_in_order():
    tx, calls = listening()
    steps = jax.tree.map(lambda *leaves: jnp.stack(leaves), BAD, PARAMS, BAD, PARAMS)

    @jax.jit
    def run(gradients):
        return jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(PARAMS), gradients)[0]

    run(steps)
    jax.effects_barrier()
    assert sorted(call[0] for call in calls) == [0, 2]


def test_of_an_ensemble_only_members_that_skip_call():
    tx, calls = listening()
    members = jax.tree.map(lambda *leaves: jnp.stack(leaves), PARAMS, BAD, PARAMS)
    state = jax.vmap(tx.init)(members)
    jax.jit(jax.vmap(tx.update))(members, state)
    jax.effects_barrier()
    assert calls == [(0, og.SkipReason.GRADIENT, ("layers",))]


def test_of_many_devices_one_calls():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"layers": P(), "out": P("x")}
    bad = PARAMS | {"out": PARAMS["out"].at[5].set(jnp.inf)}
    for options in ({}, {"axis_name": "x"}):
        tx, calls = listening(**options)

        def step(gradients, tx=tx):
            return tx.update(gradients, tx.init(gradients))[1].skipped_total

        if options:
            step = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=P())
        sharding = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
        assert int(jax.jit(step)(jax.device_put(bad, sharding))) == 1
        jax.effects_barrier()
        assert calls == [(0, og.SkipReason.GRADIENT, ("out",))]


def test_gradients_may_be_averaged_where_some_axes_are_left_to_jit():
    """Where JAX has no call that returns something."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tx, calls = listening()

    def step(gradients):
        gradients = jax.lax.pmean(gradients, "x")
        return tx.update(gradients, tx.init(gradients))[1].skipped_total

    specs = {"layers": P(), "out": P("x")}
    step = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=P(), axis_names={"x"})
    assert int(jax.jit(step)(BAD)) == 1
    jax.effects_barrier()
    assert set(calls) == {(0, og.SkipReason.GRADIENT, ("layers",))}


def test_a_call_keeps_steps_on_the_fast_way_into_compiled_functions():
    """JAX leaves it for programs with effects."""
    tx, _ = listening()
    assert not jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS)).effects


def test_it_calls_once_whatever_is_kept_of_a_step_and_however_often_that_is_traced():
    tx, calls = listening()
    jax.jit(lambda bad: tx.update(bad, tx.init(bad))[1].guard_step)(BAD)
    jax.effects_barrier()
    assert len(calls) == 1
    tx = og.rollback(og.backoff(tx))  # which traces it twice
    jax.jit(tx.update)(BAD, tx.init(PARAMS), PARAMS)
    jax.effects_barrier()
    assert len(calls) == 2


@pytest.mark.parametrize("axis_name", [None, "x"])
def test_a_clip_that_probes_the_guard_inside_calls_nobody(axis_name):
    options = {"axis_name": axis_name}
    tx, calls = listening(skip_if=og.norm_above(20.0), **options)
    tx = og.clip_by_update_ratio(tx, **options)  # probes with 1000 times the gradient

    def step(gradients):
        _, state = tx.update(gradients, tx.init(gradients), gradients)
        return state.response, state.linearity

    if axis_name:
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        step = jax.shard_map(step, mesh=mesh, in_specs=(P("x"),), out_specs=P())
    response, linearity = jax.jit(step)({"w": jnp.ones((8, 4))})
    jax.effects_barrier()
    assert calls == []
    np.testing.assert_allclose(response, 0.1, rtol=1e-5)
    assert linearity == 1  # so long a gradient was skipped, which is no answer


@pytest.mark.parametrize("gradients", [PARAMS, BAD])
def test_derivatives_are_those_without_it(gradients):
    def total(size, tx):
        moved = jax.tree.map(lambda leaf: leaf + size, gradients)
        updates, state = tx.update(moved, tx.init(PARAMS))
        return optax.tree.sum(updates), state

    tx, calls = listening()
    for derivative in (jax.grad, jax.jacfwd):
        found, state = derivative(total, has_aux=True)(2.0, tx)
        assert found == derivative(total, has_aux=True)(2.0, og.guard(optax.sgd(0.1)))[0]
        jax.effects_barrier()
        assert len(calls) == int(state.skipped_total)
        calls.clear()


def test_a_trainer_that_hides_its_state_is_told():
    """As NumPyro, Flowjax and others: the loop and the state are the trainer's own."""

    def trainer(tx, params, losses):
        @jax.jit
        def run(params, losses):
            def body(carry, loss):
                params, state = carry
                gradients = jax.tree.map(lambda leaf: leaf * loss, params)
                updates, state = tx.update(gradients, state, params)
                return (optax.apply_updates(params, updates), state), loss

            (params, _), losses = jax.lax.scan(body, (params, tx.init(params)), losses)
            return params, losses

        return run(params, losses)

    tx, calls = listening()
    params, _ = trainer(tx, PARAMS, jnp.array([0.1, math.nan, 0.1]))
    jax.effects_barrier()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert calls == [(1, og.SkipReason.GRADIENT, ("layers", "out"))]


def test_layers_go_by_the_names_that_explain_gives_them():
    linen = pytest.importorskip("flax.linen")
    boxed = {"layers": linen.Partitioned(PARAMS["layers"], ("model", None)), "out": PARAMS["out"]}
    for params in (boxed, PARAMS["layers"]):
        tx, calls = listening()
        bad = jax.tree.map(lambda leaf: jnp.nan * leaf, params)
        _, state = jax.jit(tx.update)(bad, tx.init(params), params)
        jax.effects_barrier()
        assert set(calls[0][2]) == set(og.layer_norms(state, params))


def test_a_listener_keeps_what_its_closure_holds():
    """Optimistix makes pytrees of closures, copying the lists, but not the objects, in them."""
    eqxi = pytest.importorskip("equinox.internal")
    tx, calls = listening()
    tx = eqxi.closure_to_pytree(tx)
    jax.jit(lambda bad: tx.update(bad, tx.init(bad)))(BAD)
    jax.effects_barrier()
    assert len(calls) == 1
