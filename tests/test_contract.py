"""Promises that every public transformation keeps, checked over the rows of ``registry.py``.

Six steps are the common ground of most tests here: two ordinary gradients, one with a NaN, an
ordinary one, one 100 times longer, and a zero one. ``run`` goes through them in a ``lax.scan``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import pickle
from typing import Any

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from flax import serialization
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og

# Sums of at most 96 float32 terms in another order, over six steps: a few units of 1.2e-7 each.
ROUNDING = 1e-6

PARAMS = registry.tree()
BAD_STEP = 2
NUM_STEPS = 6


def make_steps() -> list[Any]:
    steps = [registry.gradients(step) for step in range(NUM_STEPS)]
    bad = steps[BAD_STEP]
    steps[BAD_STEP] = bad | {"kernel": bad["kernel"].at[3, 1].set(jnp.nan)}
    steps[5] = jax.tree.map(jnp.zeros_like, bad)
    return steps


STEPS = make_steps()
STACKED = jax.tree.map(lambda *leaves: jnp.stack(leaves), *STEPS)
VALUES = jnp.array([2.0, 1.9, 1.8, 1.7, 1.6, 1.5])


# What takes long, or is owed to what all share, is tried on these first, and on the others with
# ``-m slow``.
DIVERSE = (
    "clip_by_norm",
    "clip_by_zscore",
    "clip_by_update_ratio",
    "normalize_and_scale",
    "guard-adam",
)


def is_alike(row: registry.Row) -> bool:
    return row.name not in DIVERSE


class Compiled:
    """A transformation with its compiled functions, shared by the tests of one worker.

    Attributes:
      tx: the transformation.
      donating_step: jitted ``(updates, state, params, value) -> (updates, state)``, which takes
        the buffers of the state.
      num_traces: how often it was traced.
      run: jitted ``(params, stacked updates, values) -> (stacked updates, last state)``.
    """

    def __init__(self, row: registry.Row):
        self.tx = row.make()
        self.num_traces = 0

        def step(updates, state, params, value):
            self.num_traces += 1
            return self.tx.update(updates, state, params, value=value)

        self.donating_step = jax.jit(step, donate_argnums=1)
        self.run = jax.jit(functools.partial(run, self.tx))

    def step(self, updates: Any, state: Any, params: Any, value: Any) -> tuple[Any, Any]:
        """The same on a copy of the state."""
        return self.donating_step(updates, jax.tree.map(jnp.copy, state), params, value)

    def walk(self, steps: Any = STEPS) -> tuple[list[Any], list[Any]]:
        """Updates of every step, and the states before and after each."""
        states, updates = [self.tx.init(PARAMS)], []
        for gradients, value in zip(steps, VALUES, strict=False):
            update, state = self.step(gradients, states[-1], PARAMS, value)
            updates.append(update)
            states.append(state)
        return updates, states


def run(tx: Any, params: Any, stacked: Any, values: jax.Array) -> tuple[Any, Any]:
    """All updates, stacked, and the last state."""

    def body(state, inputs):
        gradients, value = inputs
        updates, state = tx.update(gradients, state, params, value=value)
        return state, updates

    state, updates = lax.scan(body, tx.init(params), (stacked, values))
    return updates, state


@functools.cache
def _compiled(name: str) -> Compiled:
    return Compiled(next(row for row in registry.ROWS if row.name == name))


def is_variant(row: registry.Row) -> bool:
    return row.is_variant


def rows(keep: Any = lambda row: True, *, is_slow: Any = is_variant, variants: bool = False) -> Any:
    """Parametrises a test over the rows to keep, some of them only with ``-m slow``."""
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(row, id=row.name, marks=[pytest.mark.slow] * bool(is_slow(row)))
            for row in registry.ROWS
            if keep(row) and (variants or not row.is_variant)
        ],
    )


# What a wrapper holds for others: its optimizer's state, and copies of that and of parameters.
NOT_OWN = ("inner_state", "snapshot_params", "snapshot_state")


def own_states(state: Any) -> list[Any]:
    """All states of this library in a state."""
    found = [state] if type(state).__module__.startswith("optax_guard") else []
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, tuple) else ()
    return found + [own for part in parts for own in own_states(part)]


def arrays_of(own: Any) -> list[Any]:
    """What one state of this library holds for itself."""
    pairs = zip(own._fields, own, strict=True)
    return jax.tree.leaves([part for field, part in pairs if field not in NOT_OWN])


def own_leaves(state: Any) -> list[Any]:
    """Leaves of the library's own states, those of a wrapped optimizer left out."""
    return [leaf for own in own_states(state) for leaf in arrays_of(own)]


# The registry itself


def public_factories() -> dict[str, Any]:
    """Everything public that returns a transformation."""
    factories = {}
    for name in og.__all__:
        value = getattr(og, name)
        if inspect.isfunction(value):
            result = str(inspect.signature(value).return_annotation)
            if "GradientTransformation" in result:
                factories[name] = value
    return factories


