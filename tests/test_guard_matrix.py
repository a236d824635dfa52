"""Skip equivalence for every optimizer of Optax; the cells are those of ``fault_matrix.py``."""

from __future__ import annotations

import itertools
import json

import fault_matrix
import optax
import pytest
from fault_matrix import GUARD, NOTHING, PEER
from optimizers import ARGUMENTS, CONTEXTS, EXTRA_ARGS, FEW, UNSUPPORTED, discover

OPTIMIZERS = discover()


def is_slow(context: str) -> bool:
    return context != "plain"


def combinations() -> list[object]:
    """Every optimizer alone and in every twelfth context; the script tries all."""
    pairs = fault_matrix.combinations(is_quick=False)
    optimizers, contexts = list(OPTIMIZERS), list(CONTEXTS)
    return [
        pytest.param(
            optimizer,
            context,
            id=f"{optimizer.name}-{context.name}",
            marks=[pytest.mark.slow] * is_slow(context.name),
        )
        for optimizer, context in pairs
        if not is_slow(context.name)
        or (optimizers.index(optimizer.name) + contexts.index(context.name)) % 12 == 0
    ]


@pytest.mark.parametrize(("optimizer", "context"), combinations())
def test_run_with_faults_ends_where_the_healthy_run_ends(optimizer, context):
    cells = fault_matrix.try_cells(GUARD, optimizer, context)
    assert len(cells) >= 54
    failed = [(cell.fault, cell.problem) for cell in cells if cell.problem]
    assert failed == []


def test_optimizers_are_found_by_themselves():
    known = {"adam", "adafactor", "lbfgs", "muon", "momo", "sgd", "prodigy", "dpsgd", "dog"}
    assert known <= set(OPTIMIZERS)
    assert len(OPTIMIZERS) >= 45
    assert set(ARGUMENTS) | set(EXTRA_ARGS) | set(FEW) <= set(OPTIMIZERS)


@pytest.mark.parametrize(("name", "context"), UNSUPPORTED)
def test_what_is_left_out_fails_in_optax_alone(name, context):
    run = fault_matrix.Run(NOTHING, OPTIMIZERS[name], CONTEXTS[context])
    with pytest.raises((TypeError, ValueError)):
        run(None)


def test_every_cell_fails_without_protection():
    # Else the matrix would prove nothing.
    for name in ("adamw", "momo"):
        cells = fault_matrix.try_cells(NOTHING, OPTIMIZERS[name], CONTEXTS["plain"])
        assert all(cell.problem == "not where the healthy run ends" for cell in cells)


def test_a_protection_that_accepts_bad_steps_fails_those_cells():
    cells = fault_matrix.try_cells(PEER, OPTIMIZERS["adamw"], CONTEXTS["plain"])
    # After 100 bad steps in a row it accepts the next one.
    for cell in cells:
        assert bool(cell.problem) == (cell.fault.schedule == "1000 in a row")


def test_table_counts_cells_and_names_what_raises():
    pairs = itertools.product(("sgd",), ("plain", "lookahead"))
    cells = [
        cell
        for name, context in pairs
        for cell in fault_matrix.try_cells(PEER, OPTIMIZERS[name], CONTEXTS[context])
    ]
    text = fault_matrix.table("Title", cells)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "Title"
    assert "plain 54 45 9 fail" in lines
    assert "lookahead 54 0 54 fail" in lines
    assert "all 108 45 63 fail" in lines
    assert lines[-1] == "raises without any fault: sgd in lookahead"


def test_counts_are_kept_by_protection_and_context(tmp_path, monkeypatch):
    pairs = [(OPTIMIZERS["sgd"], CONTEXTS["plain"]), (OPTIMIZERS["sgd"], CONTEXTS["lookahead"])]
    monkeypatch.setattr(fault_matrix, "combinations", lambda *, is_quick: pairs)
    path = tmp_path / "fault_matrix_cpu.json"
    assert fault_matrix.main(["--peer", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    kept = [
        (row["protection"], row["context"], row["optimizers"], row["tried"], row["passed"])
        for row in record["rows"]
    ]
    assert kept == [
        ("optax_guard.guard", "plain", 1, 54, 54),
        ("optax_guard.guard", "lookahead", 1, 54, 54),
        ("optax.apply_if_finite", "plain", 1, 54, 45),
        ("optax.apply_if_finite", "lookahead", 1, 54, 0),
    ]
    assert record["versions"]["optax"] == optax.__version__


def test_discovery_takes_what_makes_a_transformation_of_a_learning_rate(monkeypatch):
    def brand_new(learning_rate: float):
        return optax.sgd(learning_rate)

    def schedule(learning_rate: float):
        return lambda step: learning_rate

    monkeypatch.setattr(optax, "brand_new", brand_new, raising=False)
    monkeypatch.setattr(optax, "other", schedule, raising=False)
    assert set(discover()) - set(OPTIMIZERS) == {"brand_new"}
