"""A run as one HTML file that holds all it shows: words, tables and the picture."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from optax_guard.runlog.about import About
from optax_guard.runlog.events import find_events
from optax_guard.runlog.fetch import Record
from optax_guard.runlog.summary import LAYER_COLUMNS, SCALAR_COLUMNS, layer_rows, scalar_rows
from optax_guard.runlog.words import say_events

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }}
pre {{ background: #f5f5f5; padding: 0.8em 1em; white-space: pre-wrap; }}
table {{ border-collapse: collapse; margin: 1.2em 0; }}
th, td {{ text-align: right; padding: 0.15em 0.8em; border-bottom: 1px solid #e4e4e4; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{span}</p>
<pre>{words}</pre>
<img alt="Loss, gradient norm and what happened to it, and a map of the layers, over the steps"
 src="data:image/png;base64,{picture}">
{tables}
</body>
</html>
"""


def write_report(records: Sequence[Record], about: About, path: Path, *, title: str) -> Path:
    """Writes the file and returns its path; it needs no other file and no network.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if nothing was recorded.
    """
    from optax_guard.runlog.plot import draw_png

    picture = io.BytesIO()
    draw_png(records, about, picture)
    events = find_events(records, about)
    layers, more = layer_rows(events, about)
    tables = [_table(SCALAR_COLUMNS, scalar_rows(events)), _table(LAYER_COLUMNS, layers)]
    if more:
        tables.append(f"<p>... and {more} more layers, with smaller norms</p>")
    page = _PAGE.format(
        title=html.escape(title),
        span=f"{len(records)} records, steps {events.steps[0]} to {events.steps[-1]}",
        words=html.escape("\n".join(say_events(events, about)) or "nothing happened"),
        picture=base64.b64encode(picture.getvalue()).decode(),
        tables="\n".join(tables),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"
