"""History: what is recorded and when, files that survive, sinks, the summary and the picture.

Covered: values of records against the states they come from, donation, waiting, device steps and
mixed devices, every kind of number through a file, torn and broken files, resumed runs, kills and
ends without ``close``, processes, a real TensorBoard writer, events read off counters, pictures.
"""

from __future__ import annotations

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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

import optax_guard as og
from optax_guard.runlog import events as _history_events
from optax_guard.runlog import file as _history_file

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
    assert {entry["guard/grad_norm"], entry["guard/2/grad_norm"]} == set(entry["leaf_norms"])


def test_replicated_states_and_scalars_of_another_device_come_in_one_record():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    (state,) = states(0.5)
    spread = jax.device_put(state, NamedSharding(mesh, P()))
    history = og.History()
    history.append(0, spread, loss=jax.device_put(jnp.float32(0.25), jax.devices()[3]))
    plain = og.History()
    plain.append(0, state, loss=0.25)
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
        assert before.guard_step.is_deleted()  # or else this tests nothing
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
    packs = og.reporting._history_fetch._pack
    monkeypatch.setattr(
        "optax_guard.reporting._history_fetch._pack",
        lambda arrays: fetched.append(packs(arrays)) or fetched[-1],
    )
    found, loss = states(0.1, 0.2), jnp.float32(1.0)
    history = og.History()
    for step, state in enumerate(found):
        with jax.transfer_guard_device_to_host("disallow_explicit"):
            history.append(step, state, loss=loss)
    assert len(fetched) == 2
    num_words = len(og.metrics(found[0])) + len(NAMES) + 1
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


