"""What is written into the documents of the repository: blocks between markers, by name.

<!-- begin evidence -->
...
<!-- end evidence -->
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from benchmarks import _records, _rule_tables, _sections
from benchmarks._records import Row

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "benchmarks/README.md", "examples/README.md")
FIRST = ("loops", "mlp_digits")  # of the examples; then by name
BLOCK = re.compile(r"<!-- begin ([\w ]+) -->\n(.*?)<!-- end \1 -->", re.S)


def write(text: str, folder: Path) -> str:
    """The document with every block as the files in ``folder`` have it."""
    for marker in ("begin", "end"):
        if text.count(f"<!-- {marker} ") != len(BLOCK.findall(text)):
            raise ValueError(f"Each '<!-- begin NAME -->' needs its '<!-- end NAME -->': {marker}.")

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in BLOCKS:
            raise ValueError(f"No block is called {name!r}; there are {', '.join(BLOCKS)}.")
        body = BLOCKS[name](folder)
        return f"<!-- begin {name} -->\n" + (body and f"{body}\n") + f"<!-- end {name} -->"

    return BLOCK.sub(fill, text)


# Sentences of the README


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False))


def demonstration(folder: Path) -> str:
    """How the runs of the picture end: C has the same task, faults and seeds."""
    cells = [cell for cell in _rule_tables.read(folder, "faults") if cell["case"].startswith("sgd")]
    healthy = [cell for cell in cells if (cell["rule"], cell["case"]) == ("none", "sgd, no fault")]
    if not healthy:
        return ""

    def worst(rule: str) -> str:
        own = [cell for cell in cells if cell["rule"] == rule and cell["case"].endswith("first 20")]
        return _rule_tables.accuracy(min(own, key=_rule_tables.number))

    return _wrap(
        "Test accuracy in per cent at the end, in the worst of the four cases (without bad batches "
        f"{_rule_tables.accuracy(healthy[0])}): no protection {worst('none')}, "
        f"`optax.apply_if_finite` {worst('optax.apply_if_finite')}, `optax.zero_nans` and "
        f"`clip_by_global_norm(1)` {worst('optax.zero_nans+clip')}, **`og.stabilize` "
        f"{worst('og.stabilize')}**, `og.guard(..., skip_if=og.spike())` without a clip "
        f"{worst('spike_skip')}."
    )


def _variants(
    folder: Path, prefix: str, kind: str, value: str, platform: str = "cpu"
) -> dict[str, Row]:
    """Rows on a platform of one tree or setup, by variant."""
    found = [each for each in _records.records(folder, prefix) if each.platform == platform]
    rows = _records.rows(found, (kind, "variant"))
    return {row["variant"]: row for row in rows if row[kind] == value}


def cost(folder: Path) -> str:
    """What a step and a call cost, in short."""
    sentences = []
    if steps := _variants(folder, "step_cost", "tree", "transformer"):
        names = ("og.guard", "og.stabilize", "clip_by_global_norm", "apply_if_finite(clip)")
        ratios = [f"{steps[name]['ratio']:.2f}" for name in names]
        seconds = [f"{steps[name]['compile_seconds']:.1f}" for name in ("bare", *names)]
        sentences.append(
            f"AdamW on a transformer's {steps['bare']['params_bytes'] / 4e6:.0f} million "
            f"parameters, XLA on two CPU cores: `update` and `apply_updates` take {ratios[0]} "
            f"times as long with `og.guard`, {ratios[1]} with `og.stabilize`, {ratios[2]} with "
            f"`optax.clip_by_global_norm` and {ratios[3]} with `optax.apply_if_finite` around "
            f"that. Compiling takes {seconds[0]} s without, and {', '.join(seconds[1:4])} and "
            f"{seconds[4]} s with these."
        )
        if steps := _variants(folder, "step_cost", "tree", "transformer", "gpu"):
            ratios = [f"{steps[name]['ratio']:.2f}" for name in names]
            sentences.append(
                f"On an H100 steps take {', '.join(ratios[:3])} and {ratios[3]} times."
            )
    tiny, found = "call, 64-64-10", []
    for where, setup, platform in (
        ("on two cores", tiny, "cpu"),
        ("on one", f"{tiny}, one core", "cpu"),
        ("on an H100", tiny, "gpu"),
    ):
        if calls := _variants(folder, "call_overhead", "setup", setup, platform):
            over = [calls[name]["over_guarded_clip"] for name in ("og.guard", "og.stabilize")]
            found.append(f"{where} {over[0]:.1f} and {over[1]:.1f}")
    if found:
        sentences.append(
            "On a tiny network, such as 64-64-10, the call itself is what takes time: "
            f"with them, {', '.join(found)} times that with Optax's guarded clip."
        )
    return _wrap(" ".join(sentences))


# The gallery


def gallery(folder: Path) -> str:
    """Every example: its header, word for word, and its pictures."""
    del folder  # what the scripts expect stands in their headers
    paths = [path for path in (ROOT / "examples").glob("*.py") if not path.stem.startswith("_")]
    paths.sort(key=lambda path: (path.stem not in FIRST, path.stem))
    parts = []
    for path in paths:
        header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        title, _, body = header.partition("\n\n")
        parts += [f"## {path.name}", f"**{' '.join(title.split())}**", body]
        figures = sorted((path.parent / "figures").glob(f"{path.stem}*.png"))
        parts += [f"![{path.stem}](figures/{figure.name})" for figure in figures]
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "demonstration": demonstration,
    "cost": cost,
    "evidence": _sections.evidence,
    "gallery": gallery,
}
