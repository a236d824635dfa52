"""How a guard hears of the measurement that a clip inside the wrapped optimizer makes.

While the guard traces the optimizer it listens for a measurement of the very gradients that it
must measure itself. These are told apart by the identity of their tracers, which survives
``optax.chain``, ``masked`` and ``inject_hyperparams`` as long as nothing changes a gradient.

Every other measurement on the way is noted, too, so that the guard can see which of its arrays
reach no output but through measurements. Traced once more, these are left out of it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import Tracer


class Heard(NamedTuple):
    """A measurement of the gradients, made inside.

    Attributes:
      call: its static arguments.
      operands: besides the gradients: whether small norms matter, and what is watched.
      result: what it returned.
    """

    call: Any
    operands: tuple[Any, Any]
    result: Any


class Measured(NamedTuple):
    """Some measurement made inside.

    Attributes:
      number: of the rule that makes it; see ``narrow``.
      arrays: that it was given.
      is_used: which of them it looked at.
      results: leaves of what it returned.
    """

    number: int
    arrays: tuple[Any, ...]
    is_used: tuple[bool, ...]
    results: tuple[Any, ...]


# For a rule, by its number, which arrays it may look at.
Masks = Mapping[int, tuple[bool, ...]]


class Listener:
    """Waits for the first measurement of these arrays, and notes all of the same trace."""

    def __init__(self, arrays: Sequence[Any], masks: Masks):
        self._arrays, self._masks = arrays, masks
        self._trace = next((a._trace for a in arrays if isinstance(a, Tracer)), None)
        self._number = -1
        self.heard: Heard | None = None
        self.measured: list[Measured] = []

    def is_own(self, value: Any) -> bool:
        """Whether this is a tracer of the function that is listened to, not of one inside."""
        return isinstance(value, Tracer) and value._trace is self._trace

    def narrow(self, is_used: tuple[bool, ...]) -> tuple[bool, ...]:
        """Which arrays the rule that begins is to look at."""
        self._number += 1
        mask = self._masks.get(self._number, is_used)
        return tuple(one and other for one, other in zip(is_used, mask, strict=True))

    def note(self, arrays: Sequence[Any], is_used: Sequence[bool], results: Sequence[Any]) -> None:
        """Remembers numbers that a rule takes of its arrays, if they are of the same trace."""
        if all(map(self.is_own, results)):
            one = Measured(self._number, tuple(arrays), tuple(is_used), tuple(results))
            self.measured.append(one)

    def hear(self, arrays: Sequence[Any], heard: Heard) -> None:
        """Keeps what is heard if it is about the same arrays."""
        is_used = heard.call.is_used
        self.note(arrays, is_used, jax.tree.leaves(heard.result))
        if self.heard is not None or len(arrays) != len(self._arrays):
            return
        triples = zip(arrays, self._arrays, is_used, strict=True)
        if all(one is other for one, other, is_used in triples if is_used):
            self.heard = heard


_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("listener")


@contextlib.contextmanager
def listen_for(arrays: Sequence[Any], masks: Masks) -> Iterator[Listener]:
    """Listens while the optimizer inside is traced."""
    listener = Listener(arrays, masks)
    token = _listener.set(listener)
    try:
        yield listener
    finally:
        _listener.reset(token)


def narrow(is_used: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which arrays a rule is to look at, as the innermost guard knows. To be asked once by each."""
    listener = _listener.get(None)
    return is_used if listener is None else listener.narrow(is_used)


def announce(arrays: Sequence[Any], heard: Heard) -> None:
    """Tells the innermost guard that is tracing, if any, of a measurement."""
    listener = _listener.get(None)
    if listener is not None:
        listener.hear(arrays, heard)


def note(arrays: Sequence[Any], is_used: Sequence[bool], *results: Any) -> None:
    """Tells of other numbers that a rule takes of its arrays, such as their largest elements."""
    listener = _listener.get(None)
    if listener is not None:
        listener.note(arrays, is_used, results)
