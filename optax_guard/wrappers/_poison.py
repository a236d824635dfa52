"""Whether parameters or optimizer state were non-finite before the step, if it is worth a look."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._core.axes import no_elements
from optax_guard._core.finite import any_nonfinite, is_nonfinite, stack_flags


class Watched(NamedTuple):
    """What may have been non-finite before the step, and whether to look without a reason."""

    params: list[jax.Array]
    inner_state: list[jax.Array]
    initially_nonfinite: jax.Array
    is_suspicious: jax.Array


class LookIf(NamedTuple):
    """Looks for a poison. Hashable, so that it can be a static argument.

    Attributes:
      shapes: of the gradients, by which parameters and their moments are matched.
    """

    shapes: tuple[tuple[int, ...], ...]

    def is_due(self, watched: Watched) -> jax.Array:
        """Whether to look even if no gradient is bad."""
        return watched.is_suspicious

    def __call__(self, watched: Watched, is_bad: jax.Array) -> jax.Array:
        """Whether there is a poison on this device; looks only if something is bad here."""
        return lax.cond(is_bad | watched.is_suspicious, self.find, _find_nothing, watched)

    def find(self, watched: Watched) -> jax.Array:
        """Whether there is one."""
        return any_nonfinite(
            self.shapes, watched.initially_nonfinite, watched.inner_state, watched.params
        )


def _find_nothing(watched: Watched) -> jax.Array:
    """False, of the mesh axes that ``find`` varies over: it looks at no element."""
    nothing = map(no_elements, (*watched.params, *watched.inner_state))
    return jnp.any(stack_flags([is_nonfinite(leaf) for leaf in nothing]))
