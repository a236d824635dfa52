"""States of few arrays: many named numbers in one int32 and one float vector.

Every array that goes into a compiled call and comes out of it costs 3 µs, so the scalars of a
state share two vectors. A state is a NamedTuple of its arrays; the names of what they hold are
``Entry`` attributes of its class, each said once, in the order in which they are packed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._core.arrays import increment, promote
from optax_guard._core.statistics import moving_average

_RECENT = 0.01  # weight of a step in what is called recent: about 100 steps
_NAN, _INF = -1.0, -2.0  # what stands for a norm that is not finite


class Entry:
    """One number, or a run of them, in a packed vector of a state; read as an attribute.

    It indexes the last axis, and so reads the states of an ensemble too.
    """

    def __init__(
        self,
        field: str,
        doc: str,
        *,
        where: Callable[[Any], slice] | None = None,
        read: Callable[[Any, Any], Any] | None = None,
        store: Callable[[Any], Any] | None = None,
    ):
        """Says where the entry is found; scalars take their place from their order.

        Args:
          field: the packed vector.
          doc: what the entry means.
          where: for a run, from the state to its slice.
          read: from ``(state, stored)`` to what is read.
          store: the inverse, for packing.
        """
        self.field = field
        self.__doc__ = doc
        self.where = where
        self.read = read
        self.store = store
        self.place = -1

    def __set_name__(self, owner: type, name: str) -> None:
        """Gives a scalar the next place in its vector."""
        entries = owner.__dict__.get("_entries")
        if entries is None:
            inherited = getattr(owner, "_entries", {})
            entries = dict(inherited)
            type.__setattr__(owner, "_entries", entries)
        self.place = sum(entry.field == self.field for entry in entries.values())
        entries[name] = self

    def __get__(self, state: Any, owner: type | None = None) -> Any:
        """Reads the entry; the descriptor itself from the class."""
        if state is None:
            return self
        stored = _vector(state, self.field)[..., self.index(state)]
        return stored if self.read is None else self.read(state, stored)

    def index(self, state: Any) -> int | slice:
        """Where the entry stands along the last axis."""
        return self.place if self.where is None else self.where(state)


def _vector(state: Any, field: str) -> Any:
    """A packed vector, taken out of the variable in which Flax may hold it."""
    leaves = jax.tree.leaves(getattr(state, field))
    if not leaves:
        raise ValueError(
            f"This {type(state).__name__} has no array in {field!r}. Pass the whole optimizer "
            "state, not a part that eqx.filter or eqx.partition made of it."
        )
    return leaves[0]


def flag(field: str, doc: str) -> Entry:
    """An entry that reads as bool."""
    return Entry(field, doc, read=lambda state, stored: stored != 0)


def norm(field: str, doc: str, where: Callable[[Any], slice] | None = None) -> Entry:
    """Norms that may be NaN or infinite when read, and are stored as finite numbers.

    So no state holds a NaN after a skipped step, which finiteness checks of trainers and
    ``jax_debug_nans`` would take for a broken run.
    """
    return Entry(field, doc, where=where, read=_read_norm, store=_store_norm)


def _store_norm(value: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(value), _NAN, jnp.where(jnp.isinf(value), _INF, value))


def _read_norm(state: Any, stored: Any) -> Any:
    del state
    xp = jnp if isinstance(stored, jax.Array) else np
    value = xp.where(stored == _NAN, math.nan, xp.where(stored == _INF, math.inf, stored))
    return value.astype(stored.dtype)


class PackedState:
    """Mixin of a NamedTuple whose vectors hold named entries."""

    __slots__ = ()
    _entries: ClassVar[dict[str, Entry]] = {}
    _fields: ClassVar[tuple[str, ...]]

    @classmethod
    def pack(cls, **values: Any) -> Any:
        """The state that holds these fields and entries, each of them named once.

        A packed vector has the dtype of the field's default, int32 or the widest of its floats.
        """
        parts: dict[str, list[Any]] = {}
        for name, entry in cls._entries.items():
            value = values.pop(name)
            value = np.float32(value) if isinstance(value, float) else value  # not of 64 bits
            value = entry.store(value) if entry.store else value
            parts.setdefault(entry.field, []).append(jnp.asarray(value))
        return cls(**values, **{field: _join(field, part) for field, part in parts.items()})

    def _replace(self, **changes: Any) -> Any:
        """As that of every NamedTuple, but takes the names of entries as well."""
        fields = {name: changes.pop(name) for name in list(changes) if name in self._fields}
        state = type(self)(*(fields.get(name, getattr(self, name)) for name in self._fields))
        for name, value in changes.items():
            entry = self._entries.get(name)
            if entry is None:
                known = ", ".join([*self._fields, *self._entries])
                raise ValueError(f"{type(self).__name__} has no {name!r}; it has {known}.")
            vector = jnp.asarray(_vector(state, entry.field))
            value = entry.store(value) if entry.store else value
            vector = vector.at[..., entry.index(state)].set(jnp.asarray(value, vector.dtype))
            state = state._replace(**{entry.field: vector})
        return state


def _join(field: str, parts: list[jax.Array]) -> jax.Array:
    """One vector of scalars and runs.

    Place by place by a select, which XLA computes in one kernel; before a concatenation it would
    launch one for each scalar.
    """
    is_counter = field == "integers"
    dtype = jnp.int32 if is_counter else promote(jnp.float32, *(part.dtype for part in parts))
    size = sum(part.size for part in parts)
    place = lax.iota(jnp.int32, size)
    vector, start = jnp.zeros((size,), dtype), 0
    for part in parts:
        stop = start + part.size
        value = part.astype(dtype)
        if part.ndim:
            value = lax.pad(value.reshape(-1), jnp.zeros((), dtype), [(start, size - stop, 0)])
        is_here = (place == start) if not part.ndim else (place >= start) & (place < stop)
        vector = jnp.where(is_here, value, vector)
        start = stop
    return vector


class _RuleArrays(NamedTuple):
    integers: Any
    numbers: Any
    history: Any


class RuleState(PackedState, _RuleArrays):
    """State of every rule that limits or sets norms: 20 bytes and its history.

    Attributes:
      integers: int32 ``[2]``, packed.
      numbers: float32 ``[3]``, packed.
      history: what the rule remembers of each group, ``[rows, *groups]``, or one such array for
        each leaf with scope "unit" or a callable. A rule that remembers nothing has no array here:
        ``()``, ``{"leaf": ()}`` or ``{"unit": ()}``, by its scope.
        Counts in it are kept as floats, exact up to 2**24, where they stay.
    """

    __slots__ = ()
    factory: ClassVar[str] = "limit_norms"

    steps = Entry("integers", "int32, finite steps seen (the argument of a schedule)")
    clipped_total = Entry("integers", "int32, steps in which at least one group was cut")
    last_scale = Entry("numbers", "smallest factor applied in the last finite step")
    recent_clip_rate = Entry("numbers", "share of steps cut, over about the last 100")
    recent_scale = Entry("numbers", "mean of the smallest factors, over about the last 100 steps")

    def __reduce__(self) -> Any:
        """Pickles by the name of the factory: classes of users' rules are made as they run."""
        return _rebuild, (self.factory, tuple(self))


