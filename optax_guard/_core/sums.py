"""Sums of squares of gradients, array by array or in stacks, at one scale or at three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optax_guard._core.arrays import replicated
from optax_guard._core.axes import MeshAxes
from optax_guard._core.batches import load, make_batches
from optax_guard._core.groups import Groups
from optax_guard._core.rescale import RANGES


class Watch(Protocol):
    """What else is looked at where gradients are bad. Hashable, to be a static argument."""

    def __call__(self, watched: Any, is_bad: jax.Array) -> jax.Array:
        """Whether ``watched`` alarms; ``is_bad`` tells whether gradients of this device are bad."""
        ...

    def is_due(self, watched: Any) -> jax.Array:
        """Whether to look even if no gradient is bad."""
        ...


class MeasureCall(NamedTuple):
    """Static arguments of a measurement.

    Attributes:
      groups: which elements share a norm.
      is_used: for each leaf whether it is looked at; the others count as zero.
      axes: mesh axes over which the leaves are sharded.
      watch: what else to look at where gradients are bad; None for nothing.
    """

    groups: Groups
    is_used: tuple[bool, ...]
    axes: MeshAxes
    watch: Watch | None


def squared_sum(leaf: jax.Array, axes: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Sum of ``|leaf|**2`` over ``axes``, in ``dtype``, shape as in ``Groups.blocks``."""
    if jnp.iscomplexobj(leaf):
        return squared_sum(leaf.real, axes, dtype) + squared_sum(leaf.imag, axes, dtype)
    # Without the barrier XLA finds the squares that Adam needs too, and the float32 copy of a
    # bfloat16 leaf, and writes them to memory to share them: up to 3x the bytes.
    leaf = lax.optimization_barrier(leaf).astype(dtype)
    if len(axes) == leaf.ndim:
        # A dot product, because XLA merges sum(g * g) with the g * g of Adam into one
        # materialised square. HIGHEST: TPUs would multiply in bfloat16.
        return lax.dot_general(
            leaf,
            leaf,
            ((axes, axes), ((), ())),
            precision=lax.Precision.HIGHEST,
            out_sharding=_sharding_of_sum(leaf),
        )
    return jnp.sum(leaf * leaf, axis=axes, keepdims=True)


def _sharding_of_sum(leaf: jax.Array) -> NamedSharding | None:
    """On a mesh of explicit axes that split the leaf, JAX wants to be told: on every device."""
    sharding = jax.typeof(leaf).sharding
    is_split = any(axis is not None for axis in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec()) if is_split else None


def _rescaled_sum(
    leaf: jax.Array, axes: tuple[int, ...], dtype: np.dtype, scale: jax.Array
) -> jax.Array:
    """Sum of ``|scale * leaf|**2``; no dot product, which would need ``scale * leaf`` in memory."""
    if jnp.iscomplexobj(leaf):
        real, imag = (_rescaled_sum(x, axes, dtype, scale) for x in (leaf.real, leaf.imag))
        return real + imag
    scaled = leaf.astype(dtype) * scale
    return jnp.sum(scaled * scaled, axis=axes, keepdims=len(axes) < leaf.ndim)


def batches_of(leaves: Sequence[jax.Array], call: MeasureCall) -> list[list[int]]:
    """Indices of the used leaves that are reduced together."""
    groups = call.groups
    used = [index for index, is_used in enumerate(call.is_used) if is_used]
    if groups.kind == "each":
        shapes = groups.group_shapes()
        whole = [index for index in used if groups.is_flat and not shapes[index]]
    else:
        whole = [index for index in used if groups.depths[index] == 0]
    batches = make_batches([leaves[index] for index in whole])
    others = [[index] for index in used if index not in set(whole)]
    return [[whole[place] for place in batch] for batch in batches] + others


def load_batch(
    batch: Sequence[int], leaves: Sequence[jax.Array], groups: Groups
) -> tuple[jax.Array, tuple[int, ...]]:
    """The one leaf of a batch, or a stack of them, and the axes to reduce."""
    first, *others = batch
    if not others:
        return leaves[first], groups.term_axes(first)
    return load(batch, leaves), tuple(range(1, 1 + len(groups.shapes[first])))