def test_every_public_transformation_has_a_row():
    assert len(public_factories()) >= 7
    assert set(public_factories()) <= {row.name.partition("-")[0] for row in registry.ROWS}


# A pair of bounds belongs together; a mask comes second in ``optax.add_decayed_weights``, too.
TWO_POSITIONAL = ("clip_params", "add_l1")


@pytest.mark.parametrize("name", public_factories())
def test_only_the_first_argument_is_positional(name):
    parameters = list(inspect.signature(public_factories()[name]).parameters.values())
    allowed = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    num_positional = 2 if name in TWO_POSITIONAL else 1
    assert all(parameter.kind in allowed for parameter in parameters[num_positional:])


# Structure


@rows()
def test_is_a_transformation_with_extra_args_whose_third_argument_is_params(row):
    tx = _compiled(row.name).tx
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    parameters = inspect.signature(tx.update).parameters
    assert list(parameters)[2] == "params"
    assert any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@rows(variants=True)
def test_state_keeps_structure_shapes_dtypes_and_weak_types(row):
    compiled = _compiled(row.name)
    _, states = compiled.walk()
    expected = assertions.signature(jax.eval_shape(compiled.tx.init, PARAMS))
    abstract_params = jax.eval_shape(lambda: PARAMS)
    assert assertions.signature(jax.eval_shape(compiled.tx.init, abstract_params)) == expected
    for state in states:
        assert assertions.signature(state) == expected
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(states[0]))
    # Some trainers call ``init`` with shapes, to plan memory.
    by_shapes = compiled.tx.init(abstract_params)
    assert jax.tree.structure(by_shapes) == jax.tree.structure(states[0])
    shapes = [[leaf.shape for leaf in jax.tree.leaves(x)] for x in (by_shapes, states[0])]
    assert shapes[0] == shapes[1]


@rows(variants=True)
def test_state_is_a_few_strong_arrays_none_of_them_empty(row):
    state = jax.eval_shape(_compiled(row.name).tx.init, PARAMS)
    for own in own_states(state):
        by_unit = own.history if isinstance(getattr(own, "history", None), tuple) else ()
        # A state by unit holds an array for each of the tree, at most; a guard or wrapper one
        # more for each of its conditions.
        limit = 3 if isinstance(own, og.states.RuleState) else 5
        assert len(arrays_of(own)) <= max(limit, 2 + len(PARAMS) * bool(by_unit)), type(own)
    for leaf in own_leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_)
        assert not leaf.weak_type
    assert all(leaf.size for leaf in jax.tree.leaves(state))


@rows()
def test_traces_once_for_an_input_signature(row):
    compiled = _compiled(row.name)
    before = compiled.num_traces  # 1 where another test has compiled it
    compiled.walk()
    compiled.walk()
    assert compiled.num_traces <= before + 1


COUNTERS = ("steps", "step", "total", "in_a_row", "since_snapshot")


@rows()
def test_counters_saturate(row):
    largest = jnp.iinfo(jnp.int32).max
    compiled = _compiled(row.name)

    def counters(own):
        return [name for name in getattr(own, "_entries", {}) if name.endswith(COUNTERS)]

    def fill(node):
        if not hasattr(node, "_entries"):
            return node
        filled = {name: largest for name in counters(node)}
        parts = {name: fill_all(getattr(node, name)) for name in NOT_OWN if hasattr(node, name)}
        return node._replace(**filled, **parts)

    def fill_all(tree):
        return jax.tree.map(fill, tree, is_leaf=lambda node: hasattr(node, "_entries"))

    before = fill_all(compiled.tx.init(PARAMS))
    for gradients in (STEPS[0], STEPS[BAD_STEP]):
        _, after = compiled.step(gradients, before, PARAMS, VALUES[0])
        for own in own_states(after):
            assert all(getattr(own, name) >= 0 for name in counters(own))


@rows()
def test_state_of_another_transformation_is_refused(row):
    other = og.clip_by_rms() if row.name.startswith("clip_by_norm") else og.clip_by_norm(1.0)
    with pytest.raises(TypeError, match="another transformation"):
        row.make().update(STEPS[0], other.init(PARAMS), PARAMS)


