"""The scripts in ``examples/`` run, and show what their headers say."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_guard as og

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # as `python examples/...` has it

import _demo
import batch_norm
import char_rnn
import clinic
import first_nan
import history_digits
import linen_train_state
import loops
import mlp_digits
import recommender
import rnn_temporal_order

MOST_BYTES = 150_000  # of a picture in the README


def assert_is_small_png(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert 5_000 < len(content) < MOST_BYTES


def test_mlp_digits_guarded_runs_learn_and_unguarded_ones_die(tmp_path, capsys):
    results = mlp_digits.main(["--quick", "--out", str(tmp_path / "mlp.png")])

    faults = list(mlp_digits.FAULTS)
    nan_pixel, burst = faults.index("NaN pixel"), faults.index("8 NaN batches")
    huge, labels = faults.index("sample ×1e6"), faults.index("random labels, loss ×1000")
    for name, accuracy in results.accuracy.items():
        assert accuracy.shape == results.is_alive[name].shape == (len(faults), 2)
        assert np.median(accuracy[0]) > 85, name  # without a fault everything learns
        if name.startswith("og."):
            assert results.is_alive[name].all(), name
            assert np.median(accuracy[[nan_pixel, burst]], axis=1).min() > 85, name
    assert results.accuracy["og.stabilize"].min() > 80
    assert results.accuracy["optax.zero_nans + clip 1"].min() > 80  # the strong rival

    unguarded = results.is_alive["no protection"]
    assert not unguarded[[nan_pixel, burst]].any()
    assert unguarded[[0, huge, labels]].all()
    assert results.accuracy["no protection"][labels].max() < 50
    if_finite = results.is_alive["optax.apply_if_finite(5)"]
    assert if_finite[nan_pixel].all() and not if_finite[burst].any()

    assert results.explanation.startswith("Step 80 was skipped: gradients were not finite")
    assert "hidden1/kernel" in results.explanation
    assert "Skipped so far: 4 of 88 steps" in results.explanation
    printed = capsys.readouterr().out
    assert "dead" in printed and results.explanation in printed
    assert results.figure == tmp_path / "mlp.png"
    assert_is_small_png(results.figure)


@pytest.mark.slow
def test_mlp_digits_reads_idx_data_and_takes_the_first_fault_from_the_command_line(
    tmp_path, monkeypatch
):
    kept = ("no protection", mlp_digits.STABILIZED)  # the other rows only cost time here
    optimizers = {name: mlp_digits.make_optimizers()[name] for name in kept}
    monkeypatch.setattr(mlp_digits, "make_optimizers", lambda: optimizers)
    monkeypatch.setattr(mlp_digits, "LINES", {name: mlp_digits.LINES[name] for name in kept})
    write_dataset(tmp_path / "data", num_train=64 * 12, num_test=50)
    argv = ["--data", str(tmp_path / "data"), "--seeds", "1", "--first-fault", "0"]
    results = mlp_digits.main([*argv, "--out", str(tmp_path / "mlp.png")])
    assert results.explanation.startswith("Step 0 was skipped")
    assert "Skipped so far: 1 of 12 steps" in results.explanation
    nan_pixel = list(mlp_digits.FAULTS).index("NaN pixel")
    assert not results.is_alive["no protection"][nan_pixel].any()
    assert results.is_alive[mlp_digits.STABILIZED].all()


@pytest.mark.slow
def test_rnn_temporal_order_solves_short_sequences(tmp_path, capsys):
    path = tmp_path / "figures" / "rnn.png"
    results = rnn_temporal_order.main(["--quick", "--out", str(path)])

    assert list(results) == [10]
    assert list(results[10]) == ["none", "clip_by_norm"]
    for result in results[10].values():
        assert result.final_error.shape == result.skipped.shape == (2,)
        assert result.error.shape == result.grad_norm.shape == (2, 6)
        assert np.isfinite(result.grad_norm).all() and (result.grad_norm > 0).all()
        # Guessing is wrong for 75 % of the sequences.
        assert (result.final_error < 10).all()
        assert not result.skipped.any()
    assert "2/2" in capsys.readouterr().out
    assert_is_small_png(path)


def test_first_nan_names_the_layer_of_the_stack_in_words_page_and_dashboard(tmp_path, capsys):
    source = Path(first_nan.__file__).read_text()
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 40
    page = first_nan.main(tmp_path / "run").read_text()
    output = capsys.readouterr().out
    assert "step 20: gradients were not finite (blocks/kernel[3])" in output
    assert "non-finite: blocks/kernel[3] (norm nan)" in output
    assert "blocks/kernel[3]" in page and "data:image/png;base64" in page
    (events,) = (tmp_path / "run").glob("*tfevents*")
    assert b"layers/blocks/kernel_3_" in events.read_bytes()  # tensorboardX writes no brackets


@pytest.mark.slow
def test_history_digits_records_every_fault_where_it_happened(tmp_path, capsys):
    record, picture = tmp_path / "run.jsonl", tmp_path / "run.png"
    results = history_digits.main(["--quick", "--record", str(record), "--out", str(picture)])
    assert results.accuracy > 90 and results.figure == picture
    assert_is_small_png(picture)
    history = og.History.load(record)
    assert len(history) == history_digits.NUM_STEPS_QUICK
    steps = range(len(history))
    is_bad = [history_digits.is_nan_batch(s) or history_digits.is_overflow(s) for s in steps]
    np.testing.assert_array_equal(history.series("guard/last_step_skipped"), is_bad)
    norms = np.array([row["leaf_norms"] for row in history.records])
    bad_leaves = ~np.isfinite(norms[330])
    assert [name for name, bad in zip(history.leaf_names, bad_leaves, strict=True) if bad] == [
        "hidden2/kernel"
    ]
    spiked = [history_digits.has_random_labels(step) for step in steps]
    assert history.series("guard/clip_by_update_ratio/last_scale")[spiked].max() < 0.01
    printed = capsys.readouterr().out
    assert results.explanation in printed and "16 of 340 steps" in printed


def test_temporal_order_sequences_are_those_of_the_paper():
    symbols, labels = rnn_temporal_order.sample(jax.random.key(0), 2000, 30)
    assert symbols.shape == (2000, 30) and symbols.dtype == labels.dtype == np.int32
    symbols, labels = np.asarray(symbols), np.asarray(labels)
    rows, places = np.nonzero(symbols < 2)
    np.testing.assert_array_equal(rows, np.repeat(np.arange(2000), 2))  # two in each
    early, middle = places.reshape(2000, 2).T
    assert set(early) == {3, 4, 5} and set(middle) == {15, 16, 17}
    first, second = symbols[rows, places].reshape(2000, 2).T
    np.testing.assert_array_equal(labels, first + 2 * second)
    assert set(labels) == {0, 1, 2, 3} and set(symbols.ravel()) == set(range(6))


def test_rnn_temporal_order_compares_lengths_and_writes_rates_of_success(
    tmp_path, monkeypatch, capsys
):
    def run(optimizer, setting, advance):  # what was trained is of no interest here
        of_points = np.ones((setting.seeds, setting.updates // setting.block))
        errors = np.linspace(0, 3 * setting.length / 10, setting.seeds)
        return rnn_temporal_order.Result(errors, np.zeros(setting.seeds), of_points, of_points)

    monkeypatch.setattr(rnn_temporal_order, "run", run)
    picture, path = tmp_path / "rnn.png", tmp_path / "results" / "rnn.json"
    argv = ["--methods", "clip_by_relative_change", "lr/10", "--lengths", "10", "20", "--lr", "1"]
    outputs = ["--out", str(picture), "--json", str(path)]
    results = rnn_temporal_order.main([*argv, "--seeds", "4", *outputs])
    assert list(results) == [10, 20]
    assert_is_small_png(picture)
    record = json.loads(path.read_text())
    assert record["arguments"] == {"lr": 1, "updates": 6000, "seeds": 4}
    cells = record["cells"]
    cases = [(cell["rule"], cell["case"]) for cell in cells]
    assert cases[:2] == [("clip_by_relative_change", "L=10, lr=1"), ("lr/10", "L=10, lr=1")]
    assert cases[2:] == [("clip_by_relative_change", "L=20, lr=1"), ("lr/10", "L=20, lr=1")]
    for cell, median in zip(cells, (1.5, 1.5, 3, 3), strict=True):
        assert (cell["value"], cell["solved"], cell["seeds"]) == (25, 1, 4)
        assert abs(cell["low"] - 4.6) < 0.1 and abs(cell["high"] - 69.9) < 0.1
        assert (cell["median_error"], cell["worst_error"]) == (median, 2 * median)
    printed = capsys.readouterr().out
    assert printed.count("1/4") == printed.count("5-70 %") == 4
    assert "length 10, lr 1" in printed and "length 20, lr 1" in printed


def test_temporal_order_has_every_rule_that_clips_or_normalises():
    rules = [name for name in og.__all__ if name.startswith(("clip_by", "normalize"))]
    assert set(rules) <= set(rnn_temporal_order.make_methods(0.1))


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [  # by hand, with z = 1.96: (0 of n) is [0, z² / (n + z²)]
        (0, 16, (0.0, 0.1936)),
        (16, 16, (0.8064, 1.0)),
        (8, 16, (0.2800, 0.7200)),  # 1/2 ± z / (2 √(n + z²))
        (1, 10, (0.0179, 0.4042)),  # Brown, Cai & DasGupta 2001
    ],
)
def test_wilson_interval_has_the_values_of_the_formula(successes, trials, expected):
    interval = rnn_temporal_order.wilson_interval(successes, trials)
    np.testing.assert_allclose(interval, expected, atol=1e-4)  # four digits are given


@pytest.mark.parametrize("argv", [["--lengths", "9"], ["--updates", "150"]])
def test_rnn_temporal_order_refuses_settings_that_cannot_work(argv, capsys):
    with pytest.raises(SystemExit):
        rnn_temporal_order.main(argv)
    expected = "--lengths must be at least 10 and --updates a multiple of 100"
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_linen_train_state_keeps_batch_norm_statistics_only_with_select(capsys):
    results = linen_train_state.main(["--quick"])
    assert results["accuracy"] > 90
    assert results["without_select"] < 20
    metrics = og.metrics(results["state"])
    assert metrics["guard/skipped_total"] == 1 and metrics["guard/last_fault_step"] == 11
    statistics = jax.tree.leaves(results["state"].batch_stats)
    assert len(statistics) == 2 and all(np.isfinite(leaf).all() for leaf in statistics)
    printed = capsys.readouterr().out
    assert "Step 10 was skipped" in printed
    assert "Dense_0/kernel" in printed and "guard/grad_norm" in printed


@pytest.mark.slow
def test_char_rnn_survives_empty_and_exploding_batches_with_a_guard(tmp_path, capsys):
    results = char_rnn.main(["--quick", "--out", str(tmp_path / "char.png")])
    plain, guarded = char_rnn.UNPROTECTED, char_rnn.ZSCORE
    healthy, empty, exploding = char_rnn.FAULTS
    untaught = np.log(len(char_rnn.make_corpus(char_rnn.load_text(None)).alphabet))  # a mere guess
    assert results.loss[plain, healthy] == pytest.approx(results.loss[guarded, healthy], abs=0.05)
    assert results.loss[plain, healthy] < 0.65 * untaught
    assert np.isnan(results.loss[plain, empty])
    assert results.loss[plain, exploding] > results.loss[plain, healthy] + 0.5
    for fault in (empty, exploding):
        assert results.loss[guarded, fault] < results.loss[guarded, healthy] + 0.15
    assert results.skipped[guarded, empty] == 1  # of 70 batches: the 40th
    assert results.skipped[guarded, exploding] == results.skipped[guarded, healthy] == 0

    assert len(results.text) == 300 and len(set(results.text)) > 10
    assert results.explanation.startswith(
        "Step 39 was skipped: gradients were not finite; the loss"
    )
    assert "rnn/cell/dense_h/kernel (norm nan)" in results.explanation
    printed = capsys.readouterr().out
    assert "dead" in printed and results.explanation in printed and results.text in printed
    assert_is_small_png(results.figure)


def test_char_rnn_reads_any_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab\u00e9" * 500, encoding="utf-8")
    corpus = char_rnn.make_corpus(char_rnn.load_text(path))
    assert corpus.alphabet == ["a", "b", "\u00e9"]
    np.testing.assert_array_equal(corpus.train[:6], [0, 1, 2, 0, 1, 2])
    assert corpus.train.shape == (1350,) and corpus.validation.shape == (3, char_rnn.LENGTH + 1)
    path.write_text("too short")
    with pytest.raises(ValueError, match="The text has 9 characters; give one of 980 or more"):
        char_rnn.load_text(path)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--steps", "9"], "--steps must be at least 10, got 9"),
        (["--steps", "0"], "--steps must be at least 10, got 0"),
        (["--data", "nowhere.txt"], "--data: [Errno 2] No such file or directory: 'nowhere.txt'"),
        (["--data", "short.txt"], "--data: The text has 5 characters; give one of 980 or more"),
    ],
)
def test_char_rnn_says_on_the_command_line_what_is_wrong(
    argv, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    with pytest.raises(SystemExit):
        char_rnn.main(argv)
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_batch_norm_statistics_survive_a_nan_batch_only_with_select(tmp_path, capsys):
    results = batch_norm.main(["--quick", "--out", str(tmp_path / "norm.png")])
    finite = {"Param": 0, "BatchStat": 0}
    for name in ("no bad batch", batch_norm.WITH_SELECT):
        assert results.runs[name].on_test[-1] > 90, name
        assert results.runs[name].num_nonfinite == finite, name
    # The step was skipped, training goes on as if nothing had happened, and evaluation is dead.
    guarded = results.runs["og.stabilize"]
    kept = results.runs[batch_norm.WITH_SELECT]
    assert guarded.num_nonfinite == {"Param": 0, "BatchStat": 2 * (16 + 32)}
    np.testing.assert_array_equal(guarded.in_training, kept.in_training)
    assert guarded.in_training[-1] > 90 and guarded.on_test[-1] == 0
    assert results.runs["no protection"].num_nonfinite["Param"] > 1000
    printed = capsys.readouterr().out
    assert results.explanation in printed and "Step 33 was skipped" in printed
    assert "conv1/kernel (norm nan)" in results.explanation
    assert_is_small_png(results.figure)


def test_the_state_of_an_nnx_model_is_shared_so_that_it_must_be_copied():
    """The trap that batch_norm.py warns of: a state read before shows what was written after."""
    model = batch_norm.ConvNet(rngs=nnx.Rngs(0))
    shared = nnx.state(model, nnx.BatchStat)
    copied = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    model(np.full((4, 64), np.nan, np.float32), is_training=True)
    assert np.isnan(shared["norm1"]["mean"][...]).all()
    assert (copied["norm1"]["mean"][...] == 0).all()


@pytest.mark.slow
def test_loops_skip_the_bad_batch_in_every_framework(capsys):
    results = loops.main(["--quick"])
    assert list(results) == ["plain Optax", "Flax NNX", "Flax Linen", "Equinox"]
    for name, (accuracy, result) in results.items():
        assert accuracy > 85, name
        metrics = og.metrics(result.state)
        assert metrics["guard/guard_step"] == loops.NUM_STEPS_QUICK, name
        assert metrics["guard/skipped_total"] == 1, name
        assert metrics["guard/last_fault_step"] == loops.BAD_STEP + 1, name
        assert metrics["guard/last_fault_reason"] == 3, name  # gradients, and the loss passed on
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params)), name
    printed = capsys.readouterr().out
    for leaf in ("output (norm nan)", "layers/2/kernel", "layers_2/kernel", "layers/1/weight"):
        assert leaf in printed


@pytest.mark.parametrize(
    "script",
    [
        mlp_digits,
        rnn_temporal_order,
        linen_train_state,
        history_digits,
        batch_norm,
        char_rnn,
        clinic,
        loops,
        recommender,
    ],
)
def test_every_script_tells_its_options_and_how_to_run_it(script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--help"])
    assert exit_info.value.code == 0
    assert "--quick" in capsys.readouterr().out
    assert f"python examples/{script.__name__}.py" in script.__doc__


@pytest.mark.slow
def test_clinic_tells_healthy_exploding_and_vanishing_networks_apart(tmp_path, capsys):
    picture, cells = tmp_path / "clinic.png", tmp_path / "clinic.json"
    results = clinic.main(["--quick", "--out", str(picture), "--json", str(cells)])

    assert results.cases == list(clinic.QUICK_CASES)
    assert all(array.shape == (4, 2) for array in results.score.values())
    verdicts = dict(zip(results.cases, (d.verdict for d in results.diagnosis), strict=True))
    assert verdicts[clinic.SEVERE] == "exploding" and verdicts[clinic.VANISHING] == "vanishing"
    assert verdicts[clinic.HEALTHY] == verdicts[clinic.CURED] == "ok"
    assert results.median(clinic.HEALTHY, "none") > 80
    assert results.num_lost(clinic.SEVERE, "none") == 2
    assert results.num_lost(clinic.SEVERE, "clip_by_norm 1") == 0
    assert results.median(clinic.SEVERE, "clip_by_norm 1") < 30  # kept finite, not cured
    assert results.median(clinic.VANISHING, "clip_by_norm 1") < 30
    assert results.median(clinic.CURED, "none") > 30

    printed = capsys.readouterr().out
    assert "none NaN, at best clip_by_norm 1" in printed
    assert f"{clinic.VANISHING}: none" in printed and "with Xavier instead" in printed
    assert_is_small_png(picture)
    written = json.loads(cells.read_text())["cells"]
    assert len(written) == 8 and {cell["case"] for cell in written} == set(map(str, results.cases))


@pytest.mark.slow
def test_clinic_sees_one_array_and_one_unit_for_each_stacked_layer():
    sizes = (5, 4, 4, 4, 3)
    params = clinic.make_params(jax.random.key(0), clinic.MILD, sizes)
    assert [group.kernel.shape for group in params] == [(1, 5, 4), (2, 4, 4), (1, 4, 3)]
    stacked = {"kernel": np.array(params[1].kernel), "slope": np.array([3.0, 0.5], np.float32)}
    stacked["kernel"][0] *= 100 / np.linalg.norm(stacked["kernel"][0])
    stacked["kernel"][1] *= 0.5 / np.linalg.norm(stacked["kernel"][1])

    tx = og.clip_by_norm(1.0, scope=clinic.per_array)
    clipped, _ = jax.jit(tx.update)(stacked, tx.init(stacked))
    np.testing.assert_allclose(np.linalg.norm(clipped["kernel"], axis=(1, 2)), [1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(clipped["slope"], [1, 0.5], rtol=1e-6)

    tx = og.clip_by_norm(0.2, scope=clinic.per_unit)
    clipped, _ = jax.jit(tx.update)(stacked, tx.init(stacked))
    norms = np.linalg.norm(stacked["kernel"], axis=1)
    np.testing.assert_allclose(
        np.linalg.norm(clipped["kernel"], axis=1), np.minimum(norms, 0.2), rtol=1e-6
    )

    rule = og.clip_by_relative_change(0.1, max_absolute=0.0)
    tx = clinic.unstacked(rule)
    weights = {name: np.ones_like(leaf) for name, leaf in stacked.items()}
    bounded, _ = jax.jit(tx.update)(stacked, tx.init(weights), weights)
    assert jax.tree.structure(bounded) == jax.tree.structure(stacked)
    for layer in range(2):
        alone, alone_weights = ({"kernel": t["kernel"][layer]} for t in (stacked, weights))
        expected, _ = jax.jit(rule.update)(alone, rule.init(alone_weights), alone_weights)
        np.testing.assert_allclose(bounded["kernel"][layer], expected["kernel"], rtol=1e-6)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("activation", clinic.ACTIVATIONS)
def test_clinic_network_is_the_textbook_one(activation, batch_norm):
    """Case as data, selected and stacked, against a plain NumPy network."""
    case = clinic.Case("any", activation, "He", batch_norm)
    params = clinic.make_params(jax.random.key(1), case, (6, 4, 4, 4, 3))
    inputs = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    outputs = clinic.apply(params, clinic.make_kind(case), inputs, 7)

    slope = {"relu": 0.0, "leaky_relu": 0.01, "PReLU": 0.25}.get(activation)
    functions = {"sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh}
    function = functions.get(activation, lambda x: np.where(x > 0, x, slope * x))
    kernels = [np.asarray(kernel, float) for group in params for kernel in group.kernel]
    expected = inputs.astype(float)
    for kernel in kernels[:-1]:
        expected = expected @ kernel
        if batch_norm:  # by the first seven samples
            mean, variance = expected[:7].mean(axis=0), expected[:7].var(axis=0)
            expected = (expected - mean) / np.sqrt(variance + 1e-5)
        expected = function(expected)
    np.testing.assert_allclose(outputs, expected @ kernels[-1], rtol=2e-4, atol=2e-5)

    grads = clinic._gradient(params, clinic.make_kind(case), inputs, np.arange(9) % 3)
    assert np.any(grads[1].slope) == (activation == "PReLU")
    assert np.any(grads[1].gain) == np.any(grads[1].shift) == batch_norm


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--data", "somewhere"], "--data needs --case classifier"),
        (["--full", "--case", "regressor"], "--full is about digits"),
    ],
)
def test_clinic_refuses_options_that_do_not_go_together(argv, expected, capsys):
    with pytest.raises(SystemExit):
        clinic.main(argv)
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_clinic_regressor_explodes_and_a_clip_keeps_it_finite(tmp_path, monkeypatch):
    cases = clinic.CASES["regressor"][:2]
    monkeypatch.setitem(clinic.CASES, "regressor", cases)
    argv = ["--case", "regressor", "--seeds", "2", "--steps", "40"]
    argv += ["--remedies", "clip by value .5", "--out", str(tmp_path / "clinic.png")]
    results = clinic.main(argv)
    for case in cases:
        assert results.num_lost(case, "none") == 2
        assert results.num_lost(case, "clip by value .5") == 0
        assert results.median(case, "none") == -np.inf
    assert results.median(cases[0], "clip by value .5") > 5  # per cent of the variance


def test_clinic_advice_follows_the_figures():
    """A case of each kind; lost seeds count as the worst."""
    cases = [clinic.Case("net", "relu", "He"), clinic.Case("net", "relu", "N(0,1)")]
    cases.append(clinic.Case("net", "tanh", "He"))
    minus = -np.inf
    scores = {
        "none": [[20, 10, 30], [minus] * 3, [90, 91, 92]],
        "Adam": [[94, 95, 96], [1, 2, 3], [90, 92, 92]],
        "clip_by_norm 1": [[90, 91, 0], [7, 8, minus], [70, 80, 90]],
    }
    scores = {name: np.array(rows, float) for name, rows in scores.items()}
    is_finite = {name: np.isfinite(rows) for name, rows in scores.items()}
    results = clinic.Results(cases, scores, is_finite, [])
    assert clinic.cell(results, cases[1], "none") == "NaN"
    assert clinic.cell(results, cases[1], "clip_by_norm 1") == "7 (1 NaN)"
    assert clinic.advise(results) == [
        "Needs no remedy",
        "  net tanh, He: none 91; most harm by clip_by_norm 1 80",
        "Cured, or much better, with a remedy",
        "  net relu, He: none 20, clip_by_norm 1 90, best Adam 95",
        "Beyond all of these remedies: change the network",
        "  net relu, N(0,1): none NaN, at best Adam 2; with He instead: Adam 95",
    ]
    written = json.dumps(clinic.to_cells(results))
    assert "Infinity" not in written and '"value": null' in written


def test_clinic_classifier_takes_digits_enlarged_to_28_by_28():
    data = clinic.enlarged(_demo.load_digits())
    assert data.train_images.shape == (1437, 784) and data.test_images.dtype == np.float32
    small, large = _demo.load_digits().test_images[0].reshape(8, 8), data.test_images[0]
    large = large.reshape(28, 28)
    np.testing.assert_array_equal(large[3:26:3, 3:26:3], small)
    np.testing.assert_array_equal(large[2:26:3, 4:26:3], small)
    assert not large[:2].any() and not large[26:].any() and not large[:, :2].any()


@pytest.mark.slow
def test_recommender_survives_a_high_rate_with_relative_change_only(tmp_path, capsys):
    path = tmp_path / "recommender.png"
    results = recommender.main(["--quick", "--out", str(path)])
    for runs in results.values():
        assert list(runs) == ["none", "clip_by_relative_change"]
        for run in runs.values():
            assert run.error.shape == (5, 1) and (run.zero_rows > 80).all()
        assert runs["none"].error[-1] > 1.5  # predicting the mean: 0.96
        assert (runs["clip_by_relative_change"].error < 1.0).all()
    assert "worse than the mean" in capsys.readouterr().out
    assert_is_small_png(path)


@pytest.mark.parametrize(
    "content",
    [
        "userId,movieId,rating,timestamp\n7,31,2.5,1\n7,1029,3.0,2\n12,31,5,3\n",
        "7\t31\t2.5\t1\n7\t1029\t3\t2\n12\t31\t5\t3\n",
    ],
    ids=["ratings.csv", "u.data"],
)
def test_recommender_reads_movielens(tmp_path, content):
    path = tmp_path / "ratings"
    path.write_text(content)
    ratings = recommender.load_ratings(path)
    np.testing.assert_array_equal(ratings.users, [0, 0, 1])
    np.testing.assert_array_equal(ratings.items, [0, 1, 0])
    np.testing.assert_array_equal(ratings.ratings, np.array([2.5, 3, 5], np.float32))
    assert [array.dtype for array in ratings] == [np.int32, np.int32, np.float32]


def test_recommender_says_what_is_wrong_with_a_file_of_ratings(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must name a file of ratings; .*nowhere is none"):
        recommender.load_ratings(tmp_path / "nowhere")
    path = tmp_path / "page.html"
    path.write_text("<html>\n<body>\n")
    with pytest.raises(ValueError, match=r"no table of user, item and rating.*begins with '<html>"):
        recommender.load_ratings(path)


def idx_bytes(array, *, magic=None):
    """An array of bytes in the IDX format."""
    header = bytes([0, 0, 8, array.ndim]) if magic is None else magic
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_dataset(folder, *, num_train=6, num_test=4, write=Path.write_bytes, suffix=""):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for split, number in (("train", num_train), ("t10k", num_test)):
        arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (number, 28, 28), np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = rng.integers(0, 10, number, np.uint8)
    for name, array in arrays.items():
        write(folder / f"{name}{suffix}", idx_bytes(array))
    return arrays


def write_gzip(path, content):
    path.write_bytes(gzip.compress(content))


def write_with_dot(path, content):
    path.with_name(path.name.replace("-idx", ".idx")).write_bytes(content)


@pytest.mark.parametrize(
    ("write", "suffix"), [(Path.write_bytes, ""), (write_gzip, ".gz"), (write_with_dot, "")]
)
def test_idx_folder_is_read_under_every_usual_name(tmp_path, write, suffix):
    arrays = write_dataset(tmp_path, write=write, suffix=suffix)
    data = _demo.load_idx_folder(tmp_path)
    images = arrays["train-images-idx3-ubyte"].reshape(6, 784)
    np.testing.assert_array_equal(data.train_images, images.astype(np.float32) / 255)
    np.testing.assert_array_equal(data.test_labels, arrays["t10k-labels-idx1-ubyte"])
    assert data.test_images.shape == (4, 784) and data.train_labels.shape == (6,)
    assert data.train_images.dtype == np.float32 and data.train_labels.dtype == np.int32


def test_idx_folder_errors_name_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must name a folder with IDX files; .*nowhere"):
        _demo.load_idx_folder(tmp_path / "nowhere")
    write_dataset(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    expected = (
        r"holds none of t10k-labels-idx1-ubyte, t10k-labels-idx1-ubyte\.gz, t10k-labels\.idx1"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        _demo.load_idx_folder(tmp_path)


def test_idx_folder_error_when_images_and_labels_do_not_match(tmp_path):
    write_dataset(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    with pytest.raises(ValueError, match="6 train images but 5 train labels; take all four"):
        _demo.load_idx_folder(tmp_path)


LABELS = np.arange(10, dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no IDX file of unsigned bytes with 1 dimension.*begins with nothing"),
        (b"<html>", "begins with 3c 68 74 6d, expected 00 00 08 01"),
        (idx_bytes(LABELS, magic=b"\x00\x00\x0d\x01"), "begins with 00 00 0d 01"),
        (idx_bytes(LABELS.reshape(5, 2)), "begins with 00 00 08 02, expected 00 00 08 01"),
        (idx_bytes(LABELS)[:-3], r"promises 10 bytes \(10\) but holds 7; copy it again"),
        (idx_bytes(LABELS) + b"x", r"promises 10 bytes \(10\) but holds 11"),
        (gzip.compress(idx_bytes(LABELS))[:-6], "damaged gzip file"),
    ],
    ids=["empty", "a web page", "floats", "images", "too short", "too long", "cut off gzip"],
)
def test_idx_file_errors_say_what_was_found(tmp_path, content, expected):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as error:
        _demo.read_idx(path, rank=1)
    assert str(path) in str(error.value)


def test_digits_are_split_the_same_way_every_time():
    first, second = _demo.load_digits(), _demo.load_digits()
    assert first.train_images.shape == (1437, 64) and first.test_images.shape == (360, 64)
    assert first.train_images.min() == 0 and first.train_images.max() == 1
    np.testing.assert_array_equal(first.test_labels, second.test_labels)
    assert np.bincount(first.test_labels).min() >= 25  # every class is tested
