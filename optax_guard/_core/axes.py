"""Mesh axes over which updates are sharded inside ``shard_map`` or ``pmap``, leaf by leaf.

All that has to be known on every device travels in one sum over all named axes. A leaf that is
the same along one of them is counted on the first device of that axis only, so that it counts
once, and to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Names = str | tuple[str, ...] | None
AxisName = Names | Callable[[str, Any], Names]


class MeshAxes(NamedTuple):
    """The axes of some leaves. Hashable, so that it can be a static argument.

    Attributes:
      names: all of them; empty outside of ``shard_map``.
      of_leaves: for each leaf those over which it is sharded.
    """

    names: tuple[str, ...] = ()
    of_leaves: tuple[tuple[str, ...], ...] = ()

    def count_once(self, terms: Sequence[jax.Array]) -> list[jax.Array]:
        """The terms of a sum over all devices, one a leaf."""
        return [self._where_first(term, self._repeated(index)) for index, term in enumerate(terms)]

    def _repeated(self, index: int) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.of_leaves[index])

    def _where_first(self, term: jax.Array, names: tuple[str, ...]) -> jax.Array:
        for name in names:
            term = jnp.where(lax.axis_index(name) == 0, term, jnp.zeros_like(term))
        return term

    def num_shards(self, index: int) -> Any:
        """Over how many devices the elements of a leaf are spread."""
        names = self.of_leaves[index] if self.names else ()
        return lax.psum(1, names) if names else 1

    def psum(self, tree: Any) -> Any:
        """One ``psum`` of all arrays of a tree that share a dtype; the identity without axes."""
        leaves, treedef = jax.tree.flatten(tree)
        if not self.names or not leaves:
            return tree
        flat = lax.psum(jnp.concatenate([leaf.reshape(-1) for leaf in leaves]), self.names)
        parts = jnp.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
        return jax.tree.unflatten(
            treedef, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        )

    def any(self, flags: jax.Array) -> jax.Array:
        """Whether each flag holds on any device."""
        return self.psum(flags.astype(jnp.int32)) > 0 if self.names else flags

    def mean(self, value: jax.Array) -> jax.Array:
        """Over all devices."""
        return lax.pmean(value, self.names) if self.names else value


NO_AXES = MeshAxes()


def resolve_axes(
    axis_name: AxisName,
    paths: Sequence[str],
    leaves: Sequence[Any],
    *,
    also: dict[str, Any] | None = None,
) -> MeshAxes:
    """The axes over which each leaf is sharded.

    Args:
      axis_name: as given to the factory.
      paths: of the leaves.
      leaves: gradients, or what is sharded as they are.
      also: other arrays by name, such as the loss, which may vary over named axes only.

    Raises:
      ValueError: if something varies over an axis that was not named, where types tell.
    """
    named = [_names_of(axis_name, path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    names = tuple(dict.fromkeys(name for group in named for name in group))
    if not callable(axis_name):
        names = _as_tuple(axis_name)
    others = {name: value for name, value in (also or {}).items() if value is not None}
    _check_varying(names, dict(zip(paths, leaves, strict=True)) | others)
    if not names:
        return NO_AXES
    tells = {name: _types_tell(name) for name in names}
    of_leaves = tuple(
        tuple(name for name in own if not tells[name] or name in _varying(leaf))
        for own, leaf in zip(named, leaves, strict=True)
    )
    return MeshAxes(names, of_leaves)


def resolve_axes_at_init(
    axis_name: AxisName, paths: Sequence[str], leaves: Sequence[Any]
) -> MeshAxes:
    """The same where the axes may be unbound, since ``init`` may be called outside."""
    try:
        return resolve_axes(axis_name, paths, leaves)
    except NameError:
        return NO_AXES


def _names_of(axis_name: AxisName, path: str, leaf: Any) -> tuple[str, ...]:
    if not callable(axis_name):
        return _as_tuple(axis_name)
    names = _as_tuple(axis_name(path, leaf))
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"axis_name returned {names!r} for the array at {path!r}; it must return a mesh axis "
            "name, a tuple of them, or None for an array that is the same on every device."
        )
    return names


def _as_tuple(names: Any) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def _varying(leaf: Any) -> frozenset[str]:
    """The mesh axes over which JAX's types say that an array varies."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return frozenset()
    kind = jax.typeof(leaf)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(kind.vma)  # JAX before 0.10


def _types_tell(name: str) -> bool:
    """Whether types know about this axis: under ``shard_map`` unless ``check_vma=False``."""
    return name in _varying(lax.axis_index(name))


def _check_varying(names: tuple[str, ...], arrays: dict[str, Any]) -> None:
    for path, leaf in arrays.items():
        unnamed = sorted(_varying(leaf) - set(names))
        if unnamed:
            shown = repr(unnamed[0]) if len(unnamed) == 1 else repr(tuple(unnamed))
            what = "The loss passed as value=" if path == "value=" else f"The gradient {path!r}"
            raise ValueError(
                f"{what} differs between the devices along {', '.join(map(repr, unnamed))}, but "
                "axis_name does not name that, so each device would decide by itself. If it is "
                f"sharded, pass axis_name={shown}; if every device has its own from its part of "
                f"the batch, average it first: jax.lax.pmean(x, {shown})."
            )
