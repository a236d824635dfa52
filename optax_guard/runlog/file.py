"""Records as lines of JSON that survive a kill in the middle of a line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from optax_guard.runlog.about import About
from optax_guard.runlog.fetch import FAULT_LEAVES, LEAF_NORMS, STEP, Record

LEAF_NAMES = "leaf_names"
ABOUT = "about"
RESUMED = "resumed"

# RFC 8259 has no such numbers. These are the words of the JSON form of protocol buffers.
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


_FIRST_BYTES = f'{{"{STEP}": '.encode()


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
      records: in the order of the file, without those that a resumed run has repeated.
      about: what the names in the records mean, as far as the file tells.
      good_bytes: length of the file without a torn last line.
      is_torn: whether there is one.
      ends_line: whether what is good ends with a line break.
    """

    records: list[Record]
    about: About
    good_bytes: int
    is_torn: bool
    ends_line: bool


def encode(record: Record) -> str:
    """One line, in standard JSON: non-finite numbers become the strings "NaN", "Infinity"."""
    try:
        return json.dumps(record, allow_nan=False)
    except ValueError:
        return json.dumps({key: _spell(value) for key, value in record.items()}, allow_nan=False)


def _spell(value: Any) -> Any:
    if isinstance(value, list):
        return [_spell(element) for element in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _unspell(value: Any) -> Any:
    if isinstance(value, list):
        return [_unspell(element) for element in value]
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def decode(line: bytes) -> Record:
    """The record of a line.

    Raises:
      ValueError: if it is none.
    """
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError("a record is an object with a step")
    lists = {key: content.pop(key) for key in _KINDS if key in content}
    record = {key: _unspell(value) for key, value in content.items()}
    for key, value in record.items():
        if not isinstance(value, (bool, int, float)):
            raise ValueError(f"{key} is no number")
    if type(record.get(STEP)) is not int:
        raise ValueError("a record has a step, which is an integer")
    if LEAF_NORMS in lists:
        lists[LEAF_NORMS] = _unspell(lists[LEAF_NORMS])
    for key, elements in lists.items():
        container, kinds = _KINDS[key]
        if not isinstance(elements, container) or not all(isinstance(e, kinds) for e in elements):
            raise ValueError(f"{key} is no {container.__name__} of the right kind")
    return record | lists


_KINDS: dict[str, tuple[type, Any]] = {
    LEAF_NORMS: (list, (int, float, type(None))),
    FAULT_LEAVES: (list, int),
    LEAF_NAMES: (list, str),
    ABOUT: (dict, str),
}


def read(path: Path) -> Contents:
    """Reads a file of records; a torn last line is left out, a broken one elsewhere is an error.

    Raises:
      ValueError: if the file holds something else, with the number of the line.
      OSError: if it cannot be read.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    records: list[Record] = []
    about = About()
    good_bytes = 0
    for number, line in enumerate(lines, 1):
        try:
            record = decode(line)
            about = _pop_about(record, about)
        except (ValueError, TypeError, RecursionError) as error:
            is_begun = line.startswith(_FIRST_BYTES) and not line.endswith(b"\n")
            if number == len(lines) and (records or is_begun):
                return Contents(records, about, good_bytes, is_torn=True, ends_line=True)
            raise ValueError(
                f"{path} is no history, or a damaged one: line {number} is not a record "
                f"({error}). og.History writes one JSON object a line, each with a step."
            ) from error
        good_bytes += len(line)
        if record.pop(RESUMED, False):
            records = [earlier for earlier in records if earlier[STEP] < record[STEP]]
        records.append(record)
    ends_line = not lines or lines[-1].endswith(b"\n")
    return Contents(records, about, good_bytes, is_torn=False, ends_line=ends_line)


def _about_fields(about: About) -> Record:
    rest = {key: value for key, value in about._asdict().items() if value and key != LEAF_NAMES}
    names = {LEAF_NAMES: list(about.leaf_names)} if about.leaf_names else {}
    return names | ({ABOUT: rest} if rest else {})


def _pop_about(record: Record, before: About) -> About:
    names, rest = record.pop(LEAF_NAMES, None), record.pop(ABOUT, None)
    if names is None and rest is None:
        return before
    found = {key: value for key, value in (rest or {}).items() if key in About._fields}
    conditions, scopes = found.pop("conditions", {}), found.pop("scopes", {})
    return About()._replace(
        leaf_names=tuple(names or ()),
        conditions={place: tuple(value) for place, value in conditions.items()},
        scopes=dict(scopes),
        **{key: tuple(value) for key, value in found.items()},
    )


class LineWriter:
    """Appends records to a file, each of them flushed to the operating system."""

    def __init__(self, path: Path):
        """Opens the file at once, so that a bad path is noticed before the training."""
        self._is_resumed = path.exists() and path.stat().st_size > 0
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = read(path) if self._is_resumed else None
        self._file = path.open("ab")
        if contents is not None:
            self._file.truncate(contents.good_bytes)
            if not contents.ends_line:
                self._write(b"\n")
        self.about = contents.about if contents else About()

    def append(self, record: Record, about: About) -> None:
        """Writes a line; names are written with the first one, and again when they change."""
        extra: Record = {RESUMED: True} if self._is_resumed else {}
        if about is not self.about and about != self.about:
            extra |= _about_fields(about)
        self.about = about
        self._is_resumed = False
        self._write(encode(record | extra).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


def write_all(path: Path, records: list[Record], about: About) -> None:
    """Writes a whole file, which replaces ``path`` only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            for number, record in enumerate(records):
                extra = _about_fields(about) if number == 0 else {}
                file.write(encode(record | extra).encode() + b"\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
