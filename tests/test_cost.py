"""What the guard costs, counted in the compiled program; nothing here is timed or run.

Programs are compiled for shapes only, so wide arrays cost nothing, and only wide ones have the
proportions of real training (one number for each unit is 1/768 of a matrix). The tree is that of a
transformer layer at the width of GPT-2, thinned out to eight arrays.

Covered: nine optimizers with every kind of rule, by unit AdamW, bfloat16 gradients, frozen
parameters, one evaluation of the inner update for each trace, a state whose signature never
changes, its bytes and arrays, and the collectives of sharded steps.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from assertions import signature
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og
from benchmarks import _hlo, _setups, collectives, step_cost

OPTIMIZERS = _setups.OPTIMIZERS
RULES = {
    "guard": "og.guard",
    "global": "og.guard, zscore",
    "leaf": "og.guard, zscore by leaf",
    "unit": "og.guard, zscore by unit",
    "default": "og.stabilize",
}
SHAPES = {
    "tokens": (4_000, 768),
    "attention/query": (768, 768),
    "attention/out": (768, 768),
    "mlp/up": (768, 3072),
    "mlp/up_bias": (3072,),
    "mlp/down": (3072, 768),
    "mlp/down_bias": (768,),
    "norm/scale": (768,),
}


@functools.cache
def tree(gradient_dtype: Any = jnp.float32) -> _setups.Tree:
    return _setups.make_tree(SHAPES, gradient_dtype=gradient_dtype)


@functools.cache
def measures(optimizer: str, pipeline: str, gradient_dtype: Any = jnp.float32) -> dict[str, Any]:
    variant = _setups.VARIANTS[pipeline]
    tx = variant.make(OPTIMIZERS[optimizer]())
    return step_cost.measure(tree(gradient_dtype), tx, is_hot=variant.is_hot)[1]


def check_cost(
    optimizer: str,
    rule: str,
    gradient_dtype: Any = jnp.float32,
    *,
    num_conditionals: int = 3,
    temp_share: float = 0.1,
) -> None:
    """The promises on cost, all of them reported together.

    Three conditionals: a rare second read, the factors, a look at the state.
    """
    bare = measures(optimizer, _setups.BARE, gradient_dtype)
    guarded = measures(optimizer, RULES[rule], gradient_dtype)
    parameters = tree(gradient_dtype)
    added = {name: guarded[name] - bare[name] for name in bare}
    reads = added["hot_bytes"] / parameters.gradient_bytes
    # Statistics for each unit are small, not nothing: XLA on CPU reads about ten numbers to write
    # one. This term is below 1e-4 for the other scopes.
    allowed_reads = 1.05 + 12 * added["state_bytes"] / parameters.gradient_bytes
    # Muon alone needs seven times the parameters' memory, which no schedule repeats exactly.
    allowed_temp = temp_share * max(parameters.params_bytes, bare["temp_bytes"])
    broken = []
    if not reads <= allowed_reads:
        broken.append(f"reads and writes {reads:.3f} x gradients more, not {allowed_reads:.3f}")
    if added["num_large_copies"] > 0:
        broken.append(f"makes {added['num_large_copies']} more copies as large as a parameter")
    if not added["temp_bytes"] <= allowed_temp:
        broken.append(f"needs {added['temp_bytes']:,} bytes of temporaries more")
    if guarded["num_conditionals"] > num_conditionals:
        broken.append(f"has {guarded['num_conditionals']} conditionals, not {num_conditionals}")
    if guarded["num_host_transfers"]:
        broken.append("moves data to the host")
    assert not broken, f"{RULES[rule]} against bare {optimizer}: " + "; ".join(broken)


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        pytest.param(
            optimizer,
            rule,
            marks=[pytest.mark.slow] * (optimizer != "adamw" and rule != "global"),
        )
        for optimizer in OPTIMIZERS
        for rule in RULES
        if rule != "default" and (optimizer == "adamw" or rule != "unit")
    ],
)
def test_one_read_of_the_gradients_is_all_that_a_guard_adds(optimizer, rule):
    check_cost(optimizer, rule)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_nor_does_the_default_of_stabilize_add_more_in_most_steps(optimizer):
    # Two conditionals more, to sort the first norms and to probe; a step that probes Adam writes
    # one array down.
    check_cost(optimizer, "default", num_conditionals=5, temp_share=1.0)


@pytest.mark.parametrize("rule", ["guard", "global", "leaf"])
def test_bfloat16_gradients_are_read_once_more_in_bfloat16(rule):
    check_cost("adamw", rule, jnp.bfloat16)


def test_the_default_reads_bfloat16_gradients_once_more_too():
    check_cost("adamw", "default", jnp.bfloat16, num_conditionals=5, temp_share=1.0)


def test_one_array_costs_no_more_than_many():
    one = _setups.make_tree({"kernel": (4096, 4096)})
    (_, bare), (_, guarded) = (
        step_cost.measure(one, tx, is_hot=True)
        for tx in (optax.adamw(0.1), og.stabilize(optax.adamw(0.1), clip=og.clip_by_zscore()))
    )
    assert guarded["hot_bytes"] <= bare["hot_bytes"] + 1.05 * one.gradient_bytes
    assert guarded["num_large_copies"] == 0
    assert guarded["temp_bytes"] <= 0.01 * one.params_bytes


@pytest.mark.parametrize("check_update", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_inner_update_is_traced_once_and_the_state_keeps_its_signature(optimizer, check_update):
    inner = optax.with_extra_args_support(OPTIMIZERS[optimizer]())
    num_traces = 0

    def update(updates, state, params=None, **extra_args):
        nonlocal num_traces
        num_traces += 1
        return inner.update(updates, state, params, **extra_args)

    counted = optax.GradientTransformationExtraArgs(inner.init, update)
    tx = og.stabilize(counted, clip=og.clip_by_zscore(), check_update=check_update)
    params = tree().params
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(tx.update, params, state, params)
    assert num_traces == 1
    assert signature(after) == signature(state)


def compile_sharded(pipeline: str, layout: str) -> _hlo.Program:
    """On 8 virtual devices, each matrix and vector cut as the layout says."""
    layout = collectives.LAYOUTS[layout]
    axes = tuple(layout.axes) if layout.by_hand else None
    tx = collectives.VARIANTS[pipeline](optax.adamw(0.1), axes)
    return _hlo.analyze(collectives.compile_sharded(tx, SHAPES, layout)[0])


@pytest.mark.parametrize(
    "pipeline", ["og.guard", "og.stabilize", "og.guard, zscore", "og.guard, zscore by leaf"]
)
@pytest.mark.parametrize("layout", ["fully sharded", "tensor-parallel"])
def test_sharded_step_needs_one_all_reduce_of_one_number_a_leaf(layout, pipeline):
    program = compile_sharded(pipeline, layout)
    (only,) = program.hot.collectives
    assert only.kind == "all-reduce"
    assert only.size <= len(SHAPES)
    assert {each.kind for each in program.dear.collectives} == {"all-reduce"}


def test_sharding_over_two_axes_needs_as_many_all_reduces_as_optax_does():
    layout = "fully sharded x tensor-parallel"
    ours = compile_sharded("og.guard, zscore", layout).hot.collectives
    theirs = compile_sharded("clip_by_global_norm", layout).hot.collectives
    assert sorted(ours) == sorted(theirs)


def test_replicated_gradients_need_no_collective():
    program = compile_sharded("og.guard, zscore", "data-parallel")
    assert program.hot.collectives == program.dear.collectives == []


@pytest.mark.parametrize("pipeline", ["og.guard", "og.guard, zscore", "og.guard, zscore by unit"])
def test_shard_map_step_needs_one_all_reduce(pipeline):
    program = compile_sharded(pipeline, "shard_map")
    (only,) = program.hot.collectives
    assert only.kind == "all-reduce"
    units = sum(np.prod(shape[1:], dtype=int) for shape in SHAPES.values())
    # At three scales, and whether parameters were non-finite already.
    assert only.size <= 3 * (units if "unit" in pipeline else len(SHAPES)) + 1
    # All devices run the same collectives, whatever their data.
    assert sorted(program.dear.collectives) == sorted(program.hot.collectives)


def test_the_default_of_stabilize_needs_one_more_to_measure_the_optimizer():
    found = compile_sharded("og.stabilize", "shard_map").hot.collectives
    assert [each.kind for each in found] == ["all-reduce"] * 2
    assert sorted(each.size for each in found) == [3 * len(SHAPES), 3 * len(SHAPES) + 1]


def test_by_unit_no_norm_leaves_the_device_that_needs_it():
    found = compile_sharded("og.guard, zscore by unit", "tensor-parallel").hot.collectives
    assert {each.kind for each in found} == {"all-reduce"}
    assert sum(each.size for each in found) <= sum(max(shape) for shape in SHAPES.values())


def test_gradients_of_a_sharded_batch_need_no_second_all_reduce_of_their_size():
    """Data-parallel from end to end: the backward pass reduces the gradients, the guard nothing."""
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    tx = og.stabilize(optax.adamw(0.1), clip=og.clip_by_zscore())

    def loss(params, inputs):
        return jnp.mean(jnp.square(inputs @ params["kernel"] + params["bias"]))

    def step(params, state, inputs):
        gradients = jax.grad(loss)(params, inputs)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = {"kernel": jnp.zeros((32, 16)), "bias": jnp.zeros(16)}
    arguments = (params, tx.init(params), jnp.zeros((64, 32)))
    jitted = jax.jit(step, in_shardings=(whole, whole, split), out_shardings=whole)
    found = _hlo.analyze(jitted.lower(*arguments).compile()).hot.collectives
    assert {each.kind for each in found} == {"all-reduce"}
    assert sum(each.size for each in found) == 32 * 16 + 16


# Frozen parameters: XLA drops gradients that reach no output, and sums with zero, unless a guard
# keeps them alive


LORA = {f"layer{i}": {"w": (512, 512), "a": (512, 16), "b": (16, 512)} for i in range(4)}
FROZEN_BYTES = 4 * 4 * 512 * 512


@functools.cache
def lora_step(name: str) -> tuple[float, _hlo.Cost]:
    """Floating point operations, of the dearest branches, and what a healthy step does."""
    params = {layer: _setups.make_tree(shapes).params for layer, shapes in LORA.items()}
    labels = {layer: {"w": "freeze", "a": "train", "b": "train"} for layer in LORA}
    bare = optax.partition({"train": optax.adamw(1e-3), "freeze": optax.set_to_zero()}, labels)
    tx = {
        "bare": lambda: bare,
        "guard": lambda: og.guard(bare),
        "zscore": lambda: og.stabilize(bare, clip=og.clip_by_zscore()),
        "stabilize": lambda: og.stabilize(bare),
        "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), bare),
    }[name]()

    def loss(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer["w"] + x @ layer["a"] @ layer["b"])
        return jnp.mean((x - 1) ** 2)

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    batch = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    arguments = (params, jax.eval_shape(tx.init, params), batch)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    return compiled.cost_analysis()["flops"], _hlo.analyze(compiled).hot


@pytest.mark.parametrize("name", ["guard", "zscore", "stabilize"])
def test_frozen_parameters_cost_neither_arithmetic_nor_bytes(name):
    flops, cost = lora_step(name)
    bare_flops, bare_cost = lora_step("bare")
    assert flops <= 1.05 * bare_flops
    # What is trained is a sixteenth of it, and XLA lays that out differently.
    assert cost.num_bytes <= bare_cost.num_bytes + 0.1 * FROZEN_BYTES


def test_a_clip_of_optax_does_compute_them():
    assert lora_step("clip")[0] > 1.2 * lora_step("bare")[0]


# Bytes and arrays of the states, as the docstrings tell them


OF = {"a": jnp.ones(2), "b": jnp.ones((3, 2)), "c": jnp.ones((2, 2))}
NUM_ARRAYS, NUM_UNITS, NUM_BYTES = 3, 5, 48  # of OF
SGD = optax.sgd(0.1)


def guarded(optimizer: Any = SGD, **options: Any) -> Any:
    return og.guard(optimizer, **options)


# What is documented where, an instance, the bytes that this makes for OF, and arrays.
STATES = {
    "clip_by_norm": (og.clip_by_norm, "20 bytes of state", og.clip_by_norm(1.0), 20, 2),
    "clip_by_norm-unit": (
        og.clip_by_norm, "20 bytes of state", og.clip_by_norm(1.0, scope="unit"), 20, 2,
    ),
    "clip_by_rms": (og.clip_by_rms, "20 bytes of state", og.clip_by_rms(), 20, 2),
    "clip_by_zscore": (
        og.clip_by_zscore, "44 bytes of state for scope \"global\"", og.clip_by_zscore(), 44, 3,
    ),
    "clip_by_zscore-leaf": (
        og.clip_by_zscore, "24 more for each group of the others",
        og.clip_by_zscore(scope="leaf"), 20 + 24 * NUM_ARRAYS, 3,
    ),
    "clip_by_zscore-unit": (
        og.clip_by_zscore, "24 more for each group of the others",
        og.clip_by_zscore(scope="unit"), 20 + 24 * NUM_UNITS, 2 + NUM_ARRAYS,
    ),
    "clip_by_percentile": (
        og.clip_by_percentile, "4 kB of state for a window of 1000", og.clip_by_percentile(),
        20 + 4 * 1001, 3,
    ),
    "clip_by_median": (
        og.clip_by_median, "428 bytes of state for scope \"global\"", og.clip_by_median(), 428, 3,
    ),
    "clip_by_median-leaf": (
        og.clip_by_median, "408 more for each group of the others",
        og.clip_by_median(scope="leaf"), 20 + 408 * NUM_ARRAYS, 3,
    ),
    "clip_by_ema": (
        og.clip_by_ema, "20 bytes of state, and 20 for each group", og.clip_by_ema(),
        20 + 20 * NUM_ARRAYS, 3,
    ),
    "clip_by_param_norm": (
        og.clip_by_param_norm, "20 bytes of state", og.clip_by_param_norm(), 20, 2,
    ),
    "clip_by_max_ema": (
        og.clip_by_max_ema, "20 bytes of state, and 8 for each array", og.clip_by_max_ema(),
        20 + 8 * NUM_ARRAYS, 3,
    ),
    "clip_by_relative_change": (
        og.clip_by_relative_change, "20 bytes of state", og.clip_by_relative_change(), 20, 2,
    ),
    "normalize_and_scale": (
        og.normalize_and_scale, "20 bytes of state", og.normalize_and_scale(), 20, 2,
    ),
    "normalize_and_scale-auto": (
        og.normalize_and_scale, "and 412 bytes of state for each group",
        og.normalize_and_scale("auto"), 20 + 412, 3,
    ),
    "normalize_by_ema_norm": (
        og.normalize_by_ema_norm, "20 bytes of state, and 12 for each group",
        og.normalize_by_ema_norm(), 20 + 12 * NUM_ARRAYS, 3,
    ),
    "clip_params": (og.clip_params, "20 bytes of state", og.clip_params(-1, 1), 20, 2),
    "clip_params_by_norm": (
        og.clip_params_by_norm, "20 bytes of state", og.clip_params_by_norm(1.0), 20, 2,
    ),
    "add_l1": (og.add_l1, "4 bytes of state", og.add_l1(0.1), 4, 1),
    "zero_nonfinite": (
        og.states.ZeroNonfiniteState, "12 bytes and 4 for each float leaf", og.zero_nonfinite(),
        12 + 4 * NUM_ARRAYS, 1,
    ),
    "clip_by_update_ratio": (
        og.clip_by_update_ratio, "840 bytes of state, 12 more for each array",
        og.clip_by_update_ratio(SGD), 840 + 12 * NUM_ARRAYS, 2,
    ),
    "guard": (
        og.states.GuardState,
        "44 bytes, 16 for each row (float leaf, or layer of a stacked one), and 4 for each float "
        "leaf of parameters and inner state",
        guarded(optax.trace(0.9)), 44 + 16 * NUM_ARRAYS + 4 * 2 * NUM_ARRAYS + NUM_BYTES, 2 + 3,
    ),
    "guard-stacked": (
        og.states.GuardState, "16 for each row (float leaf, or layer of a stacked one)",
        guarded(stacked=lambda path, _: path == "b"),
        44 + 16 * (NUM_ARRAYS + 2) + 4 * NUM_ARRAYS, 2,
    ),
    "guard-spike": (
        og.states.SpikeState, "4 bytes for each place in the window, and 8",
        guarded(skip_if=og.spike(window=16)), 44 + 20 * NUM_ARRAYS + 4 * 16 + 8, 4,
    ),
    "dynamic_loss_scale": (
        og.states.DynamicLossScaleState, "that of the wrapped optimizer, and 28 bytes",
        og.dynamic_loss_scale(SGD), 28, 2,
    ),
    "backoff": (
        og.backoff, "8 bytes of state", og.backoff(guarded()), 44 + 20 * NUM_ARRAYS + 8, 4,
    ),
    "rollback": (
        og.states.RollbackState, "a copy of the run, and 20 bytes", og.rollback(guarded()),
        44 + 20 * NUM_ARRAYS + NUM_BYTES + 20, 2 + 3 + 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_states_are_as_small_as_their_docstrings_tell(name):
    documented, words, tx, num_bytes, num_arrays = STATES[name]
    assert words in " ".join(documented.__doc__.split())
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, OF))
    assert (_setups.num_bytes(leaves), len(leaves)) == (num_bytes, num_arrays)
    assert all(leaf.size for leaf in leaves)