def _rebuild(factory: str, arrays: tuple[Any, ...]) -> RuleState:
    return rule_state(factory)(*arrays)


@functools.cache
def rule_state(factory: str) -> type[RuleState]:
    """The class of states that the factory of this name makes, such as ``ClipByNormState``."""
    name = "".join(word.capitalize() for word in factory.split("_")) + "State"
    namespace = {
        "__slots__": (),
        "factory": factory,
        "__doc__": f"State of ``{factory}``, see :class:`RuleState`.",
        "__module__": "optax_guard.states",
    }
    return type(name, (RuleState,), namespace)


def start_counting(state_type: type[RuleState], history: Any = ()) -> RuleState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.float32)
    return state_type.pack(
        steps=0, clipped_total=0, last_scale=zero + 1, recent_clip_rate=zero,
        recent_scale=zero + 1, history=history,
    )  # fmt: skip


def count_step(state: RuleState, *, is_cut: jax.Array, scale: jax.Array, history: Any) -> RuleState:
    """The state after a finite step.

    Args:
      state: the one before it.
      is_cut: bool, whether anything was cut.
      scale: smallest factor.
      history: the new one.
    """
    return type(state).pack(**counted(state, is_cut, scale), history=history)


def counted(state: Any, is_cut: jax.Array, scale: jax.Array) -> dict[str, jax.Array]:
    """What every rule counts, after a finite step."""
    steps = increment(state.steps)
    weight = jnp.maximum(1 / steps.astype(jnp.float32), _RECENT)
    scale = jax.lax.stop_gradient(jnp.asarray(scale).astype(jnp.float32))
    scale = jnp.minimum(scale, jnp.finfo(jnp.float32).max / 4)  # a mean of them stays finite
    total = state.clipped_total
    rate = moving_average(state.recent_clip_rate, is_cut.astype(jnp.float32), weight)
    return {
        "steps": steps,
        "clipped_total": jnp.where(is_cut, increment(total), total),
        "last_scale": scale,
        "recent_clip_rate": rate,
        "recent_scale": moving_average(state.recent_scale, scale, weight),
    }
