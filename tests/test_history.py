"""History: what is recorded and when, files that survive, sinks, the summary and the picture.

Covered: values of records against the states they come from, donation, waiting, device steps and
mixed devices, every kind of number through a file, torn and broken files, resumed runs, kills and
ends without ``close``, processes, a real TensorBoard writer, events read off counters, pictures.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tensorboardX import SummaryWriter

import optax_guard as og
from optax_guard.runlog import events as _history_events
from optax_guard.runlog import fetch as _history_fetch
from optax_guard.runlog import file as _history_file
from optax_guard.runlog import layers as _layers

PARAMS = {"dense": {"bias": jnp.zeros(2), "kernel": jnp.ones((2, 2))}}
NAMES = ("dense/bias", "dense/kernel")
TX = og.stabilize(optax.adam(0.1), clip=og.clip_by_norm(1.0))


@jax.jit
def update(size, state):
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, size), PARAMS)
    return TX.update(gradients, state, PARAMS)[1]


def states(*sizes: float) -> list[Any]:
    """What the state is after each step, of gradients whose elements are all ``size``."""
    found, state = [], TX.init(PARAMS)
    for size in sizes:
        state = update(jnp.float32(size), state)
        found.append(state)
    return found


def record(*sizes: float, **options: Any) -> og.History:
    history = og.History(**options)
    for step, state in enumerate(states(*sizes)):
        history.append(step, state)
    history.flush()
    return history


def same(one: Any, other: Any) -> bool:
    """Equal, NaN to NaN, and of the same type."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    is_nan = isinstance(one, float) and math.isnan(one)
    return type(one) is type(other) and (one == other or (is_nan and math.isnan(other)))


# What a record holds


def test_record_holds_metrics_leaf_norms_and_scalars_as_python_numbers():
    found = states(0.125, math.nan)
    history = og.History(params=PARAMS)
    for step, state in enumerate(found):
        history.append(step, state, loss=jnp.float32(2.5), epoch=3, lr=np.float64(1e-3))
    assert history.leaf_names == NAMES
    for step, state in enumerate(found):
        expected = {"epoch": 3, "lr": 1e-3, "loss": 2.5}
        expected |= {key: value.item() for key, value in og.metrics(state).items()}
        expected["leaf_norms"] = np.asarray(state.leaf_norms).tolist()
        expected |= {"fault_leaves": [0, 1]} if step else {}
        actual = history.records[step]
        assert next(iter(actual)) == "step" and actual.pop("step") == step
        assert set(actual) == set(expected)
        assert all(same(actual[key], expected[key]) for key in expected), actual
    assert history.records[1]["guard/last_step_skipped"] is True
    assert history.records[1]["guard/skip_reason"] == 1
    assert math.isnan(history.records[1]["leaf_norms"][0])


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int32", "uint32", "float16", "bfloat16", "float32"]
)
def test_scalars_of_every_dtype_keep_their_value(dtype):
    history = og.History()
    for step, number in enumerate((0, 1, 0.5)):
        value = jnp.asarray(number, dtype=dtype)
        history.append(step, None, device=value, host=np.asarray(value))
        kind = {"b": bool, "i": int, "u": int}.get(np.dtype(dtype).kind, float)
        for name in ("device", "host"):
            assert same(history.records[step][name], kind(value)), name


def test_float64_and_int64_scalars_are_not_rounded(x64):
    history = og.History()
    numbers = {"third": 1 / 3, "large": 1e300, "nan": math.nan, "integer": 2**53 + 1}
    history.append(0, None, **{name: jnp.asarray(value) for name, value in numbers.items()})
    assert same(history.records[0], {"step": 0, **numbers})


@pytest.mark.parametrize("every", [1, 3])
def test_steps_divisible_by_every_are_recorded(every):
    expected = [step for step in range(7) if step % every == 0]
    found = states(*[0.1] * 7)
    for make_step in (int, np.int64, jnp.int32):
        history = og.History(every=every)
        for step, state in enumerate(found):
            history.append(make_step(step), state)
        assert [entry["step"] for entry in history.records] == expected
        assert [entry["guard/guard_step"] for entry in history.records] == [
            step + 1 for step in expected
        ]
        assert len(history) == len(expected)


def test_series_is_a_column_with_nan_for_what_is_missing():
    history = og.History()
    history.append(0, None, loss=1)
    history.append(1, None, accuracy=0.5)
    np.testing.assert_array_equal(history.series("loss"), [1.0, np.nan])
    assert history.series("accuracy").dtype == np.float64
    with pytest.raises(KeyError, match="No record has 'los'; there are accuracy, loss, step"):
        history.series("los")


def test_changing_a_returned_record_changes_nothing():
    history = record(0.1)
    history.records[0]["step"] = 7
    assert history.records[0]["step"] == 0


# Where states come from


def test_states_in_a_train_state_an_nnx_optimizer_and_an_equinox_module():
    class Wrapped(eqx.Module):
        opt_state: Any
        activation: Any = jnp.tanh

    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    linen = nn.Dense(2)
    variables = linen.init(jax.random.key(0), jnp.ones((1, 2)))
    train_state = TrainState.create(apply_fn=linen.apply, params=variables["params"], tx=TX)
    train_state = train_state.apply_gradients(grads=jax.tree.map(jnp.ones_like, train_state.params))
    cases = (
        (optimizer, nnx.state(model, nnx.Param), ("bias", "kernel")),
        (train_state, train_state.params, ("bias", "kernel")),
        (Wrapped(states(1.0)[0]), PARAMS, NAMES),
    )
    for holder, params, names in cases:
        history = og.History(params=params)
        history.append(1, holder)
        assert history.leaf_names == names
        entry = history.records[0]
        # Two biases and four weights, all with a gradient of one.
        assert entry["guard/grad_norm"] == pytest.approx(6**0.5, rel=1e-6)
        np.testing.assert_allclose(entry["leaf_norms"], [2**0.5, 2.0], rtol=1e-6)


