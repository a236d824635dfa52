"""What a rule remembers, as one array for each block of norms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.calls import ToldError
from optax_guard._core.groups import Groups

MOST_COUNTED = 2**24  # whole numbers up to it are exact in float32


def pack(history: Any, block: jax.ShapeDtypeStruct) -> Any:
    """One array ``[rows, *block.shape]`` of all that a history holds; empty for nothing."""
    rows = []
    for leaf in jax.tree.leaves(history):
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = jnp.minimum(leaf.astype(jnp.int32), MOST_COUNTED)
        extra = leaf.ndim - len(block.shape)
        leaf = leaf[jnp.newaxis] if extra == 0 else leaf
        leaf = leaf.reshape(-1, *block.shape) if extra > 1 else leaf
        rows.append(leaf.astype(block.dtype))
    return jnp.concatenate(rows) if rows else ()


def unpack(packed: Any, init: Any, block: jax.ShapeDtypeStruct) -> Any:
    """The inverse of ``pack``."""
    templates, treedef = jax.tree.flatten(jax.eval_shape(lambda: init(block)))
    extras = [leaf.shape[: leaf.ndim - len(block.shape)] for leaf in templates]
    ends = np.cumsum([int(np.prod(extra)) for extra in extras])
    leaves = []
    for end, extra, template in zip(ends, extras, templates, strict=True):
        part = packed[end - int(np.prod(extra)) : end]
        part = part[0] if extra == () else part
        part = part.reshape(template.shape) if len(extra) > 1 else part
        leaves.append(part.astype(template.dtype))
    return jax.tree.unflatten(treedef, leaves)


def unpack_all(init: Any, history: Any, groups: Groups, name: str) -> list[Any]:
    leaf_groups = groups._replace(is_flat=False)
    packed: Any = history if groups.kind == "each" else (history,)
    if not jax.tree.leaves(history):
        packed = ((),) * len(leaf_groups.blocks)
    expected = [
        jax.eval_shape(lambda block=block: pack(init(block), block)) for block in leaf_groups.blocks
    ]
    shapes = [[leaf.shape for leaf in jax.tree.leaves(part)] for part in (list(packed), expected)]
    if shapes[0] != shapes[1]:
        raise ToldError(
            f"This state of {name} was made for other arrays, or with other arguments: its "
            f"history has the shapes {shapes[0]}, these updates and arguments need {shapes[1]}. "
            "Make a new one with init(params); where gradients are None, pass params to update()."
        )
    if groups.is_flat:
        rows = packed[0].shape[0] if jax.tree.leaves(history) else 0
        packed = [groups.flatten(packed, (rows,)) if rows else ()]
    return [unpack(part, init, block) for part, block in zip(packed, groups.blocks, strict=True)]