@rows(is_slow=is_alike)
def test_leaves_that_belong_to_parameters_can_be_mapped(row):
    tx = row.make()
    state = tx.init(PARAMS)
    mapped = optax.tree_map_params(tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    trees = [jax.tree.leaves(tree) for tree in (state, mapped)]
    num_mapped = sum(bool(jnp.any(one != other)) for one, other in zip(*trees, strict=True))
    shapes = [leaf.shape for leaf in jax.tree.leaves(PARAMS)]
    like_params = [leaf for leaf in trees[0] if leaf.shape in shapes]
    assert num_mapped == len(like_params)


# Arguments of update


# Traced only: what the tests of this part find out does not depend on values.


@rows()
def test_unknown_extra_args_are_accepted(row):
    tx = _compiled(row.name).tx
    state = jax.eval_shape(tx.init, PARAMS)
    result = jax.eval_shape(
        lambda *args: tx.update(*args, unknown=jnp.ones(3), value_fn=jnp.sum, note="a word"),
        *(STEPS[0], state, PARAMS),
    )
    assert assertions.signature(result) == assertions.signature((PARAMS, state))


@rows()
def test_params_may_be_left_out_where_they_are_not_needed(row):
    tx = _compiled(row.name).tx
    state = jax.eval_shape(tx.init, PARAMS)
    if row.needs_params:
        with pytest.raises(ValueError, match="without params"):
            jax.eval_shape(tx.update, STEPS[0], state)
    else:
        result = jax.eval_shape(tx.update, STEPS[0], state)
        assert assertions.signature(result) == assertions.signature((PARAMS, state))


@rows(lambda row: row.wrap)
def test_wrappers_forward_extra_args(row):
    def update(updates, state, params=None, *, factor, **extra_args):
        assert set(extra_args) == {"value", "label"}
        assert extra_args["label"] == "a word"
        return jax.tree.map(lambda leaf: leaf * factor * extra_args["value"], updates), state

    inner = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    tx = row.wrap(inner)
    small = jax.tree.map(lambda leaf: leaf * 1e-3, STEPS[0])  # below every clip
    updates, _ = tx.update(small, tx.init(PARAMS), PARAMS, factor=2.0, value=3.0, label="a word")
    assertions.assert_close(updates, jax.tree.map(lambda leaf: leaf * 6, small), rtol=ROUNDING)


@rows(lambda row: row.wrap)
def test_wrappers_drop_extra_args_that_the_inner_rejects(row):
    def update(updates, state, params=None, *, factor=1.0):
        return jax.tree.map(lambda leaf: leaf * factor, updates), state

    tx = row.wrap(optax.GradientTransformationExtraArgs(optax.identity().init, update))
    step = functools.partial(tx.update, factor=2.0, value=3.0, unknown=1)
    updates, _ = jax.eval_shape(step, STEPS[0], tx.init(PARAMS), PARAMS)
    assert assertions.signature(updates) == assertions.signature(PARAMS)


# Transformations of JAX


@rows(variants=True, is_slow=is_alike)
def test_scan_gives_what_a_loop_gives(row):
    compiled = _compiled(row.name)
    updates, states = compiled.walk()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *updates)
    actual = compiled.run(PARAMS, STACKED, VALUES)
    assertions.assert_close(actual, (stacked, states[-1]), rtol=ROUNDING, atol=ROUNDING)


@rows(is_slow=is_alike)
def test_vmap_gives_what_single_runs_give(row):
    compiled = _compiled(row.name)
    healthy = jax.tree.map(lambda leaf: jnp.nan_to_num(leaf) * 0.5, STACKED)
    singles = [compiled.run(PARAMS, steps, VALUES) for steps in (STACKED, healthy)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), STACKED, healthy)
    actual = jax.jit(jax.vmap(functools.partial(run, compiled.tx), in_axes=(None, 0, None)))(
        PARAMS, batch, VALUES
    )
    assertions.assert_close(actual, expected, rtol=ROUNDING, atol=ROUNDING)


@rows(is_slow=is_alike)
def test_state_can_be_donated(row):
    compiled = _compiled(row.name)
    _, expected = compiled.walk()
    for init in (compiled.tx.init, jax.jit(compiled.tx.init)):
        old = init(PARAMS)  # two fields in one buffer would be an error
        _, state = compiled.donating_step(STEPS[0], old, PARAMS, VALUES[0])
        # Fields that no output depends on are not read, hence not given away.
        assert any(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        _, state = compiled.donating_step(STEPS[1], state, PARAMS, VALUES[1])
        assertions.assert_same_bits(state, expected[2])


@rows(is_slow=is_alike)
def test_state_survives_pickling_and_msgpack(row):
    compiled = _compiled(row.name)
    _, states = compiled.walk()
    packed = serialization.to_bytes(states[3])
    for restored in (
        pickle.loads(pickle.dumps(states[3])),
        serialization.from_bytes(compiled.tx.init(PARAMS), packed),
    ):
        assertions.assert_same_bits(restored, states[3])
        expected = compiled.step(STEPS[3], states[3], PARAMS, VALUES[3])
        assertions.assert_same_bits(compiled.step(STEPS[3], restored, PARAMS, VALUES[3]), expected)


# Without ``jit``, and under what JAX can check

_compilations: list[str] = []


def _note_compilation(event: str, *_: Any, **__: Any) -> None:
    if "backend_compile" in event:
        _compilations.append(event)


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


@rows(is_slow=is_alike)
def test_eager_update_compiles_nothing_after_its_first_calls(row):
    tx = row.make()
    state = tx.init(PARAMS)
    for number, gradients in enumerate(STEPS[:5]):
        if number == BAD_STEP + 1:
            _compilations.clear()
        _, state = tx.update(gradients, state, PARAMS)
    assert not _compilations


@rows(variants=True)
def test_no_number_in_a_state_is_nan_after_a_bad_step(row):
    _, states = _compiled(row.name).walk()
    for state in states[BAD_STEP : BAD_STEP + 3]:
        for leaf in jax.tree.leaves(state):
            assert leaf.dtype == jnp.int32 or jnp.all(jnp.isfinite(leaf))


# A look for leaks forgets all that JAX has traced; what could leak is the same for many rules.
FOR_LEAKS = ("clip_by_zscore", "clip_by_norm-unit", "clip_by_update_ratio", "rollback")


@rows(variants=True, is_slow=is_alike)
def test_passes_the_checks_of_jax_wherever_plain_sgd_does(row):
    tx = row.wrap(optax.sgd(0.1)) if row.wrap else row.make()
    params = PARAMS | {"kernel": PARAMS["kernel"].astype(jnp.bfloat16)}
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.checking_leaks() if row.name in FOR_LEAKS else contextlib.nullcontext(),
    ):
        state = tx.init(params)
        step = lambda updates, state: tx.update(updates, state, params, value=VALUES[0])  # noqa: E731
        assert jax.make_jaxpr(step)(params, state).out_avals


