"""Norms over the full range of every dtype and for every scope, against float64 in NumPy.

They are looked at from outside: by what ``clip_by_norm`` and ``normalize_and_scale`` return.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any, NamedTuple

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard._core.arrays import rounded

SHAPES = {"bias": (5,), "kernel": (4, 3), "conv": (2, 2, 1, 3)}
# The contract's bound on clipped and normalised norms.
NORM_RTOL = 1e-5
# A float16 or bfloat16 result is the exact one rounded to 11 or 8 bits of mantissa; one more
# such rounding covers a float32 factor that falls on the other side of a tie.
ULP = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def rows_of_kernels(path: str, leaf: Any) -> tuple[int, ...] | None:
    return (-1,) if path == "kernel" else None


SCOPES = {"global": "global", "leaf": "leaf", "unit": "unit", "callable": rows_of_kernels}


def oracle_norms(tree: dict[str, Any], scope: str) -> dict[str, np.ndarray]:
    """float64 norm of the group of every element, with the shape of its leaf."""
    wide = {name: np.abs(np.asarray(leaf).astype(np.complex128)) for name, leaf in tree.items()}
    if scope == "global":
        total = math.sqrt(sum(float(np.sum(leaf**2)) for leaf in wide.values()))
        return {name: np.full(leaf.shape, total) for name, leaf in wide.items()}
    unit_axes = {0: None, 1: None, 2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}
    norms = {}
    for name, leaf in wide.items():
        axes = unit_axes[leaf.ndim] if scope == "unit" else None
        if scope == "callable" and name == "kernel":
            axes = (1,)
        summed = np.sum(leaf**2, axis=axes, keepdims=True)
        norms[name] = np.broadcast_to(np.sqrt(summed), leaf.shape)
    return norms


def tree_of(dtype: Any, scale: float, seed: int = 0) -> dict[str, jax.Array]:
    """Elements of magnitude 0.25 to 1 times ``scale``, of both signs."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        values = rng.uniform(0.25, 1.0, shape) * rng.choice([-1.0, 1.0], shape) * scale
        return jnp.asarray(values.astype(dtype))

    return {name: leaf(shape) for name, shape in SHAPES.items()}


@functools.partial(jax.jit, static_argnames="scope")
def clipped(tree, max_norm, scope):
    tx = og.clip_by_norm(max_norm, scope=SCOPES[scope])
    return tx.update(tree, tx.init(tree))[0]


@functools.partial(jax.jit, static_argnames="scope")
def normalized(tree, alpha, scope):
    tx = og.normalize_and_scale(alpha, scope=SCOPES[scope])
    return tx.update(tree, tx.init(tree))[0]


def as_float64(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)


def _real_parts(leaf: Any) -> list[np.ndarray]:
    wide = as_float64(leaf)
    return [wide.real, wide.imag] if np.iscomplexobj(wide) else [wide]


def check_elements(actual: Any, tree: Any, factors: Any, rtol: float, atol: float) -> None:
    assert assertions.signature(actual) == assertions.signature(tree)
    for name, leaf in tree.items():
        tiny = float(jnp.finfo(leaf.dtype).tiny)
        parts = zip(_real_parts(actual[name]), _real_parts(leaf), strict=True)
        for one, original in parts:
            expected = original * factors[name]
            may_flush = (np.abs(expected) < tiny) & (one == 0)
            expected = np.where(may_flush, 0, expected)
            np.testing.assert_allclose(one, expected, rtol=rtol, atol=atol, err_msg=name)


SCALES = {
    "float32": [1e-37, 1e-30, 1e-22, 1e-19, 3e-19, 1e-10, 1.0, 1e10, 1e18, 1e19, 1e20, 1e30, 3e38],
    "bfloat16": [1e-37, 1e-30, 1e-19, 1.0, 1e19, 1e30, 3e38],
    "float16": [2e-7, 1e-4, 1.0, 300.0, 6e4],
}
RANGES = [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales]
# One after the other, so that every scope meets every fourth range; the rest is slow.
CORNERS = [
    pytest.param(*corner, scope, marks=[pytest.mark.slow] * ((place + number) % len(SCOPES) > 0))
    for number, corner in enumerate(RANGES)
    for place, scope in enumerate(SCOPES)
]


