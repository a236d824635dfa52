"""Small arrays, which are reduced in stacks where nothing can be sharded: as on a single device.

Everything else is tested under eight devices, where only ``shard_map`` stacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og
from benchmarks import _setups, step_cost

NUM_SMALL = 30


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[pytest.MonkeyPatch]:
    """As on a machine with one device; programs traced for eight are dropped."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield patch
    jax.clear_caches()


def tree(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Vectors of two lengths and scales from 1e-30 to 1e30, with larger arrays between them."""
    rng = np.random.default_rng(0)
    shapes = {f"{i:03d}": (5,) if i % 3 else (4, 3) for i in range(NUM_SMALL)}
    shapes |= {"010 large": (200, 100), "020 other": (7,), "025 scalar": ()}
    scales = np.geomspace(1e-4, 1e4, len(shapes)) if dtype == jnp.float16 else None
    scales = np.geomspace(1e-30, 1e30, len(shapes)) if scales is None else scales
    rng.shuffle(scales)
    return {
        name: jnp.asarray(rng.normal(size=shape) * scale, dtype)
        for (name, shape), scale in zip(shapes.items(), scales, strict=True)
    }


def norm_of(leaf: jax.Array) -> float:
    return float(np.linalg.norm(np.asarray(leaf).astype(np.float64).ravel()))


def test_nothing_is_stacked_beside_other_devices(one_device):
    tx = og.guard(optax.identity())
    jax.clear_caches()
    with one_device.context() as patch:
        patch.setattr(jax, "device_count", lambda: 8)
        assert not contains_stack(tx, tree())
    jax.clear_caches()


def contains_stack(tx: optax.GradientTransformation, params: Any) -> bool:
    text = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
    return "[20,5]" in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_norms_of_small_arrays_are_each_ones_own(dtype):
    gradients = tree(dtype)
    expected = [norm_of(gradients[name]) for name in sorted(gradients)]
    tx = og.guard(optax.identity())
    assert contains_stack(tx, gradients)
    _, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    # Beside a leaf of 1e30 those below 1e-19 read as zero.
    np.testing.assert_allclose(state.leaf_norms, expected, rtol=1e-5, atol=1e-18)
    np.testing.assert_allclose(state.grad_norm, np.linalg.norm(expected), rtol=1e-5)

    tx = og.normalize_and_scale(1.0, scope="leaf")
    result, _ = jax.jit(tx.update)(gradients, tx.init(gradients))
    rtol = 1e-5 if dtype == jnp.float32 else 2.0**-7
    for name, leaf in gradients.items():
        np.testing.assert_allclose(norm_of(result[name]), 1.0, rtol=rtol)
        assert result[name].dtype == leaf.dtype


def test_a_bad_small_array_is_named_and_spoils_no_other():
    gradients = jax.tree.map(jnp.ones_like, tree())
    expected = np.asarray([norm_of(gradients[name]) for name in sorted(gradients)])
    bad = {"001": jnp.nan, "016": jnp.inf, "029": -jnp.inf}
    spoiled = gradients | {
        name: jnp.full_like(gradients[name], value) for name, value in bad.items()
    }
    tx = og.guard(optax.identity())
    _, state = jax.jit(tx.update)(spoiled, tx.init(spoiled))
    is_bad = np.asarray([name in bad for name in sorted(gradients)])
    assert state.last_fault_leaves.tolist() == is_bad.tolist()
    np.testing.assert_allclose(state.leaf_norms[~is_bad], expected[~is_bad], rtol=1e-5)


def test_poison_is_found_in_every_array():
    params = jax.tree.map(jnp.ones_like, tree())
    tx = og.guard(optax.adam(0.1))
    state = tx.init(params)
    bad = params | {"029": params["029"].at[0].set(jnp.nan)}
    update = jax.jit(tx.update)
    assert int(update(bad, state, params)[1].skip_reason) == 1
    adam, *rest = state.inner_state
    for name in params:
        last = tuple(size - 1 for size in params[name].shape)
        poisoned = params | {name: params[name].at[last].set(jnp.inf)}
        _, after = update(bad, state, poisoned)
        assert int(after.skip_reason) == 1 + 16, name
        inner_state = (adam._replace(mu=poisoned), *rest)
        _, after = update(bad, state._replace(inner_state=inner_state), params)
        assert int(after.skip_reason) == 1 + 16, name


def test_an_infinity_of_init_excuses_no_array_of_its_stack():
    inner = optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau())
    params = {"scalar": jnp.float32(2.0), "w": jnp.array([1.0, -1.0])}
    tx = og.guard(inner)
    state = tx.init(params)
    assert state.initially_nonfinite.sum() == 1
    bad = {"scalar": jnp.float32(1.0), "w": jnp.array([jnp.nan, 1.0])}
    _, after = tx.update(bad, state, params, value=1.0)
    assert int(after.skip_reason) == 1
    _, after = tx.update(bad, state, params | {"scalar": jnp.float32(jnp.nan)}, value=1.0)
    assert int(after.skip_reason) == 1 + 16


def test_many_small_arrays_take_few_kernels_more():
    many = _setups.make_tree({f"array{i:03d}": (256,) for i in range(150)})
    _, bare = step_cost.measure(many, optax.adamw(0.1), is_hot=False)
    _, guarded = step_cost.measure(many, og.guard(optax.adamw(0.1)), is_hot=True)
    assert guarded["num_kernels"] <= bare["num_kernels"] + 60
    # Read, copied and read again.
    assert guarded["hot_bytes"] <= bare["hot_bytes"] + 3.5 * many.gradient_bytes


def test_what_has_a_mesh_is_not_stacked_on_any_machine():
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("x",))
    params = jax.device_put({f"{i}": jnp.ones(5) for i in range(64)}, NamedSharding(mesh, P()))
    tx = og.guard(optax.identity())
    assert "[64,5]" not in str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))


def test_the_shards_of_shard_map_are_stacked():
    mesh = Mesh(np.asarray(jax.devices()), ("x",))
    params = {f"{i}": jnp.ones(40) for i in range(64)}
    tx = og.guard(optax.identity(), axis_name="x")

    def update(gradients):
        return tx.update(gradients, tx.init(gradients))[1].grad_norm

    mapped = jax.shard_map(update, mesh=mesh, in_specs=P("x"), out_specs=P())
    assert "[64,5]" in str(jax.make_jaxpr(mapped)(params))
    np.testing.assert_allclose(jax.jit(mapped)(params), np.sqrt(64 * 40), rtol=1e-6)
