"""The benchmark scripts run, and the reader of compiled programs agrees with the compiler.

Covered: ``main(["--quick"])`` of each script (rows, table, JSON, picture), bytes against XLA's own
count where there is no conditional, the cheap and the dear branch of one, loops, copies,
collectives and callbacks, medians and quartiles, memory groups; means of differences, and the one
table of all results.
"""

from __future__ import annotations

import json
import struct
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og
from benchmarks import (
    _harness,
    _hlo,
    _hlo_text,
    _report,
    _rules,
    _setups,
    _trials,
    ablations,
    accelerators,
    alpha,
    collectives,
    end_to_end,
    equivalences,
    faults,
    fine_tuning,
    healthy,
    history_cost,
    language_model,
    lasting_rise,
    odd_models,
    step_cost,
    summary,
)


def run_quickly(script: Any, folder: Any, *more: str) -> tuple[list[dict[str, Any]], Any]:
    """Rows and record of a script, which says what it did with."""
    path = folder / "result.json"
    rows = script.main(["--quick", "--json", str(path), *more])
    record = json.loads(path.read_text())
    assert record["rows"] == json.loads(json.dumps(rows))
    assert set(record) >= {"benchmark", "date", "versions", "device", "arguments"}
    assert record["versions"]["jax"] == jax.__version__
    assert record["device"]["platform"] == "cpu"
    return rows, record


@pytest.mark.parametrize("script", [step_cost, pytest.param(end_to_end, marks=pytest.mark.by_hand)])
def test_timing_script_returns_a_row_for_each_pipeline(script, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    rows, _ = run_quickly(script, tmp_path, "--plot", str(picture))
    assert {"bare", "og.stabilize"} <= {row["variant"] for row in rows}
    for row in rows:
        assert "error" not in row
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["num_kernels"] > 0
        assert row["hot_bytes"] > 0
        if row["variant"] == "bare":
            assert row["ratio"] == 1
    table = capsys.readouterr().out
    assert all(table.count(f" {row['variant']} ") >= 1 for row in rows)
    assert picture.stat().st_size > 1000


def test_history_script_compares_loops_that_record_with_one_that_does_not(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    rows, _ = run_quickly(history_cost, tmp_path, "--plot", str(picture))
    assert rows[0]["variant"] == "no record" and rows[0]["ratio"] == 1
    assert sum(row["is_ours"] for row in rows) == 4
    spent = {row["variant"]: row["record_seconds"] for row in rows}
    assert all(seconds >= 0 for seconds in spent.values())
    assert spent["og.History, file, every step"] > spent["no record"]
    table = capsys.readouterr().out
    assert all(table.count(f"| {name} ") == 1 for name in spent)
    assert picture.stat().st_size > 1000


@pytest.mark.slow
def test_collectives_script_finds_what_a_guard_adds(tmp_path, capsys):
    rows, _ = run_quickly(collectives, tmp_path)
    for row in rows:
        assert row["num_all_gathers"] == 0
        assert (row["hot"] == []) == (row["variant"] == "bare")
        assert row["state_bytes_added"] < 2000
    assert "all-reduce" in capsys.readouterr().out


def test_pipeline_that_does_not_run_is_reported(tmp_path, capsys):
    variants = ["--trees", "tiny", "--variants", "apply_if_finite(clip)", "--rounds", "0"]
    tree = _setups.make_tree({"kernel": (4, 4)}, gradient_dtype=jnp.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_setups.TREES, "tiny", lambda: tree)
        rows, _ = run_quickly(step_cost, tmp_path, "--plot", str(tmp_path / "p.png"), *variants)
    assert rows[1]["error"].startswith("TypeError")
    assert "fails" in capsys.readouterr().out


def program(function: Any, *arguments: Any, **options: Any) -> tuple[_hlo.Program, float]:
    compiled = jax.jit(function, **options).lower(*arguments).compile()
    return _hlo.analyze(compiled), compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize("name", ["momentum", "adamw", "adafactor", "lamb"])
def test_bytes_without_conditionals_are_those_that_the_compiler_counts(name):
    tree = _setups.make_tree({"kernel": (256, 128), "bias": (128,)})
    _, measures = step_cost.measure(tree, _setups.OPTIMIZERS[name](), is_hot=True)
    assert measures["num_conditionals"] == 0
    # XLA looks closer at a few scalars inside of fusions.
    np.testing.assert_allclose(measures["hot_bytes"], measures["all_bytes"], rtol=1e-3)


def test_conditional_counts_its_cheap_branch_when_hot_and_its_dear_one_when_not():
    x = jnp.ones((256, 256))

    def function(is_rare, x):
        return jax.lax.cond(is_rare, lambda x: jnp.sum(jnp.sin(x)), lambda x: 0.0, x)

    found, theirs = program(function, True, x)
    assert found.num_conditionals == 1
    assert found.hot.num_bytes < 1000
    assert found.dear.num_bytes >= x.nbytes
    np.testing.assert_allclose(found.dear.num_bytes, theirs, rtol=1e-3)


def test_loop_counts_as_often_as_it_runs():
    x = jnp.ones((64, 64))

    def function(x, number):
        return jax.lax.fori_loop(0, number, lambda _, y: jnp.tanh(y @ y), x)

    ten, hundred = (
        program(function, x, number, static_argnums=1)[0].hot.num_bytes for number in (10, 100)
    )
    assert 9 < hundred / ten <= 10  # x is copied once, before the loop


def test_copy_of_an_array_counts_with_its_size():
    found, _ = program(lambda x: (x, jnp.sum(x)), jnp.ones((64, 64)))
    assert found.hot.copies == [64 * 64]
    donated, _ = program(lambda x: (x, jnp.sum(x)), jnp.ones((64, 64)), donate_argnums=0)
    assert donated.hot.copies == []


def test_callback_counts_as_a_host_transfer():
    def function(x):
        jax.debug.callback(lambda _: None, x)
        return x + 1

    assert program(function, jnp.ones(4))[0].hot.num_host_transfers == 1
    assert program(lambda x: x + 1, jnp.ones(4))[0].hot.num_host_transfers == 0


def test_collectives_are_found_with_their_sizes():
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x = jnp.ones((8, 16))
    total, _ = program(lambda x: x.sum(0), x, in_shardings=split, out_shardings=whole)
    assert total.hot.collectives == [_hlo.Collective("all-reduce", 1, 16)]
    gathered, _ = program(lambda x: x * 2, x, in_shardings=split, out_shardings=whole)
    assert [each.kind for each in gathered.hot.collectives] == ["all-gather"]


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        _hlo_text.parse("HloModule nothing")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("f32[2,3]{1,0}", 24), ("(bf16[5], s4[3], pred[])", 13), ("token[]", 0), ("f8e4m3fn[7]", 7)],
)
def test_types_have_their_sizes(text, num_bytes):
    assert _hlo_text.Instruction("x", "add", text, (), "", False).num_bytes == num_bytes


