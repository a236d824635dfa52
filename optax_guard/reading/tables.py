"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def plain_table(columns: Sequence[str], rows: Rows) -> str:
    """Columns padded with blanks; the first one to the left, the others to the right."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def short(number: float | int | None) -> str:
    """Three digits; a dash for what is not known."""
    return "-" if number is None else f"{number:.3g}"
