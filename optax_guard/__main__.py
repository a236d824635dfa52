"""``python -m optax_guard history.jsonl``: what happened in a run, as a table and a picture."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from optax_guard.runlog.history import History
from optax_guard.runlog.watch import watch

_EPILOG = """\
exit status: 0 if all went well, 1 if the picture, the report or the live view could not be made,
2 if the file is missing, empty or no history
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
    output.add_argument(
        "--html", type=Path, metavar="FILE", help="all of it as one page, the picture inside"
    )
    output.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        nargs="?",
        const=2.0,
        help="show a run that is going on, anew every few seconds (default 2), until Ctrl-C",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the summary, writes the picture and returns the exit status."""
    args = parse(argv)
    if args.watch is not None:
        return _watch(args.history, args.watch)
    try:
        history = History.load(args.history)
    except (OSError, ValueError) as error:
        return _complain(error, 2)
    if not history.records:
        return _complain(f"{args.history} holds no record.", 2)
    _say(history.summary())
    if history.is_torn:
        _say("\nThe last line is incomplete (the run was killed in it) and was left out.")
    if args.no_plot:
        return 0
    try:
        if args.html is not None:
            _say(f"\nReport: {history.report(args.html, title=args.history.name)}")
        else:
            picture = history.plot(args.plot or args.history.with_suffix(".png"))
            _say(f"\nPicture: {picture}")
    except (ImportError, OSError, ValueError) as error:
        return _complain(error, 1)
    return 0


def _watch(path: Path, seconds: float) -> int:
    if not path.parent.is_dir():
        return _complain(f"{path.parent} is no folder.", 2)
    try:
        watch(path, seconds=max(seconds, 0.1))
    except KeyboardInterrupt:
        return 0
    except (ImportError, OSError) as error:
        return _complain(error, 1)
    except ValueError as error:
        return _complain(error, 2)
    return 0


def _say(text: str) -> None:
    """Prints at once; a reader that has gone away, such as ``head``, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: object, status: int) -> int:
    print(f"python -m optax_guard: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
