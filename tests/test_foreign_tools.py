"""States in the hands of other tools: checkpointers, copies, mappings, Flax NNX, Equinox, ``vmap``.

A state that kept its types goes on bit for bit, and is read like any other. One that lost them, as
checkpoints restored without a target have, is refused in words that say what to write.
"""

from __future__ import annotations

import copy
import functools
import io
import re
from typing import Any

import assertions
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import optax_guard as og

PARAMS = {"bias": jnp.linspace(-1.0, 1.0, 4), "kernel": jnp.ones((4, 3))}
NUM_STEPS, BAD = 4, 2
ADAM = optax.adam(0.1)


injected = optax.inject_hyperparams
SKIP_IF = (og.norm_above(1e6), og.spike(window=4))
TRANSFORMATIONS = {
    "stacked": og.guard(ADAM, stacked=lambda path, leaf: leaf.ndim == 2),
    "by unit": og.guard(optax.chain(og.clip_by_zscore(scope="unit", warmup_steps=2), ADAM)),
    "loss scale": og.dynamic_loss_scale(og.guard(ADAM), initial_scale=1.0),
    "rollback": og.rollback(og.backoff(og.guard(ADAM, skip_if=SKIP_IF)), every=2, after_skips=2),
    "windows": optax.MultiSteps(og.guard(ADAM), 2, should_skip_update_fn=og.skip_microbatch),
    "injected around": injected(lambda rate: og.guard(optax.adam(rate)))(rate=0.1),
    "injected inside": og.guard(injected(optax.adam)(learning_rate=0.1)),
}
each_state = pytest.mark.parametrize("name", TRANSFORMATIONS)
IN_A_HURRY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def gradients(step: int) -> Any:
    rng = np.random.default_rng(step)
    grads = {key: rng.normal(size=leaf.shape).astype(np.float32) for key, leaf in PARAMS.items()}
    if step == BAD:
        grads["kernel"][1, 1] = np.nan
    return grads


@functools.cache
def step_of(name: str) -> Any:
    return jax.jit(TRANSFORMATIONS[name].update, compiler_options=IN_A_HURRY)


@functools.cache
def trained(name: str) -> Any:
    state = TRANSFORMATIONS[name].init(PARAMS)
    for step in range(NUM_STEPS):
        _, state = step_of(name)(gradients(step), state, PARAMS)
    return state


# With their types


def by_serialise_leaves(state: Any, like: Any, folder: Any) -> Any:
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, like)


def by_pytree_checkpointer(state: Any, like: Any, folder: Any) -> Any:
    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(folder / "state", state)
    how = ocp.checkpoint_utils.construct_restore_args(like)
    return checkpointer.restore(folder / "state", item=like, restore_args=how)


def by_manager(state: Any, like: Any, folder: Any) -> Any:
    args = ocp.args
    with ocp.CheckpointManager(folder) as manager:
        manager.save(0, args=args.Composite(state=args.StandardSave(state)))
        manager.wait_until_finished()
        shapes = jax.eval_shape(lambda: like)
        found = manager.restore(0, args=args.Composite(state=args.StandardRestore(shapes)))
    return found.state


def by_adopting_dicts(state: Any, like: Any, folder: Any) -> Any:
    ocp.PyTreeCheckpointer().save(folder / "state", state)
    return og.adopt(like, ocp.PyTreeCheckpointer().restore(folder / "state"))


def by_state_dict(state: Any, like: Any, folder: Any) -> Any:
    return serialization.from_state_dict(like, serialization.to_state_dict(state))


def by_splitting(state: Any, like: Any, folder: Any) -> Any:
    return eqx.combine(*eqx.partition(state, eqx.is_inexact_array))


TOOLS = {
    "deepcopy": lambda state, like, folder: copy.deepcopy(state),
    "device_get": lambda state, like, folder: jax.device_get(state),
    "state dict": by_state_dict,
    "eqx.tree_serialise_leaves": by_serialise_leaves,
    "eqx.partition": by_splitting,
    "PyTreeCheckpointer": by_pytree_checkpointer,
    "CheckpointManager": by_manager,
    "dicts adopted": by_adopting_dicts,
}


