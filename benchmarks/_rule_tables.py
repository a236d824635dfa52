"""Tables of what the rules do for training, from files whose cells are (rule, case, value)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import _records, _report
from benchmarks._records import Row

Columns = dict[str, dict[str, str]]  # by rule, then by title

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
TEMPORAL_ORDER = "L=30, lr=0.1"


def read(folder: Path, prefix: str) -> list[Row]:
    """All cells of one kind; a rule goes by one name, and the newest file counts."""
    found = _records.records(folder, prefix)
    return _records.rows(found, ("rule", "case"), part="cells", tidy=by_name)


def by_name(cell: Row) -> Row:
    """The same cell, its rule under the name that all benchmarks share."""
    return {**cell, "rule": ALIASES.get(cell["rule"], cell["rule"])}


def is_dead(cell: Row) -> bool:
    """Most seeds ended in NaN."""
    num_dead, value = cell.get("dead", cell.get("nonfinite_seeds", 0)), cell["value"]
    return value is None or math.isnan(value) or 2 * num_dead > cell.get("seeds", 0) > 0


def number(cell: Row) -> float:
    """The value; that of a dead run is worse than any other."""
    return -math.inf if is_dead(cell) else cell["value"]


def write(cell: Row) -> str:
    """A value as it stands in a table, with its standard error or range, and what died."""
    if is_dead(cell):
        return "dead"
    if "se" in cell:
        return f"{cell['value']:+.2f} ± {cell['se']:.2f}"
    text = f"{cell['value']:.4g}"
    if cell.get("low") is not None and cell["low"] != cell["high"]:
        text += f" ({cell['low']:.4g} to {cell['high']:.4g})"
    return text + (f", {cell['dead']} dead" if cell.get("dead") else "")


def accuracy(cell: Row) -> str:
    """A value in per cent."""
    return "dead" if is_dead(cell) else f"{cell['value']:.1f}"


# One line a rule, over all benchmarks


def temporal_order(cells: Sequence[Row]) -> Columns:
    """Seeds that succeed, and the interval of their rate."""
    return {
        cell["rule"]: {
            "A: solved": f"{cell['solved']}/{cell['seeds']} "
            f"({cell['low']:.0f}-{cell['high']:.0f} %)"
        }
        for cell in cells
        if cell["case"] == TEMPORAL_ORDER
    }


def clinic(cells: Sequence[Row]) -> Columns:
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

    def describe(behind: float, case: str) -> str:
        return f"dead ({case})" if math.isinf(behind) else f"{behind:+.1f} ({case})"

    return {rule: {"B: worst row": describe(*pair)} for rule, pair in worst.items()}


def faults(cells: Sequence[Row]) -> Columns:
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
    firsts = sorted({first for of_rule in worst.values() for first in of_rule})
    title = "C: worst fault, first at " + " / ".join(map(str, firsts))
    return {
        rule: {title: " / ".join(_of_first(of_rule.get(first)) for first in firsts)}
        for rule, of_rule in worst.items()
    }


def _of_first(value: float | None) -> str:
    return "-" if value is None else "dead" if value == -math.inf else f"{value:.1f}"


def healthy(cells: Sequence[Row]) -> Columns:
    """Mean difference and standard error, a column for each data set."""
    rows: Columns = {}
    for cell in cells:
        text = write(cell) if cell["rule"] != "none" else "0"
        rows.setdefault(cell["rule"], {})[f"D: {cell['case']}"] = text
    return rows


OVERVIEW: dict[str, tuple[str, Callable[[Sequence[Row]], Columns]]] = {
    "A": ("rnn_temporal_order", temporal_order),
    "B": ("clinic", clinic),
    "C": ("faults", faults),
    "D": ("healthy", healthy),
}


def place(rule: str) -> tuple[int, str]:
    """Where a rule stands in a table."""
    matches = (rank for rank, prefix in enumerate(ORDER) if rule.startswith(prefix))
    return next(matches, len(ORDER)), rule


def overview(folder: Path) -> tuple[list[dict[str, str]], list[str]]:
    """Rows of the table of all benchmarks, rivals first, and what could not be found."""
    table: Columns = {}
    missing = []
    for letter, (prefix, summarise) in OVERVIEW.items():
        cells = read(folder, prefix)
        if not cells:
            missing.append(f"{letter}: no file {prefix}*.json in {folder.name}/; left out.")
        for rule, columns in summarise(cells).items():
            table.setdefault(rule, {"rule": rule}).update(columns)
    return sorted(table.values(), key=lambda row: place(row["rule"])), missing


def to_markdown(rows: Sequence[dict[str, str]]) -> str:
    """The rows of :func:`overview`; a dash is what was not measured."""
    titles = dict.fromkeys(title for row in rows for title in row)
    ordered = ["rule", *sorted(title for title in titles if title != "rule")]
    return _report.markdown_table(
        rows, {title: lambda row, title=title: row.get(title, "-") for title in ordered}
    )


# All cells of one benchmark


def pivot(cells: Sequence[Row], write: Callable[[Row], str] = write, *, down: str = "rule") -> str:
    """One line a rule, rivals first, one column a case, or the other way; and the versions."""
    across = "case" if down == "rule" else "rule"
    lines: dict[str, dict[str, Row]] = {}
    for cell in cells:
        lines.setdefault(cell[down], {})[cell[across]] = cell
    titles = list(dict.fromkeys(cell[across] for cell in cells))
    if down == "rule":
        lines = dict(sorted(lines.items(), key=lambda pair: place(pair[0])))
    else:
        titles.sort(key=place)
    columns: dict[str, Callable[[Row], str]] = {down: lambda line: line[down]}
    for title in titles:
        columns[title] = lambda line, title=title: write(line[title]) if title in line else "-"
    columns["version"] = lambda line: line["version"]
    table = [
        {**line, down: name, "version": ", ".join(sorted({c["version"] for c in line.values()}))}
        for name, line in lines.items()
    ]
    return _report.markdown_table(table, columns)


def solved(cells: Sequence[Row]) -> str:
    """Seeds that succeed, by length and learning rate."""
    return pivot(cells, lambda cell: f"{cell['solved']}/{cell['seeds']}")


def accuracies(cells: Sequence[Row]) -> str:
    """Values in per cent."""
    return pivot(cells, accuracy)


def by_fault(cells: Sequence[Row]) -> str:
    """A table for each optimizer, a column a fault, and in it one value a step of the first."""
    parts = []
    for optimizer in dict.fromkeys(cell["case"].partition(", ")[0] for cell in cells):
        grouped: dict[tuple[str, str], Row] = {}
        for cell in cells:
            own, _, rest = cell["case"].partition(", ")
            fault, _, first = rest.partition(", first ")
            if own == optimizer:
                merged = grouped.setdefault(
                    (cell["rule"], fault), {**cell, "case": fault, "texts": {}}
                )
                merged["texts"][int(first or 0)] = accuracy(cell)
        merged_cells = list(grouped.values())
        text = pivot(
            merged_cells, lambda cell: " / ".join(dict(sorted(cell["texts"].items())).values())
        )
        parts += [f"### {optimizer}", text]
    return "\n\n".join(parts)
