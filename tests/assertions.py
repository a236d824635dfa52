"""Comparisons of trees that look at values, shapes, dtypes, weak types and structure."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def signature(tree: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    """Structure, and shape, dtype and weak type of every leaf; also of abstract trees."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, np.dtype(leaf.dtype), leaf.weak_type) for leaf in leaves]


def _pairs(actual: Any, expected: Any) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Leaves side by side, after a look at structure, shapes and dtypes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = []
    flat = jax.tree_util.tree_leaves_with_path(actual)
    for (path, one), other in zip(flat, jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape, f"{name}: shape {one.shape}, expected {other.shape}"
        assert one.dtype == other.dtype, f"{name}: dtype {one.dtype}, expected {other.dtype}"
        pairs.append((name, one, other))
    return pairs


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Every bit agrees, the sign of zero and the payload of NaN included."""
    for name, one, other in _pairs(actual, expected):
        assert one.tobytes() == other.tobytes(), f"{name}: {one} differs from {other}"


def assert_close(actual: Any, expected: Any, *, rtol: float, atol: float = 0.0) -> None:
    """Floats agree to ``rtol``, NaN with NaN and Inf with Inf; everything else is equal."""
    for name, one, other in _pairs(actual, expected):
        is_exact = not (np.issubdtype(one.dtype, np.inexact) or one.dtype.kind == "V")
        if is_exact:
            np.testing.assert_array_equal(one, other, err_msg=name)
        else:
            wide = np.complex128 if np.iscomplexobj(one) else np.float64
            np.testing.assert_allclose(
                one.astype(wide), other.astype(wide), rtol=rtol, atol=atol, err_msg=name
            )
