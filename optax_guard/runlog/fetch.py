"""Copies the numbers of an optimizer state without waiting for the step that makes them.

The states of this library keep their numbers in a few packed vectors. These go into one compiled
call, which reads them by name and writes all numbers, bit for bit, into one vector of words: a new
buffer, which nobody donates, and one transfer instead of thirty.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._core.find import own_states
from optax_guard._core.states import PackedState
from optax_guard.reading.find import find_outer_guards, find_states, no_state, refuse_batched
from optax_guard.reading.metrics import metrics
from optax_guard.reading.names import NamedLeaf
from optax_guard.runlog.about import About, describe

STEP = "step"
LEAF_NORMS = "leaf_norms"
FAULT_LEAVES = "fault_leaves"
FAULT_STEPS = "fault_steps"  # of the outermost guards; never leaves the host
_LISTS = (LEAF_NORMS, FAULT_LEAVES, FAULT_STEPS)
_VECTORS = ("integers", "numbers")
_UNMEASURED = -1.0  # in place of a norm, on the way to the host
_WORD = np.dtype(np.uint32)
_NO_MESH = jax.sharding.Mesh(np.empty((), dtype=object), ())

Record = dict[str, Any]


class Part(NamedTuple):
    """A number or a list of them in the vector of words.

    Attributes:
      name: of the number.
      is_bool: whether they are flags.
      carrier: name of the dtype that they travel as.
      num_words: that they take.
    """

    name: str
    is_bool: bool
    carrier: str
    num_words: int


@functools.lru_cache(maxsize=1024)
def _part(name: str, size: int, dtype: Any) -> Part:
    carrier = _carrier(dtype)
    words = size * carrier.itemsize // _WORD.itemsize
    return Part(name, jnp.issubdtype(dtype, jnp.bool_), carrier.name, words)


class Layout(NamedTuple):
    """What of a state is fetched, and what arrives.

    Attributes:
      treedef: structure of the state, as of :func:`outline`.
      places: of the packed vectors, among the leaves of that.
      shapes: of these vectors.
      parts: what arrives, in its order.
      about: what its names mean.
    """

    treedef: Any
    places: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...]
    about: About

    def matches(self, leaves: Sequence[Any]) -> bool:
        """Whether a state of this structure, given by its leaves, has the same shapes too."""
        return self.shapes == tuple([getattr(leaf, "shape", ()) for leaf in self.pick(leaves)])

    def pick(self, leaves: Sequence[Any]) -> list[Any]:
        """The packed vectors."""
        return [leaves[place] for place in self.places]


def find_layout(
    opt_state: Any, params: Sequence[NamedLeaf] | None, known: frozenset[tuple[Any, ...]]
) -> Layout:
    """Looks for the numbers of ``opt_state`` once, so that later steps need not."""
    leaves, treedef = jax.tree.flatten(opt_state)
    opt_state = treedef.unflatten(leaves)  # dicts then have the order that they have when fetched
    indexed = treedef.unflatten(range(len(leaves)))
    states = find_states(opt_state)
    if not states:
        text = no_state(opt_state, "state of optax_guard")
        raise ValueError(f"{text} Or pass None to record only the scalars given by name.")
    owned = [_own_leaves(found.state) for found in find_states(indexed)]
    for found, own in zip(states, owned, strict=True):
        shape = np.shape(leaves[own[0]])
        is_packed = isinstance(found.state, PackedState)
        refuse_batched("History.append", np.empty(shape[:-1] if is_packed else shape))
    about = describe(opt_state, indexed, owned, params)

    nodes, treedef = outline(opt_state, known)
    counted = find_states(treedef.unflatten(range(len(nodes))))
    places = tuple(place for found in counted for place in _own_leaves(found.state))
    vectors = [nodes[place] for place in places]
    shaped = [jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)) for leaf in vectors]
    names: list[str] = []

    def read(vectors):
        pairs = _read(treedef, places, vectors)
        names[:] = [name for name, _ in pairs]
        return [array for _, array in pairs]

    arriving = zip(names, jax.eval_shape(read, shaped), strict=True)
    parts = [_part(name, int(np.prod(x.shape)), x.dtype) for name, x in arriving]
    return Layout(treedef, places, tuple(map(np.shape, vectors)), tuple(parts), about)


def outline(opt_state: Any, known: frozenset[tuple[Any, ...]]) -> tuple[list[Any], Any]:
    """Leaves and structure of a state, in which arrays in a dict of ``known`` keys are one leaf.

    Between two steps hundreds of moments have left the cache: to look at each takes 0.2 ms.
    """

    def is_known(node):
        return type(node) is dict and tuple(node) in known and _is_array(_first(node))

    return jax.tree.flatten(opt_state, is_leaf=is_known)


def keys_of_arrays(opt_state: Any) -> frozenset[tuple[Any, ...]]:
    """Keys of the dicts that hold nothing but arrays, such as moments; none of this library's."""
    fields = [value for state in own_states(opt_state) for value in state]
    own = {id(value) for value in fields if type(value) is dict}  # states of conditions, by name
    found: set[tuple[Any, ...]] = set()

    def is_one(node):
        is_one = id(node) not in own and type(node) is dict and bool(node) and _has_arrays(node)
        found.update([tuple(node)] if is_one else [])
        return is_one

    jax.tree.leaves(opt_state, is_leaf=is_one)
    return frozenset(found)


def _has_arrays(node: Any) -> bool:
    return all(map(_has_arrays, node.values())) if type(node) is dict else _is_array(node)


