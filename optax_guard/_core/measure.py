"""Euclidean norms of gradients, right over the full range of their dtype, in one read.

``measure`` sums squares in float32 (float64 for float64 leaves). Where such a sum leaves
the range in which it is accurate, a cold branch reads the gradients again at two other
scales, fixed powers of two, so that 1e-37 does not underflow and 3e38 does not overflow.
With ``axis_name`` the branch stays local to each device and the sums of all three scales
travel in one ``psum``, and with them what a guard wants to know: no collective depends on data.

It has a derivative rule, because those of the parts overflow where the derivative of the whole is
finite (at zero, at 1e-30, and next to a NaN).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optax_guard._core.batches import load, make_batches
from optax_guard._core.groups import Groups, make_groups
from optax_guard._core.rescale import RANGES, any_of, factors_to, scale_by, widen

AxisName = str | tuple[str, ...] | None
Watch = Callable[[tuple[jax.Array, ...], Any, jax.Array], jax.Array]


class Measurement(NamedTuple):
    """Norms of gradients.

    Attributes:
      norms: for each block the norms; a finite gradient never gives inf (saturated).
      scaled: for each block the norms times a small power of two, for norms past float32.
      finite: for each block, whether all elements of the group are finite.
      norm: of all leaves together.
      leaf_norms: float32 ``[leaves]``.
      leaf_finite: bool ``[leaves]``.
    """

    norms: tuple[jax.Array, ...]
    scaled: tuple[jax.Array, ...]
    finite: tuple[Any, ...]
    norm: jax.Array
    leaf_norms: jax.Array
    leaf_finite: Any


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


def _make_batches(leaves: Sequence[jax.Array], groups: Groups) -> list[list[int]]:
    if groups.kind == "each":
        return [[index] for index in range(len(leaves))]
    return make_batches(leaves)


def _load(
    batch: Sequence[int], leaves: Sequence[jax.Array], groups: Groups
) -> tuple[jax.Array, tuple[int, ...]]:
    """The one leaf of a batch, or a stack of them, and the axes to reduce."""
    first, *others = batch
    if not others:
        return leaves[first], groups.axes[first]
    return load(batch, leaves), tuple(axis + 1 for axis in groups.axes[first])


def _unload(
    parts: Sequence[jax.Array], batches: Sequence[Sequence[int]], groups: Groups
) -> tuple[jax.Array, ...]:
    """The form of ``Groups.stack`` from one array for each batch."""
    if groups.kind == "each" or not parts:
        return groups.stack(parts)
    vector = lax.optimization_barrier(jnp.concatenate([part.reshape(-1) for part in parts]))
    order = np.argsort(np.concatenate(batches))
    if (order == np.arange(order.size)).all():
        return (vector,)
    return (vector.at[order].get(mode="promise_in_bounds", unique_indices=True),)


class _Sums(NamedTuple):
    """Sums of squares at three scales, each in the form of ``Groups.stack``."""

    down: tuple[jax.Array, ...]
    plain: tuple[jax.Array, ...]
    up: tuple[jax.Array, ...]


def _at_all_scales(
    sums: Sequence[jax.Array], scales: Sequence[jax.Array | float], dtype: np.dtype
) -> _Sums:
    """From sums of ``|scale * leaf|**2`` to those at the three scales."""

    def at_scale(wanted):
        return tuple(
            jnp.square(jnp.sqrt(part) * (wanted / scale))
            for part, scale in zip(sums, scales, strict=True)
        )

    r = RANGES[dtype]
    return _Sums(at_scale(r.down), at_scale(1.0), at_scale(r.up))


def _reread(leaves: Sequence[jax.Array], terms: Sequence[jax.Array], groups: Groups) -> _Sums:
    """Sums of squares of leaves whose own plain sums, a term a batch, may be out of range."""
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
    batches = _make_batches(leaves, groups)
    sums = [
        _rescaled_sum(*_load(batch, leaves, groups), groups.dtype, scale)
        for batch, scale in zip(batches, scales, strict=True)
    ]
    sums, scales = (_unload(parts, batches, groups) for parts in (sums, scales))
    return _at_all_scales(sums, scales, groups.dtype)


def psum(tree: Any, axis_name: AxisName) -> Any:
    """One ``psum`` of all arrays of a tree that share a dtype; the identity without axes."""
    leaves, treedef = jax.tree.flatten(tree)
    if axis_name is None or not leaves:
        return tree
    flat = lax.psum(jnp.concatenate([leaf.reshape(-1) for leaf in leaves]), axis_name)
    parts = jnp.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(
        treedef, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


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


def _combine(leaf_norms: jax.Array, leaf_finite: jax.Array) -> jax.Array:
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


def _roots(sums: _Sums, groups: Groups) -> Measurement:
    """All norms from sums that may be out of range at one or two of the scales."""
    roots = [_root(*triple) for triple in zip(*map(groups.total, sums), strict=True)]
    norms, scaled, finite = (tuple(root[i] for root in roots) for i in range(3))
    leaf_norms, _, leaf_finite = _root(*map(groups.leaf_vector, sums))
    norm = norms[0] if groups.kind == "global" else _combine(leaf_norms, leaf_finite)
    return Measurement(norms, scaled, finite, norm, leaf_norms.astype(jnp.float32), leaf_finite)


def _plain_roots(stacked: tuple[jax.Array, ...], groups: Groups) -> Measurement:
    """All norms from plain sums that are in range."""
    sums = groups.total(stacked)
    norms = tuple(map(jnp.sqrt, sums))
    leaf_sums = groups.leaf_vector(stacked)
    return Measurement(
        norms=norms,
        scaled=tuple(norm * RANGES[groups.dtype].down for norm in norms),
        finite=tuple(map(jnp.isfinite, sums)),
        norm=jnp.sqrt(jnp.sum(leaf_sums)),
        leaf_norms=jnp.sqrt(leaf_sums).astype(jnp.float32),
        leaf_finite=jnp.isfinite(leaf_sums),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _measure(
    leaves: tuple[jax.Array, ...],
    small_norms_matter: jax.Array,
    watched: Any,
    groups: Groups,
    axis_name: AxisName,
    watch: Watch | None,
) -> tuple[Measurement, jax.Array | None]:
    r = RANGES[groups.dtype]
    batches = _make_batches(leaves, groups)
    terms = tuple(squared_sum(*_load(batch, leaves, groups), groups.dtype) for batch in batches)
    stacked = _unload(terms, batches, groups)
    sums = groups.total(stacked)
    high = r.high / max(1, sum(part.size for part in sums))  # that of all groups fits then, too
    is_cold = any_of([~(part <= high) for part in sums])
    if any(leaf.dtype != jnp.float16 for leaf in leaves):
        # Squares of float16 fit float32. A constant False for them would let XLA fold the scales
        # into infinite ones.
        are_small = [part < r.low for part in sums]
        is_cold |= jnp.where(
            small_norms_matter, any_of(are_small), ~any_of(map(jnp.invert, are_small))
        )

    # From here on everything hangs on a branch, whose outputs XLA cannot fuse with what made
    # them; else it would repeat the sum over all leaves in the loop of every leaf.
    if axis_name is None:
        measured = lax.cond(
            is_cold,
            lambda leaves, terms, *_: _roots(_reread(leaves, terms, groups), groups),
            lambda leaves, terms, stacked: _plain_roots(stacked, groups),
            leaves,
            terms,
            stacked,
        )
        return measured, None
    sums_at_all_scales = lax.cond(
        is_cold,
        lambda leaves, terms, _: _reread(leaves, terms, groups),
        lambda leaves, terms, stacked: _at_all_scales(stacked, [1.0] * len(stacked), groups.dtype),
        leaves,
        terms,
        stacked,
    )
    if watch is None:
        return _roots(psum(sums_at_all_scales, axis_name), groups), None
    is_bad = ~jnp.isfinite(sum((jnp.sum(part) for part in sums), jnp.zeros((), groups.dtype)))
    alarm = watch(leaves, watched, is_bad).astype(groups.dtype)
    sums_at_all_scales, alarm = psum((sums_at_all_scales, alarm), axis_name)
    return _roots(sums_at_all_scales, groups), alarm > 0


@_measure.defjvp
def _measure_jvp(groups, axis_name, watch, primals, tangents):
    leaves, *_ = primals
    leaf_dots, *_ = tangents
    result, alarm = _measure(*primals, groups, axis_name, watch)
    down = RANGES[groups.dtype].down

    def tangent(groups, norms, scaled, finite):
        # d|g| = <g, dg> / |g|; zero where the norm is zero or not finite.
        ones = tuple(jnp.ones_like(norm) for norm in norms)
        firsts, seconds = map(groups.spread, factors_to(norms, scaled, ones))
        is_usable = groups.spread(
            [is_finite & (norm > 0) for is_finite, norm in zip(finite, norms, strict=True)]
        )
        terms = []
        for i, (leaf, axes) in enumerate(zip(leaves, groups.axes, strict=True)):
            wide = widen(jnp.where(is_usable[i], leaf, jnp.zeros_like(leaf)), groups.dtype)
            unit = scale_by(wide, firsts[i], seconds[i])
            product = jnp.real(jnp.conj(unit) * leaf_dots[i].astype(unit.dtype))
            terms.append(jnp.sum(product, axis=axes, keepdims=len(axes) < leaf.ndim))
        return groups.total(psum(groups.stack(terms), axis_name))

    norms = tangent(groups, result.norms, result.scaled, result.finite)
    whole = make_groups("leaf", [], leaves)
    leaf_norms = result.leaf_norms.astype(groups.dtype)
    (leaf_norms_dot,) = tangent(whole, [leaf_norms], [leaf_norms * down], [result.leaf_finite])
    is_usable = jnp.isfinite(result.norm) & (result.norm > 0)
    shares = jnp.where(is_usable, leaf_norms, 0) / jnp.where(is_usable, result.norm, 1)
    dots = Measurement(
        norms=norms,
        scaled=tuple(dot * down for dot in norms),
        finite=tuple(np.zeros(flag.shape, jax.dtypes.float0) for flag in result.finite),
        norm=jnp.sum(shares * leaf_norms_dot),
        leaf_norms=leaf_norms_dot.astype(jnp.float32),
        leaf_finite=np.zeros(result.leaf_finite.shape, jax.dtypes.float0),
    )
    return (result, alarm), (dots, alarm if alarm is None else np.zeros((), jax.dtypes.float0))


class MeasureCall(NamedTuple):
    """Static arguments of a measurement."""

    groups: Groups
    axis_name: AxisName
    watch: Watch | None


_calls: dict[str, MeasureCall] = {}


def find_call(name: Any) -> MeasureCall | None:
    """The measurement that has this name in a jaxpr, if it is one.

    So the guard recognises the measurement of a clip inside the optimizer that it wraps.
    """
    return _calls.get(name)


@functools.cache
def _jitted_measure(call: MeasureCall) -> Any:
    def run(leaves, small_norms_matter, watched):
        return _measure(leaves, small_norms_matter, watched, *call)

    name = f"{call.groups}, {call.axis_name}, {call.watch and call.watch.__qualname__}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    run.__name__ = run.__qualname__ = f"optax_guard_measure_{digest}"
    _calls[run.__name__] = call
    return jax.jit(run)


def measure(
    leaves: Sequence[jax.Array],
    groups: Groups,
    *,
    axis_name: AxisName = None,
    small_norms_matter: jax.Array | bool = True,
) -> Measurement:
    """Norms of groups of elements and of every leaf, from one read of the leaves.

    Args:
      leaves: inexact arrays.
      groups: which elements share a norm.
      axis_name: mesh axes over which the leaves are sharded.
      small_norms_matter: scalar bool, false when nobody cares how far below about 1e-10 a
        norm is, which spares arrays of zeros the second read.
    """
    return measure_and_watch(
        leaves, groups, axis_name=axis_name, small_norms_matter=small_norms_matter
    )[0]


def measure_and_watch(
    leaves: Sequence[jax.Array],
    groups: Groups,
    *,
    axis_name: AxisName,
    small_norms_matter: jax.Array | bool = True,
    watch: Watch | None = None,
    watched: Any = (),
) -> tuple[Measurement, jax.Array | None]:
    """``measure``, and with ``axis_name`` whether ``watch`` gives the alarm on any device.

    ``watch(leaves, watched, is_bad)`` returns a bool from what is on one device, ``is_bad`` being
    whether the leaves are non-finite there; its answer needs no collective of its own.
    """
    call = MeasureCall(groups, axis_name, None if axis_name is None else watch)
    operands = (tuple(leaves), jnp.asarray(small_norms_matter), watched if call.watch else ())
    return _jitted_measure(call)(*operands)
