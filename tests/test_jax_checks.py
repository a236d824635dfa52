"""What JAX can be told to check at run time finds nothing in any kind of transformation.

What it checks as it traces is tried on every row of the registry in ``test_contract.py``.
"""

from __future__ import annotations

import contextlib
from typing import Any

import assertions
import jax
import jax.numpy as jnp
import optax
import pytest
import registry

import optax_guard as og

KINDS = ("clip_by_zscore", "clip_by_update_ratio", "guard-conditions", "rollback")
PARAMS = registry.tree()
LOSS = jnp.float32(1.5)
STEPS = [registry.gradients(step) for step in range(4)]
# Two fused programs and one operation at a time round differently.
ROUNDING = {"rtol": 1e-5, "atol": 1e-7}
CHECKS = {
    "NaN and Inf": lambda: _both(jax.debug_nans(True), jax.debug_infs(True)),
    "no transfers": lambda: jax.transfer_guard("disallow"),
    "no jit": jax.disable_jit,
}


@contextlib.contextmanager
def _both(*contexts: Any) -> Any:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def steps(tx: Any, state: Any) -> Any:
    for gradients in STEPS:
        updates, state = tx.update(gradients, state, PARAMS, value=LOSS)
    return updates, state


@pytest.mark.parametrize("name", KINDS)
def test_healthy_steps_pass_also_after_a_bad_one(name):
    tx = next(row for row in registry.ROWS if row.name == name).make()
    bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), STEPS[0])
    _, start = tx.update(bad, tx.init(PARAMS), PARAMS, value=LOSS)
    expected = steps(tx, start)
    for check in CHECKS.values():
        with check():
            actual = steps(tx, start)
        assertions.assert_close(actual, expected, **ROUNDING)


def test_readers_pass_inside_jit_where_nothing_may_be_transferred():
    state = og.guard(optax.sgd(0.1)).init(PARAMS)
    read = jax.jit(lambda state: (og.metrics(state), og.select(og.step_ok(state), state, state)))
    read(state)
    with jax.transfer_guard("disallow"):
        read(state)