@each_state
def test_what_comes_back_goes_on_bit_for_bit(name, tmp_path):
    state, like = trained(name), TRANSFORMATIONS[name].init(PARAMS)
    metrics = og.metrics(state)
    expected = step_of(name)(gradients(NUM_STEPS), state, PARAMS)
    for tool, carry in TOOLS.items():
        (folder := tmp_path / tool).mkdir()
        back = carry(state, like, folder)
        assertions.assert_same_bits(back, state)
        assertions.assert_same_bits(og.metrics(back), metrics)
        actual = step_of(name)(gradients(NUM_STEPS), back, PARAMS)
        assertions.assert_same_bits(actual, expected)


@each_state
def test_params_in_a_state_can_be_mapped_and_set(name):
    tx = TRANSFORMATIONS[name]
    state = tx.init(PARAMS)
    mapped = optax.tree_map_params(tx, lambda leaf, param: param, state, PARAMS)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    moments = [moment for _, moment in optax.tree.get_all_with_path(mapped, "mu")]
    assert moments
    for moment in moments:
        assertions.assert_same_bits(moment, PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    emptied = optax.tree.set(mapped, mu=zeros)
    assertions.assert_same_bits(optax.tree.get_all_with_path(emptied, "mu")[0][1], zeros)
    assert assertions.signature(emptied) == assertions.signature(state)


# Ensembles


@pytest.mark.parametrize("name", ["by unit", "rollback", "windows"])
def test_every_reader_knows_the_members_of_an_ensemble(name):
    tx, members = TRANSFORMATIONS[name], 3
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, 3 * leaf]), PARAMS)
    state = jax.vmap(tx.init)(params)
    steps = [
        jax.tree.map(lambda *g: np.stack(g), *map(gradients, s)) for s in ([0, 1, 3], [0, 2, 1])
    ]
    update = jax.jit(jax.vmap(tx.update), compiler_options=IN_A_HURRY)
    for grads in steps:
        _, state = update(grads, state, params)
    ok = og.step_ok(state)
    assert ok.tolist() == [True, False, True]  # of the last, the second has a NaN
    assert {value.shape for value in og.metrics(state).values()} == {(members,)}
    norms = og.layer_norms(state, params)
    assert {name.partition("[")[0] for name in norms} == set(PARAMS)
    assert {norm.shape for norm in norms.values()} == {(members,)}
    kept = og.select(ok, state, jax.vmap(tx.init)(params))
    assert jax.tree.structure(kept) == jax.tree.structure(state)
    assert "non-finite: kernel" in og.explain(*jax.tree.map(lambda x: x[1], (state, params)))


# Without their types


def as_nnx_state(state: Any) -> Any:
    del state
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    return nnx.state(nnx.Optimizer(model, og.guard(ADAM), wrt=nnx.Param))


LOST = {
    "dicts of Flax": serialization.to_state_dict,
    "msgpack": lambda state: serialization.msgpack_restore(serialization.to_bytes(state)),
    "a tree with it": lambda state: {"step": 1, "opt": serialization.to_state_dict(state)},
    "nnx.state": as_nnx_state,
}
READERS = {
    "metrics": og.metrics,
    "step_ok": og.step_ok,
    "check": og.check,
    "explain": lambda state: og.explain(state, PARAMS),
    "diagnose": lambda state: og.diagnose(state, PARAMS),
    "layer_norms": lambda state: og.layer_norms(state, PARAMS),
    "unwrap": og.unwrap,
    "scale_loss": lambda state: og.scale_loss(jnp.float32(1.0), state),
    "History": lambda state: og.History().append(0, state),
}


@pytest.mark.parametrize("form", LOST)
@pytest.mark.parametrize("reader", READERS)
def test_readers_say_how_a_state_gets_its_types_back(reader, form):
    lost = LOST[form](og.guard(ADAM).init(PARAMS))
    text = "holds a state as dicts of its fields, as a checkpoint is restored without a target"
    with pytest.raises(ValueError, match=text) as caught:
        READERS[reader](lost)
    assert "pass og.adopt(tx.init(params), restored)" in str(caught.value)


@pytest.mark.parametrize("tx", [og.guard(ADAM), optax.chain(og.clip_by_norm(1.0), ADAM)])
def test_update_says_it_too(tx):
    lost = serialization.to_state_dict(tx.init(PARAMS))
    with pytest.raises(TypeError, match=re.escape("pass og.adopt(tx.init(params), restored).")):
        tx.update(PARAMS, lost, PARAMS)


def test_half_a_state_is_called_that():
    half, _ = eqx.partition(og.guard(ADAM).init(PARAMS), eqx.is_inexact_array)
    with pytest.raises(ValueError, match=r"has no array in 'integers'\. Pass the whole optimizer"):
        og.metrics(half)