@pytest.mark.parametrize(("dtype", "scale", "scope"), CORNERS)
def test_clipped_and_normalized_norms_match_float64_at_every_scale(dtype, scale, scope):
    tree = tree_of(dtype, scale)
    norms = oracle_norms(tree, scope)
    smallest = min(float(np.min(norm)) for norm in norms.values())
    # float16 subnormals have an absolute spacing; float32 and bfloat16 ones are not reached.
    spacing = 2.0**-24 if dtype == "float16" else 0.0

    limit = min(0.5 * smallest, 2e38)  # a float32 itself
    factors = {name: limit / norm for name, norm in norms.items()}
    actual = clipped(tree, limit, scope)
    check_elements(actual, tree, factors, ULP[dtype], spacing)

    factors = {name: 1.0 / norm for name, norm in norms.items()}
    actual = normalized(tree, 1.0, scope)
    check_elements(actual, tree, factors, ULP[dtype], spacing)
    if dtype == "float32":
        for norm in oracle_norms(actual, scope).values():
            np.testing.assert_allclose(norm, 1.0, rtol=NORM_RTOL)


@pytest.mark.parametrize("scope", SCOPES)
def test_large_gradients_are_clipped_to_one(scope):
    for scale in (1e3, 1e19, 1e30, 3e38):
        result = clipped(tree_of("float32", scale), 1.0, scope)
        for norm in oracle_norms(result, scope).values():
            np.testing.assert_allclose(norm, 1.0, rtol=NORM_RTOL)


@pytest.mark.parametrize("scope", SCOPES)
def test_float64_norms_are_right_over_its_range(scope, x64):
    for scale in (1e-300, 1e-150, 1e-37, 1.0, 1e150, 1e300):
        tree = tree_of("float64", scale)
        # NumPy's squares overflow here as everywhere; the oracle works on the tree over scale.
        norms = oracle_norms({k: np.asarray(leaf) / scale for k, leaf in tree.items()}, scope)
        factors = {name: 1.0 / norm / scale for name, norm in norms.items()}
        # float64 all the way: a few hundred units of 2.2e-16.
        check_elements(normalized(tree, 1.0, scope), tree, factors, 1e-13, 0.0)
        limit = 0.5 * min(float(np.min(norm)) for norm in norms.values())
        factors = {name: limit / norm for name, norm in norms.items()}
        check_elements(clipped(tree, limit * scale, scope), tree, factors, 1e-13, 0.0)


@pytest.mark.parametrize("scope", SCOPES)
def test_complex_norms_count_both_parts(scope):
    for scale in (1e-37, 1e-20, 1.0, 1e20, 1e38):
        real, imag = tree_of("float32", scale, seed=1), tree_of("float32", scale, seed=2)
        tree = {name: jax.lax.complex(real[name], imag[name]) for name in real}
        norms = oracle_norms(tree, scope)
        limit = 0.5 * min(float(np.min(norm)) for norm in norms.values())
        result = clipped(tree, min(limit, 1e38), scope)
        factors = {name: min(limit, 1e38) / norm for name, norm in norms.items()}
        check_elements(result, tree, factors, NORM_RTOL, 0.0)


@pytest.mark.parametrize("scope", SCOPES)
def test_dtypes_mix_in_a_tree(scope):
    tree = {
        "bias": tree_of("float16", 300.0)["bias"],
        "kernel": tree_of("bfloat16", 200.0)["kernel"],
        "conv": tree_of("float32", 100.0)["conv"],
    }
    norms = oracle_norms(tree, scope)
    result = clipped(tree, 1.0, scope)
    for name, leaf in tree.items():
        assert result[name].dtype == leaf.dtype
        assert result[name].shape == leaf.shape
        np.testing.assert_allclose(
            as_float64(result[name]),
            as_float64(leaf) / norms[name],
            rtol=ULP[str(leaf.dtype)],
        )