def _first(node: Any) -> Any:
    while type(node) is dict:
        node = next(iter(node.values()), None)
    return node


def _is_array(node: Any) -> bool:
    return isinstance(node, (jax.Array, np.ndarray, optax.MaskedNode))


def _own_leaves(state: Any) -> list[int]:
    """Of a state with indices for leaves, those of the vectors that hold its numbers."""
    fields = [name for name in _VECTORS if hasattr(state, name)]
    if not isinstance(state, PackedState):
        fields = list(state._fields)
    return [jax.tree.leaves(getattr(state, name))[0] for name in fields]


def _read(treedef: Any, places: Sequence[int], vectors: Sequence[Any]) -> list[tuple[str, Any]]:
    """All numbers by name, of a state of which only the packed vectors are there."""
    leaves: list[Any] = [None] * treedef.num_leaves
    for place, vector in zip(places, vectors, strict=True):
        leaves[place] = jnp.asarray(vector)
    opt_state = treedef.unflatten(leaves)
    found: list[tuple[str, Any]] = list(metrics(opt_state).items())
    for guard in find_outer_guards(opt_state):
        state = guard.state
        is_measured = (state.guard_step > 0) & ~state.unused_leaves
        norms = jnp.where(is_measured, state.leaf_norms, _UNMEASURED)
        found += [(LEAF_NORMS, norms), (FAULT_LEAVES, state.last_fault_leaves)]
        found += [(FAULT_STEPS, state.last_fault_step)]
    return found


class Pending:
    """Numbers on their way to the host, as one small array."""

    def __init__(
        self,
        known: Record,
        scalars: dict[str, Any],
        layout: Layout | None = None,
        vectors: Sequence[Any] = (),
    ):
        """Starts the copy.

        Args:
          known: numbers that are on the host already.
          scalars: scalar arrays by name.
          layout: that of the state.
          vectors: of the state, picked by the layout.
        """
        self._known = known
        self._scalars = [_part(name, 1, array.dtype) for name, array in scalars.items()]
        self._parts = layout.parts if layout else ()
        self._packed: Any = None
        if vectors or scalars:
            arrays = _on_one_device([*scalars.values(), *vectors])
            pack = _packer(layout and layout.treedef, layout.places if layout else ())
            with jax.set_mesh(_NO_MESH):  # these arrays are on none, though one may be set
                self._packed = pack(arrays[: len(scalars)], arrays[len(scalars) :])
            self._packed.copy_to_host_async()

    def is_ready(self) -> bool:
        """True if :meth:`get` would not wait."""
        return self._packed is None or self._packed.is_ready()

    def get(self) -> Record:
        """The numbers as Python numbers; lists of those that there is one of for each leaf.

        A norm that was not measured is None. ``fault_leaves`` are indices.
        """
        record, lists, start = dict(self._known), {}, 0
        words = np.zeros(0, _WORD) if self._packed is None else np.asarray(self._packed)
        views = {name: words.view(name).tolist() for name in ("int32", "float32")}
        for name, is_bool, carrier, num_words in (*self._scalars, *self._parts):
            stop = start + num_words
            if carrier in views:
                values = views[carrier][start:stop]
            else:
                values = words[start:stop].view(carrier).tolist()
            start = stop
            if name in _LISTS:
                lists.setdefault(name, []).extend(values)
            else:
                record[name] = bool(values[0]) if is_bool else values[0]
        if not lists:
            return record
        norms = [None if norm == _UNMEASURED else norm for norm in lists[LEAF_NORMS]]
        lists[FAULT_LEAVES] = [index for index, bad in enumerate(lists[FAULT_LEAVES]) if bad]
        return record | lists | {LEAF_NORMS: norms}


@functools.cache
def _carrier(dtype: Any) -> np.dtype:
    """What an array travels as: something whose bytes are whole words."""
    dtype = np.dtype(dtype)
    if dtype.itemsize >= 4:
        return dtype
    return np.dtype(np.float32 if jnp.issubdtype(dtype, jnp.floating) else np.int32)


@functools.lru_cache(maxsize=128)
def _packer(treedef: Any, places: tuple[int, ...]) -> Any:
    """The compiled function ``scalars, vectors -> words``."""

    @jax.jit
    def pack(scalars, vectors):
        arrays = [*scalars]
        if treedef is not None:
            arrays += [array for _, array in _read(treedef, places, vectors)]
        return _as_words(arrays)

    return pack


def _as_words(arrays: Sequence[Any]) -> jax.Array:
    carried = [jnp.ravel(array).astype(_carrier(array.dtype)) for array in arrays]
    words = [jnp.ravel(lax.bitcast_convert_type(array, _WORD)) for array in carried]
    # Written one after the other: XLA:CPU takes ten times as long for a concatenation.
    packed, start = jnp.zeros(sum(part.size for part in words), _WORD), 0
    for part in words:
        packed = lax.dynamic_update_slice(packed, part, (start,))
        start += part.size
    return packed


def _on_one_device(arrays: Sequence[Any]) -> list[Any]:
    """The copy on one local device of what is replicated over several."""
    if jax.device_count() == 1:
        return list(arrays)
    local = [_local_copy(array) for array in arrays]
    devices = {array.device for array in local if isinstance(array, jax.Array)}
    if len(devices) > 1:
        first = next(array.device for array in local if isinstance(array, jax.Array))
        return [jax.device_put(array, first) for array in local]
    return local


def _local_copy(array: Any) -> Any:
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    return jax.device_put(array, jax.local_devices()[0])