def _subjaxprs(jaxpr: Any) -> Any:
    """A jaxpr and, with their equations, all jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _subjaxprs(inner)


def host_equations(function: Any, *args: Any) -> list[str]:
    names = [equation.primitive.name for equation in _subjaxprs(jax.make_jaxpr(function)(*args))]
    return [name for name in names if any(part in name for part in ("callback", "debug", "feed"))]


def test_host_equations_are_found_inside_branches():
    def talks(x):
        return lax.cond(x > 0, lambda: jax.debug.print("x") or x, lambda: x)

    assert host_equations(jax.jit(talks), 1.0)


@rows()
def test_update_never_talks_to_the_host(row):
    compiled = _compiled(row.name)
    state = compiled.tx.init(PARAMS)
    update = lambda *args: compiled.tx.update(*args, value=VALUES[0])  # noqa: E731
    assert host_equations(update, STEPS[0], state, PARAMS) == []


# Derivatives


def objective(tx: Any, offsets: Any, middle: Any) -> jax.Array:
    """A weighted sum of the updates of three steps, of which ``middle`` is the second."""
    dtype = jax.tree.leaves(middle)[0].dtype
    params, weights, first, last = (registry.tree(dtype, seed) for seed in (0, 90, 91, 92))
    params = jax.tree.map(jnp.add, params, offsets["params"])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, middle, last)
    stacked = jax.tree.map(jnp.add, stacked, offsets["gradients"])
    updates, _ = run(tx, params, stacked, 1 + offsets["values"])
    products = jax.tree.map(lambda update, weight: jnp.sum(update * weight), updates, weights)
    return sum(jax.tree.leaves(products))


def zero_offsets(dtype: Any) -> dict[str, Any]:
    params = jax.tree.map(jnp.zeros_like, registry.tree(dtype))
    gradients = jax.tree.map(lambda leaf: jnp.zeros((3, *leaf.shape), leaf.dtype), params)
    return {"params": params, "gradients": gradients, "values": jnp.zeros(3, dtype)}


def direction_like(offsets: Any) -> Any:
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), offsets)


def derivatives(tx: Any, dtype: Any) -> Any:
    """Jitted ``middle -> (gradient of the objective, its derivative along a direction)``."""
    offsets = zero_offsets(dtype)
    direction = direction_like(offsets)

    def both(middle):
        function = lambda offsets: objective(tx, offsets, middle)  # noqa: E731
        return jax.grad(function)(offsets), jax.jvp(function, (offsets,), (direction,))[1]

    return jax.jit(both)


def middle_steps(row: registry.Row) -> dict[str, Any]:
    ordinary = STEPS[1]
    cases = {"ordinary": ordinary}
    if row.is_smooth:
        cases["zero"] = jax.tree.map(jnp.zeros_like, ordinary)
        cases["tiny"] = jax.tree.map(lambda leaf: leaf * 1e-30, ordinary)
    if row.wrap:
        cases["nan"] = STEPS[BAD_STEP]
        cases["inf"] = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), ordinary)
    return cases


@rows(is_slow=is_alike)
def test_derivatives_are_finite_and_agree_in_both_modes(row):
    compute = derivatives(_compiled(row.name).tx, jnp.float32)
    direction = direction_like(zero_offsets(jnp.float32))
    for case, middle in middle_steps(row).items():
        gradient, forward = compute(middle)
        terms = [
            np.sum(np.asarray(g, np.float64) * np.asarray(d, np.float64))
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        ]
        sizes = [
            np.sum(np.abs(np.asarray(g, np.float64) * np.asarray(d, np.float64)))
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        ]
        assert np.isfinite(forward), case
        assert np.all(np.isfinite(terms)), case
        # float32 rounding of both modes, relative to the sum of the sizes of the terms.
        np.testing.assert_allclose(forward, sum(terms), atol=1e-5 * sum(sizes), err_msg=case)


# One guard stands for all, since the rest of a derivative is that of its inner optimizer.
@rows(lambda row: row.wrap is None or row.name in DIVERSE, is_slow=is_alike)
def test_derivative_is_that_of_the_formula(row, x64):
    tx = row.make()

    def along(distance):
        middle = registry.gradients(1, jnp.float64)
        offsets = zero_offsets(jnp.float64)
        direction = direction_like(offsets)
        moved = jax.tree.map(lambda offset, step: offset + distance * step, offsets, direction)
        return objective(tx, moved, middle)

    step = 1e-5
    distances = jnp.array([-step, 0.0, step])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(along)))(distances)
    # Error of a central difference: step**2 times a third derivative of order 1 to 100.
    difference = (values[2] - values[0]) / (2 * step)
    np.testing.assert_allclose(slopes[1], difference, rtol=1e-6, atol=1e-7)


# Devices


def mesh(axis_type: Any = AxisType.Auto) -> Any:
    assert jax.device_count() == 8
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def specs(tree: Any, leading: int = 0) -> Any:
    """Sharded where the axis after ``leading`` ones is the 16 rows of a parameter."""

    def spec(leaf):
        is_param = leaf.shape[leading : leading + 1] == (16,)
        return P(*[None] * leading, "data") if is_param else P()

    return jax.tree.map(spec, tree)


def shard(tree: Any, specs: Any, axis_type: Any = AxisType.Auto) -> Any:
    place = mesh(axis_type)
    return jax.tree.map(lambda leaf, s: jax.device_put(leaf, NamedSharding(place, s)), tree, specs)


# What a partitioner does with sums depends on the scope, not on the rule.
FEW = ("clip_by_norm", "clip_by_norm-leaf", "clip_by_norm-unit", "guard-adam", "stabilize")


@rows(is_slow=lambda row: row.name not in FEW, variants=True)
def test_sharded_jit_equals_one_device(row):
    compiled = _compiled(row.name)
    expected = compiled.run(PARAMS, STACKED, VALUES)
    params, stacked = shard(PARAMS, specs(PARAMS)), shard(STACKED, specs(STACKED, leading=1))
    actual = compiled.run(params, stacked, VALUES)
    assertions.assert_close(actual, expected, rtol=ROUNDING, atol=ROUNDING)


# The axes of a mesh are explicit by default: their shardings are part of types, and every form of
# sum and select must accept them. One row for each form; more of them in ``test_setups.py``.
FORMS = (
    *("clip_by_max_ema", "clip_by_relative_change", "zero_nonfinite-leaf", "clip_by_norm-unit"),
    *("clip_by_norm", "guard-adam", "stabilize", "normalize_by_ema_norm", "rollback"),
    "clip_params_by_norm",
)


@rows(lambda row: row.name in FORMS, is_slow=lambda row: row.name not in FORMS[:3], variants=True)
def test_jit_on_an_explicit_mesh_equals_one_device(row):
    expected = _compiled(row.name).run(PARAMS, STACKED, VALUES)
    params = shard(PARAMS, specs(PARAMS), AxisType.Explicit)
    stacked = shard(STACKED, specs(STACKED, leading=1), AxisType.Explicit)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        actual = jax.jit(functools.partial(run, row.make()))(params, stacked, VALUES)
    assertions.assert_close(actual, expected, rtol=ROUNDING, atol=ROUNDING)


def sharded_run(row: registry.Row) -> Any:
    state = jax.eval_shape(row.make().init, PARAMS)
    return jax.shard_map(
        functools.partial(run, row.make(axis_name="data")),
        mesh=mesh(),
        in_specs=(specs(PARAMS), specs(STACKED, leading=1), P()),
        out_specs=(specs(STACKED, leading=1), specs(state)),
    )


@rows(is_slow=lambda row: is_alike(row) and row.name not in FEW, variants=True)
def test_shard_map_with_axis_name_equals_one_device(row):
    expected = _compiled(row.name).run(PARAMS, STACKED, VALUES)
    actual = jax.jit(sharded_run(row))(PARAMS, STACKED, VALUES)
    assertions.assert_close(actual, expected, rtol=ROUNDING, atol=ROUNDING)


@rows()
def test_no_collective_sits_under_a_branch(row):
    jaxpr = jax.make_jaxpr(sharded_run(row))(PARAMS, STACKED, VALUES)
    equations = list(_subjaxprs(jaxpr))
    is_collective = lambda equation: "psum" in equation.primitive.name  # noqa: E731
    assert any(map(is_collective, equations))
    for equation in equations:
        if equation.primitive.name in ("cond", "while"):
            bodies = equation.params.get("branches") or [equation.params["body_jaxpr"]]
            inside = [inner for body in bodies for inner in _subjaxprs(body.jaxpr)]
            assert not any(map(is_collective, inside))


def guarded(axis_name: Any) -> Any:
    """As the row "guard-adam", over these axes."""
    return next(row for row in registry.ROWS if row.name == "guard-adam").make(axis_name=axis_name)


def test_state_may_be_made_outside_of_the_mesh():
    tx, one_device = guarded("data"), _compiled("guard-adam")
    state = tx.init(PARAMS)
    step = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=mesh(),
            in_specs=(specs(PARAMS), specs(state), specs(PARAMS)),
            out_specs=(specs(PARAMS), specs(state)),
        )
    )
    expected, expected_states = one_device.walk(STEPS[:3])
    for gradients, expected_updates in zip(STEPS[:3], expected, strict=True):
        updates, state = step(gradients, state, PARAMS)
        assertions.assert_close(updates, expected_updates, rtol=ROUNDING, atol=ROUNDING)
    assertions.assert_close(state, expected_states[-1], rtol=ROUNDING, atol=ROUNDING)


def test_pmap_with_axis_name_equals_one_device():
    tx, one_device = guarded("data"), _compiled("guard-adam")
    split = lambda leaf: leaf.reshape(8, 2, *leaf.shape[1:])  # noqa: E731
    step = jax.pmap(lambda gradients: tx.update(gradients, tx.init(gradients)), axis_name="data")
    for gradients in (STEPS[0], STEPS[BAD_STEP]):
        updates, state = step(jax.tree.map(split, gradients))
        (expected,), (_, expected_state) = one_device.walk([gradients])
        joined = jax.tree.map(lambda leaf, own: leaf.reshape(own.shape), updates, expected)
        assertions.assert_close(joined, expected, rtol=ROUNDING, atol=ROUNDING)
        np.testing.assert_array_equal(state.skip_reason, 8 * [int(expected_state.skip_reason)])
        np.testing.assert_allclose(state.grad_norm, 8 * [expected_state.grad_norm], rtol=ROUNDING)


# Dtypes and trees


def mixed_tree(dtypes: Any, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    values = {str(np.dtype(dtype)): jnp.asarray(rng.normal(size=(4, 3)), dtype) for dtype in dtypes}
    return values


LOW_AND_SINGLE = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64)


@rows()
def test_updates_keep_their_dtypes_and_statistics_are_float32(row):
    """Traced only; values of most dtypes are in ``odd_tree``."""
    tx = row.make()
    gradients = mixed_tree(LOW_AND_SINGLE, seed=1)
    state = jax.eval_shape(tx.init, gradients)
    updates, new_state = jax.eval_shape(tx.update, gradients, state, gradients)
    assert assertions.signature(updates) == assertions.signature(gradients)
    assert assertions.signature(new_state) == assertions.signature(state)
    assert all(leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_) for leaf in own_leaves(state))


@rows(variants=True)
def test_dtypes_where_float64_is_allowed(row, x64):
    """Traced only; the derivatives above are computed in float64."""
    tx = row.make()
    only_single = (jnp.float32, jnp.int32, jnp.bool_)
    for dtypes, allowed in (
        ((jnp.float32,), only_single),
        ((jnp.float32, jnp.float64), (jnp.float64, *only_single)),
        ((jnp.complex128,), (jnp.float64, *only_single)),
    ):
        gradients = mixed_tree(dtypes, seed=1)
        state = jax.eval_shape(tx.init, gradients)
        updates, new_state = jax.eval_shape(tx.update, gradients, state, gradients)
        assert assertions.signature(updates) == assertions.signature(gradients)
        assert assertions.signature(new_state) == assertions.signature(state)
        assert all(leaf.dtype in allowed for leaf in own_leaves(state))


@rows(lambda row: row.wrap)
def test_gradients_may_have_another_dtype_than_parameters(row):
    tx = row.make() if row.on_bad != "passes" else og.guard(row.make())
    state = tx.init(PARAMS)
    step = jax.jit(tx.update)
    for gradients, is_bad in ((STEPS[0], False), (STEPS[BAD_STEP], True)):
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), gradients)
        updates, new_state = step(narrow, state, PARAMS)
        assert assertions.signature(new_state) == assertions.signature(state)
        assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates))
        assert bool(og.step_ok(new_state)) != is_bad


def odd_tree() -> dict[str, Any]:
    return {
        "bool": jnp.array([True, False]),
        "bfloat16": jnp.array([0.5, -2.0], jnp.bfloat16),
        "complex": jnp.array([1 + 2j, 0.5j], jnp.complex64),
        "empty": jnp.zeros((0, 3)),
        "float16": jnp.array([300.0, 1e-4], jnp.float16),
        "int": jnp.array([[1, -2]], jnp.int8),
        "masked": optax.MaskedNode(),
        "none": None,
        "uint": jnp.array(7, jnp.uint32),
        "w": jnp.array([[3.0, -0.0], [4.0, 1e-3]]),
    }


def with_identity(row: registry.Row) -> Any:
    """The transformation; a wrapper with an inner that lets integers through."""
    return row.wrap(optax.identity()) if row.wrap else row.make()


@rows(is_slow=is_alike)
def test_leaves_that_are_no_floats_pass_untouched_beside_floats_of_all_kinds(row):
    tx = with_identity(row)
    params = odd_tree() | {"float0": jnp.int32(3)}
    state = tx.init(params)

    @jax.jit
    def step(x, state):
        # What jax.grad gives for an integer leaf: a float0 array.
        float0 = jax.grad(lambda count: 2.0 * x, allow_int=True)(3)
        gradients = odd_tree() | {"float0": float0}
        updates, state = tx.update(gradients, state, params)
        result = updates.pop("float0")
        assert (result.shape, result.dtype) == (float0.shape, jax.dtypes.float0)
        return updates, state

    for _ in range(2):
        updates, state = step(1.0, state)
        for name in ("bool", "empty", "int", "uint"):
            assertions.assert_same_bits(updates[name], params[name])
        assert updates["none"] is None
        assert updates["masked"] == optax.MaskedNode()
        for name in ("bfloat16", "complex", "float16", "w"):
            assert updates[name].dtype == params[name].dtype
            assert jnp.all(jnp.isfinite(updates[name]))


# That a masked leaf is no leaf at all is the same for every rule.
@rows(is_slow=lambda row: row.name not in ("clip_by_norm", "clip_by_zscore", "guard-adam"))
def test_masked_leaves_are_left_out(row):
    mask = {"bias": False, "conv": True, "kernel": True}
    tx = row.make()
    masked = optax.masked(tx, mask)
    state = masked.init(PARAMS)
    alone = {name: leaf for name, leaf in PARAMS.items() if mask[name]}
    state_alone = tx.init(alone)
    for gradients in STEPS[:2]:
        updates, state = masked.update(gradients, state, PARAMS)
        kept = {name: leaf for name, leaf in gradients.items() if mask[name]}
        expected, state_alone = tx.update(kept, state_alone, alone)
        assertions.assert_same_bits(updates.pop("bias"), gradients["bias"])
        assertions.assert_same_bits(updates, expected)
    assertions.assert_same_bits(jax.tree.leaves(state), jax.tree.leaves(state_alone))


@rows(is_slow=is_alike)
def test_empty_trees_work(row):
    tx = row.make()
    state = jax.eval_shape(tx.init, {})
    assert assertions.signature(jax.eval_shape(tx.update, {}, state, {})[1]) == (
        assertions.signature(state)
    )
    empty = {"none": None, "w": jnp.zeros((0, 2))}
    state = tx.init(empty)
    updates, new_state = tx.update(empty, state, empty)
    assertions.assert_same_bits(updates, empty)
    assert assertions.signature(new_state) == assertions.signature(state)
    for leaf in jax.tree.leaves(new_state):
        assert jnp.all(jnp.isfinite(leaf.astype(jnp.float32)))


# Hyperparameters


@rows(lambda row: row.inject, is_slow=is_alike, variants=True)
def test_thresholds_can_be_injected(row):
    inject = row.inject
    injected = optax.inject_hyperparams(inject.factory, static_args=inject.static_args)
    tx = injected(**inject.traced, **inject.fixed)
    plain = inject.factory(**inject.traced, **inject.fixed)
    traces = []

    @jax.jit
    def step(gradients, state):
        traces.append(1)
        return tx.update(gradients, state, PARAMS)

    state, plain_state = tx.init(PARAMS), plain.init(PARAMS)
    assert set(inject.traced) <= set(state.hyperparams)
    plain_step = jax.jit(plain.update)
    for gradients in STEPS:
        updates, state = step(gradients, state)
        expected, plain_state = plain_step(gradients, plain_state, PARAMS)
        # Constants are folded in one of the two programs: rounding.
        assertions.assert_close(updates, expected, rtol=ROUNDING, atol=ROUNDING)
    assertions.assert_close(state.inner_state, plain_state, rtol=ROUNDING, atol=ROUNDING)
    assert len(traces) == 1

    first = next(iter(inject.traced))
    before, _ = step(STEPS[4], state)
    state.hyperparams[first] = state.hyperparams[first] * 0.5
    after, _ = step(STEPS[4], state)
    assert len(traces) == 1
    assert any(
        jnp.any(one != other)
        for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


# The bad step

BAD_VALUES = {"nan": np.nan, "minus_inf": -np.inf}


def spoil(gradients: Any, value: float) -> Any:
    return gradients | {"kernel": gradients["kernel"].at[3, 1].set(value)}


@rows(lambda row: row.on_bad == "passes", variants=True)
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_bad_step_stays_visible_and_changes_no_state(row, bad):
    compiled = _compiled(row.name)
    _, states = compiled.walk()
    for state in (states[0], states[4]):
        gradients = spoil(STEPS[1], BAD_VALUES[bad])
        updates, new_state = compiled.step(gradients, state, PARAMS, VALUES[0])
        assertions.assert_same_bits(new_state, state)
        element = updates["kernel"][3, 1]
        assert bool(jnp.isnan(element)) if bad == "nan" else not jnp.isfinite(element)


@rows(lambda row: row.on_bad == "skips", variants=True)
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_bad_step_is_skipped(row, bad):
    compiled = _compiled(row.name)
    _, states = compiled.walk()
    for state in (states[0], states[4]):
        gradients = spoil(STEPS[1], BAD_VALUES[bad])
        updates, new_state = compiled.step(gradients, state, PARAMS, VALUES[0])
        nothing = jax.tree.map(lambda leaf: -jnp.zeros_like(leaf), PARAMS)
        assertions.assert_same_bits(updates, nothing)
        assertions.assert_same_bits(new_state.inner_state, state.inner_state)
        assertions.assert_same_bits(new_state.condition_states, state.condition_states)
        assert int(new_state.skip_reason) == 1
        assert int(new_state.guard_step) == int(state.guard_step) + 1


@rows(lambda row: row.on_bad == "reacts", variants=True)
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_bad_step_is_skipped_and_reacted_to(row, bad):
    compiled = _compiled(row.name)
    _, states = compiled.walk()
    for state in (states[0], states[4]):
        gradients = spoil(STEPS[1], BAD_VALUES[bad])
        updates, new_state = compiled.step(gradients, state, PARAMS, VALUES[0])
        nothing = jax.tree.map(lambda leaf: -jnp.zeros_like(leaf), PARAMS)
        assertions.assert_same_bits(updates, nothing)
        assertions.assert_same_bits(optimizer_leaves(new_state), optimizer_leaves(state))
        assert not og.step_ok(new_state)
        pairs = zip(arrays_of(state), arrays_of(new_state), strict=True)
        assert any(bool(jnp.any(one != other)) for one, other in pairs)


def optimizer_leaves(state: Any) -> list[Any]:
    """Leaves of the optimizer's state inside all wrappers."""
    while type(state).__module__.startswith("optax_guard"):
        state = state.inner_state
    return jax.tree.leaves(state)


