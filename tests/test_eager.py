"""``update`` without ``jit`` around it, as first scripts and notebooks have it.

After its first calls nothing is compiled, whatever changes between two calls that changes no type,
a step of a small network takes no longer than 3 ms, and no memory stays behind.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_guard as og
from optax_guard._core import transformation

PARAMS = {"bias": jnp.ones(16), "kernel": jnp.ones((16, 3))}
OTHERS = {"head": {"scale": jnp.ones(5)}, "table": jnp.ones((7, 2))}
MOST_SECONDS = 3e-3
STRAY_MAPS = 4  # of the heap; a program has 9 and more
MAPS = pathlib.Path("/proc/self/maps")  # Linux only
_compilations: list[str] = []


def _note_compilation(event: str, *_: Any, **__: Any) -> None:
    if "backend_compile" in event:
        _compilations.append(event)


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


def num_maps() -> int:
    return len(MAPS.read_text().splitlines()) if MAPS.exists() else 0


def cost_of(step: Callable[[int], Any], num_steps: int, *, first_calls: int = 8) -> Any:
    """Compilations, new memory maps, and the median of the seconds, after the first calls."""
    for number in range(first_calls):
        step(number)
    _compilations.clear()
    maps, seconds = num_maps(), []
    for number in range(first_calls, first_calls + num_steps):
        start = time.perf_counter()
        jax.block_until_ready(step(number))
        seconds.append(time.perf_counter() - start)
    return len(_compilations), num_maps() - maps, np.median(seconds)


class Walk:
    """Eager steps with one transformation, some models in turn."""

    def __init__(self, tx: Any, *models: Any):
        self.tx, self.models = tx, models or (PARAMS,)
        self.states = [tx.init(model) for model in self.models]

    def __call__(self, number: int, **extra_args: Any) -> Any:
        place = number % len(self.models)
        params, state = self.models[place], self.states[place]
        updates, self.states[place] = self.tx.update(params, state, params, **extra_args)
        return updates


def test_two_thousand_steps_leave_nothing_behind():
    num_compiled, num_new_maps, seconds = cost_of(Walk(og.stabilize(optax.adam(1e-3))), 2000)
    assert num_compiled == 0
    assert num_new_maps <= STRAY_MAPS
    assert seconds <= MOST_SECONDS


LOSSES = (1.0, jnp.float32(1.0), np.float32(1.0), np.float64(1.0), jnp.asarray(1.0), 2, None)


def with_losses_of_all_kinds() -> Any:
    walk = Walk(og.guard(optax.adam(1e-3)))
    return lambda number: walk(number, value=LOSSES[number % len(LOSSES)])


def with_models_in_turn() -> Any:
    return Walk(og.guard(optax.adam(1e-3)), PARAMS, OTHERS)


def with_the_rate_as_a_python_number() -> Any:
    walk = Walk(og.guard(optax.inject_hyperparams(optax.adam)(learning_rate=0.1)))

    def step(number):
        walk.states[0].inner_state.hyperparams["learning_rate"] = 0.1 / (number + 1)
        return walk(number)

    return step


def with_a_schedule() -> Any:
    return Walk(og.guard(optax.adam(optax.cosine_decay_schedule(1e-3, 100))))


def with_a_model_of_nnx() -> Any:
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, og.guard(optax.adam(1e-3)), wrt=nnx.Param)
    return lambda number: optimizer.update(model, nnx.state(model, nnx.Param))


def with_extra_args_of_other_kinds() -> Any:
    walk = Walk(og.guard(optax.sgd(1e-3)))
    return lambda number: walk(number, step=number, stage="warm", loss_fn=jnp.sum)


@pytest.mark.parametrize(
    "make",
    [
        with_losses_of_all_kinds,
        with_models_in_turn,
        with_the_rate_as_a_python_number,
        with_a_schedule,
        with_a_model_of_nnx,
        with_extra_args_of_other_kinds,
    ],
)
def test_nothing_is_compiled_again_for_what_changes_no_type(make):
    num_compiled, num_new_maps, _ = cost_of(make(), 16)
    assert num_compiled == 0
    assert num_new_maps <= STRAY_MAPS


def test_functions_that_are_new_at_every_step_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(transformation, "_MOST_PROGRAMS", 2)
    walk = Walk(og.clip_by_norm(1.0))

    def step(number):
        return walk(number, value_fn=lambda params: number)

    num_compiled, num_new_maps, _ = cost_of(step, 4, first_calls=2)
    assert num_compiled == 4
    before = num_maps()
    Walk(og.clip_by_norm(1.0))(0)
    assert num_new_maps <= num_maps() - before + STRAY_MAPS  # those of one program
