"""Runs of several rules on several cases: seeded, saved one by one, taken up where they were left.

A trial is a case, a rule and a function that returns a number for each seed. Its cell is written
to the JSON file as soon as it is known; a second run with the same arguments does what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

import optax_guard as og
from benchmarks import _harness, _report
from benchmarks._rules import PEERS, RULES, Rule, before

FIRST_SEED = 1000  # the defaults were designed on seeds below


def guarded(rule: Rule) -> Rule:
    return lambda optimizer: og.guard(rule(optimizer))


RIVALS: dict[str, Rule] = {
    "none": PEERS["none"],
    "og.stabilize": RULES["og.stabilize"],
    "optax.clip_by_global_norm": before(optax.clip_by_global_norm(1.0)),
    "optax.zero_nans+clip": PEERS["optax.zero_nans+clip"],
    "clip_by_zscore": guarded(RULES["clip_by_zscore"]),
    "clip_by_ema": guarded(RULES["clip_by_ema"]),
    "clip_by_param_norm": guarded(RULES["clip_by_param_norm"]),
    "spike_skip": partial(og.guard, skip_if=og.spike()),
}
WITH_SPIKE: dict[str, Rule] = {"stabilize_spike": partial(og.stabilize, skip_if=og.spike())}
QUICK = ("none", "og.stabilize")


class Trial(NamedTuple):
    """One cell: ``run()`` returns an array ``[seeds]``."""

    case: str
    rule: str
    run: Callable[[], Any]


def make_cell(trial: Trial, values: np.ndarray) -> dict[str, Any]:
    """Mean and extremes of the seeds whose value is finite; None for ``value`` if none is."""
    finite = values[np.isfinite(values)]
    return {
        "rule": trial.rule,
        "case": trial.case,
        "value": float(finite.mean()) if finite.size else None,
        "low": float(finite.min()) if finite.size else None,
        "high": float(finite.max()) if finite.size else None,
        "dead": int(values.size - finite.size),
        "seeds": int(values.size),
    }


def run_trials(
    name: str, arguments: argparse.Namespace, trials: Sequence[Trial]
) -> list[dict[str, Any]]:
    """The cells of all trials, those taken from the file that it has for the same arguments."""
    known = {} if arguments.fresh else _known(arguments)
    cells: list[dict[str, Any]] = []
    with _harness.progress(name, len(trials)) as advance:
        for trial in trials:
            key = trial.case, trial.rule
            if key not in known:
                known[key] = make_cell(trial, np.asarray(trial.run(), np.float64))
                _harness.save_json(
                    arguments.json, name, arguments, list(known.values()), key="cells"
                )
            cells.append(known[key])
            advance(f"{trial.rule}, {trial.case}")
    return cells


SELECTION = (
    "rules",
    "cases",
    "rates",
    "optimizers",
    "fresh",
    "json",
    "plot",
)  # say which cells, not how they are made


def _known(arguments: argparse.Namespace) -> dict[tuple[str, str], dict[str, Any]]:
    if not arguments.json.exists():
        return {}
    record = json.loads(arguments.json.read_text())
    mine, theirs = vars(arguments), record["arguments"]
    if any(mine[name] != theirs.get(name) for name in mine if name not in SELECTION):
        return {}
    return {(cell["case"], cell["rule"]): cell for cell in record["cells"]}


def parser(name: str, description: str | None, cases: Sequence[str], *, seeds: int) -> Any:
    """What the scripts have in common; see :func:`parse`."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--quick", action="store_true", help="few steps, two seeds, two rules: seconds")
    add("--seeds", type=int, help=f"default {seeds}")
    add("--first-seed", type=int, default=FIRST_SEED, help=f"default {FIRST_SEED}")
    add("--rules", nargs="+", metavar="RULE", help="default: all")
    add("--cases", nargs="+", choices=list(cases), metavar="CASE", help="default: all")
    add("--fresh", action="store_true", help="forget what the file has")
    _harness.add_output_arguments(made, name, plot=False)
    made.set_defaults(default_seeds=seeds)
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    arguments = made.parse_args(argv)
    arguments.seeds = arguments.seeds or (2 if arguments.quick else arguments.default_seeds)
    del arguments.default_seeds
    return arguments


def seeds_of(arguments: argparse.Namespace) -> np.ndarray:
    return np.arange(arguments.first_seed, arguments.first_seed + arguments.seeds)


def to_markdown(cells: Sequence[dict[str, Any]], digits: int = 3) -> str:
    """A row for each case, a column for each rule; the number of dead seeds behind a +."""
    rules = dict.fromkeys(cell["rule"] for cell in cells)
    found = {(cell["case"], cell["rule"]): cell for cell in cells}

    def write(row, rule):
        cell = found.get((row["case"], rule))
        if cell is None:
            return ""
        if cell["value"] is None:
            return "dead"
        return f"{cell['value']:.{digits}g}" + (f" + {cell['dead']} dead" if cell["dead"] else "")

    columns = {"case": lambda row: row["case"]}
    columns |= {rule: partial(write, rule=rule) for rule in rules}
    rows = [{"case": case} for case in dict.fromkeys(cell["case"] for cell in cells)]
    return _report.markdown_table(rows, columns)


def results_path(name: str) -> Path:
    return Path(__file__).parent / "results" / f"{name}_cpu.json"
