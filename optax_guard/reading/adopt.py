"""Carries a run over a change of its transformations. Host side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._core.find import is_own_state, optimizer_part
from optax_guard.reading._units import Unit, find_units, take_out
from optax_guard.reading.find import refuse_tracers
