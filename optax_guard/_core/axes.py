"""Mesh axes over which updates are sharded inside ``shard_map`` or ``pmap``, leaf by leaf.

All that has to be known on every device travels in one sum over all named axes. A leaf that is
the same along one of them is counted on the first device of that axis only, so that it counts
once, and to the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._core.collectives import pmax, psum, vary_over, where_first
from optax_guard._core.trees import is_inexact

Names = str | tuple[str, ...] | None
AxisName = Names | Callable[[str, Any], Names]


class MeshAxes(NamedTuple):
    """The axes of some leaves. Hashable, so that it can be a static argument.

    Attributes:
      names: all of them; empty outside of ``shard_map``.
      of_leaves: for each leaf those over which its groups are split, so that their norms are sums.
      kept: for each leaf those over which it is split between groups, so that each device has
        groups of its own. Types tell, where a callable leaves the axis out.
    """

    names: tuple[str, ...] = ()
    of_leaves: tuple[tuple[str, ...], ...] = ()
    kept: tuple[tuple[str, ...], ...] = ()

    @property
    def has_kept(self) -> bool:
        """Whether any leaf has groups that are not those of the other devices."""
        return any(self.kept)

    def count_once(self, terms: Sequence[jax.Array]) -> list[jax.Array]:
        """The terms of a sum over all devices, one a leaf."""
        if not self.names:
            return list(terms)
        return [
            where_first(term, self._without(own + kept))
            for term, own, kept in zip(terms, self.of_leaves, self.kept, strict=True)
        ]

    def sum_groups(self, *parts: Sequence[jax.Array]) -> list[list[jax.Array]]:
        """For each of the parts, one array a leaf: their sums over the devices of a group."""
        once = [self.count_once(part) for part in parts]
        for kept in dict.fromkeys(self.kept):
            places = [place for place, own in enumerate(self.kept) if own == kept]
            names = self._without(kept)
            for part, sums in zip(
                once,
                psum([[part[place] for place in places] for part in once], names),
                strict=True,
            ):
                for place, value in zip(places, sums, strict=True):
                    part[place] = value
        return once

    def total_of_groups(self, values: jax.Array) -> jax.Array:
        """The sum over all leaves and devices of ``[leaves]``, each made of groups."""
        pairs = zip(values, self.kept, strict=True)
        return self.psum(sum(where_first(value, self._without(kept)) for value, kept in pairs))

    def _without(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in names)

    def num_shards(self, index: int) -> Any:
        """Over how many devices the elements of a leaf are spread."""
        names = self.of_leaves[index] if self.names else ()
        return lax.psum(1, names) if names else 1

    def psum(self, tree: Any) -> Any:
        """One ``psum`` of all arrays of a tree that share a dtype; the identity without axes."""
        return psum(tree, self.names)

    def any(self, flags: jax.Array) -> jax.Array:
        """Whether each flag holds on any device."""
        return (
            self.psum(vary_over(flags.astype(jnp.int32), self.names)) > 0 if self.names else flags
        )

    def mean(self, value: jax.Array) -> jax.Array:
        """Over all devices."""
        return lax.pmean(value, self.names) if self.names else value

    def max(self, values: jax.Array) -> jax.Array:
        """The largest of each value over all devices."""
        return pmax(vary_over(values, self.names), self.names) if self.names else values

    def vary(self, index: int, tree: Any) -> Any:
        """Arrays that each device has for the groups of a leaf, of the type that says so."""
        names = self.kept[index] if self.names else ()
        return jax.tree.map(functools.partial(vary_over, names=names), tree)


NO_AXES = MeshAxes()


def resolve_axes(
    axis_name: AxisName,
    paths: Sequence[str],
    leaves: Sequence[Any],
    *,
    also: Mapping[str, Any] | None = None,
    what: str = "gradient",
    may_be_kept: bool = False,
) -> MeshAxes:
    """The axes over which each leaf is sharded.

    Args:
      axis_name: as given to the factory.
      paths: of the leaves.
      leaves: gradients, or what is sharded as they are.
      also: other arrays by what they are called, such as the loss, which may vary over named axes
        only.
      what: what the leaves are called.
      may_be_kept: whether each device may have groups of its own.

    Raises:
      ValueError: if something varies over an axis that was not named, where types tell.
    """
    named = [_names_of(axis_name, path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    names = tuple(dict.fromkeys(name for group in named for name in group))
    if not callable(axis_name):
        names = _as_tuple(axis_name)
    elif may_be_kept:
        names = tuple(dict.fromkeys([*names, *sorted(frozenset().union(*map(_varying, leaves)))]))
    called = {_name(f"The {what}", path): leaf for path, leaf in zip(paths, leaves, strict=True)}
    _check_varying(names, called | dict(also or {}))
    if not names:
        return NO_AXES
    try:
        tells = {name: _types_tell(name) for name in names}
    except NameError as error:
        raise NameError(
            f"axis_name={axis_name!r} is for update() inside of jax.shard_map or jax.pmap over "
            "that axis, and there is none around it. Under plain jit, sharded arrays included, "
            "leave axis_name out."
        ) from error
    of_leaves = tuple(
        tuple(name for name in own if not tells[name] or name in _varying(leaf))
        for own, leaf in zip(named, leaves, strict=True)
    )
    kept = tuple(
        tuple(sorted(_varying(leaf) - set(own))) for own, leaf in zip(named, leaves, strict=True)
    )
    if not may_be_kept:
        _check_none_kept(paths, kept)
    return MeshAxes(names, of_leaves, kept)


def axes_of_elements(
    axis_name: AxisName, paths: Sequence[str], leaves: Sequence[Any], params: Sequence[Any] = ()
) -> MeshAxes:
    """The same for what is right element by element, and shares no more than what it counts.

    Without a name the axes are those of the types.
    """
    if axis_name is None:
        axis_name = tuple(sorted(frozenset().union(*map(_varying, [*leaves, *params]))))
    return resolve_axes(axis_name, paths, leaves)


def resolve_axes_at_init(
    axis_name: AxisName, paths: Sequence[str], leaves: Sequence[Any], *, may_be_kept: bool = False
) -> MeshAxes:
    """The same where the axes may be unbound, since ``init`` may be called outside."""
    try:
        return resolve_axes(axis_name, paths, leaves, may_be_kept=may_be_kept)
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
    if not isinstance(leaf, jax.Array):
        return frozenset()
    kind = jax.typeof(leaf)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(kind.vma)  # JAX before 0.10


def _types_tell(name: str) -> bool:
    """Whether types know about this axis: under ``shard_map`` unless ``check_vma=False``."""
    return name in _varying(lax.axis_index(name))


def parameters(params: Any) -> dict[str, Any]:
    """For ``also`` of ``resolve_axes``: the float leaves of the parameters."""
    return _called("The parameter", params)


def state_of_optimizer(state: Any) -> dict[str, Any]:
    """The same of the state of a wrapped optimizer."""
    return _called("The optimizer's state", state)


def no_elements(leaf: Any) -> Any:
    """A float array without elements that varies over the same mesh axes; others as they are."""
    if not is_inexact(leaf):
        return leaf
    return vary_over(jnp.zeros((0,), leaf.dtype), tuple(sorted(_varying(leaf))))


def _name(what: str, path: str) -> str:
    return f"{what} {path!r}" if path else what  # a bare array has none


def _called(what: str, tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        _name(what, jax.tree_util.keystr(path, simple=True, separator="/")): leaf
        for path, leaf in flat
        if is_inexact(leaf) and _varying(leaf)
    }


def _check_varying(names: tuple[str, ...], arrays: Mapping[str, Any]) -> None:
    for what, leaf in arrays.items():
        unnamed = sorted(_varying(leaf) - set(names))
        if unnamed:
            raise ValueError(
                f"{what} differs between the devices along {_listed(unnamed)}, but axis_name does "
                "not name that, so each device would decide by itself. If it is sharded, pass "
                f"axis_name={_as_argument(unnamed)}; if every device has its own from its part of "
                f"the batch, average it first: jax.lax.pmean(x, {_as_argument(unnamed)})."
            )


def _check_none_kept(paths: Sequence[str], kept: Sequence[tuple[str, ...]]) -> None:
    for path, names in zip(paths, kept, strict=True):
        if names:
            raise ValueError(
                f"The gradient {path!r} differs between the devices along {_listed(names)}, but "
                f"axis_name({path!r}, leaf) says that it does not. Let it return "
                f"{_as_argument(names)} for this array. (To leave out an axis that splits an array "
                'between its groups is for rules with scope="unit" or a callable.)'
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _as_argument(names: Sequence[str]) -> str:
    return repr(names[0]) if len(names) == 1 else repr(tuple(names))
