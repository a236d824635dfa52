"""Setups that people have: meshes, frozen weights, infinities by design, losses of any kind.

Each kind is shown by several of its cases. Nothing here is particular to one rule: what every
transformation promises is in ``test_contract.py``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og

# float32 sums of at most 2000 terms in another order.
ROUNDING = 1e-5


def random_like(tree: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def norm_of(*leaves: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in leaves)))


# Inside shard_map: sharded, replicated and mixed leaves

BLOCK = random_like({"down": jnp.ones((8, 4)), "scale": jnp.ones(4), "up": jnp.ones((4, 8))})
LAYOUTS = {
    "replicated": {"down": P(), "scale": P(), "up": P()},
    "sharded": {"down": P("model"), "scale": P("model"), "up": P("model")},
    "mixed": {"down": P(None, "model"), "scale": P(), "up": P("model")},
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def line_of_devices() -> Any:
    return jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))


def names_of(layout: dict[str, Any]) -> Any:
    """The callable that says the same as a layout."""
    return lambda path, leaf: "model" if "model" in layout[path] else None


def clipped(axis_name: Any = None) -> Any:
    clip = og.clip_by_norm(1.0, axis_name=axis_name)
    return og.guard(optax.chain(clip, optax.sgd(1.0)), axis_name=axis_name)


def step_in(tx: Any, layout: Any, mesh: Any, gradients: Any, **options: Any) -> tuple[Any, Any]:
    """First updates, and the state without that of the optimizer."""

    def step(gradients):
        updates, state = tx.update(gradients, tx.init(gradients), value=jnp.float32(1.0))
        return updates, state._replace(inner_state=())

    specs = {"in_specs": (layout,), "out_specs": (layout, P())}
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs, **options))(gradients)


@each_layout
@pytest.mark.parametrize(
    ("check_vma", "is_callable"), [(True, False), (True, True), (False, True)], ids=str
)
def test_a_leaf_that_every_device_holds_counts_once(layout, check_vma, is_callable):
    layout = LAYOUTS[layout]
    axis_name = names_of(layout) if is_callable else "model"
    tx = clipped(axis_name)
    updates, state = step_in(tx, layout, line_of_devices(), BLOCK, check_vma=check_vma)
    whole = norm_of(*BLOCK.values())
    expected = jax.tree.map(lambda leaf: -leaf / jnp.float32(whole), BLOCK)
    assertions.assert_close(updates, expected, rtol=ROUNDING)
    np.testing.assert_allclose(state.leaf_norms, list(map(norm_of, BLOCK.values())), rtol=1e-5)
    np.testing.assert_allclose(state.grad_norm, whole, rtol=ROUNDING)


@each_layout
def test_a_fault_on_one_device_stops_all_of_them(layout):
    layout = LAYOUTS[layout]
    bad = BLOCK | {"up": BLOCK["up"].at[3, 7].set(jnp.nan)}
    updates, state = step_in(clipped("model"), layout, line_of_devices(), bad)
    assertions.assert_same_bits(updates, jax.tree.map(lambda leaf: -jnp.zeros_like(leaf), BLOCK))
    assert int(state.skip_reason) == og.SkipReason.GRADIENT
    assert state.last_fault_leaves.tolist() == [False, False, True]


def test_each_leaf_may_be_split_over_axes_of_its_own():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    layout = {"down": P("data", "model"), "scale": P("data"), "up": P(None, ("data", "model"))}
    updates, state = step_in(clipped(("data", "model")), layout, mesh, BLOCK)
    whole = norm_of(*BLOCK.values())
    expected = jax.tree.map(lambda leaf: -leaf / jnp.float32(whole), BLOCK)
    assertions.assert_close(updates, expected, rtol=ROUNDING)
    np.testing.assert_allclose(state.leaf_norms, list(map(norm_of, BLOCK.values())), rtol=1e-5)


@pytest.mark.parametrize("axis_name", [None, "data"])
def test_gradients_that_vary_over_an_unnamed_axis_are_refused(axis_name):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    layout = {"down": P("data", "model"), "scale": P("data"), "up": P("data")}
    with pytest.raises(ValueError, match=r"'down' differs .* along .*'model'.*pass axis_name="):
        step_in(clipped(axis_name), layout, mesh, BLOCK)
    # So does a rule alone.
    tx = og.clip_by_zscore(axis_name=axis_name)
    step = lambda gradients: tx.update(gradients, tx.init(gradients))[0]  # noqa: E731
    with pytest.raises(ValueError, match="axis_name"):
        jax.shard_map(step, mesh=mesh, in_specs=(layout,), out_specs=layout)(BLOCK)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx, **kw: og.dynamic_loss_scale(tx, initial_scale=1.0, **kw),
        lambda tx, **kw: og.rollback(og.backoff(tx), **kw),
    ],
    ids=["dynamic_loss_scale", "rollback"],
)
def test_wrappers_stand_around_a_guard_on_sharded_leaves(wrap):
    layout = LAYOUTS["mixed"]
    tx = wrap(og.guard(optax.sgd(1.0), axis_name="model"), axis_name="model")

    def step(gradients):
        updates, state = tx.update(gradients, tx.init(gradients), gradients)
        return updates, og.step_ok(state)

    specs = {"in_specs": (layout,), "out_specs": (layout, P())}
    mapped = jax.jit(jax.shard_map(step, mesh=line_of_devices(), **specs))
    updates, is_ok = mapped(BLOCK)
    assertions.assert_close(updates, jax.tree.map(lambda leaf: -leaf, BLOCK), rtol=ROUNDING)
    assert bool(is_ok)
    _, is_ok = mapped(BLOCK | {"up": BLOCK["up"].at[0, 0].set(jnp.inf)})
    assert not bool(is_ok)


def loss_of_each_device(tx: Any, losses: Any) -> Any:
    """The state after a step whose gradients agree, as after a pmean, but whose losses do not."""

    def step(loss):
        return tx.update(BLOCK, tx.init(BLOCK), value=loss[0])[1]._replace(inner_state=())

    mapped = jax.shard_map(step, mesh=line_of_devices(), in_specs=P("model"), out_specs=P())
    return jax.jit(mapped)(losses)


def test_a_loss_may_vary_where_the_gradients_do_not():
    spike = og.spike(of="value", window=4, min_history=1)
    tx = og.guard(optax.sgd(1.0), skip_if=spike, axis_name="model")
    state = loss_of_each_device(tx, jnp.arange(4.0))
    assert int(state.skip_reason) == 0
    (seen,) = state.condition_states.values()
    assert float(seen.window[0]) == 1.5  # the mean, on every device
    state = loss_of_each_device(tx, jnp.arange(4.0).at[2].set(jnp.inf))
    assert int(state.skip_reason) == og.SkipReason.LOSS_VALUE
    with pytest.raises(ValueError, match=r"loss passed as value= differs .*jax.lax.pmean"):
        loss_of_each_device(og.guard(optax.sgd(1.0)), jnp.arange(4.0))


PER_LEAF = {"down": "model", "up": None}
DEALT_OUT = {"down": P("model"), "up": P(None, "model")}
MATRICES = {name: BLOCK[name] for name in PER_LEAF}
SPIKES = [
    jax.tree.map(lambda leaf, factor=factor: factor * leaf, MATRICES) for factor in (1.0, 9.0)
]


def updates_of(tx: Any, steps: Any = SPIKES) -> list[Any]:
    state, found = tx.init(steps[0]), []
    for gradients in steps:
        updates, state = tx.update(gradients, state, gradients)
        found.append(updates)
    return [*found, og.metrics(state)]


@pytest.mark.parametrize("make", [og.clip_by_percentile, og.clip_by_ema])
def test_a_callable_leaves_out_the_axis_that_deals_units_out_to_the_devices(make):
    # Each device has half of the rows of one kernel, and half of the units of the other.
    steps = ([DEALT_OUT] * len(SPIKES),)
    options = {"in_specs": steps, "out_specs": [*steps[0], P()]}
    tx = make(scope="unit", axis_name=lambda path, leaf: PER_LEAF[path])
    mapped = jax.shard_map(lambda s: updates_of(tx, s), mesh=line_of_devices(), **options)
    expected = jax.jit(lambda s: updates_of(make(scope="unit"), s))(SPIKES)
    assertions.assert_close(jax.jit(mapped)(SPIKES), expected, rtol=ROUNDING)


def trace_in(
    tx: Any, layout: Any, gradients: Any = BLOCK, params: Any = None, params_layout: Any = None
) -> Any:
    """Traces an update inside ``shard_map``, which is where types tell."""
    state = tx.init(gradients)

    def step(gradients, params):
        return tx.update(gradients, state, params)[0]

    params, params_layout = params or gradients, params_layout or layout
    specs = {"in_specs": (layout, params_layout), "out_specs": layout}
    return jax.make_jaxpr(jax.shard_map(step, mesh=line_of_devices(), **specs))(gradients, params)


@pytest.mark.parametrize("make", [og.guard, lambda tx, **kw: optax.chain(og.clip_by_rms(**kw), tx)])
def test_a_callable_that_contradicts_the_types_is_refused(make):
    tx = make(optax.sgd(1.0), axis_name=lambda path, leaf: PER_LEAF.get(path))
    with pytest.raises(
        ValueError, match=r"'up' differs .*'model', but axis_name\('up', leaf\) says"
    ):
        trace_in(tx, LAYOUTS["mixed"])


@pytest.mark.parametrize(
    "make",
    [
        og.guard,
        og.stabilize,
        lambda tx: og.rollback(og.guard(tx)),
        lambda tx: optax.chain(og.clip_by_param_norm(), tx),
        lambda tx: optax.chain(tx, og.clip_by_relative_change()),
    ],
    ids=["guard", "stabilize", "rollback", "param_norm", "relative_change"],
)
def test_parameters_that_vary_where_gradients_do_not_are_named(make):
    # As of the parameters that were made to vary so that each device has gradients of its own.
    with pytest.raises(ValueError, match=r"The parameter 'down' differs .*'model'.*axis_name"):
        trace_in(make(optax.sgd(0.1)), P(), params=BLOCK, params_layout=LAYOUTS["mixed"])


@pytest.mark.parametrize("name", ["clip_by_max_ema", "clip_by_relative_change"])
def test_a_maximum_over_an_unnamed_axis_is_refused(name):
    with pytest.raises(ValueError, match=r"'down' differs .*pass axis_name='model'"):
        trace_in(getattr(og, name)(), LAYOUTS["sharded"])


@pytest.mark.parametrize("check_vma", [True, False])
def test_elementwise_rules_count_alike_on_all_devices(check_vma):
    layout = LAYOUTS["mixed"]
    axis_name = None if check_vma else names_of(layout)
    tx = og.zero_nonfinite(scope="leaf", axis_name=axis_name)
    bad = BLOCK | {"up": BLOCK["up"].at[3, 7].set(jnp.nan)}

    def step(gradients):
        return tx.update(gradients, tx.init(gradients))

    specs = {"in_specs": (layout,), "out_specs": (layout, P()), "check_vma": check_vma}
    updates, state = jax.jit(jax.shard_map(step, mesh=line_of_devices(), **specs))(bad)
    assertions.assert_same_bits(updates, BLOCK | {"up": jnp.zeros((4, 8))})
    assert (int(state.zeroed_steps_total), int(state.zeroed_elements_total)) == (1, 32)


def test_layers_that_are_dealt_out_do_not_fit_the_state_of_all():
    tx = og.guard(optax.sgd(1.0), stacked=lambda path, leaf: path == "down", axis_name="model")
    layout, state = LAYOUTS["sharded"], tx.init(BLOCK)
    specs = {"in_specs": (layout, P()), "out_specs": (layout, P())}
    with pytest.raises(ValueError, match=r"for 10 norms, these gradients have 4.*stacked="):
        jax.shard_map(tx.update, mesh=line_of_devices(), **specs)(BLOCK, state)


@pytest.mark.parametrize("make", [og.guard, lambda tx, **kw: og.rollback(og.guard(tx, **kw), **kw)])
def test_some_axes_of_an_explicit_mesh_may_be_left_to_jit(make):
    mesh = jax.make_mesh((2, 2), ("model", "y"), axis_types=(AxisType.Explicit,) * 2)
    tx = make(optax.sgd(0.1), axis_name="model")
    gradients = jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, P("model", "y")))
    with jax.set_mesh(mesh):
        step = jax.shard_map(
            lambda g: tx.update(g, tx.init(g), g)[0],
            in_specs=P("model"),
            out_specs=P("model"),
            axis_names={"model"},
        )
        assert jax.eval_shape(jax.jit(step), gradients).shape == (4, 4)


# Under jit on a mesh whose axes are explicit, the default of jax.make_mesh since JAX 0.9

FORMS = {
    "guard": og.guard,
    "stabilize": og.stabilize,
    "rollback": lambda tx: og.rollback(og.guard(tx)),
    "zscore by unit": lambda tx: og.guard(optax.chain(og.clip_by_zscore(scope="unit"), tx)),
    "percentile by leaf": lambda tx: og.guard(
        optax.chain(og.clip_by_percentile(50.0, scope="leaf", window=3), tx)
    ),
    "param norm": lambda tx: optax.chain(og.clip_by_param_norm(0.01), tx),
    "clip_params_by_norm": lambda tx: og.guard(optax.chain(tx, og.clip_params_by_norm(1.0))),
}


COLUMNS, BOTH = P(None, "y"), P("y", "x")


@pytest.mark.parametrize(
    ("form", "spec"),
    [
        ("guard", COLUMNS),
        ("stabilize", COLUMNS),
        ("rollback", COLUMNS),
        ("zscore by unit", COLUMNS),
        ("percentile by leaf", BOTH),
        ("param norm", BOTH),
        ("clip_params_by_norm", BOTH),
    ],
)
def test_matrices_may_be_split_along_any_dimension_of_an_explicit_mesh(form, spec):
    tx = FORMS[form](optax.adamw(1e-3))
    plain = random_like({"b": jnp.ones(32), "w": jnp.ones((16, 32))})
    expected, _ = jax.jit(tx.update)(plain, tx.init(plain), plain)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"b": P(spec[-1]), "w": spec}
    params = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), plain, specs
    )
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    # Of Adam's first step, 1e-3 long whatever the gradient, a few roundings.
    assertions.assert_close(updates, expected, rtol=ROUNDING, atol=1e-8)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "make", [partial(og.clip_by_norm, 0.5), og.normalize_by_ema_norm], ids=["norm", "ema"]
)
def test_rows_may_be_split_over_one_axis_and_units_over_another(make, check_vma):
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    tx = make(scope="unit", axis_name=lambda path, leaf: "d")
    split = jax.shard_map(
        lambda g: tx.update(g, tx.init(g), g)[0],
        mesh=mesh,
        in_specs=P("d", "t"),
        out_specs=P("d", "t"),
        check_vma=check_vma,
    )
    gradients = random_like(jnp.ones((4, 6)))
    whole = make(scope="unit")
    expected, _ = whole.update(gradients, whole.init(gradients), gradients)
    np.testing.assert_allclose(jax.jit(split)(gradients), expected, rtol=ROUNDING)


# Frozen and partial parameters

EYE = jnp.eye(4)
LAYERS = {"frozen": EYE, "trained": EYE}
SMALL = {"frozen": jnp.full((4, 4), 10.0), "trained": jnp.full((4, 4), 0.01)}
IS_FROZEN = {"frozen": True, "trained": False}
IS_TRAINED = {"frozen": False, "trained": True}
FREEZES = {
    "partition": lambda tx: optax.partition(
        {"go": tx, "stop": optax.set_to_zero()}, {"frozen": "stop", "trained": "go"}
    ),
    "freeze": lambda tx: optax.chain(optax.freeze(IS_FROZEN), tx),
    "freeze at last": lambda tx: optax.chain(tx, optax.freeze(IS_FROZEN)),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=IS_FROZEN),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, IS_TRAINED), optax.masked(optax.set_to_zero(), IS_FROZEN)
    ),
}
PROTECTIONS = {
    "guard": og.guard,
    "stabilize": og.stabilize,
    "with a clip": lambda tx: og.stabilize(tx, clip=og.clip_by_norm(1.0)),
}


@pytest.mark.parametrize(
    ("freeze", "protection"),
    [
        *((freeze, "with a clip") for freeze in FREEZES),
        ("partition", "stabilize"),
        ("selective_transform", "guard"),
    ],
)
def test_a_gradient_that_reaches_no_output_is_neither_measured_nor_judged(freeze, protection):
    tx = PROTECTIONS[protection](FREEZES[freeze](optax.sgd(1.0)))
    step = jax.jit(tx.update)
    updates, state = step(SMALL, tx.init(LAYERS), LAYERS)
    np.testing.assert_allclose(updates["trained"], -SMALL["trained"], rtol=ROUNDING)
    assert not np.any(updates["frozen"])
    np.testing.assert_allclose(state.leaf_norms, [0.0, 0.04], rtol=ROUNDING)
    np.testing.assert_allclose(state.grad_norm, 0.04, rtol=ROUNDING)
    assert state.unused_leaves.tolist() == [True, False]
    for name, is_skipped in (("frozen", False), ("trained", True)):
        updates, after = step(SMALL | {name: SMALL[name] * jnp.nan}, state, LAYERS)
        assert bool(after.last_step_skipped) == is_skipped
    assertions.assert_same_bits(updates, jax.tree.map(lambda leaf: -0.0 * leaf, LAYERS))


# What comes before or behind a clip, so that it no longer measures the very gradients.
CHAINS = {
    "scale, norm": (optax.scale(0.5), og.clip_by_norm(1.0)),
    "zscore, rms": (og.clip_by_zscore(), og.clip_by_rms(10.0)),
    "decay, norm by unit": (optax.add_decayed_weights(0.1), og.clip_by_norm(0.05, scope="unit")),
    "norm, l1": (og.clip_by_norm(1.0), og.add_l1(0.0)),
    "largest elements": (og.clip_by_max_ema(),),
    "scale, zeroes": (optax.scale(1.0), og.zero_nonfinite()),
    "norm of weights": (og.clip_by_param_norm(0.01, scope="global"),),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_frozen_gradient_counts_nowhere_in_a_chain(chain):
    tx = og.guard(optax.chain(*CHAINS[chain], FREEZES["partition"](optax.sgd(1.0))))
    weights = LAYERS | {"frozen": 1e3 * LAYERS["frozen"]}
    (_, state), (updates, after) = (
        jax.jit(tx.update)(SMALL | {"frozen": frozen}, tx.init(weights), weights)
        for frozen in (SMALL["frozen"], jnp.full((4, 4), jnp.inf))
    )
    alone = og.guard(optax.chain(*CHAINS[chain], optax.sgd(1.0)))
    weights, gradients = {"trained": LAYERS["trained"]}, {"trained": SMALL["trained"]}
    expected, own = alone.update(gradients, alone.init(weights), weights)
    assert not after.last_step_skipped and after.unused_leaves.tolist() == [True, False]
    np.testing.assert_allclose(updates["trained"], expected["trained"], rtol=ROUNDING)
    np.testing.assert_allclose(state.grad_norm, own.grad_norm, rtol=ROUNDING)


def test_a_clip_behind_another_still_sees_long_gradients_of_trained_weights():
    tx = og.guard(optax.chain(*CHAINS["scale, norm"], FREEZES["partition"](optax.sgd(1.0))))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, LAYERS), tx.init(LAYERS), LAYERS)
    np.testing.assert_allclose(norm_of(updates["trained"]), 1.0, rtol=ROUNDING)


def test_an_overflow_of_a_frozen_gradient_does_not_lower_the_loss_scale():
    for protect in (og.guard, og.stabilize):
        tx = og.dynamic_loss_scale(protect(FREEZES["partition"](optax.sgd(1.0))))
        state = tx.init(LAYERS)
        scaled = {"frozen": jnp.full((4, 4), jnp.inf), "trained": 0.01 * state.loss_scale * EYE}
        updates, after = jax.jit(tx.update)(scaled, state, LAYERS)
        assert after.loss_scale == state.loss_scale and after.overflows_total == 0
        np.testing.assert_allclose(updates["trained"], -0.01 * EYE, rtol=ROUNDING)


def test_updates_behind_a_frozen_gradient_are_zero_unless_they_may_be_nan():
    params = {"frozen": jnp.ones((5, 7)), "trained": jnp.eye(4)}

    def frozen_first(*rest):
        return og.guard(optax.chain(optax.freeze(IS_FROZEN), *rest))

    def selects_of_frozen(*rest):
        tx = frozen_first(*rest)
        jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        return str(jaxpr).count(":f32[5,7] = select_n")

    for optimizer in (optax.sgd(0.1), optax.sign_sgd(0.1), optax.scale(-1.0)):
        assert selects_of_frozen(optimizer) == 0
    for optimizer in (optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)):
        assert selects_of_frozen(optimizer) > 0
    tx = frozen_first(optax.scale(jnp.inf))
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    assert np.all(np.isnan(updates["frozen"]))


def test_what_a_rule_remembers_of_a_frozen_gradient_is_used():
    # A moment of it is an output, though no update follows from it.
    tx = og.guard(FREEZES["freeze at last"](optax.sgd(1.0, momentum=0.9)))
    _, state = tx.update(SMALL, tx.init(LAYERS), LAYERS)
    assert state.unused_leaves.tolist() == [False, False]
    np.testing.assert_allclose(state.grad_norm, norm_of(*SMALL.values()), rtol=ROUNDING)


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_gradients_may_be_none_where_there_is_a_parameter(protection):
    # As Equinox gives them for what ``eqx.filter_grad`` did not differentiate by.
    params = {"first": jnp.ones((2, 3)), "second": jnp.ones(3), "third": {"w": jnp.ones(4)}}
    tx = PROTECTIONS[protection](optax.sgd(0.1))
    state = tx.init(params)
    step = jax.jit(tx.update)
    # The default clip compares with parameters; the others know the leaves from ``init``.
    given = (params,) if protection == "stabilize" else ()
    good = {"first": None, "second": jnp.full(3, 0.01), "third": {"w": None}}
    updates, state = step(good, state, *given)
    np.testing.assert_allclose(updates["second"], jnp.full(3, -0.001), rtol=ROUNDING)
    assert updates["first"] is None
    assert state.unused_leaves.tolist() == [True, False, True]
    _, state = step(good | {"second": jnp.array([0.0, jnp.nan, 0.0])}, state, *given)
    assert state.last_fault_leaves.tolist() == [False, True, False]
    assert "non-finite: second" in og.explain(state, params)


def test_the_default_clip_wants_the_parameters_where_gradients_are_none():
    params = {"first": jnp.ones((2, 3)), "second": jnp.ones(3)}
    tx = og.stabilize(optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"needs the parameters where gradients are None.*params\)"
    ):
        tx.update({"first": None, "second": jnp.ones(3)}, tx.init(params))


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_quantised_parameters_stand_beside_trained_ones(protection):
    params = {"base": jnp.ones((4, 4), jnp.int8), "lora": jnp.ones((4, 4))}
    gradients = {"base": jnp.zeros((4, 4), jnp.int8), "lora": jnp.full((4, 4), 1e-3)}
    inner = optax.masked(optax.sgd(0.1, momentum=0.9), {"base": False, "lora": True})
    tx = PROTECTIONS[protection](inner)
    updates, state = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose(updates["lora"], jnp.full((4, 4), -1e-4), rtol=ROUNDING)
    assertions.assert_same_bits(updates["base"], gradients["base"])
    assert state.leaf_norms.shape == (1,)


# Infinities by design


@pytest.mark.parametrize("protection", ["guard", "stabilize"])
def test_a_mask_of_minus_infinity_among_the_parameters_is_no_poison(protection):
    params = {"mask": jnp.array([0.0, -jnp.inf, 0.0]), "w": jnp.ones(3)}
    good = {"mask": jnp.zeros(3), "w": jnp.full(3, 1e-3)}
    tx = PROTECTIONS[protection](optax.adam(1e-2))
    state = tx.init(params)
    step = jax.jit(tx.update)
    for number in range(6):
        bad = good | {"w": jnp.full(3, jnp.nan)}
        updates, state = step(bad if number == 3 else good, state, params)
    assert (int(state.skipped_total), int(state.last_fault_reason)) == (1, 1)
    assert np.all(np.isfinite(updates["w"])) and np.any(updates["w"])
    og.check(state, params)
    # What was finite and no longer is, is a poison all the same.
    _, state = step(bad, state, params | {"w": jnp.full(3, jnp.inf)})
    assert int(state.skip_reason) == og.SkipReason.GRADIENT | og.SkipReason.ALREADY_NONFINITE


def test_a_mask_of_minus_infinity_does_not_stop_a_check_of_updates():
    params = {"mask": jnp.array([0.0, -jnp.inf]), "w": jnp.ones(2)}
    good = {"mask": jnp.zeros(2), "w": jnp.ones(2)}
    tx = og.guard(optax.adam(0.1), check_update=True)
    _, state = tx.update(good, tx.init(params), params)
    assert int(state.skipped_total) == 0


def test_a_mask_of_minus_infinity_does_not_lift_a_limit_that_knows_parameters():
    params = {"mask": jnp.array([0.0, -jnp.inf]), "w": jnp.array([[3.0], [4.0]])}
    gradients = {"mask": jnp.zeros(2), "w": jnp.array([[30.0], [40.0]])}
    tx = og.clip_by_param_norm(0.1, scope="global")  # a tenth of 5
    updates, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [[0.3], [0.4]], rtol=ROUNDING)
    tx = og.clip_params_by_norm(2.5, scope="global")
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [[-1.5], [-2.0]], rtol=ROUNDING)
    assert not np.any(updates["mask"]) and int(state.clipped_total) == 1


# Accumulation


def test_the_default_clip_in_front_of_apply_every_is_refused():
    with pytest.raises(ValueError, match=r"chain\(og.stabilize\(optimizer\), optax.apply_every\(k"):
        og.stabilize(optax.chain(optax.sgd(0.1), optax.apply_every(4))).init(LAYERS)
    tx = optax.chain(og.stabilize(optax.sgd(0.1)), optax.apply_every(2))
    step, state = jax.jit(tx.update), tx.init(LAYERS)
    good = {"frozen": jnp.zeros((4, 4)), "trained": jnp.full((4, 4), 1e-3)}
    for factor, total in ((1.0, 0.0), (np.nan, -1e-4)):
        updates, state = step(jax.tree.map(lambda x, f=factor: f * x, good), state, LAYERS)
        np.testing.assert_allclose(updates["trained"], np.full((4, 4), total), rtol=ROUNDING)


# The loss

PARAMS = GRADIENTS = {"w": jnp.ones(3)}


def update_with(tx: Any, **extra_args: Any) -> Any:
    return tx.update(GRADIENTS, tx.init(PARAMS), PARAMS, **extra_args)[1]


@pytest.mark.parametrize(
    ("extra_args", "what"),
    [({}, "no loss at all"), ({"loss": 1.0, "step": 3}, "loss=, step=")],
    ids=["nothing", "other names"],
)
def test_a_condition_on_a_loss_that_never_comes_is_an_error(extra_args, what):
    tx = og.guard(optax.sgd(0.1), skip_if=og.spike(of="value"))
    with pytest.raises(ValueError, match=f"without value=; it got {what}.*value=loss.*TrainState"):
        update_with(tx, **extra_args)


@pytest.mark.parametrize(
    "value",
    [jnp.ones(4), np.ones((1,)), (jnp.float32(1), {"aux": 2.0}), jnp.complex64(1j), "1.0"],
    ids=["vector", "array of one", "with aux", "complex", "word"],
)
def test_a_loss_that_is_no_real_scalar_is_an_error(value):
    with pytest.raises(TypeError, match="value= must be the loss, a real scalar") as caught:
        update_with(og.guard(optax.sgd(0.1)), value=value)
    is_complex = isinstance(value, jax.Array) and value.dtype == jnp.complex64
    assert ("is complex" in str(caught.value)) == is_complex


@pytest.mark.parametrize(
    "value", [1, 2.5, True, np.float64(1.0), jnp.float16(3.0), jnp.int32(7)], ids=repr
)
def test_finite_losses_of_any_real_type_are_accepted(value):
    assert int(update_with(og.guard(optax.sgd(0.1)), value=value).skip_reason) == 0


# What JAX can be asked to check


@pytest.mark.parametrize("protection", ["stabilize", "with a clip"])
def test_debug_nans_stops_no_healthy_step_after_a_bad_one(protection):
    tx = PROTECTIONS[protection](optax.adam(0.1))
    params = {"w": jnp.full((2, 2), 0.5)}
    bad = {"w": jnp.full((2, 2), jnp.nan)}
    good = {"w": jnp.full((2, 2), 1e-3)}
    step = jax.jit(tx.update)
    _, state = step(bad, tx.init(params), params)
    assert bool(state.last_step_skipped)
    with jax.debug_nans(True):
        for _ in range(2):
            updates, state = step(good, state, params)
    assert np.all(np.isfinite(updates["w"])) and not bool(state.last_step_skipped)


def test_runs_equation_by_equation_with_jit_disabled():
    tx = PROTECTIONS["with a clip"](optax.sgd(0.1))
    params = {"w": jnp.full((2, 2), 0.5)}
    for value, is_skipped in ((1e-3, False), (np.nan, True)):
        gradients = {"w": jnp.full((2, 2), value)}
        expected = tx.update(gradients, tx.init(params), params)
        with jax.disable_jit():
            actual = tx.update(gradients, tx.init(params), params)
        assertions.assert_close(actual, expected, rtol=ROUNDING)
        assert bool(actual[1].last_step_skipped) == is_skipped


def test_static_extra_args_do_not_stop_an_eager_update_from_compiling_once():
    seen = []

    def update(updates, state, params=None, *, mode, **extra_args):
        seen.append(mode)
        return updates, state

    tx = og.guard(optax.GradientTransformationExtraArgs(lambda params: (), update))
    state = tx.init(PARAMS)
    for mode in ("a", "a", "b", "b", "a"):
        _, state = tx.update(GRADIENTS, state, PARAMS, mode=mode, value=1.0)
    assert seen == ["a", "b"]
