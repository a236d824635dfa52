"""Orbax in the middle of a run: what is restored goes on, bit for bit, as if nothing had happened.

The state is that of a run that was not easy: it has clipped, skipped a NaN, and is in the middle of
the windows and warm-ups of its rules. More NaN follow after the restart.
"""

from __future__ import annotations

import collections
import functools

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og

NUM_STEPS, SAVED_AFTER = 9, 5
NAN_STEPS, SPIKE_STEP = (3, 6), 4
# Float32 rounding of sums in another order, over a few steps of Adam.
ANOTHER_ORDER = {"rtol": 1e-5, "atol": 1e-6}


@functools.cache  # one object, one compiled step
def stabilized():
    return og.stabilize(optax.adam(0.01))


@functools.cache
def adaptive():
    """Statistics in the middle of their warm-up, and a window of norms."""
    clip = og.clip_by_zscore(2.0, warmup_steps=3)
    return og.guard(optax.chain(clip, optax.adam(0.01)), skip_if=og.spike(6.0, window=6))


@functools.cache
def everything():
    """Statistics per unit, a window, a learning rate in the state, and a copy of the parameters."""
    clips = optax.chain(
        og.clip_by_zscore(2.0, scope="unit", warmup_steps=3), og.clip_by_percentile(60.0, window=8)
    )
    adam = optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(0.01, 20))
    guarded = og.guard(optax.chain(clips, adam), skip_if=og.spike(6.0, window=6))
    return og.rollback(og.backoff(guarded), every=2, after_skips=3)


def make_params():
    rng = np.random.default_rng(0)
    return {
        "kernel": rng.normal(size=(16, 6)).astype(np.float32),
        "bias": rng.normal(size=8).astype(np.float32),
    }


def gradients(step):
    rng = np.random.default_rng(step + 1)
    grads = {name: rng.normal(size=p.shape).astype(p.dtype) for name, p in make_params().items()}
    if step == SPIKE_STEP:
        grads["kernel"] *= 100
    if step in NAN_STEPS:
        grads["kernel"][3, 1] = np.nan
    return grads


def mesh(num_devices):
    return Mesh(jax.devices()[:num_devices], ("data",))


def place(tree, num_devices):
    """On so many devices: what divides by them along its first axis is split, the rest copied."""

    def sharding(leaf):
        is_split = leaf.ndim > 0 and leaf.size and leaf.shape[0] % num_devices == 0
        return NamedSharding(mesh(num_devices), P("data") if is_split else P())

    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), tree)


