"""One table of what the benchmarks say about each rule, from the JSON files that they have written.

    python -m benchmarks.summary                     # at once
    python -m benchmarks.summary --folder DIR        # other files than those of benchmarks/results

It reads, from `benchmarks/results`, every file whose name begins as in `SOURCES`, and says which
kind is missing:

    A  temporal order   python examples/rnn_temporal_order.py --methods all --json FILE
    B  clinic           python examples/clinic.py --json FILE
    C  faults           python -m benchmarks.faults --json FILE
    D  healthy          python -m benchmarks.healthy --data mnist=DIR fashion=DIR --json FILE

Each holds, under "cells", a flat list of {"rule": str, "case": str, "value": float, ...}:

    A  value: seeds that succeed, per cent; also "solved", "seeds", "low", "high". The case
       "L=30, lr=0.1" is shown.
    B  value: median accuracy, per cent, of the network and initialisation that the case names;
       "nonfinite_seeds" of "seeds" ended in NaN. Shown is the worst difference, over the cases,
       to the best clipping rule (`CLIPS`) in the same case, and that case.
    C  value: median accuracy, per cent; also "dead", "seeds". The case is
       "optimizer, fault, first step". Shown is the worst fault for SGD, for each step of the first.
    D  value: mean paired difference of accuracy to no rule, in points; also "se". Shown for each
       case.

Rules go by the names of `benchmarks/_rules.py`; `ALIASES` has what others call them. Prints
Markdown; a dash is what was not measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _report

Cell = dict[str, Any]
SOURCES = {"A": "rnn_temporal_order", "B": "clinic", "C": "faults", "D": "healthy"}
TEMPORAL_ORDER = "L=30, lr=0.1"
ORDER = ("none", "lr/10", "adam", "optax.", "og.", "clip_by_", "normalize_")  # rivals come first
CLIPS = ("clip_by_", "clip by value")
ALIASES = {
    "Adam": "adam",
    "clip_by_norm 1": "clip_by_norm",
    "clip_by_zscore, cap 1": "clip_by_zscore_capped",
    "normalize 1": "normalize_and_scale",
    "normalize auto": "normalize_and_scale_auto",
    "normalize_and_scale_1": "normalize_and_scale",
    "clip_by_norm(1)": "clip_by_norm",
    "clip_by_zscore(max_norm=1)": "clip_by_zscore_capped",
    "optax.apply_if_finite(5)": "optax.apply_if_finite",
}


def read(folder: Path, prefix: str) -> list[Cell]:
    """All cells of the files that begin with ``prefix``; of two for the same, the later file's."""
    cells: dict[tuple[str, str], Cell] = {}
    for path in sorted(folder.glob(f"{prefix}*.json")):
        record = json.loads(path.read_text())
        if "cells" not in record:
            raise ValueError(
                f"{path} has no list under 'cells'; write it anew with the command in the header "
                "of benchmarks/summary.py."
            )
        for cell in record["cells"]:
            name = ALIASES.get(cell["rule"], cell["rule"])
            cells[name, cell["case"]] = {**cell, "rule": name}
    return list(cells.values())


def number(cell: Cell) -> float:
    """The value; a cell of which most seeds ended in NaN is worse than any other."""
    num_dead, value = cell.get("dead", cell.get("nonfinite_seeds", 0)), cell["value"]
    is_dead = value is None or math.isnan(value) or 2 * num_dead > cell.get("seeds", 0) > 0
    return -math.inf if is_dead else value


def temporal_order(cells: Sequence[Cell]) -> dict[str, dict[str, str]]:
    """Seeds that succeed, and the interval of their rate."""
    return {
        cell["rule"]: {
            "A: solved": f"{cell['solved']}/{cell['seeds']} "
            f"({cell['low']:.0f}-{cell['high']:.0f} %)"
        }
        for cell in cells
        if cell["case"] == TEMPORAL_ORDER
    }