# As the compiler of a TPU writes it: S(1) is vector memory, S(6) that of the scalar unit.
ON_CHIP = """
%double (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %twice = f32[8,4]{1,0} add(%x, %x)
}

ENTRY %main (g: f32[8,4], h: f32[8,4], n: s32[]) -> f32[8,4] {
  %n = s32[]{:T(128)} parameter(2)
  %h = f32[8,4]{1,0:T(8,128)} parameter(1)
  %g = f32[8,4]{1,0:T(8,128)} parameter(0)
  %copy-start = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%g)
  %slice-start = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%h)
  %next = s32[]{:T(128)S(6)} add(%n, %n)
  %first = f32[8,4]{1,0:S(1)} fusion(%h), kind=kLoop, calls=%double
  %copy-done = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %slice-done = f32[2,4]{1,0:S(1)} slice-done(%slice-start)
  %second = f32[8,4]{1,0:S(1)} fusion(%copy-done), kind=kLoop, calls=%double
  %back = (f32[8,4]{1,0}, f32[8,4]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%second)
  %all = f32[8,4]{1,0} copy-done(%back)
  %all-reduce-start = f32[8,4]{1,0} all-reduce-start(%all), to_apply=%double
  %third = f32[8,4]{1,0} fusion(%all), kind=kLoop, calls=%double
  %reduced = f32[8,4]{1,0} all-reduce-done(%all-reduce-start)
  %again = f32[8,4]{1,0} all-reduce-start(%third), to_apply=%double
  ROOT %end = f32[8,4]{1,0} all-reduce-done(%again)
}
"""


def test_what_is_on_the_chip_costs_no_bytes_and_what_is_brought_there_counts_once():
    found = _hlo.Program(ON_CHIP).hot
    array, collective = 8 * 4 * 4, 2 * 8 * 4 * 4
    # Read ahead, a quarter read ahead, first, written back, third, and two collectives.
    assert found.num_bytes == array + array / 4 + array + array + 2 * array + 2 * collective
    assert found.num_kernels == 3 + 2
    assert found.copies == []


