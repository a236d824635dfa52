"""How a guard hears of the measurement that a clip inside the wrapped optimizer makes.

While the guard traces the optimizer it listens for a measurement of the very gradients that it
must measure itself. These are told apart by the identity of their tracers, which survives
``optax.chain``, ``masked`` and ``inject_hyperparams`` as long as nothing changes a gradient.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


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


class Listener:
    """Waits for the first measurement of these arrays."""

    def __init__(self, arrays: Sequence[Any]):
        self._arrays = arrays
        self.heard: Heard | None = None

    def hear(self, arrays: Sequence[Any], heard: Heard) -> None:
        """Keeps what is heard if it is about the same arrays."""
        if self.heard is not None or len(arrays) != len(self._arrays):
            return
        triples = zip(arrays, self._arrays, heard.call.is_used, strict=True)
        if all(one is other for one, other, is_used in triples if is_used):
            self.heard = heard


_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("listener")


@contextlib.contextmanager
def listen_for(arrays: Sequence[Any]) -> Iterator[Listener]:
    """Listens while the optimizer inside is traced."""
    listener = Listener(arrays)
    token = _listener.set(listener)
    try:
        yield listener
    finally:
        _listener.reset(token)


def announce(arrays: Sequence[Any], heard: Heard) -> None:
    """Tells the innermost guard that is tracing, if any, of a measurement."""
    listener = _listener.get(None)
    if listener is not None:
        listener.hear(arrays, heard)
