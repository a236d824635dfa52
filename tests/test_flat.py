"""Norms of scope "unit" in one vector, as where nothing is sharded, are those of arrays apart."""

from __future__ import annotations

from typing import Any

import assertions
import jax
import jax.numpy as jnp
import optax
import pytest
import registry

import optax_guard as og
from optax_guard.rules import limit_norms

# Squared norms of leaves are added up in another order.
ROUNDING = 1e-6

RULES = {
    "norm": lambda: og.clip_by_norm(0.5, scope="unit"),
    "rms": lambda: og.clip_by_rms(0.1, scope="unit"),
    "zscore": lambda: og.clip_by_zscore(scope="unit", warmup_steps=2),
    "percentile": lambda: og.clip_by_percentile(30.0, scope="unit", window=3),
    "ema": lambda: og.clip_by_ema(scope="unit", warmup_steps=2),
    "param norm": lambda: og.clip_by_param_norm(0.01),
    "normalize": lambda: og.normalize_and_scale(scope="unit"),
}


def gradients(step: int) -> dict[str, Any]:
    scale = {1: 1e-30, 3: 1e30}.get(step, 1.0)
    tree = jax.tree.map(lambda leaf: leaf * scale, registry.gradients(step))
    if step == 2:
        tree["kernel"] = tree["kernel"].at[3, 1].set(jnp.nan)
    return tree | {"scalar": jnp.float32(scale)}


def walk(tx: optax.GradientTransformation) -> list[Any]:
    params = registry.tree() | {"scalar": jnp.float32(1.0)}
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for step in range(5):
        updates, state = update(gradients(step), state, params)
        seen.append((updates, state))
    return seen


PAIRS = [
    pytest.param(
        name,
        is_guarded,
        id=f"{name}-{'guarded' if is_guarded else 'alone'}",
        marks=[pytest.mark.slow] * ((number + is_guarded) % 2),
    )
    for number, name in enumerate(RULES)
    for is_guarded in (False, True)
]


@pytest.mark.parametrize(("name", "is_guarded"), PAIRS)
def test_one_vector_gives_what_arrays_apart_give(name, is_guarded, monkeypatch):
    def make():
        tx = RULES[name]()
        return og.guard(optax.chain(tx, optax.sgd(1.0))) if is_guarded else tx

    monkeypatch.setattr(limit_norms, "can_be_flat", lambda leaves: False)
    apart = walk(make())
    monkeypatch.setattr(limit_norms, "can_be_flat", lambda leaves: True)
    for one, other in zip(walk(make()), apart, strict=True):
        assertions.assert_close(one, other, rtol=ROUNDING)