def test_collective_overlaps_if_a_kernel_runs_before_its_end():
    assert _hlo.Program(ON_CHIP).hot.collectives == [
        _hlo.Collective("all-reduce", 1, 32, True),
        _hlo.Collective("all-reduce", 1, 32, False),
    ]


def test_copy_within_main_memory_counts_both_sides_though_it_is_asynchronous():
    text = ON_CHIP.replace(
        "f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0}, u32", "f32[8,4], f32[8,4], u32"
    )
    assert _hlo.Program(text).hot.copies == [32]


def test_accelerators_compiles_for_what_it_has_a_compiler_for(tmp_path, capsys):
    # A TPU's compiler is never installed beside the default tests.
    arguments = ["--platform", "v5p:2x2x1", "cpu", "--quick", "--variants", "og.guard"]
    rows = accelerators.main([*arguments, "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert 'is not installed. In an environment of its own: pip install "libtpu"' in printed
    record = json.loads((tmp_path / "accelerators_cpu.json").read_text())
    assert record["rows"] == json.loads(json.dumps(rows))
    bare, guarded = rows
    assert (bare["variant"], guarded["variant"]) == ("bare", "og.guard")
    assert 0.95 <= guarded["extra_reads"] <= 1.05
    assert 0 < guarded["num_waits"] <= guarded["num_conditionals"]
    table = accelerators.accelerators_table(tmp_path)
    assert "AdamW, 8 arrays, f32:" in table and "| 11.00 (" in table and "not run" in table


def test_accelerators_refuses_platforms_that_nobody_knows(capsys):
    with pytest.raises(SystemExit):
        accelerators.main(["--platform", "v5p"])
    assert "'v5p' is none of cpu, h100 and topologies such as v5p:2x2x1" in capsys.readouterr().err


def test_table_of_accelerators_sets_platforms_side_by_side(tmp_path):
    assert accelerators.accelerators_table(tmp_path) == ""
    row = {"tree": "t", "dtypes": "f32", "compiler": "c", "gradient_bytes": 4, "num_waits": 0}
    of_h100 = [{**row, "platform": "h100", "variant": "bare", "hot_bytes": 28}]
    of_tpu = [
        {**row, "platform": "v5p:2x2x1", "variant": "bare", "hot_bytes": 28},
        {**row, "platform": "v5p:2x2x1", "variant": "guard", "hot_bytes": 32, "num_waits": 2},
        {**row, "platform": "v5p:2x2x1", "variant": "broken", "error": "TypeError: no"},
    ]
    for name, rows in {"h100": of_h100, "v5p": of_tpu}.items():
        (tmp_path / f"accelerators_{name}.json").write_text(json.dumps({"rows": rows}))
    lines = accelerators.accelerators_table(tmp_path).splitlines()
    assert lines[0] == "AdamW, t, f32:"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:7]]
    assert cells[0] == ["pipeline", "h100", "v5p:2x2x1"]
    assert cells[2:] == [
        ["bare", "7.00", "7.00"], ["guard", "-", "8.00 (2)"], ["broken", "-", "fails"],
    ]  # fmt: skip


def test_ratios_are_of_the_same_round():
    timing = _harness.Timing([2.0, 8.0, 3.0], [2.0, 2.0, 1.0]).per(2)
    assert timing.summary() == {
        "step_seconds": 1.5,
        "ratio": 2.0,
        "ratio_low": 1.5,
        "ratio_high": 2.0,
        "num_rounds": 3,
    }


def test_groups_fit_in_memory_and_each_has_the_baseline():
    sizes = {"bare": 2.0, "a": 3.0, "b": 4.0, "c": 1.0, "large": 100.0}
    groups = _harness.groups_within(9.0, sizes, "bare")
    assert groups == [["bare", "a", "b"], ["bare", "c"], ["bare", "large"]]
    assert _harness.groups_within(9.0, {"bare": 2.0}, "bare") == [["bare"]]


def test_table_is_aligned_markdown():
    columns = {"name": lambda row: row["name"], "n": lambda row: str(row["n"])}
    assert _report.markdown_table([{"name": "a", "n": 10}], columns).splitlines() == [
        "| name |  n |",
        "| :--- | -: |",
        "| a    | 10 |",
    ]