def test_leaves_of_very_different_scale_keep_their_own_norms():
    scales = {"bias": 1e-30, "kernel": 1.0, "conv": 1e30}
    tree = {name: tree_of("float32", scale)[name] for name, scale in scales.items()}
    for scope in ("leaf", "unit", "callable"):
        norms = oracle_norms(tree, scope)
        factors = {name: 1.0 / norm for name, norm in norms.items()}
        check_elements(normalized(tree, 1.0, scope), tree, factors, NORM_RTOL, 0.0)


def test_columns_of_very_different_scale_keep_their_own_norms():
    kernel = jnp.outer(jnp.array([3.0, 4.0]), jnp.array([1e-36, 1.0, 1e37]))
    result = normalized({"kernel": kernel}, 1.0, "unit")["kernel"]
    expected = np.outer([0.6, 0.8], [1.0, 1.0, 1.0])
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=NORM_RTOL)


def test_float16_norm_beyond_255_does_not_overflow():
    result = clipped({"w": jnp.full((4,), 300, jnp.float16)}, 1.0, "global")
    assertions.assert_same_bits(result, {"w": jnp.full((4,), 0.5, jnp.float16)})


def test_rounding_to_bfloat16_is_that_of_jax_for_every_kind_of_number():
    random = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = (np.arange(2**16, dtype=np.uint32) << 16) + 0x8000
    bits = np.concatenate([random, ties, ties - 1, ties + 1, ties - 0x8000])
    numbers = jnp.asarray(bits.view(np.float32))
    found = jax.jit(lambda x: rounded(x, jnp.bfloat16))(numbers)
    wanted = numbers.astype(jnp.bfloat16)
    is_number = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), ~is_number)
    assertions.assert_same_bits(found[is_number], wanted[is_number])


def test_rounding_to_bfloat16_has_the_derivative_of_a_conversion():
    x, along = jnp.float32(1.0), jnp.float32(3.0)
    _, moved = jax.jvp(lambda x: rounded(x, jnp.bfloat16), (x,), (along,))
    assert (moved, moved.dtype) == (3.0, jnp.bfloat16)
    assert jax.grad(lambda x: rounded(x, jnp.bfloat16).astype(jnp.float32))(x) == 1.0


def test_bfloat16_sums_lose_no_terms():
    tree = {"w": jnp.ones((100_000,), jnp.bfloat16)}
    state = guarded_state(tree)
    np.testing.assert_allclose(state.grad_norm, math.sqrt(1e5), rtol=NORM_RTOL)


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_long_sums_are_accurate(scope):
    values = np.random.default_rng(0).normal(size=300_000).astype(np.float32)
    result = normalized({"w": jnp.asarray(values)}, 1.0, scope)
    np.testing.assert_allclose(oracle_norms(result, "global")["w"][0], 1.0, rtol=NORM_RTOL)


@jax.jit
def guarded_state(tree):
    tx = og.guard(optax.identity())
    return tx.update(tree, tx.init(tree))[1]


@pytest.mark.parametrize("scale", [0.0, 1e-37, 1e-19, 1.0, 1e19, 1e37])
def test_guard_reports_norms_over_the_full_range(scale):
    tree = tree_of("float32", scale)
    state = guarded_state(tree)
    leaf_norms = [oracle_norms(tree, "leaf")[name].flat[0] for name in sorted(SHAPES)]
    assert state.leaf_norms.dtype == state.grad_norm.dtype == jnp.float32
    assert state.leaf_norms.shape == (3,)
    np.testing.assert_allclose(state.leaf_norms, leaf_norms, rtol=NORM_RTOL)
    np.testing.assert_allclose(
        state.grad_norm, oracle_norms(tree, "global")["bias"][0], rtol=NORM_RTOL
    )


