"""What a guard does with a bad step: bits, dtypes, leaves, counters, arguments, embeddings."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optax_guard as og

PARAMS = {"b": jnp.array([0.5, -1.5]), "w": jnp.arange(6.0).reshape(2, 3) - 2.5}
LOW_AND_SINGLE = (jnp.float16, jnp.bfloat16, jnp.float32)
BAD = {"NaN": np.nan, "+Inf": np.inf, "-Inf": -np.inf}


def gradients(seed: int = 0, like: Any = PARAMS) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), like)


def spoiled(seed: int = 0, value: float = np.nan) -> Any:
    good = gradients(seed)
    return good | {"w": good["w"].at[1, 2].set(value)}


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def minus_zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: -jnp.zeros_like(leaf), tree)


@functools.cache
def stepper(tx: Any) -> Any:
    """Jitted ``(params, state, gradients, extra_args) -> (params, state)``."""

    def step(params, state, gradients, extra_args):
        updates, state = tx.update(gradients, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def walk(tx: Any, steps: Any, params: Any = PARAMS, **extra_args: Any) -> tuple[Any, Any]:
    step, state = stepper(tx), tx.init(params)
    for each in steps:
        params, state = step(params, state, each, extra_args)
    return params, state


# Bits of the parameters


def edges(dtype: Any) -> dict[str, Any]:
    """Numbers that an addition may change: zeros with their signs, ends of the range."""
    info = jnp.finfo(dtype)
    values = [0.0, -0.0, info.tiny, -info.tiny, info.max, info.min]
    if dtype != jnp.bfloat16:  # XLA:CPU takes subnormals of bfloat16 for zero in every addition
        values += [info.smallest_subnormal, -info.smallest_subnormal, 0.5 * float(info.tiny)]
    return {"w": jnp.asarray(np.asarray(values, np.float64).astype(dtype))}


@pytest.mark.parametrize("dtype", LOW_AND_SINGLE)
def test_skip_keeps_every_bit_of_the_parameters(dtype):
    params = edges(dtype)
    tx = og.guard(optax.adamw(0.1))
    steps = [jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)] * 2
    after, state = walk(tx, steps, params)
    assertions.assert_same_bits(after, params)
    assert state.skipped_total == 2


def test_healthy_step_is_that_of_the_optimizer_alone():
    bare, tx = optax.adamw(0.1), og.guard(optax.adamw(0.1))
    state, guarded = bare.init(PARAMS), tx.init(PARAMS)
    for seed in range(3):
        expected, state = jax.jit(bare.update)(gradients(seed), state, PARAMS)
        updates, guarded = jax.jit(tx.update)(gradients(seed), guarded, PARAMS)
        # Two programs: a fused multiply-add here and there.
        assertions.assert_close(updates, expected, rtol=1e-6, atol=1e-9)
        assertions.assert_close(guarded.inner_state, state, rtol=1e-6, atol=1e-9)


# Mixed precision

OPTIMIZERS = {
    "adam": lambda: optax.adam(0.1, eps=1e-3),  # an eps that float16 can hold
    "adamw, float32 moments": lambda: optax.adamw(0.1, eps=1e-3, mu_dtype=jnp.float32),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
}


@pytest.mark.parametrize(
    ("name", "grad_dtype", "param_dtype"),
    [
        ("momentum", jnp.float32, jnp.float16),
        ("momentum", jnp.bfloat16, jnp.float16),
        ("adam", jnp.float16, jnp.float16),
        ("adam", jnp.bfloat16, jnp.float32),
        ("adamw, float32 moments", jnp.bfloat16, jnp.bfloat16),
        ("adamw, float32 moments", jnp.float16, jnp.float32),
    ],
)
def test_gradients_and_parameters_of_any_precision(name, grad_dtype, param_dtype):
    bare = OPTIMIZERS[name]()
    tx = og.guard(bare)
    params = cast(PARAMS, param_dtype)
    healthy, bad = cast(gradients(), grad_dtype), cast(spoiled(), grad_dtype)
    expected, _ = jax.jit(bare.update)(healthy, bare.init(params), params)
    update = jax.jit(tx.update)
    start = tx.init(params)
    updates, state = update(healthy, start, params)
    assert assertions.signature(updates) == assertions.signature(expected)
    # One rounding of the narrowest type.
    assertions.assert_close(updates, expected, rtol=1e-2)
    assert assertions.signature(state) == assertions.signature(start)
    updates, after = update(bad, state, params)
    assertions.assert_same_bits(updates, minus_zeros(expected))
    assertions.assert_same_bits(after.inner_state, state.inner_state)
    assertions.assert_same_bits(optax.apply_updates(params, updates), params)


def test_leaves_of_different_precision_in_one_tree():
    params = {"a": jnp.ones(3, jnp.float16), "b": jnp.ones(3), "c": jnp.ones(3, jnp.bfloat16)}
    steps = [gradients(0, params), gradients(1, params)]
    bad = steps[1] | {"c": jnp.full(3, jnp.inf, jnp.bfloat16)}
    tx = og.guard(optax.sgd(0.1, momentum=0.9))
    params_after, state = walk(tx, [steps[0], bad, steps[1]], params)
    expected, expected_state = walk(tx, steps, params)
    assertions.assert_same_bits(params_after, expected)
    assertions.assert_same_bits(state.inner_state, expected_state.inner_state)
    assert state.last_fault_leaves.tolist() == [False, False, True]


# Leaves that are no floats


def test_leaves_that_are_no_floats_live_beside_an_optimizer():
    params = {
        "count": jnp.array([1, 2]),
        "flag": jnp.array([True, False]),
        "masked": optax.MaskedNode(),
        "none": None,
        "w": jnp.ones(2),
    }
    trained = {"count": False, "flag": False, "masked": optax.MaskedNode(), "none": None, "w": True}
    inner = optax.chain(
        optax.masked(optax.adam(0.1), trained),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda is_trained: not is_trained, trained)),
    )
    tx = og.guard(inner)
    steps = [params | {"w": jnp.array([1.0, value])} for value in (1.0, np.nan, 2.0)]
    after, state = walk(tx, steps, params)
    expected, _ = walk(tx, [steps[0], steps[2]], params)
    assertions.assert_same_bits(after, expected)
    assert state.leaf_norms.shape == (1,)
    assert state.skipped_total == 1


def test_float0_gradients_of_integers_pass():
    params = {"count": jnp.array([1, 2]), "w": jnp.ones(2)}
    tx = og.guard(optax.masked(optax.sgd(0.1, momentum=0.9), {"count": False, "w": True}))

    @jax.jit
    def step(params, state, factor):
        loss = lambda params: factor * jnp.sum(params["w"] * params["count"])  # noqa: E731
        grads = jax.grad(loss, allow_int=True)(params)
        assert grads["count"].dtype == jax.dtypes.float0
        updates, state = tx.update(grads, state, params)
        assert updates["count"].dtype == jax.dtypes.float0
        return updates["w"], state

    updates, state = step(params, tx.init(params), 1.0)
    np.testing.assert_allclose(updates, [-0.1, -0.2], rtol=1e-6)
    updates, after = step(params, state, jnp.nan)
    assertions.assert_same_bits(updates, -jnp.zeros(2))
    assertions.assert_same_bits(after.inner_state, state.inner_state)


def test_complex_gradients():
    params = {"z": jnp.array([1 + 2j, -0.5j])}
    tx = og.guard(optax.adam(0.1))
    good = {"z": jnp.array([1j, 2.0 + 0j])}
    for bad in (np.nan + 1j, complex(1.0, np.inf), complex(-np.inf, np.nan)):
        steps = [good, {"z": good["z"].at[0].set(bad)}, good]
        after, state = walk(tx, steps, params)
        expected, expected_state = walk(tx, [good, good], params)
        assertions.assert_same_bits(after, expected)
        assertions.assert_same_bits(state.inner_state, expected_state.inner_state)


# States wired in any way


def wired_optimizer() -> optax.GradientTransformation:
    """Its new state is made of shared values, swapped fields, inputs, constants, other dtypes."""

    def init(params):
        names = ("one", "same as one", "x", "y", "gradient", "params", "kept")
        state = {name: jnp.full(2, float(i)) for i, name in enumerate(names)}
        return state | {"flag": jnp.array(True), "half": jnp.zeros(2, jnp.float16)}

    def update(updates, state, params=None):
        doubled = 2 * updates["w"]
        return {"w": doubled + state["one"]}, {
            "one": doubled,
            "same as one": doubled,
            "x": state["y"],
            "y": state["x"],
            "gradient": updates["w"],
            "params": params["w"],
            "kept": state["kept"],
            "flag": jnp.asarray(False),
            "half": doubled + 1.0,
        }

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("check_update", [False, True])
def test_every_field_of_a_state_is_restored_however_it_is_made(check_update):
    bare, tx = wired_optimizer(), og.guard(wired_optimizer(), check_update=check_update)
    params = {"w": jnp.array([5.0, 6.0])}
    good, bad = {"w": jnp.array([0.5, -1.0])}, {"w": jnp.array([jnp.inf, 1.0])}
    update = jax.jit(tx.update)
    start = tx.init(params)
    _, after = update(bad, start, params)
    assertions.assert_same_bits(after.inner_state, start.inner_state)
    updates, after = update(good, after, params)
    expected_updates, expected = bare.update(good, bare.init(params), params)
    expected["half"] = expected["half"].astype(jnp.float16)
    assertions.assert_same_bits(updates, expected_updates)
    assertions.assert_same_bits(after.inner_state, expected)
    _, again = update(bad, after, params)
    assertions.assert_same_bits(again.inner_state, after.inner_state)


# Giving up


def test_gave_up_latches_and_changes_nothing_else():
    tx = og.guard(optax.sgd(0.1), max_consecutive_skips=3)
    step, state, params = stepper(tx), tx.init(PARAMS), PARAMS
    for number in range(1, 6):
        params, state = step(params, state, spoiled(), {})
        assert bool(state.gave_up) == (number >= 3)
        assert state.skipped_in_a_row == number
    assertions.assert_same_bits(params, PARAMS)
    params, state = step(params, state, gradients(), {})
    assert state.skipped_in_a_row == 0
    assert (bool(state.last_step_skipped), bool(state.gave_up)) == (False, True)
    expected = jax.tree.map(lambda p, g: p - jnp.float32(0.1) * g, PARAMS, gradients())
    assertions.assert_close(params, expected, rtol=1e-6)


def test_a_healthy_step_resets_the_patience():
    tx = og.guard(optax.sgd(0.1), max_consecutive_skips=3)
    _, state = walk(tx, [spoiled(), spoiled(), gradients()] * 5)
    assert not state.gave_up
    assert (state.skipped_total, state.guard_step, state.last_fault_step) == (10, 15, 14)


def test_without_a_limit_it_never_gives_up():
    tx = og.guard(optax.sgd(0.1), max_consecutive_skips=None)

    def step(state, _):
        return tx.update(spoiled(), state, PARAMS)[1], None

    state, _ = jax.jit(lambda state: lax.scan(step, state, length=2000))(tx.init(PARAMS))
    assert (state.skipped_in_a_row, bool(state.gave_up)) == (2000, False)
    og.check(state, PARAMS)


def containers() -> dict[str, Any]:
    """Functions that make a bad step in a training library and return what ``check`` wants."""
    tx = og.guard(optax.sgd(0.1), max_consecutive_skips=1)

    def plain():
        _, state = walk(tx, [spoiled()])
        return state, PARAMS

    def linen():
        state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
        state = state.apply_gradients(grads=spoiled())
        return state, state.params

    def nnx_optimizer():
        class Model(nnx.Module):
            def __init__(self):
                self.b, self.w = nnx.Param(PARAMS["b"]), nnx.Param(PARAMS["w"])

        model = Model()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        loss = lambda model: jnp.sum(model.b[...]) + jnp.nan * model.w[1, 2]  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))
        return optimizer, nnx.state(model, nnx.Param)

    return {"plain": plain, "Linen": linen, "NNX": nnx_optimizer}


@pytest.mark.parametrize("name", ["plain", "Linen", "NNX"])
def test_check_raises_with_step_reason_and_names(name):
    state, params = containers()[name]()
    with pytest.raises(og.GuardGaveUp, match=r"(?s)Step 0 .*not finite.*w") as caught:
        og.check(state, params)
    assert (caught.value.step, caught.value.reason, caught.value.leaves) == (0, 1, ("w",))


# Parameters or state that were bad before


@pytest.mark.parametrize("where", ["params", "state"])
def test_poison_from_before_is_told_from_a_bad_batch(where):
    tx = og.guard(optax.sgd(0.1, momentum=0.9))
    _, state = walk(tx, [gradients()])
    params = PARAMS
    if where == "params":
        params = PARAMS | {"b": jnp.array([1.0, jnp.nan])}
    else:
        poison = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), state.inner_state)
        state = state._replace(inner_state=poison)
    _, healthy = tx.update(gradients(), state, params)
    assert (healthy.skip_reason, bool(healthy.gave_up)) == (0, False)  # not looked at: it costs
    _, after = tx.update(spoiled(), state, params)
    assert (after.skip_reason, bool(after.gave_up)) == (1 + 16, True)
    with pytest.raises(og.GuardGaveUp, match="already non-finite") as caught:
        og.check(after, params)
    assert caught.value.reason == 17


def sharded_steps(tx: Any, poison: dict[str, Any], batches: list[Any]) -> list[list[int]]:
    """Reasons of each step on each of two devices, with ``poison`` in the parameters after init."""
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    clean = {"w": jnp.ones(8), "b": jnp.ones(4)}

    def steps(clean, params, batches):
        state, reasons = tx.init(clean), []
        for gradients in batches:
            _, state = tx.update(gradients, state, params)
            reasons.append(jnp.stack([state.skip_reason, state.gave_up.astype(jnp.int32)]))
        return jnp.stack(reasons)[None]

    run = jax.jit(
        jax.shard_map(steps, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    )
    first, second = run(clean, clean | poison, batches)
    assert first.tolist() == second.tolist()
    return first.tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda: og.guard(optax.sgd(0.1, momentum=0.9), axis_name="data"),
        lambda: og.guard(
            optax.chain(og.clip_by_zscore(scope="leaf", axis_name="data"), optax.sgd(0.1)),
            axis_name="data",
        ),
    ],
)
def test_every_device_learns_of_a_poison_on_one(make):
    good = {"w": jnp.ones(8), "b": jnp.ones(4)}
    bad_first = good | {"w": jnp.ones(8).at[0].set(jnp.nan)}
    bad_second = good | {"w": jnp.ones(8).at[7].set(jnp.inf)}
    healthy, batch, both = [0, 0], [1, 0], [1 + 16, 1]
    steps = functools.partial(sharded_steps, make())
    assert steps({}, [good, bad_first, bad_second, good]) == [healthy, batch, batch, healthy]
    poison = {"b": jnp.ones(4).at[0].set(jnp.nan)}  # on the first device
    assert steps(poison, [good, bad_first]) == [healthy, both]
    # What is bad here is found here at once; elsewhere at the second bad step.
    assert steps(poison, [good, bad_second, bad_second]) == [healthy, batch, both]
    assert steps(poison, [bad_second, good, bad_second]) == [batch, [0, 0], batch]


def test_bad_batch_alone_is_not_called_poison():
    tx = og.guard(optax.sgd(0.1, momentum=0.9))
    _, state = walk(tx, [gradients(), spoiled()])
    assert (state.skip_reason, bool(state.gave_up)) == (1, False)


def test_condition_never_blames_the_parameters():
    # A rejected finite step looks at nothing but its condition.
    tx = og.guard(optax.sgd(0.1), skip_if=og.norm_above(1e-3))
    params = PARAMS | {"b": jnp.array([1.0, jnp.nan])}
    _, state = tx.update(gradients(), tx.init(params), params)
    assert (state.skip_reason, bool(state.gave_up)) == (8, False)


# The loss


@pytest.mark.parametrize("bad", BAD)
def test_bad_loss_is_a_reason_of_its_own(bad):
    tx = og.guard(optax.adam(0.1))
    step, start = stepper(tx), tx.init(PARAMS)
    params, state = step(PARAMS, start, gradients(), {"value": jnp.float32(BAD[bad])})
    assertions.assert_same_bits(params, PARAMS)
    assertions.assert_same_bits(state.inner_state, start.inner_state)
    assert state.skip_reason == 2
    assert not np.any(state.last_fault_leaves)
    params, state = step(PARAMS, start, spoiled(), {"value": jnp.float32(BAD[bad])})
    assert state.skip_reason == 1 + 2


# Extra arguments


def recorder(seen: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def test_extra_args_reach_the_inner_as_they_are():
    seen: dict[str, Any] = {}
    function = lambda x: x  # noqa: E731
    arrays = {"value": jnp.float32(1.0), "tree": {"a": jnp.ones(2)}, "number": 3}
    tx = og.guard(recorder(seen))
    tx.update(
        gradients(), tx.init(PARAMS), PARAMS, **arrays, function=function, word="a", nothing=None
    )
    assert seen["function"] is function
    assert (seen["word"], seen["nothing"]) == ("a", None)
    assert assertions.signature(seen["tree"]) == assertions.signature(arrays["tree"])
    assert seen["number"].dtype == jnp.int32


# Embeddings


def skips_in(state: Any) -> Any:
    (total,) = [value for key, value in og.metrics(state).items() if key.endswith("skipped_total")]
    return total


def run_in(outer: Any, params: Any = PARAMS) -> tuple[Any, Any]:
    """Parameters after good, bad and good gradients, and after the good ones alone."""
    faulty, state = walk(outer, [gradients(0), spoiled(1), gradients(2)], params)
    assert skips_in(state) == 1
    healthy, _ = walk(outer, [gradients(0), gradients(2)], params)
    assert any(
        bool(jnp.any(after != before))
        for after, before in zip(jax.tree.leaves(healthy), jax.tree.leaves(params), strict=True)
    )
    return faulty, healthy


ADAM = optax.adam(0.1)
ONLY_W = {"b": False, "w": True}
EMBEDDINGS = {
    "chain around": lambda: optax.chain(og.guard(ADAM), optax.scale(0.5)),
    "masked inside": lambda: og.guard(optax.masked(ADAM, ONLY_W)),
    "named chain": lambda: optax.named_chain(("guard", og.guard(ADAM)), ("half", optax.scale(0.5))),
    "partition inside": lambda: og.guard(
        optax.partition({"a": ADAM, "s": optax.sgd(0.1, 0.9)}, {"b": "s", "w": "a"})
    ),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_bad_step_leaves_no_trace_in_any_embedding(name):
    faulty, healthy = run_in(EMBEDDINGS[name]())
    assertions.assert_same_bits(faulty, healthy)


@pytest.mark.parametrize(
    "outer",
    [
        lambda: optax.masked(og.guard(optax.sgd(0.1)), ONLY_W),
        lambda: optax.partition(
            {"guarded": og.guard(optax.sgd(0.1)), "other": optax.sgd(0.1)},
            {"b": "other", "w": "guarded"},
        ),
    ],
    ids=["masked", "partition"],
)
def test_guard_inside_sees_and_protects_its_part_only(outer):
    params, state = walk(outer(), [spoiled()])
    assertions.assert_same_bits(params["w"], PARAMS["w"])
    assert bool(jnp.all(params["b"] != PARAMS["b"]))
    assert skips_in(state) == 1


def test_inner_guard_of_two_sees_no_bad_step_and_is_called_needless():
    tx = og.guard(og.stabilize(ADAM), skip_if=og.spike())
    with pytest.warns(UserWarning, match="guard around a guard"):
        params, state = walk(tx, [gradients(0), spoiled(1), gradients(2)])
    assert (state.skipped_total, state.inner_state.skipped_total) == (1, 0)
    assert (state.guard_step, state.inner_state.guard_step) == (3, 2)
    with pytest.warns(UserWarning, match="guard around a guard"):
        expected, healthy = walk(tx, [gradients(0), gradients(2)])
    assertions.assert_same_bits(params, expected)
    assertions.assert_same_bits(state.inner_state, healthy.inner_state)


def test_leaf_vectors_follow_the_fast_parameters_of_lookahead():
    params = optax.LookaheadParams.init_synced(PARAMS)
    tx = og.guard(optax.lookahead(optax.adam(0.1), sync_period=2, slow_step_size=0.5))
    step, state = stepper(tx), tx.init(params)
    assert state.leaf_norms.shape == (2,)
    params, state = step(params, state, gradients(), {})
    norms = [np.linalg.norm(np.float64(leaf)) for leaf in jax.tree.leaves(gradients())]
    np.testing.assert_allclose(state.leaf_norms, norms, rtol=1e-6)
    after, state = step(params, state, spoiled(), {})
    assertions.assert_same_bits(after, params)
    assert state.last_fault_leaves.tolist() == [False, True]
    assert "non-finite: w" in og.explain(state, params)


# Transformations of JAX


def test_only_the_faulty_member_of_an_ensemble_skips():
    tx = og.guard(optax.adam(0.1))
    good = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(gradients, range(3)))
    bad = good | {"b": good["b"].at[1, 0].set(jnp.inf)}
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), PARAMS)
    state = jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(stepper(tx), in_axes=(0, 0, 0, None)))
    params, state = step(params, state, good, {})
    expected, _ = step(params, state, good, {})
    after, state = step(params, state, bad, {})
    member = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: E731
    assertions.assert_same_bits(member(after, 1), member(params, 1))
    for i in (0, 2):
        assertions.assert_same_bits(member(after, i), member(expected, i))
    assert state.skipped_total.tolist() == [0, 1, 0]


def test_donated_parameters_and_state_are_updated_in_place():
    tx = og.stabilize(optax.adamw(0.1))
    step = jax.jit(stepper(tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for each in (gradients(0), spoiled(1), gradients(2)):
        old_params, old_state = params, state
        params, state = step(params, state, each, {})
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old_params))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old_state.inner_state))
    expected, _ = walk(tx, [gradients(0), gradients(2)])
    assertions.assert_close(params, expected, rtol=1e-6)


# Any schedule of faults

MOST_STEPS = 24
KINDS = [None, *itertools.product(BAD, ("element", "leaf", "all", "loss"))]


@functools.cache
def _random_run() -> Any:
    """One compiled run, over tables of gradients, for every schedule."""
    tx = og.guard(
        optax.chain(
            optax.adamw(optax.linear_schedule(0.1, 0.01, 20)), optax.add_noise(0.1, 0.5, 0)
        ),
        skip_if=og.spike(window=8),
        max_consecutive_skips=5,
    )

    def step(carry, inputs):
        params, state = carry
        grads, value, is_real = inputs
        updates, new_state = tx.update(grads, state, params, value=value)
        new = optax.apply_updates(params, updates), new_state
        carry = jax.tree.map(lambda n, o: jnp.where(is_real, n, o), new, carry)
        return carry, (new_state.skip_reason, new_state.gave_up)

    return tx, jax.jit(lambda state, inputs: lax.scan(step, (PARAMS, state), inputs))


def _schedule(kinds: Any) -> Any:
    """Inputs of a run: healthy gradients in order, with the faults between them."""
    grads, values = [], []
    healthy = itertools.count()
    for kind in kinds:
        tree, value = gradients(next(healthy) if kind is None else 99), 1.0
        if kind is not None:
            bad, place = kind
            if place == "element":
                tree = tree | {"w": tree["w"].at[1, 2].set(BAD[bad])}
            if place in ("leaf", "all"):
                tree = tree | {"b": jnp.full(2, BAD[bad])}
            if place == "all":
                tree = tree | {"w": jnp.full((2, 3), BAD[bad])}
            value = BAD[bad] if place == "loss" else 1.0
        grads.append(tree)
        values.append(value)
    padding = MOST_STEPS - len(kinds)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads, *[gradients()] * padding)
    is_real = jnp.arange(MOST_STEPS) < len(kinds)
    return stacked, jnp.asarray(values + [1.0] * padding, jnp.float32), is_real


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=MOST_STEPS))
def test_any_schedule_of_faults_ends_where_its_healthy_steps_end(kinds):
    tx, run = _random_run()
    (params, state), (reasons, gave_up) = run(tx.init(PARAMS), _schedule(kinds))
    healthy = [kind for kind in kinds if kind is None] or [None]
    (expected, expected_state), _ = run(tx.init(PARAMS), _schedule(healthy))
    if None in kinds:
        assertions.assert_same_bits(params, expected)
        keys = [jax.random.key_data(s.inner_state[1].rng_key) for s in (state, expected_state)]
        assertions.assert_same_bits(*keys)
        assertions.assert_same_bits(state.inner_state[0], expected_state.inner_state[0])
        assertions.assert_same_bits(state.condition_states, expected_state.condition_states)
    else:
        assertions.assert_same_bits(params, PARAMS)
    faults = [0 if kind is None else 2 if kind[1] == "loss" else 1 for kind in kinds]
    assert reasons[: len(kinds)].tolist() == faults
    rows = [len(list(run)) for is_bad, run in itertools.groupby(kinds, bool) if is_bad]
    assert bool(gave_up[len(kinds) - 1]) == (max(rows, default=0) >= 5)
    assert (state.guard_step, state.skipped_total) == (len(kinds), np.count_nonzero(faults))


@pytest.mark.parametrize("scope", ["global", "leaf", "unit"])
@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e30])
def test_norms_in_the_state_are_right_though_the_clip_does_not_need_them(scope, scale):
    gradients = {"a": jnp.full((3, 4), scale), "b": jnp.full(9, 2 * scale)}
    tx = og.stabilize(optax.sgd(0.1), clip=og.clip_by_norm(1.0, scope=scope))
    _, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    # 1e-6: a float32 sum of at most twelve squares and its root
    np.testing.assert_allclose(state.grad_norm, scale * 48**0.5, rtol=1e-6)
    np.testing.assert_allclose(state.leaf_norms, [scale * 12**0.5, scale * 6.0], rtol=1e-6)
