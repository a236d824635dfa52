"""Scopes: which elements of a tree share a norm, and how norms are laid out in blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._core.arrays import replicated

Stacked = Callable[[str, Any], bool | int] | None
Scope = str | Callable[[str, Any], int | tuple[int, ...] | None]


def norm_dtype(leaf: Any) -> np.dtype:
    """float64 for float64 and complex128 leaves, float32 for all others."""
    wide = leaf.dtype in (np.dtype("float64"), np.dtype("complex128"))
    return np.dtype("float64") if wide else np.dtype("float32")


class Groups(NamedTuple):
    """Which elements share a norm. Hashable, so that it can be a static argument.

    Norms come in *blocks*: one scalar for "global", one vector ``[leaves]`` for "leaf", and
    otherwise ("each") one array for each leaf, with kept dimensions, or one vector of them all.

    Attributes:
      kind: "global", "leaf" or "each".
      axes: for each leaf the axes that a norm reduces.
      shapes: shape of each leaf.
      dtype: of all norms: float64 when any leaf is float64 or complex128, else float32.
      depths: for each leaf, along how many leading axes it stacks layers. The norm of each of
        them is reported; together they are the *rows*, one for each leaf that stacks none.
      is_flat: whether the norms of "each" come in one vector, which spares a kernel for every leaf
        and every statistic; not where leaves may be sharded, since it would be gathered.
    """

    kind: str
    axes: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype
    depths: tuple[int, ...]
    is_flat: bool = False

    @property
    def rows(self) -> list[int]:
        """Number of rows of each leaf."""
        return [math.prod(s[:d]) for s, d in zip(self.shapes, self.depths, strict=True)]

    @property
    def has_stacks(self) -> bool:
        """Whether any leaf has more rows than one."""
        return any(self.depths)

    def row_names(self, paths: Sequence[str]) -> list[str]:
        """Of each row, such as ``"layers/kernel[3]"``."""
        return [
            path + suffix
            for path, shape, depth in zip(paths, self.shapes, self.depths, strict=True)
            for suffix in row_suffixes(shape[:depth])
        ]

    def term_axes(self, index: int) -> tuple[int, ...]:
        """Axes that may be summed at once: those of a group within one layer."""
        return tuple(axis for axis in self.axes[index] if axis >= self.depths[index])

    def term_shapes(self) -> list[tuple[int, ...]]:
        """Shape of what is left of each leaf then."""
        return [_kept(shape, self.term_axes(index)) for index, shape in enumerate(self.shapes)]

    def group_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each leaf with all axes of its groups reduced."""
        return list(map(_kept, self.shapes, self.axes))

    def of_rows(self) -> Groups:
        """The groups whose norms are the rows, one block a leaf."""
        pairs = zip(self.shapes, self.depths, strict=True)
        axes = tuple(tuple(range(depth, len(shape))) for shape, depth in pairs)
        return Groups("each", axes, self.shapes, self.dtype, (0,) * len(axes))

    def split_rows(self, rows: jax.Array) -> tuple[jax.Array, ...]:
        """From one vector of rows to the blocks of ``of_rows``, whose method it is."""
        shapes = [block.shape for block in self.blocks]
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        parts = jnp.split(rows, ends) if shapes else []
        return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))

    @property
    def blocks(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of each block of norms."""
        if self.kind == "global":
            shapes: list[tuple[int, ...]] = [()]
        elif self.kind == "leaf":
            shapes = [(len(self.axes),)]
        elif self.is_flat:
            shapes = [(sum(self.unit_counts),)]
        else:
            shapes = self.group_shapes()
        return [jax.ShapeDtypeStruct(shape, self.dtype) for shape in shapes]

    def sizes(self, is_used: Sequence[bool], num_shards: Sequence[Any]) -> jax.Array:
        """``[leaves]``, number of elements that share a norm; 0 for what is not used."""
        sizes = [
            math.prod(shape[axis] for axis in axes) * float(used) * shards
            for shape, axes, used, shards in zip(
                self.shapes, self.axes, is_used, num_shards, strict=True
            )
        ]
        return stack([jnp.asarray(size, self.dtype) for size in sizes], self.dtype)

    def sizes_of_blocks(self, sizes: jax.Array) -> list[jax.Array]:
        """The same for each group of each block."""
        if self.kind == "global":
            return [jnp.sum(sizes)]
        if self.kind == "leaf":
            return [sizes]
        if self.is_flat:
            return [self.repeat(sizes)]
        return [sizes[index] for index in range(len(self.axes))]

    def repeat(self, per_leaf: Any) -> jax.Array:
        """From ``[leaves]`` to the one vector of a flat block."""
        return jnp.asarray(per_leaf)[self._leaf_of_unit()]

    def _leaf_of_unit(self) -> np.ndarray:
        counts = self.unit_counts  # as a constant: XLA would take seconds to fold it
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    @property
    def unit_counts(self) -> list[int]:
        """Number of norms of each leaf with "each"."""
        return list(map(math.prod, self.group_shapes()))

    def flatten(self, parts: Sequence[jax.Array], lead: tuple[int, ...] = ()) -> jax.Array:
        """From one array a leaf, shaped ``lead`` and as its norms, to the last axis of one."""
        # Behind a barrier it is a copy; else XLA would make one large kernel of all before it.
        flat = lax.optimization_barrier([part.reshape(*lead, -1) for part in parts])
        return jnp.concatenate(flat, -1) if flat else jnp.zeros((*lead, 0), self.dtype)

    def starts(self) -> list[jax.Array]:
        """Where in a vector the norms of each leaf begin, for ``split``."""
        # Behind a barrier, so that XLA takes them for data: leaves of one shape then share one
        # kernel, where slices at constant places would be a kernel each.
        counts = [1] * len(self.axes) if self.kind == "leaf" else self.unit_counts
        places = np.cumsum([0, *counts], dtype=np.int32)[:-1]
        return lax.optimization_barrier([jnp.asarray(place) for place in places])

    def split(self, vectors: jax.Array, starts: Sequence[jax.Array]) -> list[jax.Array]:
        """For each leaf its part along the last axis, shaped as its norms.

        The inverse of ``flatten``. In a branch, with ``starts`` from outside of it.
        """
        lead = vectors.shape[:-1]
        shapes = [()] * len(self.axes) if self.kind == "leaf" else self.group_shapes()
        return [
            lax.dynamic_slice_in_dim(vectors, start, math.prod(shape), -1).reshape(*lead, *shape)
            for start, shape in zip(starts, shapes, strict=True)
        ]

    def total(self, terms: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """From one vector of rows, or for "each" one array a leaf or a vector, to blocks."""
        if self.kind == "global":
            return (jnp.sum(terms[0]),)
        if self.kind == "leaf":
            return (self.add_rows(terms[0]),)
        if self.is_flat:
            return tuple(terms)
        return tuple(self._group_sum(index, term) for index, term in enumerate(terms))

    def _group_sum(self, index: int, term: jax.Array) -> jax.Array:
        if len(self.axes[index]) == len(self.shapes[index]):
            return jnp.sum(term) if term.ndim else term
        over_layers = tuple(axis for axis in self.axes[index] if axis < self.depths[index])
        return jnp.sum(term, axis=over_layers, keepdims=True) if over_layers else term

    def row_sums(self, terms: Sequence[jax.Array]) -> jax.Array:
        """From the same to one vector ``[rows]``."""
        if self.kind != "each":
            return terms[0]
        if self.is_flat:
            leaf = self._leaf_of_unit()
            return jax.ops.segment_sum(
                terms[0], leaf, num_segments=len(self.axes), indices_are_sorted=True
            )
        parts = []
        for term, depth in zip(terms, self.depths, strict=True):
            rest = tuple(range(depth, term.ndim))
            parts.append(replicated(jnp.sum(term, axis=rest) if rest else term).reshape(-1))
        return jnp.concatenate(parts) if parts else jnp.zeros((0,), self.dtype)

    def add_rows(self, rows: jax.Array) -> jax.Array:
        """From ``[rows]`` to ``[leaves]``: adds up the layers of each stack."""
        if not self.has_stacks:
            return rows
        ends = np.cumsum(self.rows)
        parts = [
            jnp.sum(rows[end - count : end]) for end, count in zip(ends, self.rows, strict=True)
        ]
        return stack(parts, rows.dtype)

    def spread(self, blocks: Sequence[jax.Array]) -> list[jax.Array]:
        """For each leaf the entries of the blocks that concern it, ready to broadcast."""
        if self.kind == "global":
            return [blocks[0]] * len(self.axes)
        if self.kind == "leaf":
            return [blocks[0][index] for index in range(len(self.axes))]
        return self.split(blocks[0], self.starts()) if self.is_flat else list(blocks)


def row_suffixes(layers: tuple[int, ...]) -> list[str]:
    """``["[0]", "[1]", ...]`` for the layers of a stack; one empty string for no stack."""
    return ["".join(f"[{index}]" for index in place) for place in np.ndindex(*layers)]


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
    scope: Scope,
    paths: Sequence[str],
    leaves: Sequence[Any],
    *,
    is_sharded: bool = False,
    stacked: Stacked = None,
) -> Groups:
    """Resolves ``scope`` and ``stacked`` for these leaves, which may be shards."""
    shapes = tuple(tuple(leaf.shape) for leaf in leaves)
    dtype = np.result_type(np.float32, *map(norm_dtype, leaves))
    depths = (0,) * len(shapes)
    if stacked is not None:
        depths = tuple(_depth(stacked, *each) for each in zip(paths, leaves, strict=True))
    if isinstance(scope, str) and scope in ("global", "leaf"):
        axes = tuple(tuple(range(len(shape))) for shape in shapes)
        return Groups(scope, axes, shapes, dtype, depths)
    choose = functools.partial(_unit_axes, is_sharded=is_sharded)
    if not isinstance(scope, str):
        choose = scope
    axes = tuple(
        _checked_axes(path, leaf, choose(path, leaf))
        for path, leaf in zip(paths, leaves, strict=True)
    )
    return Groups("each", axes, shapes, dtype, depths)


def _depth(stacked: Any, path: str, leaf: Any) -> int:
    depth = stacked(path, leaf)
    if isinstance(depth, (bool, np.bool_, int, np.integer)) and 0 <= depth <= leaf.ndim:
        return int(depth)
    raise ValueError(
        f"stacked returned {depth!r} for the array of shape {leaf.shape} at {path!r}; it must "
        f"return True, False, or the number of leading axes that stack layers, 0 to {leaf.ndim}."
    )