def test_norm_of_finite_elements_saturates_instead_of_becoming_infinite():
    tree = {"w": jnp.full((100,), 3e38), "v": jnp.full((9,), -3e38)}
    state = guarded_state(tree)
    assert not bool(state.last_step_skipped)
    assert np.all(np.isfinite(state.leaf_norms))
    assert float(state.grad_norm) == np.finfo(np.float32).max


@pytest.mark.parametrize("size", [3, 5_000, 40_000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_is_seen_in_arrays_of_any_size(size, bad):
    # XLA:CPU drops NaN from maxima of arrays above some thousand elements.
    for place in (0, size // 2, size - 1):
        tree = {"w": jnp.ones((size,)).at[place].set(bad)}
        state = guarded_state(tree)
        assert int(state.skip_reason) == 1
        assert bool(np.isnan(state.grad_norm)) == bool(np.isnan(bad))
        assert not np.isfinite(state.grad_norm)


def test_vmapped_norms_cover_the_range_row_by_row():
    scales = jnp.array([1e-37, 1e-20, 1.0, 1e20, 1e38])
    rows = jnp.array([0.3, -0.4]) * scales[:, None]
    tx = og.normalize_and_scale(1.0)
    result = jax.jit(jax.vmap(lambda row: tx.update(row, tx.init(row))[0]))(rows)
    np.testing.assert_allclose(result, np.tile([0.6, -0.8], (5, 1)), rtol=NORM_RTOL)


# Zero, and below the threshold


@pytest.mark.parametrize("scope", SCOPES)
def test_zero_stays_exactly_zero(scope):
    zeros = tree_of("float32", 0.0)
    zeros["bias"] = -jnp.abs(zeros["bias"])  # -0.0
    assertions.assert_same_bits(clipped(zeros, 1.0, scope), zeros)
    assertions.assert_same_bits(normalized(zeros, 1.0, scope), zeros)


@pytest.mark.parametrize("scope", ["global", "unit"])
def test_derivatives_at_zero_are_finite(scope):
    zeros = tree_of("float32", 0.0)

    def total(tree, threshold):
        one, other = clipped(tree, threshold, scope), normalized(tree, threshold, scope)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves((one, other)))

    @jax.jit
    def both(*arguments):
        reverse = jax.grad(total, argnums=(0, 1))(*arguments)
        return reverse, jax.jvp(total, arguments, jax.tree.map(jnp.ones_like, arguments))[1]

    slopes = both(zeros, jnp.float32(1.0))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slopes))
    # Clipping leaves a small gradient alone, hence a slope of one for each of its elements.
    assert slopes[1] >= sum(leaf.size for leaf in zeros.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("scope", SCOPES)
def test_what_lies_below_the_threshold_passes_bit_for_bit(dtype, scope):
    smallest = float(jnp.finfo(dtype).tiny)
    values = np.array([[-0.0, 0.0, smallest], [1 / 3, -2 / 3, 0.1]])
    if dtype == "complex64":
        values = values + 1j * np.array([[-0.0, -0.0, 1.0], [0.3, 0.0, -smallest]])
    tree = {"kernel": jnp.asarray(values.astype(dtype)), "bias": jnp.asarray(-0.0, dtype)}
    assertions.assert_same_bits(clipped(tree, 10.0, scope), tree)
    assertions.assert_same_bits(clipped(tree, np.inf, scope), tree)


def test_norm_equal_to_the_limit_passes_bit_for_bit():
    tree = {"w": jnp.array([3.0, 4.0])}
    assertions.assert_same_bits(clipped(tree, 5.0, "global"), tree)


def test_limit_of_zero_gives_zero():
    for scale in (1e-30, 1.0, 1e30):
        for leaf in clipped(tree_of("float32", scale), 0.0, "leaf").values():
            np.testing.assert_array_equal(leaf, np.zeros(leaf.shape, np.float32))


# Scopes

UNIT_SHAPES = [
    (),
    (7,),
    (2, 3),
    (1, 5),
    (5, 1),
    (1, 1),
    (2, 3, 4),
    (1, 3, 4),
    (1, 1, 4),
    (2, 3, 2, 4),
    (1, 1, 1, 7),
    (3, 1, 1, 1),
    (2, 1, 2, 2, 3),
    (1, 1, 1, 1, 6),
]


def test_units_are_those_of_optax():
    rng = np.random.default_rng(3)
    tree = {str(shape): jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in UNIT_SHAPES}
    result = normalized(tree, 1.0, "unit")
    unitwise_norms = jax.jit(lambda tree: jax.tree.map(optax.transforms.unitwise_norm, tree))
    for name, norms in unitwise_norms(tree).items():
        expected = tree[name] / norms
        assert result[name].shape == tree[name].shape
        # Two float32 computations of the same sums.
        np.testing.assert_allclose(result[name], expected, rtol=1e-6, err_msg=name)


def test_units_of_rank_six_are_an_error_that_names_the_remedy():
    tree = {"block": {"w": jnp.ones((2,) * 6)}}
    message = (
        r'scope="unit" knows arrays of rank 0 to 5, got shape \(2, 2, 2, 2, 2, 2\) at '
        r"'block/w'. Pass a callable \(path, leaf\) -> axes"
    )
    with pytest.raises(ValueError, match=message):
        og.clip_by_norm(1.0, scope="unit").init(tree)


@pytest.mark.parametrize("answer", ["x", 2, (0, 5), 1.5, (0.5,), -3])
def test_callable_that_returns_no_axes_is_named_with_its_answer(answer):
    message = re.escape(
        f"scope returned axes {answer!r} for the array of shape (2, 3) at 'layer/w'; it must "
        "return None, an axis or a tuple of axes in [-2, 2)."
    )
    with pytest.raises(ValueError, match=message):
        og.clip_by_norm(1.0, scope=lambda path, leaf: answer).init(
            {"layer": {"w": jnp.ones((2, 3))}}
        )


@pytest.mark.parametrize(
    ("axes", "reduced"),
    [(None, (0, 1)), (0, (0,)), (-1, (1,)), ((1,), (1,)), ((-2, 1), (0, 1)), ([0], (0,)), ((), ())],
)
def test_callable_may_answer_in_every_form_of_axes(axes, reduced):
    values = np.array([[3.0, 0.0, -1.0], [4.0, 2.0, 1.0]], np.float32)
    tx = og.normalize_and_scale(scope=lambda path, leaf: axes)
    result, _ = tx.update(jnp.asarray(values), tx.init(jnp.asarray(values)))
    norms = np.sqrt(np.sum(values.astype(np.float64) ** 2, axis=reduced, keepdims=True))
    expected = values / np.where(norms > 0, norms, 1)
    assert result.shape == values.shape
    np.testing.assert_allclose(result, expected, rtol=NORM_RTOL)


class Layer(NamedTuple):
    weight: Any
    bias: Any


def test_callable_is_given_paths_and_leaves():
    seen = {}

    def scope(path, leaf):
        seen[path] = (leaf.shape, leaf.dtype)

    tree = {
        "blocks": [Layer(jnp.ones((2, 3)), None), Layer(jnp.ones((1,), jnp.bfloat16), 3)],
        "head": (jnp.ones(()),),
    }
    og.clip_by_norm(1.0, scope=scope).init(tree)
    expected = {
        "blocks/0/weight": ((2, 3), jnp.float32),
        "blocks/1/weight": ((1,), jnp.bfloat16),
        "head/0": ((), jnp.float32),
    }
    assert seen == expected


def test_path_of_a_single_array_is_empty():
    paths = []
    og.clip_by_norm(1.0, scope=lambda path, leaf: paths.append(path)).init(jnp.ones(3))
    assert paths == [""]