def unload(
    parts: Sequence[jax.Array], batches: Sequence[Sequence[int]], call: MeasureCall
) -> tuple[jax.Array, ...]:
    """One vector of rows, or one array a leaf for "each", from one array for each batch."""
    groups = call.groups
    if groups.kind != "each":
        return (join(parts, batches, groups.rows, groups.dtype),)
    if groups.is_flat:
        return (join(parts, batches, groups.unit_counts, groups.dtype),)
    by_leaf = {batch[0]: part for batch, part in zip(batches, parts, strict=True)}
    return tuple(
        replicated(by_leaf[index]) if index in by_leaf else jnp.zeros(shape, groups.dtype)
        for index, shape in enumerate(groups.term_shapes())
    )


def join(
    parts: Sequence[jax.Array],
    batches: Sequence[Sequence[int]],
    counts: Sequence[int],
    dtype: np.dtype,
) -> jax.Array:
    """One vector, leaf after leaf, of ``counts`` entries each; zero for what is in no batch."""
    starts = np.cumsum([0, *counts])
    if not parts:
        return jnp.zeros((int(starts[-1]),), dtype)
    flat = [replicated(part).reshape(-1) for part in parts]
    # Behind a barrier it is a copy; else XLA would make one large kernel of all before it.
    vector = lax.optimization_barrier(jnp.concatenate(lax.optimization_barrier(flat)))
    ranges = [np.arange(starts[i], starts[i + 1]) for batch in batches for i in batch]
    order = np.concatenate(ranges)
    if np.array_equal(order, np.arange(starts[-1])):
        return vector
    if len(order) < starts[-1]:  # a place of its own, of zero, for all that is not used
        vector = jnp.append(vector, jnp.zeros((), vector.dtype))
    places = np.full(starts[-1], len(order), np.int32)
    places[order] = np.arange(len(order))
    return vector.at[places].get(mode="promise_in_bounds")


class Sums(NamedTuple):
    """Sums of squares at three scales, each in the form of ``_unload``."""

    down: tuple[jax.Array, ...]
    plain: tuple[jax.Array, ...]
    up: tuple[jax.Array, ...]


def at_all_scales(
    sums: Sequence[jax.Array], scales: Sequence[jax.Array | float], dtype: np.dtype
) -> Sums:
    """From sums of ``|scale * leaf|**2`` to those at the three scales."""

    def at_scale(wanted):
        return tuple(
            jnp.square(jnp.sqrt(part) * (wanted / scale))
            for part, scale in zip(sums, scales, strict=True)
        )

    r = RANGES[dtype]
    return Sums(at_scale(r.down), at_scale(1.0), at_scale(r.up))


def reread(leaves: Sequence[jax.Array], terms: Sequence[jax.Array], call: MeasureCall) -> Sums:
    """Sums of squares of leaves whose own plain sums, a term a batch, may be out of range."""
    groups = call.groups
    r = RANGES[groups.dtype]
    # One scalar for each leaf, made from its own sum: XLA:CPU multiplies and sums in one pass
    # only if no two leaves share the broadcast factor.
    scales = [
        lax.select(
            term <= r.high,
            lax.select(term < r.low, lax.full_like(term, r.up), lax.full_like(term, 1)),
            lax.full_like(term, r.down),
        )
        for term in terms
    ]
    batches = batches_of(leaves, call)
    sums = [
        _rescaled_sum(*load_batch(batch, leaves, groups), groups.dtype, scale)
        for batch, scale in zip(batches, scales, strict=True)
    ]
    sums, scales = (unload(parts, batches, call) for parts in (sums, scales))
    # What is not used has the sum 0, at any scale.
    scales = [jnp.where(scale > 0, scale, 1) for scale in scales]
    return at_all_scales(sums, scales, groups.dtype)