def test_guards_of_a_partition_are_recorded_side_by_side():
    labels = {"dense": {"bias": "slow", "kernel": "fast"}}
    groups = {"slow": og.guard(optax.sgd(0.1, 0.9)), "fast": og.guard(optax.adam(0.1))}
    tx = optax.partition(groups, labels)
    gradients = {"dense": {"bias": jnp.full(2, 3.0), "kernel": jnp.full((2, 2), 2.0)}}
    _, state = tx.update(gradients, tx.init(PARAMS), PARAMS)
    history = og.History(params=PARAMS)
    history.append(0, state)
    entry = history.records[0]
    norms = dict(zip(history.leaf_names, entry["leaf_norms"], strict=True))
    assert norms == pytest.approx({"dense/bias": 18**0.5, "dense/kernel": 4.0}, rel=1e-6)
    assert entry["guard/slow/grad_norm"] == norms["dense/bias"]
    assert entry["guard/fast/grad_norm"] == norms["dense/kernel"]


def test_groups_with_the_names_of_parameters_are_found():
    params = PARAMS["dense"]
    tx = optax.partition({"bias": TX, "kernel": TX}, {"bias": "bias", "kernel": "kernel"})
    history, state = og.History(params=params), tx.init(params)
    for step, each in enumerate([TX.init(params), state, TX.init(params), state]):
        history.append(step, each)
    whole, parts = history.records[:2]
    assert set(og.metrics(state)) == {name for name in parts if name.startswith("guard/")}
    assert history.records[2:] == [whole | {"step": 2}, parts | {"step": 3}]


def test_a_condition_may_remember_an_array():
    counting = og.Condition("never", lambda: jnp.zeros(2), lambda norm, value, n: (norm < 0, n + 1))
    tx = og.guard(optax.adam(0.1), skip_if=counting)
    history, state = og.History(params=PARAMS), tx.init(PARAMS)
    for step in range(2):
        _, state = tx.update(PARAMS, state, PARAMS)
        history.append(step, state)
    assert [entry["guard/guard_step"] for entry in history.records] == [1, 2]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_replicated_states_and_scalars_of_another_device_come_in_one_record(kind):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(kind,))
    (state,) = states(0.5)
    plain = og.History()
    plain.append(0, state, loss=0.25)
    spread = jax.device_put(state, NamedSharding(mesh, P()))
    for enter in (contextlib.nullcontext, jax.set_mesh):
        history = og.History()
        with enter(mesh):
            history.append(0, spread, loss=jax.device_put(jnp.float32(0.25), jax.devices()[3]))
        assert {**history.records[0]} == {**plain.records[0]}


def test_state_restored_as_numpy_arrays_is_recorded():
    (state,) = states(0.5)
    history, plain = og.History(), og.History()
    history.append(0, jax.device_get(state))
    plain.append(0, state)
    assert history.records == plain.records


# Not in the way of training


def test_record_survives_the_donation_of_its_state():
    step = jax.jit(lambda state: TX.update(PARAMS, state, PARAMS)[1], donate_argnums=0)
    state, history = jax.jit(TX.init)(PARAMS), og.History()
    for number in range(5):
        state, before = step(state), state
        assert before.integers.is_deleted()  # or else this tests nothing
        history.append(number, state)
    assert history.series("guard/guard_step").tolist() == [1, 2, 3, 4, 5]


@jax.jit
def slow_number(matrix):
    """A number, about a second after the call that makes it has returned."""
    return jax.lax.fori_loop(0, 80, lambda _, x: jnp.tanh(x @ x), matrix)[0, 0] * 0 + 1.5


def test_append_does_not_wait_and_writes_in_order_later(tmp_path):
    path, matrix = tmp_path / "h.jsonl", jnp.full((600, 600), 1e-3)
    with og.History(path) as history:
        history.append(0, None, loss=slow_number(matrix))  # compiles
        history.flush()
        slow = slow_number(matrix)
        history.append(1, None, loss=slow)
        history.append(2, None, loss=2.5)
        assert not slow.is_ready()  # or else append has waited for it
        assert len(path.read_text().splitlines()) == 1
        assert [entry["loss"] for entry in history.records] == [1.5, 1.5, 2.5]  # waits
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_one_array_is_fetched_for_each_record(monkeypatch):
    fetched = []
    packer = _history_fetch._packer

    def spy(*key):
        return lambda *arrays: fetched.append(packer(*key)(*arrays)) or fetched[-1]

    monkeypatch.setattr(_history_fetch, "_packer", spy)
    found, loss = states(0.1, 0.2), jnp.float32(1.0)
    history = og.History()
    for step, state in enumerate(found):
        with jax.transfer_guard_device_to_host("disallow_explicit"):
            history.append(step, state, loss=loss)
    assert len(fetched) == 2
    num_words = len(og.metrics(found[0])) + 2 * len(NAMES) + 2  # norms and faults, step, loss
    assert all(packed.shape == (num_words,) for packed in fetched)


def test_records_that_wait_are_limited(monkeypatch):
    from optax_guard.runlog.fetch import Pending

    monkeypatch.setattr(Pending, "is_ready", lambda self: False)
    written = []
    history = og.History(sinks=lambda row, step: written.append(step))
    for step in range(40):
        history.append(step, None, loss=1.0)
    assert written == list(range(40 - 32))
    history.flush()
    assert written == list(range(40))


# Files


def test_file_has_one_standard_json_object_a_line_and_is_loaded_as_it_was(tmp_path):
    path = tmp_path / "folder" / "h.jsonl"
    with og.History(path, params=PARAMS) as history:
        for step, state in enumerate(states(0.1, math.nan, math.inf, 1e-30)):
            history.append(step, state, loss=(-math.inf, math.nan, 1.0, 2)[step])
    before = history.records

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = [json.loads(x, parse_constant=refuse) for x in path.read_text().splitlines()]
    assert [line["loss"] for line in lines] == ["-Infinity", "NaN", 1.0, 2]
    assert lines[2]["guard/grad_norm"] in ("NaN", "Infinity")
    loaded = og.History.load(path)
    assert same(loaded.records, before)
    assert loaded.leaf_names == NAMES
    assert not loaded.is_torn


