"""What the benchmarks have written: their JSON files, the newest of each figure, and its origin."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Record(NamedTuple):
    """One file."""

    name: str
    data: dict[str, Any]

    @property
    def version(self) -> str:
        """Of this library."""
        return self.data.get("versions", {}).get("optax_guard", "?")

    @property
    def platform(self) -> str:
        """Such as cpu."""
        device = self.data.get("device", "cpu")
        return device.get("platform", "cpu") if isinstance(device, dict) else device

    @property
    def age(self) -> tuple[list[int], str, str]:
        """Sorts files, the newest last."""
        numbers = [int(part) for part in self.version.split(".") if part.isdigit()]
        return numbers, self.data.get("date", ""), self.name


def load(path: Path) -> Record:
    return Record(path.name, json.loads(path.read_text(encoding="utf-8")))


def is_of_kind(path: Path, prefix: str) -> bool:
    """Such as ``prefix.json`` and ``prefix_cpu.json``."""
    return path.stem == prefix or path.stem.startswith(f"{prefix}_")


def records(folder: Path, prefix: str) -> list[Record]:
    """The files of one kind, the newest last."""
    found = [load(path) for path in folder.glob("*.json") if is_of_kind(path, prefix)]
    return sorted(found, key=lambda record: record.age)


def rows(
    found: Iterable[Record],
    names: Sequence[str],
    *,
    part: str = "rows",
    tidy: Callable[[Row], Row] = dict,
) -> list[Row]:
    """The rows of all files; of several that agree in ``names`` the newest, in the first's place.

    ``tidy`` is applied to each before they are compared.
    """
    newest: dict[tuple[Any, ...], Row] = {}
    for record in found:
        if part not in record.data:
            raise ValueError(
                f"{record.name} has no list under {part!r}; write it anew with the command in the "
                "header of its script."
            )
        common = {"version": record.version, "arguments": record.data.get("arguments", {})}
        for row in record.data[part]:
            row = tidy({**common, **row})
            newest[tuple(row.get(name) for name in names)] = row
    return list(newest.values())


def origin(found: Sequence[Record]) -> str:
    """Where the figures of a section come from, in words."""
    names: dict[str, list[str]] = {}
    for record in found:
        names.setdefault(", ".join(_details(record)), []).append(f"`{record.name}`")
    described = [f"{', '.join(own)} ({details})" for details, own in names.items()]
    return f"From {'; '.join(described)}."


def _details(record: Record) -> list[str]:
    versions, device = record.data.get("versions", {}), record.data.get("device", {})
    details = [f"version {record.version}"]
    details += [f"{name} {versions[name]}" for name in ("jax", "optax") if name in versions]
    if isinstance(device, dict) and device:
        details.append(f"{device.get('kind', '')}, {device.get('host_cores', '?')} cores")
    if "date" in record.data:
        details.append(record.data["date"])
    return details