def clinic(cells: Sequence[Cell]) -> dict[str, dict[str, str]]:
    """The case in which a rule falls furthest behind the best clipping rule."""
    best: dict[str, float] = {}
    for cell in cells:
        if cell["rule"].startswith(CLIPS):
            best[cell["case"]] = max(best.get(cell["case"], -math.inf), number(cell))
    worst: dict[str, tuple[float, str]] = {}
    for cell in cells:
        if math.isfinite(best.get(cell["case"], -math.inf)):
            behind = number(cell) - best[cell["case"]]
            worst[cell["rule"]] = min(
                worst.get(cell["rule"], (math.inf, "")), (behind, cell["case"])
            )

    def write(behind: float, case: str) -> str:
        return f"dead ({case})" if math.isinf(behind) else f"{behind:+.1f} ({case})"

    return {rule: {"B: worst row": write(*pair)} for rule, pair in worst.items()}


def faults(cells: Sequence[Cell]) -> dict[str, dict[str, str]]:
    """The worst fault for each step of the first; "adam" is Adam without any rule."""
    worst: dict[str, dict[int, float]] = {}
    for cell in cells:
        optimizer, _, when = cell["case"].partition(", ")
        rule = cell["rule"]
        if optimizer == "adam" and rule == "none":
            rule, optimizer = "adam", "sgd"
        if optimizer != "sgd" or ", first " not in when:
            continue
        first = int(when.rpartition(" ")[2])
        of_rule = worst.setdefault(rule, {})
        of_rule[first] = min(of_rule.get(first, math.inf), number(cell))
    title = "C: worst fault, first at "
    firsts = sorted({first for of_rule in worst.values() for first in of_rule})
    title += " / ".join(map(str, firsts))

    def write(of_rule: dict[int, float]) -> str:
        values = (of_rule.get(first, math.nan) for first in firsts)
        return " / ".join(
            "dead" if value == -math.inf else "-" if math.isnan(value) else f"{value:.1f}"
            for value in values
        )

    return {rule: {title: write(of_rule)} for rule, of_rule in worst.items()}


def healthy(cells: Sequence[Cell]) -> dict[str, dict[str, str]]:
    """Mean difference and standard error, a column for each data set."""
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        text = f"{cell['value']:+.2f} ± {cell['se']:.2f}" if cell["rule"] != "none" else "0"
        rows.setdefault(cell["rule"], {})[f"D: {cell['case']}"] = text
    return rows


READERS: dict[str, Callable[[Sequence[Cell]], dict[str, dict[str, str]]]] = {
    "A": temporal_order,
    "B": clinic,
    "C": faults,
    "D": healthy,
}


def place(rule: str) -> tuple[int, str]:
    """Where a rule stands in the table."""
    matches = (rank for rank, prefix in enumerate(ORDER) if rule.startswith(prefix))
    return next(matches, len(ORDER)), rule


def summarise(folder: Path) -> tuple[list[dict[str, str]], list[str]]:
    """Rows of the table, rivals first, and what could not be found."""
    table: dict[str, dict[str, str]] = {}
    missing = []
    for letter, prefix in SOURCES.items():
        cells = read(folder, prefix)
        if not cells:
            missing.append(f"{letter}: no file {prefix}*.json in {folder.name}/; left out.")
        for rule, columns in READERS[letter](cells).items():
            table.setdefault(rule, {"rule": rule}).update(columns)
    rows = sorted(table.values(), key=lambda row: place(row["rule"]))
    return rows, missing


def to_markdown(rows: Sequence[dict[str, str]]) -> str:
    titles = dict.fromkeys(title for row in rows for title in row)
    ordered = ["rule", *sorted(title for title in titles if title != "rule")]
    columns = {title: lambda row, title=title: row.get(title, "-") for title in ordered}
    return _report.markdown_table(rows, columns)


def main(argv: Sequence[str] | None = None) -> list[dict[str, str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results"
    parser.add_argument("--folder", type=Path, default=default, metavar="DIR")
    rows, missing = summarise(parser.parse_args(argv).folder)
    if rows:
        print(to_markdown(rows))
    for line in missing:
        print(line)
    return rows


if __name__ == "__main__":
    main()
