"""The Python in README.md runs as it stands there, and what the README shows is there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_guard as og

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """The fenced blocks of the README, named by the headings above them."""
    found, heading = {}, ""
    for match in re.finditer(r"^#+ ([^\n]+)$|^```(\w+)\n(.*?)^```$", README, re.M | re.S):
        heading = match[1] or heading
        if match[2] == language:
            number = sum(name.startswith(heading) for name in found) + 1
            found[f"{heading} {number}"] = match[3]
    return found


PYTHON = blocks("python")


class Model(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.output = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, images):
        return self.output(images)


def loss_fn(model_or_params, batch):
    """The mean squared error of a linear map, whatever holds its weights."""
    images, targets = batch
    if isinstance(model_or_params, nnx.Module):
        outputs = model_or_params(images)
    else:
        outputs = images @ model_or_params["kernel"] + model_or_params["bias"]
    return jnp.mean((outputs - targets) ** 2)


def good_batch():
    return jnp.ones((4, 3)), jnp.ones((4, 2))


def bad_batch():
    images, targets = good_batch()
    return images.at[0, 0].set(jnp.nan), targets


def make_params():
    return {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}


TX = og.stabilize(optax.adamw(1e-3))


@jax.jit
def step_of_one_guard(params, opt_state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = TX.update(grads, opt_state, params, value=loss)
    return optax.apply_updates(params, updates), opt_state, loss


def namespace():
    """The names that the snippets take for granted."""
    params = make_params()
    params, opt_state, _ = step_of_one_guard(params, TX.init(params), bad_batch())
    return {
        **{"jax": jax, "jnp": jnp, "optax": optax, "og": og, "nnx": nnx},
        **{"params": params, "opt_state": opt_state, "loss_fn": loss_fn},
        "batches": [good_batch(), bad_batch(), *[good_batch()] * 20],
        "train_step": step_of_one_guard,
        "model": Model(rngs=nnx.Rngs(0)),
        "grads": jax.tree.map(jnp.ones_like, params),
        "batch_stats": {"mean": jnp.zeros(2)},
        "new_batch_stats": {"mean": jnp.full(2, jnp.nan)},
    }


def execute(name, **given):
    """What the block leaves behind: its names, on top of those it was given."""
    names = namespace() | given
    exec(compile(PYTHON[name], f"README.md, {name}", "exec"), names)
    return names


def is_loop(name):
    return "def train_step(" in PYTHON[name]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what the snippets write


@pytest.mark.parametrize("name", [name for name in PYTHON if not is_loop(name)])
def test_snippet_runs(name):
    execute(name)


@pytest.mark.parametrize("name", filter(is_loop, PYTHON))
def test_loop_of_the_readme_learns_and_skips_the_bad_batch(name):
    names = execute(name)
    train_step, batches = names["train_step"], [good_batch(), bad_batch(), good_batch()]
    metrics = []
    if "model" in inspect.signature(train_step).parameters:
        model, optimizer = names["model"], names["optimizer"]
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        for batch in batches:
            metrics.append(train_step(model, optimizer, batch))
        after = nnx.state(model, nnx.Param)
    else:
        before = after = names["params"]
        opt_state = names["opt_state"]
        for batch in batches:
            after, opt_state, scalars = train_step(after, opt_state, batch)
            metrics.append(scalars)
    skipped = [bool(scalars["guard/last_step_skipped"]) for scalars in metrics]
    assert skipped == [False, True, False]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.isfinite(new).all() and (np.asarray(new) != np.asarray(old)).any()


def test_readme_has_a_loop_for_plain_optax_and_nnx():
    loops = "".join(code for name, code in PYTHON.items() if is_loop(name))
    for needed in ("tx.update(grads, opt_state, params, value=loss)", "nnx.Optimizer(model, "):
        assert needed in loops


def block_with(text):
    (name,) = [name for name, code in PYTHON.items() if text in code]
    return name


def test_snippet_of_explain_names_the_bad_leaves(capsys):
    execute(block_with("og.explain"))
    printed = capsys.readouterr().out
    assert printed.startswith("Step 0 was skipped: gradients were not finite")
    assert "kernel (norm nan)" in printed


def test_snippet_of_the_readings_reads_a_skipped_step(capsys):
    names = execute(block_with("og.select"))
    assert not names["ok"] and names["scalars"]["guard/skipped_total"] == 1
    assert list(names["norms"]) == ["bias", "kernel"]
    assert int(optax.tree.get(names["inner_state"], "count")) == 0
    assert "kernel" in capsys.readouterr().out  # the diagnosis
    np.testing.assert_array_equal(names["batch_stats"]["mean"], np.zeros(2, np.float32))


def test_snippet_of_history_leaves_a_record_and_a_picture(tmp_path, capsys):
    execute(block_with("og.History"))
    record = og.History.load(tmp_path / "run.jsonl")
    assert [row["step"] for row in record.records] == [0, 10, 20]
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip()  # the summary


def test_explanation_in_the_readme_is_what_explain_says():
    """Word for word: the state that the text tells of, made by hand."""
    (shown,) = blocks("text").values()
    params = {
        "hidden1": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)},
        "output": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)},
    }
    state = og.guard(optax.sgd(0.1)).init(params)
    state = state._replace(
        guard_step=jnp.int32(57),
        skipped_total=jnp.int32(3),
        last_fault_step=jnp.int32(41),
        last_fault_reason=jnp.int32(1),
        last_fault_leaves=jnp.array([True, True, False, False]),
        last_fault_norms=jnp.array([jnp.nan, jnp.nan, 0.204, 0.813]),
    )
    assert og.explain(state, params) == shown.strip()


def test_one_table_of_the_readme_lists_every_transformation():
    table = README.partition("## All transformations")[2].partition("\n## ")[0]
    factories = [name for name in og.__all__ if inspect.isfunction(getattr(og, name))]
    reading = ("adopt", "check", "diagnose", "explain", "layer_norms", "metrics", "select")
    transformations = set(factories) - {*reading, "step_ok", "unwrap"}
    assert len(transformations) > 20
    missing = [name for name in transformations if not re.search(rf"\b{name}\b", table)]
    assert missing == []
    assert README.count("\n|---|") == 1
