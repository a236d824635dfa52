"""What the compiler of TPUs makes of a guarded step; no TPU is needed, and nothing is run.

    pytest -m tpu tests/test_accelerators.py      # in an environment with libtpu>=0.0.52

The package `libtpu` compiles for chips that are only described. With it installed every program
that imports JAX looks for a TPU, so these tests have an environment of their own. The bounds hold
with libtpu 0.0.52, not with the 0.0.42 that jax[tpu] of JAX 0.10 asks for (guard: 1.4 to 1.7
gradients' bytes more).

The compiler of the H100 works in the same way, but takes 4.6 GB to install, so it is asked by hand:

    pip install "jax[cuda13]"                     # in yet another environment
    python -m benchmarks.accelerators --platform h100 --folder benchmarks/results
    python -m benchmarks.sharded --platform h100:8 --folder benchmarks/results

Covered, for a v5p: bytes of the hot path, copies and transfers of every kind of clip and of the
default, bfloat16 gradients, and the collectives of a step that is split over four chips.
"""

from __future__ import annotations

import functools
from typing import Any

import optax
import pytest

from benchmarks import _hlo, _setups, _topologies, accelerators, collectives

pytestmark = pytest.mark.tpu

SHAPES = accelerators.SHAPES["8 arrays"]


@functools.cache
def chips() -> _topologies.Chips:
    _topologies.prepare()
    return _topologies.describe("v5p:2x2x1")


@functools.cache
def measures(name: str, dtypes: str = "f32") -> dict[str, Any]:
    variant = _setups.VARIANTS[name]
    tx = variant.make(optax.adamw(0.1))
    wanted = accelerators.DTYPES[dtypes]
    return accelerators.measure(chips(), SHAPES, wanted, tx, is_hot=variant.is_hot)[1]


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("og.guard", "f32"),
        ("og.guard, zscore", "f32"),
        ("og.guard, zscore by leaf", "f32"),
        ("og.stabilize, norm", "f32"),
        ("og.stabilize", "f32"),
        ("og.guard", "bf16 gradients"),
        ("og.guard, zscore", "bf16 gradients"),
        ("og.guard, zscore", "bf16, f32 moments"),
    ],
)
def test_one_read_of_the_gradients_is_all_that_a_guard_adds(name, dtypes):
    bare, guarded = measures(_setups.BARE, dtypes), measures(name, dtypes)
    reads = (guarded["hot_bytes"] - bare["hot_bytes"]) / bare["gradient_bytes"]
    assert reads <= 1.05
    assert guarded["num_large_copies"] == guarded["num_host_transfers"] == 0
    # Not one gradient's worth of memory more.
    assert guarded["temp_bytes"] <= bare["temp_bytes"] + 0.2 * bare["gradient_bytes"]


def test_optax_pays_more_for_a_clip_and_a_guard():
    theirs, ours = measures("apply_if_finite(clip)"), measures("og.stabilize, norm")
    assert ours["hot_bytes"] < 0.8 * theirs["hot_bytes"]


@functools.cache
def program(name: str) -> _hlo.Program:
    """On four chips, each matrix split over both axes."""
    layout = collectives.LAYOUTS["fully sharded x tensor-parallel"]
    layout = layout._replace(axes={"data": 2, "model": 2})
    tx = collectives.VARIANTS[name](optax.adamw(0.1), None)
    return _hlo.analyze(collectives.compile_sharded(tx, SHAPES, layout, chips())[0])


@pytest.mark.parametrize("name", ["og.guard", "og.stabilize"])
def test_split_step_has_the_collectives_of_a_plain_clip(name):
    ours, theirs = (program(each).hot.collectives for each in (name, "clip_by_global_norm"))
    assert sorted(ours) == sorted(theirs)
    assert {each.kind for each in ours} == {"all-reduce"}
    assert sum(each.size for each in ours) <= 2 * len(SHAPES)