def test_bytes_of_state_are_those_of_the_arrays():
    params = {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    assert _setups.num_bytes(jax.eval_shape(optax.adam(0.1).init, params)) == 2 * 64 + 4


@pytest.mark.by_hand
def test_alpha_compares_rules_on_all_conditions(tmp_path, capsys):
    rows, _ = run_quickly(alpha, tmp_path)
    assert [row["rule"] for row in rows] == ["none", "alpha=1.0", 'alpha="auto"']
    for row in rows:
        assert all(0 <= row[f"{name}, worst"] <= row[name] <= 100 for name in alpha.CONDITIONS)
    # Only normalised steps do not feel the size of the loss.
    assert rows[1]["healthy"] == rows[1]["loss x 64"] > 50
    assert rows[0]["healthy"] > 50 > rows[0]["loss x 64"]
    assert capsys.readouterr().out.count("auto") == 1


def run_for_cells(script: Any, folder: Any, *more: str) -> list[dict[str, Any]]:
    """Cells of a script, which has written them as the summary reads them."""
    path = folder / f"{script.__name__.rpartition('.')[2]}_quick.json"
    cells = script.main(["--quick", "--json", str(path), *more])
    record = json.loads(path.read_text())
    assert record["cells"] == json.loads(json.dumps(cells))
    assert record["versions"]["jax"] == jax.__version__
    for cell in cells:
        assert isinstance(cell["rule"], str) and isinstance(cell["case"], str)
        assert isinstance(cell["value"], float)
    return cells


def test_healthy_pairs_seeds_before_it_takes_the_error():
    cell = healthy.make_cell("x", "y", np.array([91.0, 83, 75]), np.array([90.0, 80, 70]))
    assert cell["value"] == 3 and cell["accuracy"] == 83 and cell["worst"] == 75
    assert cell["se"] == pytest.approx(2 / 3**0.5)  # of 1, 3, 5; that of the accuracies is 4.6
    assert cell["seeds"] == 3


def write_idx(path: Any, array: Any) -> None:
    path.write_bytes(struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape))
    with path.open("ab") as file:
        file.write(array.tobytes())


