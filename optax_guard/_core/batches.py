"""Small arrays of the same type are reduced together, in stacks.

A stack is one loop to compile and to launch where each of its arrays takes three, and half the
arrays of a model are vectors; the price is a copy of little. Bounds keep it little. What may be
sharded is left alone: arrays of one shape but of different shardings would be gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_guard._core.arrays import is_partitioned

_MAX_SIZE = 2**14
_MAX_LENGTH = 64
_MAX_TOTAL = 2**22  # 16 MB of float32


def make_batches(leaves: Sequence[Any]) -> list[list[int]]:
    """Indices of the leaves that are reduced together; one that cannot be stacked is alone."""
    batches: list[list[int]] = []
    unfilled: dict[Any, list[int]] = {}
    total = 0
    for index, leaf in enumerate(leaves):
        if not can_be_stacked(leaf) or total + leaf.size > _MAX_TOTAL:
            batches.append([index])
            continue
        total += leaf.size
        key = jax.typeof(leaf)
        if key not in unfilled or len(unfilled[key]) == _MAX_LENGTH:
            unfilled[key] = []
            batches.append(unfilled[key])
        unfilled[key].append(index)
    return batches


def can_be_stacked(leaf: Any) -> bool:
    """Whether an array is small, and on one device or inside ``shard_map``."""
    return leaf.size <= _MAX_SIZE and not _may_be_sharded(leaf)


def can_be_flat(leaves: Sequence[Any]) -> bool:
    """Whether small arrays that are made of these may be put into one vector."""
    return not any(map(_may_be_sharded, leaves))


def _may_be_sharded(leaf: Any) -> bool:
    """Whether XLA may split an array; not on one device, and not inside ``shard_map``."""
    # Without a mesh it may still be sharded, by the ``in_shardings`` of ``jit``.
    is_unknown = jax.device_count() > 1 and jax.typeof(leaf).sharding.mesh.empty
    return is_unknown or is_partitioned(leaf)


def load(batch: Sequence[int], leaves: Sequence[Any]) -> jax.Array:
    """The leaves of a batch along a new first axis."""
    return jnp.stack([leaves[index] for index in batch])