def abstract(tree):
    """Shapes, dtypes and shardings: all that a restart knows of a state."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


TRACES = collections.Counter()


@functools.cache
def compiled_step(tx, num_devices, donate):
    def step(params, opt_state, grads):
        TRACES[tx, num_devices, donate] += 1
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = place(make_params(), num_devices)
    start = (params, place(tx.init(params), num_devices))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, start)
    return jax.jit(step, donate_argnums=(0, 1) if donate else (), out_shardings=shardings)


class Run:
    """Parameters and optimizer state of a run, and its compiled step."""

    def __init__(self, tx, num_devices, donate=False):
        self.num_devices = num_devices
        self.params = place(make_params(), num_devices)
        self.opt_state = place(tx.init(self.params), num_devices)
        self.step = compiled_step(tx, num_devices, donate)

    @property
    def tree(self):
        return {"params": self.params, "opt_state": self.opt_state}

    def resume(self, tree):
        self.params, self.opt_state = tree["params"], tree["opt_state"]
        return self

    def walk(self, begin, end):
        for step in range(begin, end):
            grads = place(gradients(step), self.num_devices)
            self.params, self.opt_state = self.step(self.params, self.opt_state, grads)
        return self


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path, target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def shardings(tree):
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("make", [stabilized, everything])
def test_a_restored_run_goes_on_bit_for_bit(make, num_devices, tmp_path):
    run = Run(make(), num_devices).walk(0, SAVED_AFTER)
    assert og.metrics(run.opt_state)["guard/skipped_total"] >= 1
    save(tmp_path / "state", run.tree)
    saved = run.tree
    expected = run.walk(SAVED_AFTER, NUM_STEPS).tree

    again = Run(make(), num_devices)
    restored = restore(tmp_path / "state", abstract(again.tree))
    assertions.assert_same_bits(restored, saved)
    assert assertions.signature(restored) == assertions.signature(saved)
    assert shardings(restored) == shardings(saved)
    if num_devices == 8:
        moments = [leaf for leaf in jax.tree.leaves(restored["opt_state"]) if leaf.shape == (16, 6)]
        assert len(moments) >= 2
        assert all(leaf.addressable_data(0).shape == (2, 6) for leaf in moments)
    actual = again.resume(restored).walk(SAVED_AFTER, NUM_STEPS).tree
    assertions.assert_same_bits(actual, expected)
    metrics = og.metrics(actual["opt_state"])
    assert metrics["guard/guard_step"] == NUM_STEPS
    assert metrics["guard/last_fault_step"] == NAN_STEPS[-1] + 1
    assert TRACES[make(), num_devices, False] == 1  # a restored state is no new kind of input


@pytest.mark.parametrize(("before", "after"), [(8, 4), (8, 1), (1, 8)])
def test_a_run_goes_on_with_another_number_of_devices(before, after, tmp_path):
    run = Run(adaptive(), before).walk(0, SAVED_AFTER)
    save(tmp_path / "state", run.tree)
    saved = jax.device_get(run.tree)
    expected = run.walk(SAVED_AFTER, NUM_STEPS).tree

    moved = Run(adaptive(), after)
    target = abstract(moved.tree)
    restored = restore(tmp_path / "state", target)
    assertions.assert_same_bits(restored, saved)
    assert shardings(restored) == shardings(target)
    actual = moved.resume(restored).walk(SAVED_AFTER, NUM_STEPS).tree
    assertions.assert_close(actual, expected, **ANOTHER_ORDER)
    # To the bit where the same numbers go when no file lies between.
    by_hand = moved.resume(place(saved, after)).walk(SAVED_AFTER, NUM_STEPS).tree
    assertions.assert_same_bits(actual, by_hand)


def test_a_save_in_the_background_holds_its_step_while_the_next_ones_take_the_buffers(tmp_path):
    run = Run(adaptive(), 8, donate=True)
    first = run.params
    run.walk(0, SAVED_AFTER)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    expected = jax.tree.map(np.array, run.tree)  # copies
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(SAVED_AFTER, args=ocp.args.StandardSave(run.tree))  # goes on behind
        run.walk(SAVED_AFTER, NUM_STEPS)
        manager.wait_until_finished()
        target = ocp.args.StandardRestore(abstract(run.tree))
        restored = manager.restore(manager.latest_step(), args=target)
    assertions.assert_same_bits(restored, expected)


class Model(nnx.Module):
    def __init__(self, rngs, num_devices):
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.output = nnx.Linear(16, 2, rngs=rngs)
        if num_devices > 1:
            nnx.update(self, place(nnx.state(self), num_devices))

    def __call__(self, x):
        return self.output(nnx.relu(self.hidden(x)))


@nnx.jit
def nnx_step(model, optimizer, x):
    grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
    optimizer.update(model, grads)


def nnx_run(num_devices):
    model = Model(nnx.Rngs(0), num_devices)
    optimizer = nnx.Optimizer(model, adaptive(), wrt=nnx.Param)
    if num_devices > 1:
        nnx.update(optimizer, place(nnx.state(optimizer), num_devices))
    return model, optimizer


def nnx_walk(model, optimizer, begin, end):
    for step in range(begin, end):
        x = np.random.default_rng(step).normal(size=(8, 4)).astype(np.float32)
        if step in NAN_STEPS:
            x[2, 1] = np.nan
        nnx_step(model, optimizer, x)
    return nnx.state((model, optimizer))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_restored_nnx_optimizer_goes_on_bit_for_bit(num_devices, tmp_path):
    model, optimizer = nnx_run(num_devices)
    saved = jax.tree.map(jnp.copy, nnx_walk(model, optimizer, 0, SAVED_AFTER))
    assert og.metrics(optimizer.opt_state)["guard/skipped_total"] >= 1
    save(tmp_path / "state", nnx.state((model, optimizer)))
    expected = nnx_walk(model, optimizer, SAVED_AFTER, NUM_STEPS)

    model, optimizer = nnx_run(num_devices)
    restored = restore(tmp_path / "state", abstract(nnx.state((model, optimizer))))
    assertions.assert_same_bits(restored, saved)
    nnx.update((model, optimizer), restored)
    if num_devices > 1:
        assert len(model.hidden.kernel[...].sharding.device_set) == num_devices
    actual = nnx_walk(model, optimizer, SAVED_AFTER, NUM_STEPS)
    assertions.assert_same_bits(actual, expected)
    metrics = og.metrics(optimizer.opt_state)
    assert metrics["guard/guard_step"] == NUM_STEPS
    assert metrics["guard/last_fault_step"] == NAN_STEPS[-1] + 1


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_recipe_of_the_readme_for_another_clip(num_devices, tmp_path):
    old = Run(adaptive(), num_devices).walk(0, SAVED_AFTER)
    save(tmp_path / "state", old.tree)
    new = Run(stabilized(), num_devices)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state")  # plain dicts
    opt_state = og.adopt(new.opt_state, restored["opt_state"])

    assertions.assert_same_bits(opt_state, og.adopt(new.opt_state, old.opt_state))
    assert shardings(opt_state) == shardings(new.opt_state)
    for name in ("mu", "nu"):
        moments = (optax.tree.get(each, name) for each in (opt_state, old.opt_state))
        assertions.assert_same_bits(*moments)
    new.resume({"params": old.params, "opt_state": opt_state}).walk(SAVED_AFTER, NUM_STEPS)
    metrics = og.metrics(new.opt_state)
    assert metrics["guard/guard_step"] == NUM_STEPS
    assert metrics["guard/clip_by_update_ratio/steps"] < NUM_STEPS - SAVED_AFTER  # its own
    assert metrics["guard/skipped_total"] >= len(NAN_STEPS)
