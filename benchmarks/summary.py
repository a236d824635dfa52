"""All that the benchmarks have found, from the JSON files that they have written.

    python -m benchmarks.summary                     # one table of all rules, at once
    python -m benchmarks.summary --write             # README.md and those of benchmarks, examples
    python -m benchmarks.summary --folder DIR        # other files than those of benchmarks/results

A document holds what is generated between markers (`_documents.py`); `--write` fills them, and a
test fails where they differ from the files. `benchmarks/README.md` has a section for every kind of
file (`_sections.py`). A file of another kind is shown as a table under the header of its script,
`benchmarks/<"benchmark">.py`, if it has "cells": a flat list of {"rule": str, "case": str,
"value": float}, perhaps with "se", or "low" and "high", or "dead" of "seeds". Where several files
have the same rule and case, the newest counts: by version of this library, date and name.

The table without `--write` takes A, temporal order (the case "L=30, lr=0.1"; "solved", "seeds" and
the interval "low" to "high"), B, the clinic (worst difference, over the cases, to the best clipping
rule), C, faults ("optimizer, fault, first step"; the worst for SGD) and D, healthy runs (mean
paired difference, "se"). Rules go by the names of `benchmarks/_rules.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _documents, _rule_tables


def main(argv: Sequence[str] | None = None) -> list[dict[str, str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results"
    parser.add_argument("--folder", type=Path, default=default, metavar="DIR")
    parser.add_argument("--write", action="store_true", help="fill the blocks of the documents")
    arguments = parser.parse_args(argv)
    rows, missing = _rule_tables.overview(arguments.folder)
    if arguments.write:
        for path in map(_documents.ROOT.joinpath, _documents.DOCUMENTS):
            text = _documents.write(path.read_text(encoding="utf-8"), arguments.folder)
            path.write_text(text, encoding="utf-8")
            print(f"Written: {path.relative_to(_documents.ROOT)}")
    elif rows:
        print(_rule_tables.to_markdown(rows))
    for line in missing:
        print(line)
    return rows


if __name__ == "__main__":
    main()
