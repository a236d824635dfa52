"""Scopes: which elements of a tree share a norm, and how norms are laid out in blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Scope = str | Callable[[str, Any], int | tuple[int, ...] | None]


def norm_dtype(leaf: Any) -> np.dtype:
    """float64 for float64 and complex128 leaves, float32 for all others."""
    wide = leaf.dtype in (np.dtype("float64"), np.dtype("complex128"))
    return np.dtype("float64") if wide else np.dtype("float32")


class Groups(NamedTuple):
    """Which elements share a norm. Hashable, so that it can be a static argument.

    Norms come in *blocks*: one scalar for "global", one vector ``[leaves]`` for "leaf", and
    one array for each leaf, with kept dimensions, otherwise ("each").

    Attributes:
      kind: "global", "leaf" or "each".
      axes: for each leaf the axes that a norm reduces.
      shapes: shape of each leaf.
      dtype: of all norms: float64 when any leaf is float64 or complex128, else float32.
    """

    kind: str
    axes: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype

    @property
    def blocks(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of each block of norms."""
        if self.kind == "global":
            shapes: list[tuple[int, ...]] = [()]
        elif self.kind == "leaf":
            shapes = [(len(self.axes),)]
        else:
            shapes = list(map(_kept, self.shapes, self.axes))
        return [jax.ShapeDtypeStruct(shape, self.dtype) for shape in shapes]

    @property
    def sizes(self) -> list[np.ndarray]:
        """Number of elements of each group, one array (or scalar) a block."""
        sizes = [
            math.prod(shape[axis] for axis in axes)
            for shape, axes in zip(self.shapes, self.axes, strict=True)
        ]
        if self.kind == "global":
            return [np.asarray(float(sum(sizes)))]
        if self.kind == "leaf":
            return [np.asarray(sizes, float)]
        return [np.asarray(float(size)) for size in sizes]

    def stack(self, per_leaf: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """One vector ``[leaves]`` of per-leaf scalars, or one array a leaf for "each"."""
        if self.kind == "each":
            return tuple(per_leaf)
        return (stack(per_leaf, self.dtype),)

    def total(self, stacked: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """From the form of ``stack`` to blocks: adds up the leaves for "global"."""
        return (jnp.sum(stacked[0]),) if self.kind == "global" else stacked

    def leaf_vector(self, stacked: tuple[jax.Array, ...]) -> jax.Array:
        """From the form of ``stack`` to one vector ``[leaves]``."""
        if self.kind != "each":
            return stacked[0]
        return stack([jnp.sum(part) if part.ndim else part for part in stacked], self.dtype)

    def spread(self, blocks: Sequence[jax.Array]) -> list[jax.Array]:
        """For each leaf the entries of the blocks that concern it, ready to broadcast."""
        if self.kind == "global":
            return [blocks[0]] * len(self.axes)
        if self.kind == "leaf":
            return [blocks[0][index] for index in range(len(self.axes))]
        return list(blocks)


def stack(values: Sequence[jax.Array], dtype: Any) -> jax.Array:
    return jnp.stack(values) if values else jnp.zeros((0,), dtype)


def _kept(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Shape after a reduction that keeps dimensions; a scalar when nothing else is left."""
    if len(axes) == len(shape):
        return ()
    return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def _unit_axes(path: str, leaf: Any, is_sharded: bool) -> tuple[int, ...] | None:
    """Axes that ``optax.adaptive_grad_clip`` reduces for each output unit.

    It takes an array with one axis longer than 1 as a whole. A shard may have that shape though
    the array has not, so of shards only the rank counts, which comes to the same for arrays whose
    last axis has length 1.
    """
    if leaf.ndim <= 1 or (not is_sharded and sum(size != 1 for size in leaf.shape) <= 1):
        return None
    if leaf.ndim > 5:
        raise ValueError(
            f'scope="unit" knows arrays of rank 0 to 5, got shape {leaf.shape} at {path!r}. '
            "Pass a callable (path, leaf) -> axes that says which axes make up one unit."
        )
    return {2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}[leaf.ndim]


def _checked_axes(path: str, leaf: Any, axes: Any) -> tuple[int, ...]:
    """The axes that a scope callable chose, as sorted non-negative numbers."""
    if axes is None:
        return tuple(range(leaf.ndim))
    chosen = (axes,) if isinstance(axes, (int, np.integer)) else axes
    try:
        normal = sorted({range(leaf.ndim)[axis] for axis in chosen})
    except (TypeError, IndexError) as error:
        raise ValueError(
            f"scope returned axes {axes!r} for the array of shape {leaf.shape} at {path!r}; "
            f"it must return None, an axis or a tuple of axes in [-{leaf.ndim}, {leaf.ndim})."
        ) from error
    return tuple(normal)


def make_groups(
    scope: Scope, paths: Sequence[str], leaves: Sequence[Any], *, is_sharded: bool = False
) -> Groups:
    """Resolves ``scope`` for these leaves, which may be shards along the axes to reduce."""
    shapes = tuple(tuple(leaf.shape) for leaf in leaves)
    dtype = np.result_type(np.float32, *map(norm_dtype, leaves))
    if isinstance(scope, str) and scope in ("global", "leaf"):
        axes = tuple(tuple(range(len(shape))) for shape in shapes)
        return Groups(scope, axes, shapes, dtype)
    choose = functools.partial(_unit_axes, is_sharded=is_sharded)
    if not isinstance(scope, str):
        choose = scope
    axes = tuple(
        _checked_axes(path, leaf, choose(path, leaf))
        for path, leaf in zip(paths, leaves, strict=True)
    )
    return Groups("each", axes, shapes, dtype)