def test_memory_and_file_hold_the_same_and_save_writes_what_load_reads(tmp_path):
    sizes = (0.1, math.nan, 5.0)
    in_memory = record(*sizes, params=PARAMS)
    in_file = record(*sizes, path=tmp_path / "h.jsonl", params=PARAMS)
    assert same(in_memory.records, in_file.records)
    saved = in_memory.save(tmp_path / "saved.jsonl")
    assert saved.read_text() == (tmp_path / "h.jsonl").read_text()
    assert same(og.History.load(saved).records, in_memory.records)
    assert {path.name for path in tmp_path.iterdir()} == {"h.jsonl", "saved.jsonl"}
    with pytest.raises(ValueError, match="is the file that this history writes itself"):
        in_file.save(tmp_path / "h.jsonl")
    in_file.close()


def test_loaded_history_goes_on_in_memory_only(tmp_path):
    path = record(0.1).save(tmp_path / "h.jsonl")
    content = path.read_bytes()
    loaded = og.History.load(path)
    loaded.append(1, None, loss=1.0)
    assert len(loaded) == 2
    assert path.read_bytes() == content


@pytest.mark.parametrize("cut", [1, "all but one", "line break"])
def test_torn_last_line_is_left_out_and_said(tmp_path, cut):
    path = tmp_path / "h.jsonl"
    record(0.1, 0.2, 0.3, path=path).close()
    content = path.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    size = {"all but one": len(last) - 2, "line break": len(last) - 1}.get(cut, cut)
    path.write_bytes(content[: len(content) - len(last) + size])
    loaded = og.History.load(path)
    is_complete = cut == "line break"
    assert loaded.is_torn == (not is_complete)
    assert [entry["step"] for entry in loaded.records] == ([0, 1, 2] if is_complete else [0, 1])
    with og.History(path) as resumed:  # and a new run does not write into the half line
        resumed.append(3, None, loss=1.0)
    steps = [entry["step"] for entry in og.History.load(path).records]
    assert steps == ([0, 1, 2, 3] if is_complete else [0, 1, 3])
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_resumed_run_replaces_the_steps_that_it_repeats(tmp_path):
    path = tmp_path / "h.jsonl"
    for first, loss in ((0, 1.0), (3, 2.0)):
        with og.History(path) as history:
            for step in range(first, first + 5):
                history.append(step, None, loss=loss)
    expected = [(step, 1.0 if step < 3 else 2.0) for step in range(8)]
    for found in (history, og.History.load(path)):
        assert [(entry["step"], entry["loss"]) for entry in found.records] == expected
    assert len(path.read_text().splitlines()) == 10  # nothing is deleted from the file


def test_steps_repeated_within_a_run_are_all_kept(tmp_path):
    with og.History(tmp_path / "h.jsonl") as history:
        for loss in (1.0, 2.0):
            history.append(5, None, loss=loss)
    assert og.History.load(tmp_path / "h.jsonl").series("loss").tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"step": 0}\nhello\n{"step": 1}\n', "line 2 is not a record"),
        ("hello\n", "line 1 is not a record"),
        ("[1, 2]\n", "a record is an object"),
        ('{"loss": 1.0}\n', "a record has a step"),
        ('{"step": 1.5}\n', "a record has a step"),
        ('{"step": true}\n', "a record has a step"),
        ('{"step": 0, "loss": "high"}\n{"step": 1}\n', "loss is no number"),
        ('{"step": 0, "leaf_norms": 3}\n{"step": 1}\n', "leaf_norms is no list"),
        ("\x89PNG\r\n\x1a\n\x00", "line 1 is not a record"),
        ("[" * 100_000, "line 1 is not a record"),
    ],
)
def test_file_that_is_no_history_is_refused_and_left_alone(tmp_path, content, words):
    path = tmp_path / "h.jsonl"
    path.write_text(content, encoding="latin-1", newline="")
    before = path.read_bytes()
    for read in (og.History.load, og.History):
        with pytest.raises(ValueError, match="no history, or a damaged one.*" + words):
            read(path)
    assert path.read_bytes() == before


def test_missing_file_and_missing_rights_are_the_errors_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        og.History.load(tmp_path / "none.jsonl")
    with pytest.raises(OSError):
        og.History(tmp_path)  # a folder


def test_empty_file_is_a_history_without_records(tmp_path):
    og.History(tmp_path / "h.jsonl").close()
    loaded = og.History.load(tmp_path / "h.jsonl")
    assert loaded.records == [] and len(loaded) == 0
    assert loaded.summary() == "No records."
    with pytest.raises(ValueError, match="Nothing was recorded yet"):
        loaded.plot(tmp_path / "h.png")


def run_script(body: str, *argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body), *argv],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_records_of_a_killed_run_are_in_the_file(tmp_path):
    body = """
        import sys, time, jax.numpy as jnp, optax_guard as og
        history = og.History(sys.argv[1])
        for step in range(1000000):
            history.append(step, None, loss=jnp.float32(step))
            if step == 200:
                print("go", flush=True)
    """
    process = run_script(body, str(tmp_path / "h.jsonl"))
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    steps = [entry["step"] for entry in og.History.load(tmp_path / "h.jsonl").records]
    assert len(steps) > 200 - 32
    assert steps == list(range(len(steps)))


def test_end_of_the_process_writes_what_is_left_even_after_an_error(tmp_path):
    body = """
        import sys, jax, jax.numpy as jnp, optax_guard as og
        from optax_guard.runlog.fetch import Pending
        Pending.is_ready = lambda self: False
        history = og.History(sys.argv[1])
        for step in range(3):
            history.append(step, None, loss=jnp.float32(step))
        raise RuntimeError("the training broke")
    """
    process = run_script(body, str(tmp_path / "h.jsonl"))
    assert "the training broke" in process.communicate()[1]
    assert og.History.load(tmp_path / "h.jsonl").series("loss").tolist() == [0, 1, 2]


