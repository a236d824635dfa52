"""Norms from sums of squares, and what a measurement is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.groups import Groups
from optax_guard._core.rescale import RANGES
from optax_guard._core.sums import MeasureCall, Sums, join


class Measurement(NamedTuple):
    """Norms of gradients.

    Attributes:
      norms: for each block the norms; a finite gradient never gives inf (saturated).
      scaled: for each block the norms times a small power of two, for norms past float32.
      finite: for each block, whether all elements of the group are finite.
      sizes: ``[leaves]``, number of elements that were measured for each norm of a leaf.
      norm: of all leaves together.
      leaf_norms: float32 ``[rows]``.
      leaf_finite: bool ``[rows]``.
    """

    norms: tuple[jax.Array, ...]
    scaled: tuple[jax.Array, ...]
    finite: tuple[Any, ...]
    sizes: jax.Array
    norm: jax.Array
    leaf_norms: jax.Array
    leaf_finite: Any


def _root(
    down: jax.Array, plain: jax.Array, up: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norm, scaled norm and finiteness from the sums of squares at three scales."""
    r = RANGES[np.dtype(plain.dtype)]
    is_finite = jnp.isfinite(down)
    scaled = jnp.sqrt(down)
    saturated = jnp.minimum(scaled * (1 / r.down), jnp.finfo(plain.dtype).max)
    large = jnp.where(is_finite, saturated, scaled)
    small = jnp.sqrt(up) * (1 / r.up)
    norm = jnp.where(plain < r.low, small, jnp.where(plain <= r.high, jnp.sqrt(plain), large))
    return norm, scaled, is_finite


def combine(leaf_norms: jax.Array, leaf_finite: jax.Array) -> jax.Array:
    """Norm over all leaves from their norms; infinite or NaN as they are.

    Relative to the largest norm, so that no square overflows.
    """
    is_usable = leaf_finite & (leaf_norms > 0)
    largest = jnp.max(jnp.where(is_usable, leaf_norms, 0), initial=0)
    divisor = jnp.where(largest > 0, largest, 1)
    ratios = jnp.where(is_usable, leaf_norms, 0) / divisor
    total = jnp.sum(ratios * ratios)
    norm = jnp.where(total > 0, divisor * jnp.sqrt(jnp.where(total > 0, total, 1)), 0)
    norm = jnp.minimum(norm, jnp.finfo(norm.dtype).max)
    return jnp.where(jnp.all(leaf_finite), norm, jnp.sum(jnp.where(leaf_finite, 0, leaf_norms)))


def merge_rows(measured: Measurement, groups: Groups) -> Measurement:
    """The same with one row for each leaf, as a call that knows of no stacks gives it."""
    if not groups.has_stacks:
        return measured
    ends = np.cumsum(groups.rows)
    parts = [slice(end - n, end) for end, n in zip(ends, groups.rows, strict=True)]
    norms, finite = measured.leaf_norms, measured.leaf_finite
    return measured._replace(
        leaf_norms=jnp.stack([combine(norms[part], finite[part]) for part in parts]),
        leaf_finite=jnp.stack([jnp.all(finite[part]) for part in parts]),
    )


def roots_of(
    sums: Sums, sizes: jax.Array, groups: Groups, row_sums: Sequence[jax.Array] | None = None
) -> Measurement:
    """All norms from sums that may be out of range at one or two of the scales."""
    roots = [_root(*triple) for triple in zip(*map(groups.total, sums), strict=True)]
    norms, scaled, finite = (tuple(root[i] for root in roots) for i in range(3))
    down, plain, up = map(groups.row_sums, sums) if row_sums is None else row_sums
    leaf_norms, _, leaf_finite = _root(down, plain, up)
    norm = norms[0] if groups.kind == "global" else combine(leaf_norms, leaf_finite)
    leaf_norms = leaf_norms.astype(jnp.float32)
    return Measurement(norms, scaled, finite, sizes, norm, leaf_norms, leaf_finite)


def plain_roots_of(
    stacked: tuple[jax.Array, ...],
    terms: Sequence[jax.Array],
    batches: Sequence[Sequence[int]],
    sizes: jax.Array,
    call: MeasureCall,
) -> Measurement:
    """All norms from plain sums that are in range."""
    groups = call.groups
    sums = groups.total(stacked)
    norms = tuple(map(jnp.sqrt, sums))
    if groups.is_flat:  # equal kernels for equal shapes, which slices of the vector would not be
        pairs = zip(terms, batches, strict=True)
        parts = [term if len(batch) > 1 else jnp.sum(term) for term, batch in pairs]
        row_sums = join(parts, batches, groups.rows, groups.dtype)
    else:
        row_sums = groups.row_sums(stacked)
    return Measurement(
        norms=norms,
        scaled=tuple(norm * RANGES[groups.dtype].down for norm in norms),
        finite=tuple(map(jnp.isfinite, sums)),
        sizes=sizes,
        norm=jnp.sqrt(jnp.sum(row_sums)),
        leaf_norms=jnp.sqrt(row_sums).astype(jnp.float32),
        leaf_finite=jnp.isfinite(row_sums),
    )