@rows(lambda row: row.on_bad == "zeroes", variants=True)
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_bad_elements_are_zeroed(row, bad):
    compiled = _compiled(row.name)
    gradients = spoil(STEPS[1], BAD_VALUES[bad])
    updates, _ = compiled.step(gradients, compiled.tx.init(PARAMS), PARAMS, VALUES[0])
    assertions.assert_same_bits(updates["kernel"][3, 1], jnp.float32(0))
    assertions.assert_same_bits(updates["bias"], gradients["bias"])
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates))


@rows(lambda row: row.on_bad == "skips")
def test_run_with_faulty_steps_ends_where_the_healthy_steps_end(row):
    compiled = _compiled(row.name)
    healthy = [gradients for step, gradients in enumerate(STEPS[:4]) if step != BAD_STEP]
    updates, states = compiled.walk(STEPS[:4])
    expected_updates, expected_states = compiled.walk(healthy)
    assertions.assert_same_bits(updates[-1], expected_updates[-1])
    assertions.assert_same_bits(states[-1].inner_state, expected_states[-1].inner_state)


# Checkpoints


@pytest.mark.slow
@rows(lambda row: row.name in DIVERSE)
def test_state_survives_orbax(row, tmp_path):
    import orbax.checkpoint as ocp

    compiled = _compiled(row.name)
    _, states = compiled.walk()
    abstract = jax.eval_shape(compiled.tx.init, PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", states[4])
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assertions.assert_same_bits(restored, states[4])
    assert assertions.signature(restored) == assertions.signature(states[4])
    expected = compiled.step(STEPS[3], states[4], PARAMS, VALUES[3])
    assertions.assert_same_bits(compiled.step(STEPS[3], restored, PARAMS, VALUES[3]), expected)


@pytest.mark.parametrize("make", [og.clip_by_norm, og.clip_by_param_norm])
def test_units_are_those_of_the_whole_array_when_each_device_holds_one_row(make):
    kernel = jnp.arange(24.0).reshape(8, 3)
    params, spec = {"kernel": kernel + 1}, {"kernel": P("data")}
    expected, expected_state = make(0.5, scope="unit").update(
        {"kernel": kernel}, make(0.5, scope="unit").init(params), params
    )
    tx = make(0.5, scope="unit", axis_name="data")
    step = jax.shard_map(tx.update, mesh=mesh(), in_specs=(spec, P(), spec), out_specs=(spec, P()))
    updates, state = jax.jit(step)({"kernel": kernel}, tx.init(params), params)
    assertions.assert_close(updates, expected, rtol=ROUNDING, atol=ROUNDING)
    assertions.assert_close(state, expected_state, rtol=ROUNDING, atol=ROUNDING)
