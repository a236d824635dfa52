"""Whether parameters or optimizer state were non-finite before the step, if it is worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._core.finite import any_nonfinite, is_nonfinite, stack_flags


class Watched(NamedTuple):
    """What may have been non-finite before the step, and whether to look without a reason."""

    params: list[jax.Array]
    inner_state: list[jax.Array]
    initially_nonfinite: jax.Array
    is_suspicious: jax.Array


def find_poison(gradients: Sequence[jax.Array], watched: Watched) -> jax.Array:
    return any_nonfinite(
        gradients, watched.initially_nonfinite, watched.inner_state, watched.params
    )


def _find_nothing(gradients: Sequence[jax.Array], watched: Watched) -> jax.Array:
    """False, of the mesh axes that ``find_poison`` varies over: it looks at no element."""
    del gradients
    nothing = [leaf.reshape(-1)[:0] for leaf in (*watched.params, *watched.inner_state)]
    return jnp.any(stack_flags([is_nonfinite(leaf) for leaf in nothing]))


def look_if(gradients: Sequence[jax.Array], watched: Watched, is_bad: jax.Array) -> jax.Array:
    """Whether there is a poison on this device; looks for it only if something is bad here."""
    is_due = is_bad | watched.is_suspicious
    return lax.cond(is_due, find_poison, _find_nothing, list(gradients), watched)