@pytest.mark.by_hand
def test_healthy_compares_with_the_run_without_a_rule_on_digits_and_on_a_folder(tmp_path, capsys):
    folder = tmp_path / "letters"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        write_idx(folder / f"{split}-images-idx3-ubyte", rng.integers(0, 256, (70, 4, 4), np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte", rng.integers(0, 10, 70, np.uint8))
    named, data = healthy.load_folder(f"mine={folder}", 40)
    assert (named, *data.train_images.shape, len(data.test_labels)) == ("mine", 40, 16, 70)
    assert healthy.load_folder(str(folder), 40)[0] == "letters"

    cells = run_for_cells(healthy, tmp_path, "--train", "40", "--data", f"mine={folder}")
    assert str(folder) not in (tmp_path / "healthy_quick.json").read_text()
    none, tiny, *others = cells
    assert [none["rule"], tiny["rule"]] == [cell["rule"] for cell in others] == list(healthy.QUICK)
    assert none["case"] == tiny["case"] == "digits"
    assert [cell["case"] for cell in others] == ["mine", "mine"]
    assert none["value"] == none["se"] == 0 and none["accuracy"] > 85
    # Steps of length 0.001 lead nowhere in three epochs.
    assert tiny["value"] == pytest.approx(tiny["accuracy"] - none["accuracy"]) and tiny["se"] > 0
    assert tiny["value"] < -30
    assert f"{tiny['value']:+.2f} ±" in capsys.readouterr().out


def test_every_rule_that_clips_or_normalises_is_measured():
    rules = {name for name in og.__all__ if name.startswith(("clip_by", "normalize"))}
    assert rules <= set(_rules.RULES) and set(_rules.RULES) <= set(healthy.METHODS)
    assert set(_rules.ADAPTIVE) <= set(faults.METHODS)


@pytest.mark.by_hand
def test_faults_kill_what_has_no_protection(tmp_path, capsys):
    cells = run_for_cells(faults, tmp_path)
    found = {(cell["rule"], cell["case"]): cell for cell in cells}
    assert {rule for rule, _ in found} == set(faults.QUICK)
    assert len(cells) == len(faults.QUICK) * (1 + 2 * 4)  # no fault, or four from either step on
    for first in (0, 20):
        bad = f"sgd, NaN pixel, first {first}"
        assert found["none", bad]["dead"] == 2
        assert found["og.stabilize", bad]["dead"] == 0 and found["og.stabilize", bad]["value"] > 85
        labels = f"sgd, random labels, loss ×1000, first {first}"
        assert (
            found["og.stabilize", labels]["value"] > 85 > found["clip_by_zscore", labels]["value"]
        )
    assert min(cell["value"] for cell in cells if cell["case"] == "sgd, no fault") > 85
    printed = capsys.readouterr().out
    assert printed.count("dead / dead") == 2


def write_cells(folder: Any, name: str, *cells: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps({"cells": cells}))


def test_summary_puts_all_benchmarks_into_one_row_a_rule(tmp_path, capsys):
    order = {"case": "L=30, lr=0.1", "value": 94.0, "low": 72, "high": 99, "solved": 15}
    write_cells(
        tmp_path,
        "rnn_temporal_order_cpu.json",
        {"rule": "clip_by_norm", "seeds": 16, **order},
        {"rule": "clip_by_norm", "seeds": 16, **order, "case": "L=20, lr=0.01", "solved": 1},
    )
    write_cells(
        tmp_path,
        "clinic_cpu.json",
        {"rule": "clip_by_norm 1", "case": "mild", "value": 66.0},
        {"rule": "clip_by_norm 1", "case": "bad", "value": 82.0},
        {"rule": "clip by value .5", "case": "bad", "value": 96.0},
        {"rule": "Adam", "case": "mild", "value": 82.0},
        {"rule": "none", "case": "mild", "value": 10.0, "nonfinite_seeds": 5, "seeds": 8},
        {"rule": "lr/10", "case": "mild", "value": None},
    )
    fault = {"dead": 0, "seeds": 5}
    write_cells(
        tmp_path,
        "faults_cpu.json",
        {"rule": "clip_by_norm", "case": "sgd, no fault", "value": 1.0, **fault},
        {"rule": "clip_by_norm", "case": "sgd, x, first 0", "value": 97.0, **fault},
        {"rule": "clip_by_norm", "case": "sgd, y, ×1, first 0", "value": 96.5, **fault},
        {"rule": "clip_by_norm", "case": "sgd, x, first 20", "value": 98.0, "dead": 3, "seeds": 5},
        {"rule": "clip_by_norm", "case": "adam, x, first 0", "value": 5.0, **fault},
    )
    adam = {"rule": "none", "case": "adam, x, first 20", "value": 8.0, **fault}
    write_cells(tmp_path, "faults_adam_cpu.json", adam)
    write_cells(
        tmp_path,
        "healthy_cpu.json",
        {"rule": "none", "case": "digits", "value": 0.0, "se": 0.0},
        {"rule": "clip_by_norm", "case": "digits", "value": -1.24, "se": 0.09},
    )
    rows = {row["rule"]: row for row in summary.main(["--folder", str(tmp_path)])}
    assert list(rows) == ["none", "lr/10", "adam", "clip_by_norm", "clip by value .5"]
    assert rows["clip_by_norm"] == {
        "rule": "clip_by_norm",
        "A: solved": "15/16 (72-99 %)",
        "B: worst row": "-14.0 (bad)",
        "C: worst fault, first at 0 / 20": "96.5 / dead",
        "D: digits": "-1.24 ± 0.09",
    }
    assert rows["adam"]["B: worst row"] == "+16.0 (mild)"
    assert rows["adam"]["C: worst fault, first at 0 / 20"] == "- / 8.0"
    assert rows["none"]["B: worst row"] == rows["lr/10"]["B: worst row"] == "dead (mild)"
    assert rows["none"]["D: digits"] == "0"
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_summary_says_what_is_missing_or_unreadable(tmp_path, capsys):
    write_cells(tmp_path, "healthy_cpu.json", {"rule": "x", "case": "y", "value": 1.0, "se": 0.5})
    assert summary.main(["--folder", str(tmp_path)]) == [{"rule": "x", "D: y": "+1.00 ± 0.50"}]
    printed = capsys.readouterr().out
    assert "B: no file clinic*.json" in printed and "D: no file" not in printed
    (tmp_path / "clinic.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"clinic\.json has no list under 'cells'; write it anew"):
        summary.main(["--folder", str(tmp_path)])


def test_summary_reads_the_results_that_come_with_the_repository(capsys):
    rows = summary.main([])
    assert {"none", "og.stabilize", "optax.zero_nans+clip"} <= {row["rule"] for row in rows}
    assert "clip_by_zscore_capped" in capsys.readouterr().out


def test_trials_are_taken_up_where_they_were_left(tmp_path):
    path, calls = tmp_path / "x.json", []

    def run(value):
        calls.append(value)
        return np.array([value, np.nan, value + 2])

    def cells_of(*rules, more=()):
        made = _trials.parser("x", None, ("a", "b"), seeds=3)
        arguments = _trials.parse(made, ["--json", str(path), *more])
        trials = [_trials.Trial("a", rule, partial(run, i)) for i, rule in enumerate(rules)]
        return _trials.run_trials("x", arguments, trials)

    (first,) = cells_of("none")
    known = {"value": 1.0, "low": 0.0, "high": 2.0, "dead": 1, "seeds": 3}
    assert first == {"rule": "none", "case": "a", **known}
    assert len(cells_of("none", "other")) == 2
    assert calls == [0, 1]  # the first cell was there
    assert [cell["rule"] for cell in json.loads(path.read_text())["cells"]] == ["none", "other"]
    cells_of("none", more=["--seeds", "2"])  # cells of three seeds say nothing of two
    cells_of("none", more=["--seeds", "2", "--fresh"])
    assert calls == [0, 1, 0, 0]
    assert "dead" in _trials.to_markdown(
        [_trials.make_cell(_trials.Trial("a", "b", run), np.array([np.nan]))]
    )


def found_quickly(script: Any, folder: Any, *more: str) -> dict[tuple[str, str], dict[str, Any]]:
    cells = run_for_cells(script, folder, *more)
    assert all(cell["dead"] == 0 and cell["seeds"] == 2 for cell in cells)
    return {(cell["case"], cell["rule"]): cell for cell in cells}


def test_odd_models_train_as_bare(tmp_path, capsys):
    found = found_quickly(odd_models, tmp_path)
    for case in odd_models.QUICK_CASES:
        bare, ours = (found[case, rule]["value"] for rule in ("none", "og.stabilize"))
        assert ours <= bare * (1 + 1e-3) + 1e-6
    assert "line, sgd 0.1" in capsys.readouterr().out
    searching = odd_models.CASES["quadratic, polyak"]()
    assert odd_models.only_guards(og.stabilize, searching)
    assert not odd_models.only_guards(og.stabilize, odd_models.CASES["line, sgd 0.1"]())


@pytest.mark.by_hand
def test_accumulation_is_one_large_batch(tmp_path):
    found = found_quickly(equivalences, tmp_path)
    assert {case for case, _ in found} == {"MultiSteps, sgd", "MultiSteps, adam"}
    assert max(cell["value"] for cell in found.values()) < 1e-3


@pytest.mark.by_hand
def test_fine_tuning_survives_one_bad_batch(tmp_path):
    cells = fine_tuning.main(["--quick", "--json", str(tmp_path / "fine_tuning.json")])
    found = {(cell["case"], cell["rule"]): cell for cell in cells}
    assert found["rank 4, adam, one NaN batch", "none"]["dead"] == 2
    for fault in fine_tuning.FAULTS:
        assert found[f"rank 4, adam, {fault}", "og.stabilize"]["dead"] == 0


@pytest.mark.by_hand
def test_norms_that_rise_for_good_do_not_stop_the_default(tmp_path):
    found = found_quickly(lasting_rise, tmp_path, "--cases", "second loss", "saddle")
    for case in ("second loss", "saddle"):
        bare, ours = (found[case, rule]["value"] for rule in ("none", "og.stabilize"))
        assert ours <= 2 * bare


@pytest.mark.by_hand
def test_language_model_is_trained_at_every_rate_and_through_bursts(tmp_path):
    found = found_quickly(language_model, tmp_path, "--optimizers", "adamw", "soap")
    assert len(found) == 2 * (2 + 2) + 2 * 2
    for cell in found.values():
        assert 1 < cell["value"] < 10
    healthy = found["adamw, 0.01", "none"]["value"]
    assert found["adamw, 0.01, bursts ×1000", "none"]["value"] > healthy


@pytest.mark.by_hand
def test_stacked_layers_train_as_layers_in_a_row(tmp_path):
    found = found_quickly(equivalences, tmp_path, "--cases", "stacked")
    assert max(cell["value"] for cell in found.values()) < 1e-3


@pytest.mark.slow
def test_ablations_run_all_variants_at_once(tmp_path, capsys):
    found = found_quickly(ablations, tmp_path)
    for variant in ablations.QUICK_VARIANTS:
        assert found["K line", variant]["value"] > 0
    bare, ours = (found["K line", name]["value"] for name in ablations.QUICK_VARIANTS[1::-1])
    assert ours == pytest.approx(bare, rel=1e-3)
    assert capsys.readouterr().out.count("the rule") == 1
