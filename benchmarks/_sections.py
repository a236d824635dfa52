"""The sections of ``benchmarks/README.md``: one for each kind of file that there is."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import (
    _records,
    _report,
    _rule_tables,
    alpha,
    call_overhead,
    collectives,
    end_to_end,
    history_cost,
    sharded,
    step_cost,
)
from benchmarks import accelerators as own
from benchmarks._records import Record, Row

TESTS = Path(__file__).parents[1] / "tests"


class Section(NamedTuple):
    """One kind of file, and how it is shown.

    Attributes:
      title: of the section.
      prefix: the files are ``prefix.json`` and ``prefix_*.json``.
      command: writes one.
      words: what the figures are.
      table: from the rows to Markdown.
      names: what tells rows apart; of two that agree the newer file's counts.
      part: the key of the rows in the file.
      tidy: makes rows of several files alike.
    """

    title: str
    prefix: str
    command: str
    words: str
    table: Callable[[Sequence[Row]], str]
    names: tuple[str, ...] = ("rule", "case")
    part: str = "cells"
    tidy: Callable[[Row], Row] = dict


def matrix(rows: Sequence[Row]) -> str:
    """Cells passed of those tried: a line a context, a column a protection, the sum last."""
    protections = list(dict.fromkeys(row["protection"] for row in rows))
    contexts = [*dict.fromkeys(row["context"] for row in rows), None]

    def write(context: str | None, protection: str) -> str:
        own = [
            row
            for row in rows
            if row["protection"] == protection and context in (None, row["context"])
        ]
        passed, tried = (sum(row[name] for row in own) for name in ("passed", "tried"))
        return f"{passed:,} of {tried:,}"

    columns: dict[str, Callable[[Row], str]] = {
        "context": lambda line: line["context"] or "**all**"
    }
    for protection in protections:
        columns[protection] = lambda line, name=protection: write(line["context"], name)
    return _report.markdown_table([{"context": context} for context in contexts], columns)


def whole_steps(rows: Sequence[Row]) -> str:
    """One table for steps called one by one, and one for steps inside a ``lax.scan``."""
    parts = []
    for number in dict.fromkeys(row["steps_per_call"] for row in rows):
        own = [row for row in rows if row["steps_per_call"] == number]
        title = "One step a call" if number == 1 else f"{number} steps a call, in a `lax.scan`"
        parts += [f"### {title}", end_to_end.to_markdown(own)]
    return "\n\n".join(parts)


def with_steps(row: Row) -> Row:
    return {**row, "steps_per_call": row["arguments"].get("steps_per_call", 1)}


TASKS = {  # letters of those that `others` shows
    "language_model": "E, F",
    "lasting_rise": "G",
    "fine_tuning": "H",
    "equivalences": "I, J",
    "odd_models": "K",
}
COST = ("variant", "optimizer")
SECTIONS = (
    Section(
        "A. Temporal order: a recurrent network that explodes",
        "rnn_temporal_order",
        "python examples/rnn_temporal_order.py --methods all",
        "Seeds that solve the task of Pascanu, Mikolov and Bengio (2013), by length L of the "
        "sequence and learning rate; plain SGD. Rounding alone moves a chaotic run from one side "
        "to the other, so that one or two seeds more or less mean nothing.",
        _rule_tables.solved,
        tidy=_rule_tables.by_name,
    ),
    Section(
        "B. The clinic: deep and badly initialised networks",
        "clinic",
        "python examples/clinic.py",
        "Test accuracy in per cent after a short training on digits, median over the seeds; dead: "
        "most seeds ended in NaN. The rules act on plain SGD, unless they are named Adam or "
        "RMSprop.",
        _rule_tables.accuracies,
        tidy=_rule_tables.by_name,
    ),
    Section(
        "C. Faults from some step on",
        "faults",
        "python -m benchmarks.faults",
        "Test accuracy in per cent on digits, median over the seeds, when every 20th batch goes "
        "wrong, for a first fault at step 0 / 20 / 60. All rules are guarded; peers from Optax "
        "are as they come. `spike_skip` is `og.guard(optimizer, skip_if=og.spike())` without a "
        "clip. One point is about four test images.",
        _rule_tables.by_fault,
        tidy=_rule_tables.by_name,
    ),
    Section(
        "D. Healthy training",
        "healthy",
        "python -m benchmarks.healthy --data mnist=DIR fashion=DIR",
        "What a rule costs a run that needs none: paired difference of test accuracy to plain SGD, "
        "in points, mean and standard error over the seeds.",
        _rule_tables.pivot,
        tidy=_rule_tables.by_name,
    ),
    Section(
        "How long should a normalised step be?",
        "alpha",
        "python -m benchmarks.alpha",
        'Test accuracy on digits, median (worst), for fixed lengths and `alpha="auto"`.',
        alpha.to_markdown,
        ("rule",),
        "rows",
    ),
    Section(
        "Skipping leaves no trace",
        "fault_matrix",
        "python tests/fault_matrix.py --peer --json FILE",
        "Every optimizer of `optax` and `optax.contrib`, alone and in contexts, under NaN, Inf "
        "and -Inf in one element, one array or all, at step 0, once, 5, 20 or 1000 times in a "
        "row. A cell passes if the run ends, bit for bit, where the same compiled function ends "
        "that saw only the healthy steps. Both protections have the same patience of 100.",
        matrix,
        ("protection", "context"),
        "rows",
    ),
    Section(
        "What a step costs",
        "step_cost",
        "python -m benchmarks.step_cost --peer",
        "`update` and `apply_updates`, jitted, with donated parameters and state: time relative "
        "to the bare optimizer in the same round (median and quartiles), bytes of a healthy step "
        "in units of the gradients', XLA's own count (dearest branches included), and the "
        "compiler's time.",
        step_cost.to_markdown,
        ("tree", *COST),
        "rows",
    ),
    Section(
        "What a call costs on a tiny network, and beside frozen weights",
        "call_overhead",
        "python -m benchmarks.call_overhead",
        "Where the kernels are short, every array of the state costs some microseconds a call.",
        call_overhead.to_markdown,
        ("setup", "variant"),
        "rows",
    ),
    Section(
        "What a whole training step costs",
        "end_to_end",
        "python -m benchmarks.end_to_end",
        "Forward and backward pass included. Ratios below 1 are noise.",
        whole_steps,
        ("model", *COST, "steps_per_call"),
        "rows",
        with_steps,
    ),
    Section(
        "What recording costs",
        "history_cost",
        "python -m benchmarks.history_cost",
        "A training loop with `og.History`, beside the same loop without.",
        history_cost.to_markdown,
        ("variant",),
        "rows",
    ),
    Section(
        "Communication",
        "collectives",
        "python -m benchmarks.collectives",
        "Collectives of a healthy step, read off programs that were compiled for shapes on "
        "virtual CPU devices. XLA on CPU cuts an all-reduce at 256 arrays and by mesh axes.",
        collectives.to_markdown,
        ("layout", *COST),
        "rows",
    ),
    Section(
        "Communication, by the compilers of accelerators",
        "sharded",
        "python -m benchmarks.sharded --platform v5p",
        "Compiled ahead of time for chips that need not be there; nothing is run.",
        sharded.to_markdown,
        ("case", "platform", "variant"),
        "rows",
    ),
)


def show(section: Section, folder: Path) -> str:
    """Its Markdown, or nothing if there is no file."""
    found = _records.records(folder, section.prefix)
    if not found:
        return ""
    tables = []
    for platform in dict.fromkeys(record.platform for record in found):
        own = [record for record in found if record.platform == platform]
        rows = _records.rows(own, section.names, part=section.part, tidy=section.tidy)
        tables += [f"On {platform}:"] if len({record.platform for record in found}) > 1 else []
        tables += [section.table(rows)]
    source = f"`{section.command}`. {_records.origin(found)}"
    return "\n\n".join((f"## {section.title}", section.words, *tables, source))


def others(folder: Path) -> list[str]:
    """Sections of cells that nothing above knows, a table for each benchmark."""
    known = [section.prefix for section in SECTIONS] + ["accelerators"]
    by_benchmark: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.json")):
        if not any(_records.is_of_kind(path, prefix) for prefix in known):
            record = _records.load(path)
            by_benchmark.setdefault(record.data.get("benchmark", path.stem), []).append(record)
    shown = [_other(name, found) for name, found in by_benchmark.items()]
    return sorted(shown)


def _other(name: str, found: list[Record]) -> str:
    found.sort(key=lambda record: record.age)
    cells = _records.rows(found, ("rule", "case"), part="cells", tidy=_rule_tables.by_name)
    num_rules, num_cases = (len({cell[key] for cell in cells}) for key in ("rule", "case"))
    table = _rule_tables.pivot(cells, down="rule" if num_cases <= num_rules else "case")
    script = Path(__file__).with_name(f"{name}.py")
    header = ast.get_docstring(ast.parse(script.read_text("utf-8"))) if script.is_file() else name
    title, *paragraphs = (header or name).split("\n\n")
    words = [text for text in paragraphs if not text.startswith("    ")]
    letters = f"{TASKS[name]}. " if name in TASKS else ""
    source = f"`python -m benchmarks.{name}`. {_records.origin(found)}"
    return "\n\n".join((f"## {letters}{' '.join(title.split())}", *words, table, source))


def accelerators(folder: Path) -> str:
    """What the compilers of accelerators say; its own module makes the table."""
    table = own.accelerators_table(folder)
    return f"## Accelerators\n\n{table}" if table else ""


def overview(folder: Path) -> str:
    """All rules at a glance."""
    rows, _ = _rule_tables.overview(folder)
    if not rows:
        return ""
    words = (
        "A: seeds that solve the temporal order task, with the 95 % interval of their rate. B: the "
        "case of the clinic in which the rule is furthest behind the best clip. C: the worst of "
        "four faults, for SGD. D: what the rule costs a healthy network, in points."
    )
    return f"## All rules at a glance\n\n{words}\n\n{_rule_tables.to_markdown(rows)}"


def setups(folder: Path) -> str:
    """What the tests of setups and clients promise, in the words of their names."""
    parts = ["## Setups", "What people have, each shown by tests that anyone can run:"]
    for path in sorted([*TESTS.glob("test_setups*.py"), *TESTS.glob("test_clients*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        lines = [f"- {name.removeprefix('test_').replace('_', ' ')}" for name in names]
        parts += [f"`tests/{path.name}`:", "\n".join(lines)]
    return "\n\n".join(parts)


def evidence(folder: Path) -> str:
    """All sections that there are files for."""
    known = [show(section, folder) for section in SECTIONS]
    parts = [overview(folder), *known[:4], *others(folder), *known[4:]]
    parts += [accelerators(folder), setups(folder)]
    return "\n\n".join(part for part in parts if part)