def test_forgotten_history_is_written_and_its_file_closed(tmp_path):
    history = og.History(tmp_path / "h.jsonl")
    history.append(0, None, loss=jnp.float32(1.0))
    del history
    gc.collect()  # a file left open would be a ResourceWarning, which is an error here
    assert len(og.History.load(tmp_path / "h.jsonl")) == 1


def test_closed_history_can_be_read_and_closed_again_but_not_written(tmp_path):
    history = record(0.1, path=tmp_path / "h.jsonl")
    history.close()
    history.close()
    assert len(history) == 1
    with pytest.raises(ValueError, match=r"This og\.History is closed"):
        history.append(1, None, loss=1.0)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    seen = []
    path = tmp_path / "h.jsonl"
    with og.History(path, sinks=lambda row, step: seen.append(step)) as history:
        history.append(0, states(0.1)[0])
        assert history.records == []
    history.save(tmp_path / "s.jsonl")
    history.plot(tmp_path / "p.png")
    assert seen == []
    assert list(tmp_path.iterdir()) == []


# Sinks


def read_events(folder: Path) -> dict[tuple[str, int], float]:
    """Scalars of a TensorBoard event file, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    events = {name: accumulator.Scalars(name) for name in accumulator.Tags()["scalars"]}
    return {(name, event.step): event.value for name, of in events.items() for event in of}


def test_tensorboard_writer_gets_every_scalar(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        history = og.History(sinks=[writer], params=PARAMS)
        for step, state in enumerate(states(0.125, math.nan, 3.0)):
            history.append(10 * step, state, loss=jnp.float32(step))
        history.close()
        expected = history.records
    found = read_events(tmp_path)
    names = {name for name, _ in found}
    assert {name for name in names if name.startswith("layers/")} == {f"layers/{n}" for n in NAMES}
    assert len(found) == 3 * len(names)
    for entry in expected:
        lists = entry.pop("leaf_norms"), entry.pop("fault_leaves", None)
        entry |= {f"layers/{name}": norm for name, norm in zip(NAMES, lists[0], strict=True)}
    assert names == set(expected[0]) - {"step"}
    for entry in expected:
        for name in names:
            assert same(float(entry[name]), float(found[name, entry["step"]])), name


def test_callable_sinks_get_a_dict_of_their_own_and_the_step():
    rows = []

    def careless(row, step):
        rows.append((dict(row), step))
        row.clear()

    history = og.History(sinks=(careless, careless), params=PARAMS)
    history.append(4, states(0.125)[0], loss=0.5)
    history.flush()
    entry = history.records[0]
    assert entry.pop("step") == 4
    entry |= dict(zip((f"layers/{name}" for name in NAMES), entry.pop("leaf_norms"), strict=True))
    assert rows == [(entry, 4), (entry, 4)]


def test_error_of_a_sink_is_raised_after_the_record_was_written(tmp_path):
    def broken(row, step):
        raise ConnectionError("no network")

    path = tmp_path / "h.jsonl"
    history = og.History(path, sinks=broken)
    with pytest.raises(ConnectionError, match="no network"):
        history.append(0, None, loss=1.0)
    assert len(og.History.load(path)) == 1
    history.close()


# Errors


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"every": 0}, ValueError, "every must be an integer >= 1"),
        ({"every": 2.0}, TypeError, "every must be an integer >= 1"),
        ({"sinks": [3]}, TypeError, r"a sink must have add_scalar\(name, value, step\)"),
    ],
)
def test_bad_argument_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        og.History(**options)


@pytest.mark.parametrize(
    ("step", "state", "scalars", "error", "words"),
    [
        ("1", None, {}, TypeError, "step must be an integer, got '1'"),
        (1.0, None, {}, TypeError, "step must be an integer, got 1.0"),
        (True, None, {}, TypeError, "step must be an integer, got True"),
        (jnp.ones(()), None, {}, TypeError, "step must be an integer"),
        (jnp.arange(2), None, {}, TypeError, "step must be an integer"),
        (0, {"w": jnp.ones(2)}, {}, ValueError, "No state of optax_guard was found"),
        (0, None, {"loss": jnp.ones(3)}, ValueError, r"loss must be a scalar.*shape \(3,\)"),
        (0, None, {"loss": [1, 2]}, ValueError, r"loss must be a scalar.*shape \(2,\)"),
        (0, None, {"loss": "low"}, TypeError, "loss must be a real number, got 'low'"),
        (0, None, {"loss": None}, TypeError, "loss must be a real number, got None"),
        (0, None, {"loss": 1j}, TypeError, "loss must be a real number"),
        (0, None, {"loss": jnp.complex64(1)}, TypeError, "loss must be a real number"),
        (0, None, {"leaf_norms": 1.0}, ValueError, "'leaf_norms' is a name that og.History uses"),
    ],
)
def test_bad_append_is_refused_and_records_nothing(step, state, scalars, error, words):
    history = og.History()
    with pytest.raises(error, match=words):
        history.append(step, state, **scalars)
    assert history.records == []


def test_ensembles_other_parameters_and_tracers_are_refused():
    (state,) = states(0.5)
    history = og.History()
    with pytest.raises(ValueError, match=r"og\.History\.append reads the state of one model"):
        history.append(0, jax.vmap(lambda _: state)(jnp.arange(3)))
    with pytest.raises(ValueError, match="params has 1 float leaves, but the guard watches 2"):
        og.History(params={"w": jnp.ones(2)}).append(0, state)

    def inside(state, loss):
        history.append(0, state, loss=loss)

    with pytest.raises(TypeError, match=r"og\.History\.append runs on the host"):
        jax.jit(inside)(state, jnp.float32(1.0))
    history.append(0, state)  # the structure is known now
    with pytest.raises(TypeError, match=r"og\.History\.append runs on the host"):
        jax.jit(lambda state: inside(state, 1.0))(state)
    with pytest.raises(TypeError, match=r"og\.History\.append runs on the host"):
        jax.jit(lambda step: history.append(step, state))(3)
    assert len(history) == 1


# Events and summary


def events_of(history: og.History) -> _history_events.Events:
    return _history_events.find_events(history.records, history._log.about)


def follow(tx: Any, sizes: Any, *, params: Any = PARAMS, **options: Any) -> og.History:
    """The record of a run, given the size of all elements of the gradient in each step."""
    state, history = tx.init(params), og.History(params=params, **options)
    for step, size in enumerate(sizes):
        gradients = jax.tree.map(lambda leaf, size=size: jnp.full_like(leaf, size), params)
        _, state = tx.update(gradients, state, params)
        history.append(step, state)
    return history


def test_events_tell_skips_clips_and_what_the_optimizer_received():
    history = record(0.1, 2.0, math.nan, 0.1, math.nan)
    events = events_of(history)
    assert events.skipped.tolist() == [False, False, True, False, True]
    assert events.clipped.tolist() == [False, True, False, False, False]
    assert events.guards[0].skipped_total.tolist() == [0, 0, 1, 1, 2]
    expected = np.array([0.1 * 6**0.5, 1, np.nan, 0.1 * 6**0.5, np.nan])
    np.testing.assert_allclose(events.received, expected, rtol=1e-6)
    np.testing.assert_allclose(events.norm[:2], [0.1 * 6**0.5, 2 * 6**0.5], rtol=1e-6)


def test_events_between_records_and_in_the_first_record_are_noticed():
    history = record(2.0, math.nan, 0.1, 5.0, 0.1, 0.1, 0.1, every=2)
    events = events_of(history)
    assert events.steps.tolist() == [0, 2, 4, 6]
    assert events.skipped.tolist() == [False, True, False, False]
    assert events.clipped.tolist() == [True, False, True, False]


def test_all_clips_of_the_whole_gradient_count_for_what_is_received_and_no_others():
    clips = (og.clip_by_norm(6**0.5), og.clip_by_percentile(50.0, window=3), og.clip_by_rms(1e-3))
    after_adam = optax.chain(*clips, optax.scale_by_adam(), og.clip_by_norm(1e-3))
    history = follow(og.guard(after_adam), (0.5, 4.0, 4.0))
    assert history._log.about.uniform == ("guard/clip_by_norm/", "guard/clip_by_percentile/")
    events = events_of(history)
    # Cut to 1 a element by the first, then to the median of (0.5, 1) and of (0.5, 1, 0.75 or 1).
    np.testing.assert_allclose(events.received, np.array([0.5, 0.75, 1.0]) * 6**0.5, rtol=1e-5)
    labels = [clip.label for clip in events.clips]
    assert labels == ["clip_by_norm", "clip_by_percentile", "clip_by_rms", "clip_by_norm 2"]


def test_counters_that_start_again_are_no_events():
    history = og.History()
    found = states(math.nan, math.nan, 0.1)
    for step, state in enumerate([*found, *states(0.1, math.nan)]):
        history.append(step, state)
    events = events_of(history)
    assert events.skipped.tolist() == [True, True, False, False, True]
    assert _history_events.total_of(events.guards[0].skipped_total, events) == 3


def test_overflows_are_no_skips_and_all_steps_count():
    # The loss scale keeps the overflows from the guard, which saw one step of six.
    history = follow(og.dynamic_loss_scale(og.guard(optax.sgd(0.1))), (1.0, *[jnp.inf] * 5))
    assert not events_of(history).skipped.any()
    text = history.summary()
    assert "skipped: 0 of 6 steps" in text
    overflows = "overflowed at the loss scale: 5 of 6 steps, loss scale now 1024"
    assert f"{overflows} (at steps 1, 2, 3, 4, 5)" in text
    # At the smallest scale it hands them on: then both count the same step.
    tx = og.dynamic_loss_scale(og.guard(optax.sgd(0.1)), initial_scale=1.0)
    text = follow(tx, (1.0, jnp.inf, jnp.inf)).summary()
    assert "skipped: 2 of 3 steps" in text and "loss scale: 2 of 3 steps" in text


def test_returns_and_back_offs_are_told_by_themselves():
    tx = og.rollback(og.backoff(og.stabilize(optax.sgd(0.1), clip=og.clip_by_norm(0.1))),
                     every=2, after_skips=2)  # fmt: skip
    history = follow(tx, (*[0.1] * 6, jnp.nan, jnp.nan, *[0.1] * 4))
    text = history.summary()
    assert "skipped: 2 of 12 steps" in text
    assert "went back to a snapshot: once (at step 7)" in text
    assert "took smaller steps after a skip: 2 times, step factor now 0.2" in text
    # The clip's own counter went back with the optimizer; no step is counted twice.
    assert "clip_by_norm: cut 10 of 12 steps" in text


def test_micro_batches_left_out_are_told_and_an_open_window_has_no_norms():
    tx = optax.MultiSteps(
        og.guard(optax.chain(og.clip_by_norm(0.1), optax.sgd(0.1))),
        2,
        should_skip_update_fn=og.skip_microbatch,
    )
    history = follow(tx, (0.1, jnp.nan, 0.1, 0.1, 0.1, 0.1))
    text = history.summary()
    assert "skipped: 0 of 2 windows of MultiSteps" in text
    assert "micro-batches left out: 1 (at step 1)" in text
    assert "clip_by_norm: cut 2 of 2 windows of MultiSteps" in text
    assert history.records[1]["leaf_norms"] == [None, None]  # not zero: nothing was measured
    steps, norms = _history_events.leaf_norms(events_of(history))
    assert steps.tolist() == [2, 4] and np.all(norms > 0)


def test_reports_are_for_each_group_by_its_key():
    labels = {"dense": {"bias": "slow", "kernel": "fast"}}
    clipped = og.guard(optax.chain(og.clip_by_norm(1e-3), optax.adam(0.1)))
    tx = optax.partition({"slow": og.guard(optax.adam(0.1)), "fast": clipped}, labels)
    text = follow(tx, (0.1, jnp.nan, 0.1)).summary()
    for words in ("skipped (slow): 1 of 3 steps", "skipped (fast): 1 of 3 steps"):
        assert words in text
    assert "fast/clip_by_norm: cut 2 of 3 steps" in text


def test_steps_have_one_number_beside_overflows():
    tx = og.dynamic_loss_scale(og.guard(optax.sgd(0.1), max_consecutive_skips=1))
    update, state, history = jax.jit(tx.update), tx.init(PARAMS), og.History(params=PARAMS)
    for step, (size, loss) in enumerate([(1, 1), (jnp.inf, 1), (jnp.inf, 1), (1, jnp.nan), (1, 1)]):
        gradients = jax.tree.map(lambda leaf, size=size: jnp.full_like(leaf, size), PARAMS)
        _, state = update(gradients, state, PARAMS, value=jnp.float32(loss))
        history.append(step, state)
    text = history.summary()
    assert "skipped: 1 of 5 steps\n  step 3: the loss value was not finite" in text
    assert "overflowed at the loss scale: 2 of 5 steps" in text
    text = og.explain(state, PARAMS)
    assert "Step 3 was skipped" in text and "Skipped so far: 1 of 5 steps" in text
    with pytest.raises(og.GuardGaveUp, match="Step 3 was skipped") as error:
        og.check(state, PARAMS)
    assert error.value.step == 3


def test_scope_of_a_clip_is_told_and_nothing_is_drawn_that_was_not_measured():
    def received(*clips):
        history = follow(og.guard(optax.chain(*clips, optax.adam(0.1))), (0.5, 4.0))
        return history.summary(), events_of(history)

    text, events = received(og.clip_by_norm(1.0, scope="leaf"))
    assert "clip_by_norm by leaf: cut some array in 1 of 2 steps (recent 50 %)" in text
    assert "smallest factor on average 0.56" in text
    assert np.isnan(events.received).all()  # each array has a factor of its own
    text, events = received(og.clip_by_norm(1.0), og.clip_by_norm(0.9, scope="unit"))
    assert [clip.label for clip in events.clips] == ["clip_by_norm", "clip_by_norm 2 by unit"]
    np.testing.assert_allclose(events.received, [1, 1], rtol=1e-6)
    _, events = received(og.clip_by_norm(1.0), og.clip_by_norm(0.1, scope="unit"))
    assert np.isnan(events.received).all()
    _, events = received(og.clip_by_rms(1.0))
    assert events.clips[0].label == "clip_by_rms"  # by leaf, as it usually is


def test_skip_is_told_with_step_reason_condition_and_layers():
    params = {f"Dense_{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for i in range(12)}
    tx = og.guard(optax.sgd(0.1), skip_if=(og.norm_above(1e9), og.spike(6.0, window=4)))
    state, history = tx.init(params), og.History(params=params, every=3)
    for step in range(13):
        size = 1e3 if step == 11 else 0.1 + 0.001 * step
        gradients = jax.tree.map(lambda leaf, size=size: jnp.full_like(leaf, size), params)
        for layer in (10, 2) if step in (4, 5) else ():
            gradients[f"Dense_{layer}"]["kernel"] *= jnp.nan
        _, state = tx.update(gradients, state, params)
        history.append(step, state)
    text = history.summary()
    assert "skipped: 3 of 13 steps" in text
    where = "(Dense_2/kernel, Dense_10/kernel)"
    between = "step 5 (1 more between the records of steps 3 and 6)"
    assert f"  {between}: gradients were not finite {where}" in text
    assert "  step 11: rejected by the condition spike" in text
    assert "fault_leaves" not in history.records[3]  # of the spike, which had none
    explained = og.explain(state, params)  # counts the same way
    assert "Step 11 was skipped" in explained


def test_clip_that_cuts_most_steps_is_questioned_with_a_likely_cause():
    guarded = og.guard(optax.chain(og.clip_by_norm(0.02 * 6**0.5), optax.sgd(0.1)))
    steady = " ".join(follow(guarded, [1.0] * 120).summary().split())
    line = "clip_by_norm: cut 120 of 120 steps (recent 100 %), mean factor 0.02"
    assert f"{line}: is the threshold too low?" in steady
    assert "a norm of about 2.4" in steady and "Try a threshold a few times that norm" in steady
    rising = " ".join(follow(guarded, 1.1 ** np.arange(120)).summary().split())
    assert "the learning rate is likely too high" in rising
    for sizes in ([1.0] * 50, [1.0] * 110 + [0.001] * 300):  # too few, and long ago
        assert "too low?" not in follow(guarded, sizes).summary()


@pytest.mark.parametrize(
    "clip",
    [
        og.clip_by_percentile(10.0),
        og.clip_by_ema(0.9),
        og.normalize_and_scale(0.1),
        og.clip_by_max_ema(),
    ],
    ids=["percentile", "ema", "normalize", "max_ema"],
)
def test_rules_that_cut_by_design_are_not_questioned(clip):
    tx = og.guard(optax.chain(clip, optax.sgd(0.1)))

    @jax.jit
    def run(sizes):
        def body(state, size):
            gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, size), PARAMS)
            return tx.update(gradients, state, PARAMS)[1], None

        return jax.lax.scan(body, tx.init(PARAMS), sizes)[0]

    state = run(1.0 + jnp.arange(300) % 7)
    history = og.History(params=PARAMS)
    history.append(299, state)
    (rate,) = (v for k, v in history.records[0].items() if k.endswith("recent_clip_rate"))
    assert rate > 0.5
    assert "too low?" not in history.summary()
    assert og.explain(state, PARAMS) == "No step was skipped in 300 steps."


def test_explain_names_the_clip_that_cuts_most_steps_and_what_to_try():
    labels = {"dense": {"bias": "slow", "kernel": "fast"}}
    part = [og.guard(optax.chain(og.clip_by_norm(s), optax.adam(0.1))) for s in (1e3, 1e-3)]
    tx = optax.partition({"slow": part[0], "fast": part[1]}, labels)
    run = jax.jit(
        lambda s: jax.lax.fori_loop(0, 120, lambda _, s: tx.update(PARAMS, s, PARAMS)[1], s)
    )
    lines = og.explain(run(tx.init(PARAMS)), PARAMS).splitlines()
    assert lines[:2] == [
        f"Guard {key}: No step was skipped in 120 steps." for key in ("fast", "slow")
    ]
    (advice,) = lines[2:]
    assert advice.startswith("fast/clip_by_norm cut 100% of the last 100 steps or so, to 0.0005")
    assert "Try a threshold a few times that norm" in advice


SUMMARY_SIZES = (0.1, 2.0, math.nan, 0.1, 3.0, 0.2)


@pytest.mark.parametrize("has_rich", [True, False])
def test_summary_counts_and_tabulates(monkeypatch, has_rich):
    if not has_rich:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    history = record(*SUMMARY_SIZES, params={"dense[0]": PARAMS["dense"]})
    history.append(6, None, loss=math.inf)
    text = history.summary()
    assert ("─" in text) == has_rich
    lines = [line.split() for line in text.splitlines()]
    assert text.splitlines()[0] == "7 records, steps 0 to 6"
    assert "skipped: 1 of 6 steps" in text
    assert "  step 2: gradients were not finite (all layers)" in text
    assert "clip_by_norm: cut 2 of 6 steps" in text
    assert "gave up" not in text
    assert ["loss", "inf", "inf", "nan", "nan", "nan", "1"] in lines
    # norms of six equal elements, of four, and of two
    norms = [0.1 * 6**0.5, 0.2 * 6**0.5, 0.2449, 0.4899, 3 * 6**0.5]
    assert ["guard/grad_norm", *(f"{norms[i]:.4g}" for i in (0, 1, 2, 3, 4)), "1"] in lines
    assert ["dense[0]/kernel", "0.2", "0.4", "6", "1"] in lines


def test_summary_lists_the_last_skips_and_says_when_the_guard_gave_up():
    tx = og.guard(optax.sgd(0.1), max_consecutive_skips=7)
    text = follow(tx, [math.nan] * 7).summary()
    assert "skipped: 7 of 7 steps; the last 5:" in text
    assert text.count("gradients were not finite") == 5
    assert "the guard gave up" in text


def test_summary_shows_the_worst_layers_of_many_in_the_order_of_the_network():
    params = {f"layer{i}": jnp.ones(2) for i in range(30)}
    tx = og.guard(optax.sgd(0.1))
    gradients = {name: jnp.full(2, float(i)) for i, name in enumerate(params)}
    gradients["layer3"] = jnp.full(2, jnp.nan)
    _, state = tx.update(gradients, tx.init(params))
    history = og.History(params=params)
    history.append(0, state)
    lines = history.summary().splitlines()
    shown = [line.split()[0] for line in lines if line.strip().startswith("layer")]
    assert shown == ["layer3", *(f"layer{i}" for i in range(11, 30))]
    assert lines[-1] == "... and 10 more layers, with smaller norms"


def test_unused_gradients_are_in_no_table_and_stacked_layers_have_their_own_row():
    params = {"head": jnp.ones(2), "layers": {"kernel": jnp.ones((3, 2))}}
    labels = {"head": "frozen", "layers": {"kernel": "used"}}
    inner = optax.partition({"frozen": optax.set_to_zero(), "used": optax.sgd(0.1)}, labels)
    tx = og.guard(inner, stacked=lambda path, leaf: path.startswith("layers"))
    history = follow(jax.tree.map(lambda f: f, tx), (0.1, 0.1), params=params)
    assert history.leaf_names == ("head", *(f"layers/kernel[{i}]" for i in range(3)))
    assert history.records[0]["leaf_norms"][0] is None
    assert "head" not in history.summary() and "layers/kernel[2]" in history.summary()


# Picture


def test_labels_keep_what_tells_layers_apart():
    blocks = [(i, part) for i in (1, 11) for part in ("query", "value")]
    names = [f"params/encoder/block_{i}/self_attention/{part}/kernel" for i, part in blocks]
    labels = _layers.shorten([*names, "params/head/kernel"], 30)
    starts = {1: "encoder/block_1", 11: "…/block_11"}
    expected = [f"{starts[i]}/…/{part}/kernel" for i, part in blocks]
    assert labels == [*expected, "head/kernel"]
    long = ["a/" + "x" * 50 + number for number in "12"]
    assert _layers.shorten(long, 20) == ["xxxxxxxxx…xxxxxxxxx1", "xxxxxxxxx…xxxxxxxxx2"]
    same = ["a" * 40 + "1" + "b" * 40, "a" * 40 + "2" + "b" * 40]
    assert _layers.shorten(same, 20) == same  # rather long than the same


@pytest.mark.parametrize(
    ("num_blocks", "parts", "expected"),
    [
        (6, ("bias", "kernel"), ["block_0/bias", "block_0/kernel", "block_1/bias"]),
        (13, tuple("abcdefghijklmn"), ["block_0 (14)", "block_1 (14)"]),
        (1000, ("kernel",), ["block_0–24 (25)", "block_25–49 (25)"]),
        (200, ("bias", "kernel"), ["block_0–4 (10)", "block_5–9 (10)"]),
    ],
)
def test_many_layers_share_lines_in_the_order_of_the_network(num_blocks, parts, expected):
    # As JAX sorts them: block_10 before block_2.
    names = sorted(f"net/block_{i}/{part}" for i in range(num_blocks) for part in parts)
    rows = list(range(len(names)))
    bands = _layers.arrange(names, rows, [], most=40, longest=30)
    assert [band.label for band in bands][: len(expected)] == expected
    assert len(bands) <= 40 and sorted(row for band in bands for row in band.rows) == rows
    bad = names.index("net/block_5/" + parts[-1])
    bands = _layers.arrange(names, rows, [bad], most=40, longest=30)
    assert [band.rows for band in bands if bad in band.rows] == [(bad,)]  # never folded away


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


VERMILION = (0xD5, 0x5E, 0x00)


def count_of(color: tuple[int, ...], image: np.ndarray) -> int:
    return int((np.abs(image - color).max(axis=-1) <= 8).sum())


def test_picture_is_small_and_shows_skips(tmp_path):
    sizes = np.exp(np.random.default_rng(0).normal(size=200)) * 0.3
    healthy = record(*sizes, params=PARAMS).plot(tmp_path / "sub" / "healthy.png")
    sizes[50:200:50] = np.nan
    faulty = record(*sizes, params=PARAMS).plot(str(tmp_path / "faulty.png"))
    assert healthy == tmp_path / "sub" / "healthy.png"
    for path in (healthy, faulty):
        assert pixels(path).shape[1] == 880
        assert 5_000 < path.stat().st_size < 150_000
    assert count_of(VERMILION, pixels(healthy)) == 0
    assert count_of(VERMILION, pixels(faulty)) > 100


def test_axes_are_named_logarithmic_and_have_a_legend(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k)
    )
    history = og.History(params=PARAMS)
    for step, state in enumerate(states(0.1, 2.0, math.nan, 3.0, 0.1)):
        history.append(step, state, loss=10.0**-step, threshold=4.0)
    history.plot(tmp_path / "p.png")
    loss, norm, layers, bar = figures[0].axes
    labels = loss.get_ylabel(), norm.get_ylabel(), layers.get_xlabel()
    assert labels == ("loss", "gradient norm", "step")
    assert [axis.get_yscale() for axis in (loss, norm, bar)] == ["log"] * 3
    expected = ["gradient norm", "after the clip", "threshold", "cut by clip_by_norm (2)"]
    texts = [text.get_text() for text in norm.get_legend().get_texts()]
    assert texts == [*expected, "skipped (1)"]
    assert [text.get_text() for text in layers.get_yticklabels()] == ["✕ bias", "✕ kernel"]
    lines = {line.get_label(): line for line in norm.get_lines()}
    marked = [list(lines[name].get_xdata()) for name in ("cut by clip_by_norm (2)", "skipped (1)")]
    assert marked == [[1, 3], [2]]
    received = lines["after the clip"].get_ydata()
    np.testing.assert_allclose(received[[1, 3]], 1, rtol=1e-6)
    figures[0].canvas.draw()
    ticks = [text.get_text() for axis in (norm, bar) for text in axis.get_yticklabels()]
    assert any(ticks) and not any("$" in tick for tick in ticks)  # 0.1, not 10^-1
    assert loss.get_xlim() == norm.get_xlim() == layers.get_xlim()


def test_loss_scale_overflows_returns_and_micro_batches_are_drawn():
    from optax_guard.runlog.plot import make_figure

    guarded = og.rollback(og.backoff(og.guard(optax.sgd(0.1))), every=2, after_skips=2)
    tx = og.dynamic_loss_scale(guarded, initial_scale=2.0, min_scale=1.0)
    history = follow(tx, (0.1, 0.1, *[jnp.inf] * 3, 0.1))
    figure = make_figure(history.records, history._log.about)
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels[:3] == ["gradient norm", "loss scale", "step factor"]
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert {"overflow of the loss scale (3)", "rolled back (1)", "skipped (2)"} <= set(texts)
    tx = optax.MultiSteps(og.guard(optax.sgd(0.1)), 2, should_skip_update_fn=og.skip_microbatch)
    history = follow(tx, (jnp.nan, 0.1))
    figure = make_figure(history.records, history._log.about)
    (norm,) = figure.axes  # no window has ended: nothing to map, and no line of zeros
    assert [line.get_label() for line in norm.get_lines()] == ["micro-batch left out (1)"]


@pytest.mark.parametrize(
    "sizes", [(0.5,), (math.nan,), (0.0, 0.0), (1e-30, 1e30), (math.nan, 0.0, math.inf)]
)
def test_picture_of_a_short_or_strange_run(tmp_path, sizes):
    path = record(*sizes).plot(tmp_path / "p.png")
    assert pixels(path).shape[1] == 880


def test_picture_of_scalars_only_and_of_a_clip_without_guard(tmp_path):
    history = og.History()
    tx = og.clip_by_norm(1.0)
    state = tx.init(PARAMS)
    for step in range(3):
        _, state = tx.update(PARAMS, state)
        history.append(step, state, grad_norm=2.0, loss=-1.0)
    assert events_of(history).received.tolist() == pytest.approx([1.0] * 3, rel=1e-6)
    written = history.plot(tmp_path / "clip")  # the ending is added, and told
    assert written == tmp_path / "clip.png" and written.exists()
    scalars = og.History()
    scalars.append(0, None, loss=1.0)
    scalars.plot(tmp_path / "scalars.svg")
    assert (tmp_path / "scalars.svg").read_text().startswith("<?xml")


def test_long_runs_of_many_layers_are_drawn_in_little_space(tmp_path):
    generator = np.random.default_rng(0)
    norms = np.exp(generator.normal(size=(5000, 150)))
    norms[2500, 70] = np.nan  # one cell of 750 000 must not vanish among the pixels
    lines = [
        _history_file.encode({"step": step, "guard/grad_norm": 1.0, "leaf_norms": row})
        for step, row in enumerate(norms.tolist())
    ]
    (tmp_path / "h.jsonl").write_text("\n".join(lines))
    path = og.History.load(tmp_path / "h.jsonl").plot(tmp_path / "p.png")
    image = pixels(path)
    assert image.shape[0] < 1000
    assert path.stat().st_size < 400_000
    assert count_of(VERMILION, image) > 2


def test_missing_matplotlib_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'optax_guard\[report\]'"):
        record(0.1).plot(tmp_path / "p.png")


def test_import_of_the_package_brings_no_tool_for_reports():
    body = """
        import sys, optax_guard
        history = optax_guard.History()
        history.append(0, None, loss=1.0)
        history.flush()
        extras = ("matplotlib", "rich", "tensorboardX", "flax", "chex", "hypothesis")
        before = set(sys.argv[1].split(","))
        print([name for name in extras if name in sys.modules and name not in before])
    """
    probe = run_script("import sys, optax; print(','.join(sys.modules))")
    before = probe.communicate()[0].strip()
    output, errors = run_script(body, before).communicate()
    assert output.strip() == "[]", errors
