"""Small array functions with the derivatives and dtypes that the library needs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard


def promote(*dtypes: Any) -> Any:
    """The dtype that holds all of them, also where JAX is told to be strict about promotion.

    Floats of 8 bits, which JAX promotes to nothing by itself, count as float32 beside others.
    """
    if len(set(map(jnp.dtype, dtypes))) > 1:
        dtypes = tuple(jnp.float32 if _is_tiny_float(dtype) else dtype for dtype in dtypes)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def _is_tiny_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 1


def increment(count: jax.Array) -> jax.Array:
    """``count + 1``, saturating at the largest value of its dtype."""
    return jnp.where(count < jnp.iinfo(count.dtype).max, count + 1, count)


def tree_where(condition: jax.Array, new: Any, old: Any) -> Any:
    """Selects leaf by leaf, keeping the dtype of ``old``; ``condition`` broadcasts."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o).astype(o.dtype), new, old)


@jax.custom_jvp
def safe_ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """``numerator / denominator``, zero where the denominator is zero.

    The derivative that JAX gives a quotient contains ``denominator**-2``, which overflows
    at 1e-20 although the derivative of the ratio is harmless.
    """
    is_zero = denominator == 0
    return jnp.where(is_zero, 0, numerator / jnp.where(is_zero, 1, denominator))


@safe_ratio.defjvp
def _safe_ratio_jvp(primals, tangents):
    numerator, denominator = primals
    ratio = safe_ratio(numerator, denominator)
    return ratio, safe_ratio(tangents[0] - ratio * tangents[1], denominator)


@jax.custom_jvp
def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root of a non-negative array, with derivative zero at zero."""
    return jnp.sqrt(x)


@safe_sqrt.defjvp
def _safe_sqrt_jvp(primals, tangents):
    root = safe_sqrt(primals[0])
    return root, safe_ratio(tangents[0], 2 * root)


def root_sum_square(values: jax.Array) -> jax.Array:
    """Euclidean norm of non-negative values, whose squares may neither overflow nor vanish."""
    unit = lax.stop_gradient(jnp.max(values, initial=0))  # drops out of value and derivative
    unit = jnp.where(unit > 0, unit, 1)
    return unit * safe_sqrt(jnp.sum(jnp.square(values / unit)))


def times(leaf: jax.Array, factor: jax.Array) -> jax.Array:
    """``leaf * factor`` for a real factor, computed in its precision, in the dtype of the leaf."""
    if jnp.iscomplexobj(leaf):
        # A complex product would turn Inf into NaN and -0.0 into 0.0.
        return lax.complex(times(leaf.real, factor), times(leaf.imag, factor))
    wide = promote(leaf.dtype, factor.dtype)
    return rounded(leaf.astype(wide) * factor, leaf.dtype)


def rounded(wide: jax.Array, dtype: Any) -> jax.Array:
    """``wide.astype(dtype)``, in a form that XLA:CPU fuses where the result is used twice.

    For it the conversion to bfloat16 is dear: it writes scaled gradients to memory, and of a step
    of AdamW that moves 18 times their bytes makes 25 with Optax's clip; with whole numbers in the
    conversion's place ours has 19 (``benchmarks/accelerators.py --platform cpu``).
    """
    is_dear = wide.dtype == jnp.float32 and dtype == jnp.bfloat16
    return _to_bfloat16(wide) if is_dear else wide.astype(dtype)


@jax.custom_jvp
def _to_bfloat16(wide: jax.Array) -> jax.Array:
    def on_cpu(wide):
        bits = lax.bitcast_convert_type(wide, jnp.uint32)
        upper = bits >> 16
        to_nearest = (bits + 0x7FFF + (upper & 1)) >> 16  # of two that are as near, the even one
        upper = jnp.where(jnp.isnan(wide), upper | 0x40, to_nearest)  # quiet, and no carry
        return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)

    return lax.platform_dependent(wide, cpu=on_cpu, default=lambda x: x.astype(jnp.bfloat16))


@_to_bfloat16.defjvp
def _to_bfloat16_jvp(primals, tangents):
    return _to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def is_partitioned(leaf: Any) -> bool:
    """Whether an array is known to lie on a mesh whose axes XLA splits, not ``shard_map``."""
    mesh = jax.typeof(leaf).sharding.mesh
    return not mesh.empty and set(mesh.axis_types) != {AxisType.Manual}


def replicated(leaf: jax.Array) -> jax.Array:
    """The same on every device of a mesh of explicit axes, where JAX wants to be told."""
    sharding = jax.typeof(leaf).sharding
    if all(axis is None for axis in sharding.spec):
        return leaf
    return reshard(leaf, NamedSharding(sharding.mesh, PartitionSpec()))


def update_towards(target: jax.Array, start: jax.Array, dtype: Any) -> jax.Array:
    """The update of ``dtype`` that takes ``start`` to ``target``, to one rounding.

    A difference past the largest number of ``dtype`` (float16: 65504) is cut to it; of
    non-finite arrays it is NaN or cut.
    """
    if jnp.issubdtype(dtype, jnp.complexfloating):
        part = jnp.finfo(dtype).dtype
        real = update_towards(jnp.real(target), jnp.real(start), part)
        return lax.complex(real, update_towards(jnp.imag(target), jnp.imag(start), part))
    wide = promote(target.dtype, start.dtype, jnp.float32)
    most = jnp.finfo(dtype).max.astype(wide)
    return jnp.clip(target.astype(wide) - start.astype(wide), -most, most).astype(dtype)