@pytest.mark.parametrize("cut", [1, 2, 30, "all but one", "line break"])
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
    """Scalars of a TensorBoard event file: length, checksum, message, checksum."""
    (path,) = folder.glob("*tfevents*")
    content, found = path.read_bytes(), {}
    while content:
        size = int.from_bytes(content[:8], "little")
        message = content[12 : 12 + size]
        checksum = int.from_bytes(content[12 + size : 16 + size], "little")
        assert checksum == masked_crc32c(message)
        content = content[16 + size :]
        event = Event.FromString(message)
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_writer_gets_every_scalar(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        history = og.History(sinks=[writer])
        for step, state in enumerate(states(0.125, math.nan, 3.0)):
            history.append(10 * step, state, loss=jnp.float32(step))
        history.close()
        expected = history.records
    found = read_events(tmp_path)
    names = {name for name, _ in found}
    assert names == set(expected[0]) - {"step", "leaf_norms"}
    assert len(found) == 3 * len(names)
    for entry in expected:
        for name in names:
            assert same(float(entry[name]), float(found[name, entry["step"]])), name


def test_callable_sinks_get_a_dict_of_their_own_and_the_step():
    rows = []

    def careless(row, step):
        rows.append((dict(row), step))
        row.clear()

    history = og.History(sinks=(careless, careless))
    history.append(4, states(0.125)[0], loss=0.5)
    history.flush()
    entry = history.records[0]
    assert entry.pop("step") == 4 and len(entry.pop("leaf_norms")) == 2
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


# Events, summary, picture


def events_of(history: og.History) -> _history_events.Events:
    return _history_events.find_events(history.records)


def test_events_tell_skips_clips_and_limits():
    history = record(0.1, 2.0, math.nan, 0.1, math.nan)
    events = events_of(history)
    assert events.skipped.tolist() == [False, False, True, False, True]
    assert events.clipped.tolist() == [False, True, False, False, False]
    assert events.skipped_total.tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_allclose(events.after_clip, [np.nan, 1, np.nan, np.nan, np.nan], rtol=1e-6)
    np.testing.assert_allclose(events.norm[:2], [0.1 * 6**0.5, 2 * 6**0.5], rtol=1e-6)


def test_events_between_records_and_in_the_first_record_are_noticed():
    history = record(2.0, math.nan, 0.1, 5.0, 0.1, 0.1, 0.1, every=2)
    events = events_of(history)
    assert events.steps.tolist() == [0, 2, 4, 6]
    assert events.skipped.tolist() == [False, True, False, False]
    assert events.clipped.tolist() == [True, False, True, False]


def test_limit_is_not_told_from_a_step_that_was_skipped():
    tx = og.stabilize(optax.sgd(0.1), skip_if=og.norm_above(100.0))
    state, history = tx.init(PARAMS), og.History(every=2)
    for step, size in enumerate((0.1, 2.0, 1000.0)):  # the factor is that of step 1
        gradients = jax.tree.map(lambda leaf, size=size: jnp.full_like(leaf, size), PARAMS)
        _, state = tx.update(gradients, state, PARAMS)
        history.append(step, state)
    events = events_of(history)
    assert events.skipped.tolist() == events.clipped.tolist() == [False, True]
    assert events.norm[1] == pytest.approx(1000 * 6**0.5, rel=1e-6)
    assert np.isnan(events.after_clip).all()


def test_counters_that_start_again_are_no_events():
    history = og.History()
    found = states(math.nan, math.nan, 0.1)
    for step, state in enumerate([*found, *states(0.1, math.nan)]):
        history.append(step, state)
    assert events_of(history).skipped.tolist() == [True, True, False, False, True]


def test_overflows_of_a_loss_scale_are_skips():
    tx = og.dynamic_loss_scale(og.stabilize(optax.sgd(0.1)))
    state, history = tx.init(PARAMS), og.History()
    for step, size in enumerate((1.0, jnp.inf, 1.0)):
        gradients = jax.tree.map(lambda leaf, size=size: jnp.full_like(leaf, size), PARAMS)
        _, state = tx.update(gradients, state, PARAMS)
        history.append(step, state)
    assert events_of(history).skipped.tolist() == [False, True, False]
    assert "step 1: gradients overflowed at the loss scale" in history.summary()


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
    assert "  step 2: gradients were not finite" in text
    assert ["loss", "inf", "inf", "nan", "nan", "nan", "1"] in lines
    # norms of six equal elements, of four, and of two
    norms = [0.1 * 6**0.5, 0.2 * 6**0.5, 0.2449, 0.4899, 3 * 6**0.5]
    assert ["guard/grad_norm", *(f"{norms[i]:.4g}" for i in (0, 1, 2, 3, 4)), "1"] in lines
    assert ["dense[0]/kernel", "0.2", "0.4", "6", "1"] in lines
    assert lines.index(["dense[0]/kernel", "0.2", "0.4", "6", "1"]) < len(lines) - 1


def test_summary_says_the_totals_of_the_last_record_of_a_guard():
    text = record(*SUMMARY_SIZES).summary()
    assert "skipped: 1 of 6 steps" in text
    assert "acted: norm_clip in 2 steps" in text
    assert "gave up" not in text
    many = record(*[math.nan] * 7).summary()
    assert "skipped: 7 of 7 steps; the last 5:" in many
    assert many.count("gradients were not finite") == 5


def test_summary_says_when_the_guard_gave_up_and_what_fell_between_records():
    tx = og.guard(optax.sgd(0.1), max_consecutive_skips=2)
    state, history = tx.init(PARAMS), og.History(every=3)
    for step, size in enumerate((1.0, jnp.nan, jnp.nan, 1.0)):
        gradients = jax.tree.map(lambda leaf, size=size: jnp.full_like(leaf, size), PARAMS)
        _, state = tx.update(gradients, state, PARAMS)
        history.append(step, state)
    text = history.summary()
    assert "skipped: 2 of 4 steps" in text
    assert "  between the records of steps 0 and 3" in text
    assert "the guard gave up" in text


def test_summary_shows_the_worst_layers_of_many():
    params = {f"layer{i:02d}": jnp.ones(2) for i in range(30)}
    tx = og.guard(optax.sgd(0.1))
    gradients = {name: jnp.full(2, float(i)) for i, name in enumerate(params)}
    gradients["layer03"] = jnp.full(2, jnp.nan)
    _, state = tx.update(gradients, tx.init(params))
    history = og.History(params=params)
    history.append(0, state)
    lines = history.summary().splitlines()
    shown = [line.split()[0] for line in lines if line.strip().startswith("layer")]
    assert shown == ["layer03", *(f"layer{i:02d}" for i in range(29, 10, -1))]
    assert lines[-1] == "... and 10 more layers, with smaller norms"


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
    assert (loss.get_ylabel(), norm.get_ylabel(), layers.get_xlabel()) == (
        "loss",
        "gradient norm",
        "step",
    )
    assert [axis.get_yscale() for axis in (loss, norm, bar)] == ["log"] * 3
    assert [text.get_text() for text in norm.get_legend().get_texts()] == [
        "gradient norm",
        "threshold",
        "norm × clip factor",
        "clipped (2)",
        "skipped (1)",
    ]
    assert [text.get_text() for text in layers.get_yticklabels()] == list(NAMES)
    lines = {line.get_label(): list(line.get_xdata()) for line in norm.get_lines()}
    assert lines["clipped (2)"] == [1, 3] and lines["skipped (1)"] == [2]
    assert loss.get_xlim() == norm.get_xlim() == layers.get_xlim()


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
    assert events_of(history).after_clip.tolist() == pytest.approx([1.0] * 3, rel=1e-6)
    history.plot(tmp_path / "clip.png")
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
