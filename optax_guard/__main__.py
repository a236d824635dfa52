"""``python -m optax_guard history.jsonl``: what happened in a run, as a table and a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from optax_guard.runlog.history import History

_EPILOG = """\
exit status: 0 if all went well, 1 if the picture could not be made, 2 if the file is missing,
empty or no history
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m optax_guard",
        description="Summarises and draws a run that og.History has recorded.",
        epilog=_EPILOG,
    )
    parser.add_argument("history", type=Path, help="file that og.History(path) has written")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="default: beside the history, ending in .png"
    )
    output.add_argument("--no-plot", action="store_true", help="print the summary only")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the summary, writes the picture and returns the exit status."""
    args = parse(argv)
    try:
        history = History.load(args.history)
    except (OSError, ValueError) as error:
        return _complain(error, 2)
    if not history.records:
        return _complain(f"{args.history} holds no record.", 2)
    print(history.summary())
    if history.is_torn:
        print("\nThe last line is incomplete (the run was killed in it) and was left out.")
    if args.no_plot:
        return 0
    try:
        picture = history.plot(args.plot or args.history.with_suffix(".png"))
    except (ImportError, OSError, ValueError) as error:
        return _complain(error, 1)
    print(f"\nPicture: {picture}")
    return 0


def _complain(error: object, status: int) -> int:
    print(f"python -m optax_guard: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
