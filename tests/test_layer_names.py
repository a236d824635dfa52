"""Which layer: the number within a stack, in every report and every setup.

Covered: explain, check, diagnose, layer_norms, History, with wrappers of ours and of Optax around,
two axes of layers, inside scan, ensembles, groups that hide leaves; the order of layers; no further
read.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard.reading.names import network_order, unrolled
from optax_guard.runlog import layers as _layers

PARAMS = {
    "head": jnp.ones(2),
    "layers": {"bias": jnp.ones((3, 2)), "kernel": jnp.ones((3, 2, 2))},
}
BAD = PARAMS | {
    "layers": {
        "bias": PARAMS["layers"]["bias"],
        "kernel": jnp.ones((3, 2, 2)).at[1, 0, 0].set(jnp.nan),
    }
}
WHERE = "layers/kernel[1]"
GROUPS = {"head": "head", "layers": "body"}
ONLY_LAYERS = {"head": False, "layers": True}


def is_stacked(path: str, leaf: Any) -> bool:
    return path.startswith("layers")


def guarded(**options: Any) -> Any:
    return og.guard(optax.adam(0.1), stacked=is_stacked, max_consecutive_skips=1, **options)


SETUPS = {
    "guard": guarded,
    "stabilize": lambda: og.stabilize(optax.adam(0.1), stacked=is_stacked, max_consecutive_skips=1),
    "loss scale": lambda: og.dynamic_loss_scale(guarded()),
    "recovery": lambda: og.rollback(og.backoff(guarded())),
    "partition inside": lambda: og.guard(
        optax.partition({"body": optax.adam(0.1), "head": optax.sgd(0.1)}, GROUPS),
        stacked=is_stacked,
        max_consecutive_skips=1,
    ),
    "partition outside": lambda: optax.partition(
        {"body": guarded(), "head": og.guard(optax.adam(0.1))}, GROUPS
    ),
    "masked outside": lambda: optax.masked(guarded(), ONLY_LAYERS),
}


@pytest.mark.parametrize("name", SETUPS)
def test_every_report_names_the_layer_within_the_stack(name):
    tx = SETUPS[name]()

    @jax.jit
    def run(gradients, losses):
        def body(state, step):
            _, state = tx.update(step[0], state, PARAMS, value=step[1])
            return state, None

        state = jax.lax.scan(body, tx.init(PARAMS), (gradients, losses))[0]
        return state, og.layer_norms(state, PARAMS)

    two_steps = jax.tree.map(lambda *leaves: jnp.stack(leaves), PARAMS, BAD)
    # A loss scale takes gradients that are not finite for an overflow unless the loss is so too.
    state, norms = run(two_steps, jnp.array([1.0, math.nan]))
    text = og.explain(state, PARAMS)
    assert "Step 1 was skipped" in text
    assert text.split("non-finite: ")[1].startswith(f"{WHERE} (norm nan)\n")
    assert math.isnan(norms[WHERE]) and math.isfinite(norms["layers/kernel[0]"])
    rows = {row.path: row.verdict for row in og.diagnose(state, PARAMS).rows}
    assert [path for path, verdict in rows.items() if verdict == "nonfinite"] == [WHERE]
    with pytest.raises(og.GuardGaveUp) as error:
        og.check(state, PARAMS)
    assert (error.value.step, error.value.leaves) == (1, (WHERE,))
    history = og.History(params=PARAMS)
    history.append(1, state)
    (entry,) = history.records
    assert [history.leaf_names[row] for row in entry["fault_leaves"]] == [WHERE]
    assert f"step 1: gradients were not finite; the loss value was not finite ({WHERE})" in (
        history.summary()
    )


def test_stages_of_layers_have_two_numbers():
    params = {"pipe": jnp.ones((2, 4, 3, 3)), "head": jnp.ones(2)}
    tx = og.guard(optax.sgd(0.1), stacked=lambda path, leaf: 2 * (path == "pipe"))
    bad = params | {"pipe": params["pipe"].at[1, 3, 0, 0].set(jnp.inf)}
    _, state = tx.update(bad, tx.init(params), params)
    assert "non-finite: pipe[1][3] (norm inf)\n" in og.explain(state, params)
    assert [name for name in og.layer_norms(state, params) if "pipe" in name] == [
        f"pipe[{stage}][{layer}]" for stage in range(2) for layer in range(4)
    ]


def test_members_of_an_ensemble_have_layers_and_the_names_may_come_from_one():
    tx = guarded()
    members = jax.tree.map(lambda one, other: jnp.stack([one, other]), PARAMS, BAD)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
    _, state = jax.jit(jax.vmap(tx.update))(members, jax.vmap(tx.init)(params), params)
    for tree in (params, PARAMS):
        norms = jax.jit(og.layer_norms)(state, tree)
        assert len(norms) == 7 and np.isnan(norms[WHERE]).tolist() == [False, True]
        with pytest.raises(og.GuardGaveUp, match="Member 1 of the ensemble") as error:
            og.check(state, tree)
        assert error.value.leaves == (WHERE,)


def test_layers_of_a_stack_come_one_after_the_other_with_all_their_arrays():
    names = [f"net/{part}[{layer}]" for part in ("attn/bias", "mlp") for layer in (0, 1, 10)]
    order = network_order(["embed", *names, "out"])
    assert [(["embed", *names, "out"])[place] for place in order] == [
        "embed",
        *[f"net/{part}[{layer}]" for layer in (0, 1, 10) for part in ("attn/bias", "mlp")],
        "out",
    ]
    assert unrolled(names)[:2] == ["net[0]/attn/bias", "net[1]/attn/bias"]
    # Beside what is not stacked, or in another number of layers, the number stays further down.
    assert unrolled(["net/a/b[0]", "net/norm"]) == ["net/a[0]/b", "net/norm"]
    assert unrolled(["d/b[0]", "d/c[0]", "d/c[1]"]) == ["d/b[0]", "d/c[0]", "d/c[1]"]
    assert unrolled(["b[0]", "k[0]"]) == ["[0]/b", "[0]/k"]
    assert unrolled(["a/k[0]", "x/b[0]"]) == ["a[0]/k", "x[0]/b"]


def test_many_stacked_layers_share_a_line_layer_by_layer():
    parts = [f"{part}/{leaf}" for part in ("attn", "down", "up") for leaf in ("bias", "kernel")]
    names = ["embed"] + [f"layers/{part}[{layer}]" for part in parts for layer in range(24)]
    bad = names.index("layers/up/kernel[13]")
    bands = _layers.arrange(names, range(len(names)), [bad], most=40, longest=30)
    labels = [band.label for band in bands]
    assert labels[:3] == ["embed", "layers[0] (6)", "layers[1] (6)"]
    assert labels[14:16] == ["layers[13] (5)", "layers/up/kernel[13]"]


def test_norms_of_layers_take_no_further_read():
    params = {"layers": jnp.ones((8, 256, 256))}

    def bytes_of(**options):
        tx = og.guard(optax.adam(0.1), **options)
        compiled = jax.jit(tx.update, donate_argnums=1).lower(params, tx.init(params), params)
        return compiled.compile().cost_analysis()["bytes accessed"]

    gradient = 4 * params["layers"].size
    assert bytes_of(stacked=is_stacked) <= bytes_of() + 0.05 * gradient
